"""``convit export``: a model for another runtime, checked against the eager model before it appears.

| format       | file              | runs in                | batch   | image size            |
|--------------|-------------------|------------------------|---------|-----------------------|
| onnx         | .onnx             | ONNX Runtime and others| dynamic | fixed, or --dynamic-size |
| openvino     | .xml and .bin     | OpenVINO               | dynamic | fixed, or --dynamic-size |
| torch-export | .pt2              | torch.export.load      | dynamic | fixed, or --dynamic-size |
| torchscript  | .pt               | torch.jit.load, libtorch| dynamic | fixed, or --dynamic-size |
| mindir       | .mindir           | MindSpore              | dynamic | fixed                 |

Real images run through the exported file in its runtime, one by one and as a batch, and the logits must equal the eager model's to
1e-5 of the largest. Only then is the file moved to its place: a failed export leaves nothing behind.
"""

import argparse
import copy
import importlib
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TOLERANCE = 1e-5  # of the largest logit
OPSETS = (18, 23)  # what torch's exporter writes and ONNX Runtime reads


class Format(NamedTuple):
    """One format: the suffix of its file, the packages it needs, and the extra that brings them."""

    suffix: str
    needs: tuple[str, ...]
    extra: str


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), "export"),
    "openvino": Format(".xml", ("onnx", "onnxscript", "openvino"), "export"),
    "torch-export": Format(".pt2", (), ""),
    "torchscript": Format(".pt", (), ""),
    "mindir": Format(".mindir", ("mindspore",), "mindspore"),
}


