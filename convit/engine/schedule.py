"""The learning rate of every step: MindCV's schedules, for both engines, and with ``warmup_prefix`` false timm's and FAIR's."""

import math
from bisect import bisect_right

from convit.engine.recipe import Recipe


def rates(recipe: Recipe, lr: float, steps: int) -> list[float]:
    """The rates of a run with ``steps`` steps an epoch and the peak ``lr``: a linear warm-up, then the decay, by step or by epoch."""
    unit = 1 if recipe.lr_epoch_stair else steps
    warmup = recipe.warmup_epochs * unit
    start = lr * recipe.warmup_factor if recipe.warmup_lr is None else recipe.warmup_lr
    found = []
    for step in range(recipe.epoch_size * steps):
        t = step // steps if recipe.lr_epoch_stair else step
        found.append(start + t * ((lr - start) / warmup) if t < warmup else _decayed(recipe, lr, t - warmup * recipe.warmup_prefix, unit))
    return found


def _decayed(recipe: Recipe, lr: float, t: int, unit: int) -> float:
    """The rate ``t`` units after the decay began, ``unit`` of them an epoch."""
    epoch = t / unit
    if recipe.scheduler in ("cosine_decay", "warmup_cosine_decay"):
        cycle, rest = divmod(t, recipe.decay_epochs * unit)
        if cycle >= recipe.num_cycles:
            return recipe.min_lr
        top = lr * recipe.cycle_decay**cycle
        return recipe.min_lr + 0.5 * (top - recipe.min_lr) * (1 + math.cos(math.pi * rest / (recipe.decay_epochs * unit)))
    if recipe.scheduler == "one_cycle":
        last = recipe.epoch_size * unit - 1
        top = 0.3 * (last + 1) - 1
        from_, to, share = (lr / 25, lr, t / top) if t <= top else (lr, recipe.min_lr, (t - top) / (last - top))
        return to + (from_ - to) / 2 * (math.cos(math.pi * share) + 1)
    if recipe.scheduler == "cyclic":
        up = max(int(recipe.epoch_size * unit / recipe.num_cycles / 2), 1)
        within = t / (2 * up) % 1
        return recipe.min_lr + (lr - recipe.min_lr) * (within if within <= 0.5 else 1 - within) * 2
    if recipe.scheduler == "step_decay":
        return float(lr * recipe.decay_rate ** math.floor(epoch / recipe.decay_epochs))
    if recipe.scheduler == "multi_step_decay":
        return float(lr * recipe.decay_rate ** bisect_right(sorted(recipe.multi_step_decay_milestones), epoch))
    if recipe.scheduler == "exponential_decay":
        return float(lr * recipe.decay_rate**epoch)
    if recipe.scheduler == "polynomial_decay":
        total = recipe.epoch_size - recipe.warmup_epochs * recipe.warmup_prefix
        return float(lr * (1 - min(epoch, total) / total) ** recipe.decay_rate)
    return lr


def average_decay(recipe: Recipe, updates: int) -> float:
    """The decay of the moving average at its update number ``updates``, from 1: with MindCV's warm-up, or constant."""
    return recipe.ema_decay * (1 - math.exp(-updates / 2000) if recipe.ema_warmup else 1)
