"""Learning rate, weight decay and moving average, in both engines: MindCV's, and with ``warmup_prefix`` false timm's and FAIR's."""

import math
import re
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


def share_and_decay(recipe: Recipe, name: str, axes: int, blocks: int) -> tuple[float, float]:
    """A parameter's share of the learning rate, and its weight decay.

    Args:
        recipe: ``layer_decay``, ``weight_decay_filter`` and ``weight_decay``.
        name: Of the parameter, in either framework.
        axes: Of the parameter.
        blocks: Of the model.
    """
    share, rule = 1.0, recipe.weight_decay_filter
    if recipe.layer_decay is not None:
        block = re.match(r"blocks\.(\d+)\.", name)
        head = name.startswith(("head.", "classifier."))
        depth = int(block[1]) + 1 if block else blocks if name.startswith("norm.") else blocks + 1 if head else 0
        share = float(recipe.layer_decay ** (blocks + 1 - depth))
    if rule == "timm":
        spared = axes < 2 or name in ("pos_embed", "cls_token", "reg_token")
    else:
        spared = rule != "disable" and ("norm" in name or (rule == "norm_and_bias" and "bias" in name))
    return share, 0.0 if spared else recipe.weight_decay
