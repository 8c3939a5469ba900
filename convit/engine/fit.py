"""A recipe fitted to the pictures and the machine: classes, batch, epochs, learning rate, workers. Imports no framework."""

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path

from convit.engine.recipe import Recipe
from convit.engine.sources import open_source

SEEN = 40_000  # images that a small run sees in all: some minutes on two cores
EPOCHS = (20, 200)


def most_workers() -> int:
    """Data-loading processes where nobody says how many: the recipes' default, but no more than there are cores."""
    return min(Recipe().num_parallel_workers, os.cpu_count() or 1)


def fit(recipe: Recipe, given: Collection[str], processes: int = 1, free: bool = False) -> tuple[Recipe, str]:
    """The recipe for its own ``data_dir``, and one line that says what there is and what was fitted.

    A recipe that was chosen keeps its own keys, but that a number of classes that the data does not have is left out, and a batch that the
    images cannot fill is made smaller.

    Args:
        recipe: The recipe.
        given: Keys that the user has set: they stay.
        processes: That train together.
        free: The recipe was not chosen: epochs, learning rate, batch and workers follow from the number of images.

    Raises:
        ValueError, FileNotFoundError: See ``convit.engine.sources.open_source``.
    """
    train = open_source(recipe, train=True)
    images, classes = len(train.targets), len(train.classes)
    held = len(open_source(recipe, train=False).targets) if recipe.val_while_train else 0
    new: dict[str, object] = {}
    if recipe.num_classes is not None and recipe.num_classes != classes and "num_classes" not in given:
        new["num_classes"] = None
    batch = recipe.batch_size
    shares = processes * recipe.gradient_accumulation_steps
    usable = int(images * recipe.sampling_ratio) if recipe.num_samples is None else min(images, recipe.num_samples)
    most = max(usable // (4 if free else 1) // shares, 1)
    if batch > most and "batch_size" not in given:
        batch = 1 << (most.bit_length() - 1)
        if (recipe.mixup or recipe.cutmix) and batch < 2:
            raise ValueError(f"{images} images are too few for mixup or cutmix: --mixup 0 --cutmix 0")
        new["batch_size"] = batch
    if free:
        if "lr" not in given:
            new["lr"] = round(recipe.lr * (batch * shares / recipe.batch_size) ** 0.5, 6)
        if "num_parallel_workers" not in given:
            new["num_parallel_workers"] = 0 if images <= 500 else most_workers()
        if "epoch_size" not in given:
            epochs = min(max(SEEN // images, EPOCHS[0]), EPOCHS[1])
            warmup = recipe.warmup_epochs if "warmup_epochs" in given else max(1, epochs // 20)
            new |= {"epoch_size": epochs, "warmup_epochs": warmup}
            new |= {} if "decay_epochs" in given else {"decay_epochs": max(epochs - warmup, 1)}
        elif "decay_epochs" not in given and "warmup_epochs" not in given:
            warmup = min(recipe.warmup_epochs, recipe.epoch_size // 5)
            new |= {"warmup_epochs": warmup, "decay_epochs": max(recipe.epoch_size - warmup, 1)}
    fitted = dataclasses.replace(recipe, **new)  # type: ignore[arg-type]
    names = ", ".join(train.classes[:6]) + (", ..." if classes > 6 else "")
    said = {"num_classes": f"{classes} classes in place of {recipe.num_classes}", "batch_size": f"batch {fitted.batch_size}"}
    said |= {"lr": f"learning rate {fitted.lr:g}", "num_parallel_workers": f"{fitted.num_parallel_workers} workers"}
    said |= {"epoch_size": f"{fitted.epoch_size} epochs"}
    what = [said[name] for name in said if name in new]
    line = f"{Path(recipe.data_dir).name or recipe.data_dir}: {classes} classes ({names}), {images} images to train on, {held} to validate"
    return fitted, line + (f"; fitted: {', '.join(what)}" if what else "")
