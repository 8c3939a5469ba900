"""Classify image files in MindSpore; the same results as ``convit.engine.pytorch.infer``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor
from mindspore.dataset.transforms import Compose
from PIL import Image

from convit.engine.images import find_images, imagenet_names, need_weights, shown
from convit.engine.mindspore.data import eval_transforms, normalisation
from convit.engine.mindspore.train import build_model, check_recipe, start
from convit.engine.recipe import Recipe


def infer(recipe: Recipe, images: list[str], topk: int = 5, progress: bool = False) -> Iterator[dict[str, Any]]:
    """Yield, per image, {image, classes: [{index, name, probability}, ...]} or {image, error}.

    Raises:
        ValueError: Neither a checkpoint nor published weights are chosen, or they do not fit the model.
        FileNotFoundError: An image or folder does not exist.
        ImportError: MindCV, whose evaluation transforms these are, is not installed.
    """
    need_weights(recipe)
    check_recipe(recipe)
    paths = find_images(images)
    start(recipe)
    num_classes = recipe.num_classes or 1000
    model = build_model(recipe, num_classes).set_train(False)
    names, prepare = class_names(recipe, num_classes), _preparation(recipe)

    def results() -> Iterator[dict[str, Any]]:
        for path in paths:
            try:
                image = prepare(path)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                yield {"image": str(path), "error": f"{type(error).__name__}: {error}"}
                continue
            logits = model(Tensor(image[None])).asnumpy()[0].astype(np.float64)
            exponentials = np.exp(logits - logits.max())
            top = np.argsort(-logits, kind="stable")[:topk]
            rows = [{"index": int(i), "name": names[i], "probability": float(exponentials[i] / exponentials.sum())} for i in top]
            yield {"image": str(path), "classes": rows}

    return shown(results(), len(paths)) if progress else results()


def _preparation(recipe: Recipe) -> Any:
    """A function from a file to what the model takes, [C, size, size] float32: as in validation, of images and of digits."""
    if recipe.in_channels == 1:
        size = (recipe.image_resize, recipe.image_resize)
        mean, std = (value[0] for value in normalisation(recipe))

        def grey(path: Path) -> np.ndarray:
            image = Image.open(path).convert("L").resize(size, Image.Resampling.BILINEAR)
            return ((np.asarray(image, np.float32)[None] - mean) / std).astype(np.float32)

        return grey
    transforms = Compose(eval_transforms(recipe)[1:])  # without the decoding: Pillow reads more, and says what it cannot read

    def colour(path: Path) -> np.ndarray:
        return np.asarray(transforms(np.asarray(Image.open(path).convert("RGB")))).reshape(3, recipe.image_resize, recipe.image_resize)

    return colour


def class_names(recipe: Recipe, num_classes: int) -> list[str]:
    """Names of the classes: the folders that the model was trained on if they are there, ImageNet's for a head of 1000, else numbers."""
    folder = Path(recipe.data_dir).expanduser() / recipe.train_split
    if recipe.data_dir and folder.is_dir():
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        if len(names) == num_classes:
            return names
    return imagenet_names() if num_classes == 1000 else [str(i) for i in range(num_classes)]
