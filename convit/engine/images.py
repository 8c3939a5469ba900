"""Image files: which there are, and how one is read, everywhere in the same way. Imports no framework."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from convit.engine.recipe import Recipe
from convit.weights.files import check_regular

# what Pillow opens only with a program or library of its own, or what holds no picture
_OTHERS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


class BadImage(NamedTuple):
    """An image that could not be read."""

    name: str
    reason: str


@cache
def image_suffixes() -> frozenset[str]:
    """Of the formats that Pillow reads, in lower case, with the dot."""
    known = Image.registered_extensions().items()
    return frozenset(suffix.lower() for suffix, kind in known if kind in Image.OPEN and kind not in _OTHERS)


def read_image(file: str | os.PathLike[str] | BinaryIO, channels: int = 3, formats: list[str] | None = None) -> Image.Image:
    """Read an image in full: upright as its EXIF orientation says, 8 bit, "L" for one channel and "RGB" for more.

    16-bit grey is scaled to 8 bit; palettes and CMYK become colours; transparency is dropped, as timm and torchvision do.

    Args:
        file: A path, or an open file.
        channels: 1 for grey, else colour.
        formats: Those of Pillow that are tried; default all.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no image, is damaged, or its values have no stated range.
    """
    try:
        if isinstance(file, (str, os.PathLike)):
            check_regular(file)
        with Image.open(file, formats=formats) as opened:
            image: Image.Image = opened
            image.load()
            with suppress(Exception):  # orientation that cannot be read is none
                image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                image = _from_16_bit(image)
            if image.mode == "P":
                image = image.convert("RGBA")  # a palette may be transparent
            return image.convert("L" if channels == 1 else "RGB")
    except FileNotFoundError:
        raise
    except Exception as error:  # the many ways in which Pillow and its libraries refuse a file
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{image.mode} pixels from {values.min()} to {values.max()}: expected 8 or 16 bit")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def read_named(path: str | os.PathLike[str], channels: int = 3) -> Image.Image:
    """``read_image`` of a file, which its message names.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no image.
    """
    try:
        return read_image(path, channels)
    except ValueError as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error


def find_images(places: list[str]) -> list[Path]:
    """The files in ``places``, and the images in the folders among them, in order of name; links to folders are followed."""
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            inside = sorted(images_below(place))
            if not inside:
                raise FileNotFoundError(f"no image in the folder {place}")
            found += inside
        elif place.exists():
            found.append(place)
        else:
            raise FileNotFoundError(f"no such image: {place}")
    return found


def images_below(folder: Path) -> Iterator[Path]:
    """The image files in ``folder`` and below; hidden ones are left out, and links to folders followed, each folder once."""
    seen = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        about = os.stat(at)
        if (about.st_dev, about.st_ino) in seen:  # a link to where we have been
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in image_suffixes():
                yield Path(at, name)


def need_weights(recipe: Recipe) -> None:
    """Raise ``ValueError`` for a recipe without weights to infer with."""
    if not recipe.ckpt_path and not recipe.pretrained:
        raise ValueError("infer needs weights: --ckpt_path FILE, or --pretrained for the published ones")


def classify(
    paths: list[Path], channels: int, predict: Callable[[Image.Image], np.ndarray], names: list[str], topk: int, progress: bool
) -> Iterator[dict[str, Any]]:
    """Yield, per image, {image, classes: [{index, name, probability}, ...]} or {image, error}.

    Args:
        paths: The files.
        channels: Of the model.
        predict: From an image to the probabilities [classes].
        names: Of the classes.
        topk: How many of them to give, the most probable ones.
        progress: Show a bar on stderr.
    """
    if progress:
        from rich.console import Console
        from rich.progress import track

        paths = track(paths, "inferring", console=Console(stderr=True))  # type: ignore[assignment]
    for path in paths:
        try:
            image = read_image(path, channels)
        except (OSError, ValueError) as error:
            yield {"image": str(path), "error": str(error)}
            continue
        probabilities = predict(image)
        top = np.argsort(-probabilities, kind="stable")[:topk]
        rows = [{"index": int(i), "name": names[i], "probability": float(probabilities[i])} for i in top]
        yield {"image": str(path), "classes": rows}
