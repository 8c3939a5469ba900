"""The one check of every exported file: it runs in its runtime on real images, equals the eager model, and only then appears."""

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convit.engine.images import read_named
from convit.engine.preparation import Preparation

TOLERANCE = 1e-5  # of the largest logit
OPSETS = (18, 23)  # what torch's exporter writes and ONNX Runtime reads

Infer = Callable[[np.ndarray], Any]  # images to logits


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


class Options(NamedTuple):
    """What the writers of PyTorch's formats have to know beside the model."""

    dynamic_size: bool
    patch_size: tuple[int, int]
    opset: int
    facts: dict[str, str]


class Report(NamedTuple):
    """What a successful export found: files, largest difference of logits (share of the largest logit), batches and sizes checked.

    With ``int8`` these are of the float file that the int8 one was made from, and ``int8`` says what was measured of that.
    """

    files: list[Path]
    difference: float
    batches: list[int]
    sizes: list[tuple[int, int]]
    int8: Any = None


def check_request(name: str, path: Path | None = None, opset: int = OPSETS[0], dynamic_size: bool = False) -> Format:
    """The format called ``name``, if it can be written to ``path`` with these options.

    Raises:
        ValueError: Unknown format, a file name of another format, an opset out of range, or a dynamic size where there is none.
        ImportError: A package of the format is not installed.
    """
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    form = FORMATS[name]
    if path is not None and path.suffix != form.suffix:
        raise ValueError(f"{name} files end in {form.suffix}, got {path.name!r}")
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise ValueError(f"opset must be in {OPSETS[0]}..{OPSETS[1]}, got {opset}")
    if name == "mindir" and dynamic_size:
        raise ValueError("mindir files have a fixed image size: make one per size with --image_resize")
    for package in form.needs:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f"--format {name} needs {package} ({error}): pip install '.[{form.extra}]' in the source folder") from error
    return form


def facts_of(preparation: Preparation, classes: Sequence[str]) -> dict[str, str]:
    """What a server needs beside the model, each as JSON: how to prepare an image and what the classes are called."""
    asked = preparation._asdict() | {"classes": list(classes)}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in asked.items()}


def check_images(files: Sequence[str | os.PathLike[str]] | None, preparation: Preparation) -> np.ndarray:
    """Image files as a batch [n, channels, height, width] float32, at least two images: a single one comes with its mirror image.

    Raises:
        ImportError: No files are given and scikit-learn is not installed.
        ValueError: A file is no image, or there are none.
    """
    if files is None:
        try:
            import sklearn.datasets
        except ImportError:
            raise ImportError("to check the export, pass images with --images, or install scikit-learn for its photographs") from None
        folder = Path(sklearn.datasets.__file__).parent / "images"
        files = [folder / "china.jpg", folder / "flower.jpg"]
    if not files:
        raise ValueError("images must name at least one image file, or be None for the photographs in scikit-learn")
    images = [preparation(read_named(file, len(preparation.mean))) for file in files]
    if len(images) == 1:
        images.append(np.ascontiguousarray(images[0][:, :, ::-1]))
    return np.stack(images)


def write_checked(
    path: Path,
    name: str,
    write: Callable[[Path], Infer],
    eager: Infer,
    batches: Sequence[np.ndarray],
    quantise: Callable[[Path], Any] | None = None,
) -> Report:
    """Write a file of the format ``name``, run it, and move it to ``path`` if it equals the eager model.

    Args:
        path: The file; an existing one is replaced.
        name: One of ``FORMATS``.
        write: Writes the file it is given, with its data beside it, and returns the function that runs it in its runtime.
        eager: The model: a batch of images to logits.
        batches: Normalised images [n, channels, height, width], one batch per size; checked whole and by the first image.
        quantise: Puts another file in the place of the checked one, and returns what it found.

    Raises:
        ValueError: The logits differ; what was at ``path`` is as it was.
    """
    with _folder(path.parent), tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        made = Path(folder) / path.name
        infer = write(made)
        difference, counts = 0.0, sorted({1, len(batches[0])})
        for batch in batches:
            expected = np.asarray(eager(batch))
            for count in counts:
                difference = max(difference, _difference(np.asarray(infer(batch[:count])), expected[:count]))
        if not difference <= TOLERANCE:
            raise ValueError(f"the {name} file differs from the eager model by {difference:.1e} of the largest logit; nothing is written")
        int8 = quantise(made) if quantise else None
        files = [file for file in made.parent.iterdir() if file != made] + [made]
        for file in files:  # the named one last: its data is there when it appears
            os.replace(file, path.with_name(file.name))
        sizes = [(int(batch.shape[2]), int(batch.shape[3])) for batch in batches]
        return Report([path.with_name(file.name) for file in reversed(files)], difference, counts, sizes, int8)


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """The folder ``path``; what of it has to be made goes again with a failure."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for each in missing:
            with suppress(OSError):  # something else is in it by now
                each.rmdir()
        raise


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference as a share of the largest value; infinite for another shape or what is no number."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / np.abs(expected).max())
