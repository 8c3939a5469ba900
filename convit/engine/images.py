"""What the engines share in classifying image files. Imports no framework."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convit.engine.recipe import Recipe

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff")


def need_weights(recipe: Recipe) -> None:
    """Raise ``ValueError`` for a recipe without weights to infer with."""
    if not recipe.ckpt_path and not recipe.pretrained:
        raise ValueError("infer needs weights: --ckpt_path FILE, or --pretrained for the published ones")


def find_images(places: list[str]) -> list[Path]:
    """The files in ``places``, and the images in the folders among them, in order of name."""
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            inside = sorted(path for path in place.rglob("*") if path.suffix[1:].lower() in IMAGE_SUFFIXES)
            if not inside:
                raise FileNotFoundError(f"no image in the folder {place}")
            found += inside
        elif place.exists():
            found.append(place)
        else:
            raise FileNotFoundError(f"no such image: {place}")
    return found


def imagenet_names() -> list[str]:
    """Descriptions of ImageNet-1K's classes; their numbers without timm, which knows them."""
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return [str(i) for i in range(1000)]
    info = ImageNetInfo()
    return [info.index_to_description(i) for i in range(1000)]


def shown(results: Iterator[Any], total: int) -> Iterator[Any]:
    """``results``, with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import track

    return iter(track(results, "inferring", total=total, console=Console(stderr=True)))
