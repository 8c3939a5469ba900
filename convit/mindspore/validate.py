"""Evaluation in MindSpore; the same results as ``convit.pytorch.validate``."""

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import mindspore as ms

from convit.config import Recipe, load_recipe
from convit.mindspore.train import build_model, check_recipe, evaluate, make_data, start


def saved_recipe(path: str) -> dict[str, Any] | None:
    """The recipe beside a checkpoint of a training run; ``None`` for any other file."""
    recipe = Path(path).with_name("recipe.yaml")
    if not re.fullmatch(r"(best|epoch_\d+)\.ckpt", Path(path).name) or not recipe.exists():
        return None
    return dataclasses.asdict(load_recipe(recipe))


def validate(recipe: Recipe, progress: bool = True) -> dict[str, Any]:
    """Measure the model and checkpoint of ``recipe`` on its validation split; result and errors as ``convit.pytorch.validate.validate``."""
    check_recipe(recipe)
    rank, size = start(recipe)
    batches, classes, _ = make_data(recipe, False, rank, size)
    model = build_model(recipe, recipe.num_classes or classes)
    if recipe.amp_level != "O0" and ms.get_context("device_target") != "CPU":
        model = ms.amp.auto_mixed_precision(model, recipe.amp_level)
    began = time.perf_counter()
    scores = evaluate(model, batches, size)
    return {
        "model": recipe.model,
        "checkpoint": recipe.ckpt_path or ("published" if recipe.pretrained else None),
        "samples": int(scores["samples"]),
        "top1": scores["top1"],
        "top5": scores["top5"],
        "loss": scores["loss"],
        "images_per_second": round(scores["samples"] / (time.perf_counter() - began), 2),
        "bad_images": [],
    }
