"""What a model asks of an image, and an image made so, with NumPy and Pillow alone: bit for bit timm's evaluation transform."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from convit.architecture import IMAGENET_MEAN, IMAGENET_STD
from convit.engine.recipe import Recipe
from convit.weights.files import shown

if TYPE_CHECKING:  # a model is loaded where there is no Pillow
    from PIL import Image


# Pillow's numbers
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
_WHOLE = 1 << 24  # pixels of a resized image: beyond, only its crop is made: the same, but for Pillow's roundings between rows and columns


class Preparation(NamedTuple):
    """Resize until the smaller side is ``size / crop_pct``, crop the middle, normalise.

    Attributes:
        size: (height, width) of the model's input.
        mean, std: One value per channel, of pixels in 0 to 1.
        crop_pct: The share of the resized image that the crop keeps; above 1 it has a black margin.
        interpolation: A filter of Pillow's, such as "bilinear" or "bicubic".
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    @classmethod
    def of(cls, model: Any) -> "Preparation":
        """Of a PyTorch ConViT: its present image size, the rest from its ``pretrained_cfg``, as timm reads it; else ImageNet's."""
        return cls.of_config(getattr(model, "pretrained_cfg", None) or {}, model.patch_embed.img_size, model.in_chans)

    @classmethod
    def of_config(cls, config: Mapping[str, Any], size: tuple[int, int], channels: int) -> "Preparation":
        """Of timm's configuration. A mean and std of colour, given or ImageNet's, are averaged for another number of channels."""
        given: dict[str, Any] = {name: config[name] for name in ("crop_pct", "interpolation") if config.get(name) is not None}
        for name, low, high in (("crop_pct", 0.01, 2.0), ("mean", -1e6, 1e6), ("std", 1e-6, 1e6)):  # NaN is in no range
            values = config.get(name) or ()
            values = values if isinstance(values, (list, tuple)) else [values]
            if not all(isinstance(value, (int, float)) and low <= value <= high for value in values) or len(values) > 1000:
                raise ValueError(f"{name} must be from {low:g} to {high:g}, got {shown(config[name])}")
        if config.get("mean") and config.get("std"):
            given["mean"], given["std"] = unit_scale(config["mean"], config["std"])
        if config.get("crop_mode", "center") != "center":
            raise ValueError(f"crop_mode can only be 'center', got {config['crop_mode']!r}")
        made = cls((int(size[0]), int(size[1])), **given)
        if not isinstance(made.interpolation, str) or made.interpolation not in _FILTERS:
            raise ValueError(f"interpolation must be one of {', '.join(_FILTERS)}, got {made.interpolation!r}")
        if len(made.mean) == channels:
            return made
        return made._replace(mean=(float(np.mean(made.mean)),) * channels, std=(float(np.mean(made.std)),) * channels)

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> "Preparation":
        size = (recipe.image_resize, recipe.image_resize)
        interpolation = "bicubic" if recipe.interpolation == "random" else recipe.interpolation  # as the engines evaluate
        return cls(size, *unit_scale(recipe.mean, recipe.std), recipe.crop_pct, interpolation)

    def crop(self, image: "Image.Image") -> "Image.Image":
        """The part of an image that the model sees, in the model's size."""
        (height, width), (old_width, old_height) = self.size, image.size
        high, wide = math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)
        if high == wide:
            short, long = sorted((old_width, old_height))
            other = int(high * long / short)
            resized = (high, other) if old_width <= old_height else (other, high)
        else:
            ratio = min(old_height / high, old_width / wide)
            resized = (round(old_width / ratio), round(old_height / ratio))
        top, left = _margin(resized[1] - height), _margin(resized[0] - width)
        if resized[0] * resized[1] > _WHOLE:  # of a strip: resize no more of it than the crop takes
            x, y, right, bottom = max(left, 0), max(top, 0), min(left + width, resized[0]), min(top + height, resized[1])
            by_x, by_y = old_width / resized[0], old_height / resized[1]
            box = (x * by_x, y * by_y, min(right * by_x, old_width), min(bottom * by_y, old_height))
            image = image.resize((right - x, bottom - y), _FILTERS[self.interpolation], box)
            left, top = left - x, top - y
        elif resized != image.size:
            image = image.resize(resized, _FILTERS[self.interpolation])
        return image.crop((left, top, left + width, top + height))

    def __call__(self, image: "Image.Image") -> np.ndarray:
        """An image in mode "L" or "RGB" as the model's input: [channels, height, width] float32."""
        return self.normalise(self.crop(image))

    def normalise(self, crop: "Image.Image") -> np.ndarray:
        """What ``crop`` gave as the model's input."""
        array = np.asarray(crop, dtype=np.float32).reshape(*self.size, -1).transpose(2, 0, 1) / np.float32(255)
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        return np.ascontiguousarray((array - mean) / std)


def _margin(spare: int) -> int:
    """Where the middle begins; of a negative ``spare``, a margin, the larger half comes behind (torchvision's ``center_crop``)."""
    return round(spare / 2.0) if spare >= 0 else -(-spare // 2)


def full_scale(mean: Sequence[float], std: Sequence[float]) -> float:
    """The value of a white pixel that ``mean`` and ``std`` are meant for: 1, or 255 where one of them has a value above 1."""
    return 255.0 if max(*mean, *std) > 1 else 1.0


def unit_scale(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """``mean`` and ``std`` for pixels in 0 to 1; values above 1 are of 0 to 255, as MindCV writes them."""
    by = full_scale(mean, std)
    return tuple(float(value) / by for value in mean), tuple(float(value) / by for value in std)
