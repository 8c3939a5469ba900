"""The formats that PyTorch itself runs: ``torch.export`` programs and TorchScript."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convit.export.check import Infer, Options

FACTS = "convit.json"  # the extra file with what a server needs


def _json(options: Options) -> str:
    return json.dumps({name: json.loads(value) for name, value in options.facts.items()}, ensure_ascii=False)


def exported_program(deployed: nn.Module, batch: Tensor, options: Options) -> torch.export.ExportedProgram:
    """The deployed form as a program with a dynamic batch and, where asked, a dynamic size."""
    from torch.export import Dim

    shapes: dict[int, Any] = {0: Dim("batch", max=65536)}
    if options.dynamic_size:
        height, width = options.patch_size
        if batch.shape[2] < 2 * height or batch.shape[3] < 2 * width:
            size = f"{batch.shape[2]} x {batch.shape[3]}, patches of {height} x {width}"
            raise ValueError(
                "dynamic_size in this format starts from two rows and two columns of patches, which torch.export can vary; the model's "
                f"size is {size}: set_input_size first, or export without dynamic_size"
            )
        shapes |= {2: height * Dim("grid_h", min=2, max=1024), 3: width * Dim("grid_w", min=2, max=1024)}
    with torch.no_grad():
        return torch.export.export(deployed, (batch,), dynamic_shapes=(shapes,))


def write_torch_export(deployed: nn.Module, batch: Tensor, path: Path, options: Options) -> Infer:
    torch.export.save(exported_program(deployed, batch, options), path, extra_files={FACTS: _json(options)})
    module = torch.export.load(path).module()

    def infer(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits: Tensor = module(torch.from_numpy(images))
        return logits.numpy()

    return infer


def write_torchscript(deployed: nn.Module, batch: Tensor, path: Path, options: Options) -> Infer:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracer warnings about sizes that the check covers, and the notice that TorchScript is old
        traced = torch.jit.trace(deployed, (batch,), check_trace=False)
        torch.jit.save(torch.jit.freeze(traced), str(path), _extra_files={FACTS: _json(options)})
        module = torch.jit.load(str(path))

    def infer(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits: Tensor = module(torch.from_numpy(images))
        return logits.numpy()

    return infer
