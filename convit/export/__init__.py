"""Models for other runtimes, each file checked against the eager model before it appears.

| format       | file              | runs in                | batch   | image size               | made in            |
|--------------|-------------------|------------------------|---------|--------------------------|--------------------|
| onnx         | .onnx             | ONNX Runtime and others| dynamic | fixed, or dynamic_size   | ``onnx_openvino``  |
| openvino     | .xml and .bin     | OpenVINO               | dynamic | fixed, or dynamic_size   | ``onnx_openvino``  |
| torch-export | .pt2              | torch.export.load      | dynamic | fixed, or dynamic_size   | ``torch_program``  |
| torchscript  | .pt               | torch.jit.load, libtorch| dynamic | fixed, or dynamic_size  | ``torch_program``  |
| mindir       | .mindir           | MindSpore              | dynamic | fixed                    | ``mindir``         |

Real images run through the exported file in its runtime, one by one and as a batch, and the logits must equal the eager model's to
1e-5 of the largest (``check``). Only then is the file moved to its place: a failed export leaves nothing behind. ONNX and OpenVINO files
can be quantised after that (``int8``).
"""

import copy
import importlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convit.engine.preparation import Preparation
from convit.engine.trained import class_names
from convit.export.check import FORMATS, OPSETS, TOLERANCE, Options, Report, check_images, check_request, facts_of, write_checked
from convit.export.int8 import check_int8, quantise, read_images

__all__ = ["FORMATS", "OPSETS", "TOLERANCE", "Report", "export"]

_WRITERS = {
    "onnx": ("onnx_openvino", "write_onnx"),
    "openvino": ("onnx_openvino", "write_openvino"),
    "torch-export": ("torch_program", "write_torch_export"),
    "torchscript": ("torch_program", "write_torchscript"),
}


def export(
    model: Any,
    path: str | os.PathLike[str],
    format: str,
    *,
    images: Sequence[str | os.PathLike[str]] | None = None,
    classes: Sequence[str] | None = None,
    dynamic_size: bool = False,
    opset: int = OPSETS[0],
    int8_data: str | os.PathLike[str] | None = None,
) -> Report:
    """Export a PyTorch ConViT, checked in the runtime of the format.

    The file carries what a server needs, as JSON texts: ``size``, ``mean``, ``std``, ``crop_pct`` and ``interpolation``, from the model's
    ``pretrained_cfg``, and ``classes``. ONNX has them in its metadata, OpenVINO in ``rt_info`` under "convit", the two formats of PyTorch
    in the extra file ``convit.json``.

    Args:
        model: A ``convit.ConViT``; exported in float32 and evaluation mode, left as it is.
        path: The file, with the suffix of the format; an existing one is replaced.
        format: "onnx", "openvino", "torch-export" or "torchscript" (for "mindir" see ``convit.export.mindir``).
        images: Image files to check with; default the two photographs in scikit-learn.
        classes: Names of the outputs; default those that the model came with (``label_names`` in its ``pretrained_cfg``), else numbers.
        dynamic_size: Take images of any multiple of the patch size; with "torch-export", of at least two patches each way.
        opset: Of ONNX.
        int8_data: A folder of images to quantise the file with ("onnx" and "openvino"): ``convit.export.int8``.

    Raises:
        ValueError: Unknown format, another suffix, opset out of range, an image cannot be read, the model pads images of its size, or the
            file's logits differ; the int8 file is slower here than the float one, or another model.
        ImportError: A package of the format, or the quantiser, is not installed.
    """
    import torch

    from convit.dispatch import use_backend
    from convit.export.deploy import Deployed
    from convit.pytorch.model import ConViT

    path = Path(path)
    check_request(format, path, opset, dynamic_size)
    if format == "mindir":
        raise ValueError("mindir is exported from MindSpore: use convit.export.mindir.export_mindir")
    if not isinstance(model, ConViT):
        raise ValueError(f"model must be a convit.ConViT, got {type(model).__name__}; load its checkpoint into convit.create_model(...)")
    if int8_data is not None:
        check_int8(format, int8_data)
    size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
    if any(side % part for side, part in zip(size, patch, strict=True)):
        height, width = (-(-side // part) * part for side, part in zip(size, patch, strict=True))
        raise ValueError(
            f"exported files take images of whole patches of {patch[0]} x {patch[1]}, and the model pads its {size[0]} x {size[1]}: "
            f"set_input_size(({height}, {width})) first"
        )
    sizes = [size] + ([(size[0] + patch[0], size[1] + 2 * patch[1])] if dynamic_size else [])
    preparation = Preparation.of(model)
    names = list(classes or model.pretrained_cfg.get("label_names") or [])
    if classes is not None and len(names) != model.num_classes:
        raise ValueError(f"classes must name the {model.num_classes} outputs of the model, got {len(names)}")
    batches = [check_images(images, preparation._replace(size=(int(each[0]), int(each[1])))) for each in sizes]
    quantiser = None
    if int8_data is not None:
        calibrate, compare = read_images(int8_data, preparation)
        quantiser = partial(quantise, form=format, calibrate=calibrate, compare=compare)
    deployed = Deployed(model, dynamic_size=dynamic_size, fused=format in ("torch-export", "torchscript")).cpu()
    home, name = _WRITERS[format]
    writer = getattr(importlib.import_module(f"convit.export.{home}"), name)
    options = Options(dynamic_size, patch, opset, facts_of(preparation, class_names(names, model.num_classes)))

    def eager(batch: np.ndarray) -> np.ndarray:
        twin = copy.deepcopy(model).float().cpu().eval()
        twin.patch_embed.dynamic = True
        with torch.no_grad(), use_backend("reference"):
            logits: torch.Tensor = twin(torch.from_numpy(batch))
        return logits.numpy()

    return write_checked(
        path, format, lambda made: writer(deployed, torch.from_numpy(batches[0]), made, options), eager, batches, quantiser
    )
