"""Evaluation in MindSpore; the same results as ``convit.engine.pytorch.validate``."""

import time
from collections.abc import Iterable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from convit.engine.mindspore.build import build_model, check_precision, check_recipe, own_generators, start
from convit.engine.mindspore.checkpoint import facts_of
from convit.engine.mindspore.data import EvalData
from convit.engine.recipe import Recipe
from convit.engine.trained import recorded_classes


def validate(recipe: Recipe, progress: bool = True) -> dict[str, Any]:
    """Measure the model and checkpoint of ``recipe`` on its validation split; result and errors as the PyTorch engine's."""
    check_recipe(recipe)
    world = start(recipe)
    classes = recorded_classes(recipe.ckpt_path, facts_of)
    num_classes = recipe.num_classes or len(classes) or None
    data = EvalData(recipe, world, classes, num_classes)
    with own_generators():
        model = build_model(recipe, num_classes or len(data.classes))
    level = recipe.val_amp_level or (recipe.amp_level if ms.get_context("device_target") != "CPU" else "O0")
    check_precision(level, None)
    if level != "O0":
        model = ms.amp.auto_mixed_precision(model, level)
    began = time.perf_counter()
    scores = evaluate(model, data, world.size)
    return {
        "model": recipe.model,
        "checkpoint": recipe.ckpt_path or ("published" if recipe.pretrained else None),
        "samples": int(scores["samples"]),
        "top1": scores["top1"],
        "top5": scores["top5"],
        "loss": scores["loss"],
        "images_per_second": round(scores["samples"] / (time.perf_counter() - began), 2),
        "bad_images": [image.name for image in data.bad],
    }


def evaluate(model: nn.Cell, batches: Iterable[tuple[Tensor, np.ndarray]], size: int) -> dict[str, float]:
    """samples, top1 and top5 (percent) and loss (mean cross entropy), in float64 over all processes."""
    model.set_train(False)
    sums = np.zeros(4)
    for images, labels in batches:
        logits = model(images).asnumpy().astype(np.float64)
        top = np.argsort(-logits, axis=1, kind="stable")[:, :5] == labels[:, None]
        shifted = logits - logits.max(axis=1, keepdims=True)
        loss = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
        sums += len(labels), top[:, 0].sum(), top.any(axis=1).sum(), loss.sum()
    count, top1, top5, loss_sum = total([float(value) for value in sums], size)
    if not count:
        raise ValueError("no validation image could be read")
    return {"samples": count, "top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss_sum / count}


def total(values: list[float], size: int) -> list[float]:
    """Sum each of ``values`` over the processes, in float32; the same on every process."""
    if size == 1:
        return values
    from mindcv.utils import AllReduceSum

    return [float(value) for value in AllReduceSum()(Tensor(np.array(values, np.float32))).asnumpy()]
