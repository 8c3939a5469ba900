"""Evaluation in PyTorch: exact sums over every sample once, on one process or several."""

import dataclasses
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from convit.engine.images import BadImage
from convit.engine.pytorch.build import amp_dtype, build_model, fastest
from convit.engine.pytorch.checkpoint import facts_of
from convit.engine.pytorch.data import EvalData
from convit.engine.pytorch.distributed import choose_device, gathered, start, total
from convit.engine.recipe import Recipe
from convit.engine.trained import recorded_classes
from convit.engine.world import World, find_world


class Scores(NamedTuple):
    """Over ``samples`` images: ``top1`` and ``top5`` in percent, the mean cross entropy, images per second, and what could not be read."""

    samples: int
    top1: float
    top5: float
    loss: float
    images_per_second: float
    bad: list[BadImage]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: EvalData,
    world: World,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    sharded: bool = False,
) -> Scores:
    """Score ``model``, left in evaluation mode, on ``data``. On several processes each takes its part and all get the sums.

    A ``sharded`` model meets the other processes in every forward pass: one that has no image left passes a blank one, not counted.

    Raises:
        ValueError: No image could be read.
    """
    model.eval()
    loss = top1 = top5 = count = 0.0
    began = time.perf_counter()
    batches = data
    if progress:
        from rich.console import Console
        from rich.progress import track

        batches = track(data, "validating", total=data.rounds, console=Console(stderr=True))  # type: ignore[assignment]
    for images, targets in batches:
        if not len(targets) and not sharded:
            continue
        if not len(targets):
            images = images.new_zeros(1, *images.shape[1:])
        targets = targets.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(images.to(device, non_blocking=True)).float()[: len(targets)]
        ranks = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        top1 += ranks[:, 0].sum().item()
        top5 += ranks.any(dim=1).sum().item()
        count += len(targets)
    count, loss, top1, top5 = total([count, loss, top1, top5], world, device)
    bad = gathered(data.bad, world)
    if not count:
        raise ValueError("no validation image could be read" + (f", from {bad[0].name} ({bad[0].reason})" if bad else ""))
    seconds = time.perf_counter() - began
    return Scores(int(count), 100 * top1 / count, 100 * top5 / count, loss / count, count / seconds, bad)


def validate(recipe: Recipe, progress: bool = True, precision: str = "auto") -> dict[str, Any]:
    """Measure the model and checkpoint of ``recipe`` on its validation split; ``precision`` as in ``build.fastest``.

    Returns:
        model, checkpoint, samples, top1 and top5 (percent), loss (mean cross entropy), precision, images_per_second, bad_images (names).

    Raises:
        ValueError: Model, checkpoint and data do not fit together.
        OSError: Checkpoint or data cannot be read.
    """
    recipe = dataclasses.replace(recipe, amp_level=recipe.val_amp_level or recipe.amp_level)
    world = find_world()
    device = choose_device(recipe.device, world)
    start(world, device)
    data = None
    try:
        classes = recorded_classes(recipe.ckpt_path, facts_of)
        num_classes = recipe.num_classes or len(classes) or None
        data = EvalData(recipe, world, device, classes, num_classes)
        model = build_model(recipe, num_classes or len(data.source.classes)).to(device)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if recipe.compile:
            model.compile()
        dtype = amp_dtype(recipe, device)
        model = fastest(model, recipe, device, precision)
        scores = evaluate(model, data, world, device, dtype, progress and world.rank == 0)
    finally:
        if data:
            data.close()
        if world.size > 1:
            dist.destroy_process_group()
    return {
        "model": recipe.model,
        "checkpoint": recipe.ckpt_path or ("published" if recipe.pretrained else None),
        "samples": scores.samples,
        "top1": scores.top1,
        "top5": scores.top5,
        "loss": scores.loss,
        "precision": str(getattr(model, "dtype", dtype or torch.float32)).removeprefix("torch."),
        "images_per_second": round(scores.images_per_second, 2),
        "bad_images": [image.name for image in scores.bad],
    }
