"""Classify image files in PyTorch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from convit.engine.images import find_images, imagenet_names, need_weights, shown
from convit.engine.pytorch.data import BadImage, eval_transform, read_image
from convit.engine.pytorch.distributed import World, choose_device
from convit.engine.recipe import Recipe


class _Files:
    """Image files as a source that ``read_image`` takes."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def open(self, index: int) -> Any:
        return open(self.paths[index], "rb")


def infer(recipe: Recipe, images: list[str], topk: int = 5, progress: bool = False) -> Iterator[dict[str, Any]]:
    """Yield, per image, {image, classes: [{index, name, probability}, ...]} or {image, error}.

    Raises:
        ValueError: Neither a checkpoint nor published weights are chosen, or they do not fit the model.
        FileNotFoundError: An image or folder does not exist.
    """
    from convit.engine.pytorch.train import build_model

    need_weights(recipe)
    paths = find_images(images)
    num_classes = recipe.num_classes or 1000
    device = choose_device(recipe.device, World())
    model = build_model(recipe, num_classes).to(device).eval()
    names = class_names(recipe.ckpt_path, num_classes)
    transform, source = eval_transform(recipe), _Files(paths)
    mode = "L" if recipe.in_channels == 1 else "RGB"

    def results() -> Iterator[dict[str, Any]]:
        for index in range(len(paths)):
            image = read_image(source, index, mode)
            if isinstance(image, BadImage):
                yield {"image": image.name, "error": image.reason}
                continue
            with torch.inference_mode():
                probabilities = model(transform(image)[None].to(device))[0].float().softmax(dim=0).cpu()
            top = probabilities.topk(min(topk, num_classes))
            rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            yield {"image": source.name(index), "classes": [{"index": i, "name": names[i], "probability": p} for i, p in rows]}

    return shown(results(), len(paths)) if progress else results()


def class_names(ckpt_path: str, num_classes: int) -> list[str]:
    """Names of the classes: those in the checkpoint, ImageNet's for a head of 1000, else their numbers."""
    if ckpt_path:
        try:
            state = torch.load(ckpt_path, map_location="cpu", weights_only=True)
            names = state.get("classes", []) if isinstance(state, dict) else []
        except Exception:  # another format carries no names; load_checkpoint has read the weights already
            names = []
        if len(names) == num_classes:
            return names
    return imagenet_names() if num_classes == 1000 else [str(i) for i in range(num_classes)]
