"""Classify image files in MindSpore; the same results as ``convit.engine.pytorch.infer``."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from mindspore import Tensor
from PIL import Image

from convit.engine.images import classify, find_images, need_weights
from convit.engine.mindspore.build import build_model, check_recipe, own_generators, start
from convit.engine.mindspore.checkpoint import facts_of
from convit.engine.mindspore.data import eval_transforms, transformed
from convit.engine.recipe import Recipe
from convit.engine.trained import class_names, recorded_classes


def infer(recipe: Recipe, images: list[str], topk: int, progress: bool = False) -> Iterator[dict[str, Any]]:
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
    recorded = recorded_classes(recipe.ckpt_path, facts_of, described=True)
    num_classes = recipe.num_classes or len(recorded) or 1000
    with own_generators():
        model = build_model(recipe, num_classes).set_train(False)
    transforms = eval_transforms(recipe)

    def predict(image: Image.Image) -> np.ndarray:
        logits = model(Tensor(transformed(image, transforms)[None])).asnumpy()[0].astype(np.float64)
        exponentials = np.exp(logits - logits.max())
        return np.asarray(exponentials / exponentials.sum())

    return classify(paths, recipe.in_channels, predict, class_names(recorded, num_classes), topk, progress)
