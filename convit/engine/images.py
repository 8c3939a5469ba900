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

# what Pillow opens only with a program or library of its own (Ghostscript would run a stranger's PostScript), or what holds no picture
_OTHERS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# an image with more pixels than the first, and more per byte of its file than the second, is no photograph but made to fill memory
_LARGE, _DENSE = 36_000_000, 200
_TO_8_BIT = ((np.arange(1 << 16, dtype=np.uint32) + 128) // 257).astype(np.uint8)


class BadImage(NamedTuple):
    """An image that could not be read."""

    name: str
    reason: str


@cache
def image_suffixes() -> frozenset[str]:
    """Of the formats that Pillow reads, in lower case, with the dot."""
    known = Image.registered_extensions().items()
    return frozenset(suffix.lower() for suffix, kind in known if kind in Image.OPEN and kind not in _OTHERS)


@cache
def _formats() -> tuple[str, ...]:
    image_suffixes()  # Pillow has registered all of its formats after it
    return tuple(kind for kind in Image.OPEN if kind not in _OTHERS)


def read_image(file: str | os.PathLike[str] | BinaryIO, channels: int = 3, formats: list[str] | None = None) -> Image.Image:
    """Read an image in full: upright as its EXIF orientation says, 8 bit, "L" for one channel and "RGB" for more.

    16-bit grey is scaled to 8 bit; palettes and CMYK become colours; transparency is dropped, as timm and torchvision do.

    Args:
        file: A path, or an open file.
        channels: 1 for grey, else colour.
        formats: Those of Pillow that are tried; default all that need no other program. The content decides, not the suffix.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no image, is damaged, has more pixels than a file of its length can hold of a photograph, or its values have no
            stated range.
    """
    try:
        if isinstance(file, (str, os.PathLike)):
            check_regular(file)
        with Image.open(file, formats=_formats() if formats is None else formats) as opened:
            image: Image.Image = opened
            pixels, length = image.width * image.height, _length(file)
            if pixels > max(_LARGE, _DENSE * length):
                raise ValueError(f"{length:,} bytes hold {pixels:,} pixels: a decompression bomb")
            if image.format == "TIFF" and image.mode == "I":
                raise ValueError("32-bit pixels have no stated range: expected 8 or 16 bit")
            image.load()
            with suppress(Exception):  # orientation that cannot be read is none
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                image = _from_16_bit(image)
            if image.mode == "P":
                image = image.convert("RGBA")  # a palette may be transparent
            mode = "L" if channels == 1 else "RGB"
            return image if image.mode == mode else image.convert(mode)
    except FileNotFoundError:
        raise
    except Exception as error:  # the many ways in which Pillow and its libraries refuse a file
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{image.mode} pixels from {values.min()} to {values.max()}: expected 8 or 16 bit")
    return Image.fromarray(_TO_8_BIT[values])


def _length(file: str | os.PathLike[str] | BinaryIO) -> int:
    if isinstance(file, (str, os.PathLike)):
        return os.stat(file).st_size
    at = file.tell()
    length = file.seek(0, os.SEEK_END)
    file.seek(at)
    return length


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
    """The image files in ``folder`` and below; hidden ones are left out, and links to folders followed, each folder once.

    Raises:
        OSError: A folder cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise error

    seen = set()
    for at, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
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
