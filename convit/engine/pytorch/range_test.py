"""The learning-rate range test: a short run whose rate rises from step to step, and where the loss falls fastest."""

import dataclasses
import math
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convit.engine.pytorch.train import TorchRun
from convit.engine.recipe import Recipe
from convit.engine.world import World, find_world

SMOOTHING = 0.9  # of the losses, by a moving average
DIVERGED = 4.0  # times the lowest smoothed loss


class RangeTest(NamedTuple):
    """A rate, the loss of its step and the smoothed loss, per step; ``steepest`` is the rate where the smoothed loss falls fastest per
    decade, None if it never does; ``scale`` is what the recipe multiplies its ``lr`` by."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float | None
    scale: float


def lr_find(recipe: Recipe, low: float = 1e-6, high: float = 1.0, steps: int = 100) -> RangeTest:
    """Train from the recipe's start with rates from ``low`` to ``high``, in equal factors, until the loss diverges. Nothing is written.

    Data, model, optimiser and its groups, loss, mixing, clipping and precision are the recipe's; schedule and moving average have no part.

    Raises:
        ValueError: Rates that do not rise, fewer than 10 steps, several processes, or what ``train`` refuses.
        OSError: The data cannot be read.
    """
    if not 0 < low < high < math.inf or steps < 10:
        raise ValueError(f"a range test needs 0 < low < high and 10 steps or more, got low={low}, high={high}, steps={steps}")
    if find_world().size > 1:
        raise ValueError("a range test runs on one process: start it without a launcher, with the batch_size of all processes together")
    recipe = dataclasses.replace(recipe, val_while_train=False, early_stop=None, ckpt_save_policy=None, ema=False)
    run = TorchRun(recipe, Path(), False, False, False)
    run.world = World()
    losses: list[float] = []
    smoothed: list[float] = []
    try:
        run.join()
        plan = run.build()
        run.plan = plan._replace(steps=steps, rates=np.geomspace(low, high, steps).tolist())
        batches = chain.from_iterable(run.batches(epoch, 0) for epoch in count())
        average = 0.0
        while run.progress.step < steps:
            loss, _, _ = run.gradients(batches)
            if not (math.isfinite(loss) and math.isfinite(run.gradient_norm())):
                break
            average = SMOOTHING * average + (1 - SMOOTHING) * loss
            losses.append(loss)
            smoothed.append(average / (1 - SMOOTHING ** len(losses)))
            if smoothed[-1] > DIVERGED * min(smoothed) or not math.isfinite(run.apply()):
                break
            run.progress.step += 1
    finally:
        run.leave()
    rates = run.plan.rates[: len(losses)]
    return RangeTest(rates, losses, smoothed, _steepest(rates, smoothed), plan.lr / recipe.lr if recipe.lr else 1.0)


def _steepest(rates: list[float], smoothed: list[float]) -> float | None:
    """Of the steps up to the lowest loss; the first few are of the untrained model's noise."""
    first, end = 5, int(np.argmin(smoothed)) + 1 if smoothed else 0
    if end - first < 3:
        return None
    slopes = np.gradient(smoothed[:end], np.log10(rates[:end]))[first:]
    best = int(np.argmin(slopes))
    return rates[first + best] if slopes[best] < 0 else None
