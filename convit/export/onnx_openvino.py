"""ONNX files, and OpenVINO's, which are made from them."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convit.engine.shown import quiet
from convit.export.check import Infer, Options
from convit.export.torch_program import exported_program


def write_onnx(deployed: nn.Module, batch: Tensor, path: Path, options: Options) -> Infer:
    import onnxruntime

    _save(deployed, batch, path, options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def write_openvino(deployed: nn.Module, batch: Tensor, path: Path, options: Options) -> Infer:
    import openvino

    with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix=".export-") as folder:
        _save(deployed, batch, Path(folder) / "model.onnx", options)
        model = openvino.convert_model(Path(folder) / "model.onnx")
        for name, value in options.facts.items():
            model.set_rt_info(value, ["convit", name])
        openvino.save_model(model, path, compress_to_fp16=False)
        del model
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def infer(images: np.ndarray) -> Any:
        return compiled([images])[0]

    return infer


def _save(deployed: nn.Module, batch: Tensor, path: Path, options: Options) -> None:
    import onnx

    with torch.no_grad(), warnings.catch_warnings(), quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")
        exported = exported_program(deployed, batch, options)
        program = torch.onnx.export(exported, opset_version=options.opset, verbose=False, input_names=["images"], output_names=["logits"])
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    made = program.model_proto
    for node in made.graph.node:  # stack traces with this machine's paths: more bytes than a tiny model's weights
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    _name_batch(made.graph)
    written = {entry.domain: entry.version for entry in made.opset_import}
    if written.get("", 0) != options.opset:
        raise ValueError(f"torch's exporter wrote opset {written.get('')} instead of {options.opset}")
    onnx.helper.set_model_props(made, options.facts)
    onnx.checker.check_model(made)
    onnx.save(made, path)


def _name_batch(graph: Any) -> None:
    """Call the first axis of the images "batch", here and wherever it comes back; the exporter calls it s77 or the like."""
    given = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == given:
                dim.dim_param = "batch"
