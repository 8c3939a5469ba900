"""Evaluation in PyTorch: exact sums over every sample once, on one process or several."""

import time
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from convit.config import Recipe
from convit.pytorch.data import BadImage, EvalData
from convit.pytorch.distributed import World, choose_device, total


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
    model: nn.Module, data: EvalData, world: World, device: torch.device, dtype: torch.dtype | None = None, progress: bool = False
) -> Scores:
    """Score ``model``, left in evaluation mode, on ``data``. On several processes each takes its part and all get the sums.

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

        size = -(-len(data.chosen) // data.recipe.batch_size)
        batches = track(data, "validating", total=size, console=Console(stderr=True))  # type: ignore[assignment]
    for images, targets in batches:
        targets = targets.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(images.to(device, non_blocking=True)).float()
        ranks = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        top1 += ranks[:, 0].sum().item()
        top5 += ranks.any(dim=1).sum().item()
        count += len(targets)
    count, loss, top1, top5 = total([count, loss, top1, top5], world, device)
    if not count:
        raise ValueError("no validation image could be read" + (f", from {data.bad[0].name} ({data.bad[0].reason})" if data.bad else ""))
    seconds = time.perf_counter() - began
    return Scores(int(count), 100 * top1 / count, 100 * top5 / count, loss / count, count / seconds, data.bad)