class Report(NamedTuple):
    """What a successful export found: files, largest difference of logits (share of the largest logit), batches and sizes checked."""

    files: list[Path]
    difference: float
    batches: list[int]
    sizes: list[tuple[int, int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "The file is checked in its runtime on real images before it is written; a failed export leaves no file."
    parser.add_argument("model", metavar="MODEL", help="a variant (convit_tiny) or the folder of a PyTorch training run")
    parser.add_argument("--format", required=True, help=", ".join(FORMATS))
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="the file to write [MODEL with the suffix of the format]")
    parser.add_argument("--checkpoint", metavar="FILE", type=Path, help="weights: timm or FAIR .pth, .safetensors, MindCV .ckpt")
    parser.add_argument("--pretrained", action="store_true", help="published ImageNet-1K weights")
    parser.add_argument("--img-size", metavar="H[,W]", type=_size, help="image size the file is made for [the model's]")
    parser.add_argument("--num-classes", type=int, help="classes of the checkpoint [1000]")
    parser.add_argument("--dynamic-size", action="store_true", help="take images of any multiple of the patch size")
    parser.add_argument("--opset", type=int, default=18, help=f"ONNX opset, {OPSETS[0]} to {OPSETS[1]} [18]")
    parser.add_argument("--images", metavar="FILE", type=Path, nargs="+", help="images to check with [the photographs in scikit-learn]")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def run(args: argparse.Namespace) -> None:
    form = _format(args.format, args.opset, args.dynamic_size)
    output = args.output or Path(Path(args.model).name + form.suffix)
    if output.exists() and not args.force:
        raise ValueError(f"{output} exists; --force replaces it")
    if args.format == "mindir":
        if Path(args.model).is_dir():
            raise ValueError("mindir needs a variant's name and --checkpoint, got a run folder")
        from convit.export.mindir import export_mindir

        given = {"img_size": args.img_size, "num_classes": args.num_classes}
        report = export_mindir(args.model, output, weights=args.checkpoint or args.pretrained, images=args.images, **given)
    else:
        model, mean, std = _model(args)
        options = {"images": args.images, "mean": mean, "std": std, "dynamic_size": args.dynamic_size, "opset": args.opset}
        report = export(model, output, args.format, **options)
    sizes = " and ".join(f"{h} x {w}" for h, w in report.sizes)
    megabytes = sum(file.stat().st_size for file in report.files) / 1e6
    print(
        f"{', '.join(map(str, report.files))}: {megabytes:.1f} MB\n"
        f"checked in its runtime, batch {' and '.join(map(str, report.batches))}, {sizes}: "
        f"largest difference to the eager model {report.difference:.1e} of the largest logit"
    )


def export(
    model: Any,
    path: str | os.PathLike[str],
    format: str,
    *,
    images: Sequence[str | os.PathLike[str]] | None = None,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    dynamic_size: bool = False,
    opset: int = 18,
) -> Report:
    """Export a PyTorch ConViT, checked in the runtime of the format.

    Args:
        model: A ``convit.ConViT``; exported in float32 and evaluation mode, left as it is.
        path: The file; an existing one is replaced.
        format: "onnx", "openvino", "torch-export" or "torchscript" (for "mindir" see ``convit.export.mindir``).
        images: Image files to check with; default the two photographs in scikit-learn.
        mean, std: Normalisation of the images, per channel; recorded in ONNX files.
        dynamic_size: Take images of any multiple of the patch size.
        opset: Of ONNX.

    Raises:
        ValueError: Unknown format, opset out of range, an image cannot be read, or the file's logits differ from the model's.
        ImportError: A package of the format is not installed.
    """
    import torch

    from convit.dispatch import use_backend
    from convit.export.deploy import Deployed
    from convit.pytorch.model import ConViT

    form = _format(format, opset, dynamic_size)
    if format == "mindir":
        raise ValueError("mindir is exported from MindSpore: use convit.export.mindir.export_mindir")
    if not isinstance(model, ConViT):
        raise ValueError(f"model must be a convit.ConViT, got {type(model).__name__}; load its checkpoint into convit.create_model(...)")
    size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
    sizes = [size] + ([(size[0] + patch[0], size[1] + 2 * patch[1])] if dynamic_size else [])
    batches = [torch.from_numpy(check_images(images, each, model.in_chans, mean, std)) for each in sizes]
    deployed = Deployed(model, dynamic_size=dynamic_size, fused=format in ("torch-export", "torchscript"))

    def eager(batch: torch.Tensor) -> np.ndarray:
        twin = copy.deepcopy(model).float().cpu().eval()
        twin.patch_embed.dynamic = True
        with torch.no_grad(), use_backend("reference"):
            return twin(batch).numpy()

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        made = Path(folder) / path.name
        meta = {"mean": str(list(mean)), "std": str(list(std)), "img_size": str(list(size)), "model": "ConViT"}
        infer = _WRITERS[format](deployed.cpu(), batches[0], made, dynamic_size, patch, opset, meta)
        difference, counts = 0.0, sorted({1, len(batches[0])})
        for batch in batches:
            expected = eager(batch)
            for count in counts:
                found = np.asarray(infer(batch[:count].numpy()))
                difference = max(difference, difference_of(found, expected[:count]))
        if not difference <= TOLERANCE:
            raise ValueError(f"the {format} file differs from the eager model by {difference:.1e} of the largest logit; nothing is written")
        return Report(place(made, path, form), difference, counts, [(int(h), int(w)) for h, w in sizes])


def difference_of(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference as a share of the largest value; infinite for another shape or what is no number."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def place(made: Path, path: Path, form: Format) -> list[Path]:
    """Move the finished files (and their data beside them) from the temporary folder to their place; the named one last."""
    files = [file for file in made.parent.iterdir() if file != made] + [made]
    if form.suffix == ".xml" and path.suffix != ".xml":
        raise ValueError(f"OpenVINO files end in .xml, got {path.name!r}")
    for file in files:
        os.replace(file, path.with_name(file.name))
    return [path.with_name(file.name) for file in reversed(files)]


def check_images(
    files: Sequence[str | os.PathLike[str]] | None, size: tuple[int, int], channels: int, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """Image files as a normalised batch [n, channels, *size] float32, at least two images: a single one comes with its mirror image.

    Raises:
        ImportError: No files are given and scikit-learn is not installed.
        ValueError: A file is no image.
    """
    from convit.figures import load_array

    if files is None:
        try:
            import sklearn.datasets
        except ImportError:
            raise ImportError("to check the export, pass images with --images, or install scikit-learn for its photographs") from None
        folder = Path(sklearn.datasets.__file__).parent / "images"
        files = [folder / "china.jpg", folder / "flower.jpg"]
    if len(mean) != channels:
        mean, std = [float(np.mean(mean))] * channels, [float(np.mean(std))] * channels
    images = [load_array(file, size, channels, mean, std) for file in files]
    if len(images) == 1:
        images.append(np.ascontiguousarray(images[0][:, :, ::-1]))
    return np.stack(images)


def _format(name: str, opset: int, dynamic_size: bool) -> Format:
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise ValueError(f"opset must be in {OPSETS[0]}..{OPSETS[1]}, got {opset}")
    if name == "mindir" and dynamic_size:
        raise ValueError("mindir files have a fixed image size: make one per size with --img-size")
    form = FORMATS[name]
    for package in form.needs:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f"--format {name} needs {package} ({error}): pip install 'convit[{form.extra}]'") from error
    return form


def _model(args: argparse.Namespace) -> tuple[Any, Sequence[float], Sequence[float]]:
    import convit

    if Path(args.model).is_dir():
        if args.checkpoint or args.pretrained or args.num_classes is not None:
            raise ValueError("a run folder has its own weights: leave out --checkpoint, --pretrained and --num-classes")
        from convit.figures import trained_model

        model, recipe = trained_model(Path(args.model))
        if args.img_size:
            model.set_input_size(args.img_size)
        return model, recipe.mean, recipe.std
    if args.checkpoint and args.pretrained:
        raise ValueError("choose --checkpoint or --pretrained")
    given = {} if args.num_classes is None else {"num_classes": args.num_classes}
    given |= {} if args.img_size is None else {"img_size": args.img_size}
    model = convit.create_model(args.model, pretrained=args.pretrained, **given)
    if args.checkpoint:
        convit.load_checkpoint(model, args.checkpoint)
    elif not args.pretrained:
        print("convit export: neither --checkpoint nor --pretrained: the weights are the initial ones")
    return model, model.pretrained_cfg["mean"], model.pretrained_cfg["std"]


def _size(text: str) -> tuple[int, int]:
    try:
        height, _, width = text.partition(",")
        return int(height), int(width or height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected H or H,W, got {text!r}") from None


# writers: write `path`, return a function from images to logits that runs the file in its runtime

Infer = Callable[[np.ndarray], Any]


def _dynamic_shapes(dynamic_size: bool, patch: tuple[int, int]) -> tuple[dict[int, Any]]:
    from torch.export import Dim

    shapes: dict[int, Any] = {0: Dim("batch", max=65536)}
    if dynamic_size:
        shapes |= {2: patch[0] * Dim("grid_h", min=2, max=1024), 3: patch[1] * Dim("grid_w", min=2, max=1024)}
    return (shapes,)


def _exported(deployed: Any, batch: Any, dynamic_size: bool, patch: tuple[int, int]) -> Any:
    import torch

    with torch.no_grad():
        return torch.export.export(deployed, (batch,), dynamic_shapes=_dynamic_shapes(dynamic_size, patch))


def _write_torch_export(deployed: Any, batch: Any, path: Path, dynamic_size: bool, patch: tuple[int, int], *_: Any) -> Infer:
    import torch

    torch.export.save(_exported(deployed, batch, dynamic_size, patch), path)
    module = torch.export.load(path).module()
    return lambda images: module(torch.from_numpy(images)).detach().numpy()


def _write_torchscript(deployed: Any, batch: Any, path: Path, *_: Any) -> Infer:
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracer warnings about sizes that the check below covers, and the notice that TorchScript is old
        torch.jit.save(torch.jit.freeze(torch.jit.trace(deployed, (batch,), check_trace=False)), str(path))
        module = torch.jit.load(str(path))

    def infer(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    return infer


def _write_onnx(
    deployed: Any, batch: Any, path: Path, dynamic_size: bool, patch: tuple[int, int], opset: int, meta: dict[str, str], infer: bool = True
) -> Any:
    import logging

    import onnx
    import torch

    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = _exported(deployed, batch, dynamic_size, patch)
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        program = torch.onnx.export(exported, opset_version=opset, verbose=False, **names)
    made = program.model_proto  # type: ignore[union-attr]
    for node in made.graph.node:  # stack traces with this machine's paths: more bytes than a tiny model's weights
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    written = {entry.domain: entry.version for entry in made.opset_import}
    if written.get("", 0) != opset:
        raise ValueError(f"torch's exporter wrote opset {written.get('')} instead of {opset}")
    onnx.helper.set_model_props(made, meta)
    onnx.checker.check_model(made)
    onnx.save(made, path)
    if not infer:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def _write_openvino(deployed: Any, batch: Any, path: Path, *options: Any) -> Infer:
    import openvino

    with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix=".export-") as folder:
        _write_onnx(deployed, batch, Path(folder) / "model.onnx", *options, infer=False)  # type: ignore[misc]
        model = openvino.convert_model(Path(folder) / "model.onnx")
        openvino.save_model(model, path, compress_to_fp16=False)
        del model
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: compiled([images])[0]


_WRITERS: dict[str, Callable[..., Infer]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "torch-export": _write_torch_export,
    "torchscript": _write_torchscript,
}
