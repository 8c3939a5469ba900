"""Classify image files in PyTorch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from convit.engine.images import classify, find_images, need_weights
from convit.engine.pytorch.build import build_model, fastest
from convit.engine.pytorch.checkpoint import facts_of
from convit.engine.pytorch.data import eval_transform
from convit.engine.pytorch.distributed import choose_device
from convit.engine.recipe import Recipe
from convit.engine.trained import class_names, recorded_classes
from convit.engine.world import World


def infer(recipe: Recipe, images: list[str], topk: int, progress: bool = False, precision: str = "auto") -> Iterator[dict[str, Any]]:
    """Yield, per image, {image, classes: [{index, name, probability}, ...]} or {image, error}; ``precision`` as in ``build.fastest``.

    Raises:
        ValueError: Neither a checkpoint nor published weights are chosen, or they do not fit the model.
        FileNotFoundError: An image or folder does not exist.
    """
    need_weights(recipe)
    paths = find_images(images)
    recorded = recorded_classes(recipe.ckpt_path, facts_of, described=True)
    num_classes = recipe.num_classes or len(recorded) or 1000
    device = choose_device(recipe.device, World())
    model = fastest(build_model(recipe, num_classes).to(device).eval(), recipe, device, precision)
    transform = eval_transform(recipe)

    def predict(image: Image.Image) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(model(transform(image)[None].to(device))[0].float().softmax(dim=0).cpu())

    return classify(paths, recipe.in_channels, predict, class_names(recorded, num_classes), topk, progress)
