"""The data of the MindSpore engine: MindCV's builders, every epoch's order and augmentation a function of the seed and the epoch.

MindSpore's augmentations draw from generators that the workers of a stage share, so that they repeat only with one worker. On CPU, where
the model takes nearly all of the time, there is one per stage, and an epoch can be repeated bit for bit; elsewhere as many as asked for.
"""

import dataclasses
import multiprocessing
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mindspore as ms
import mindspore.dataset as ds
import numpy as np

from convit.engine.recipe import Recipe
from convit.engine.sources import DigitsSource, match_imagenet, open_source


class _Digits:
    """scikit-learn's digits for a GeneratorDataset, the split of the PyTorch engine: ([1, s, s] float32, label)."""

    def __init__(self, recipe: Recipe, train: bool) -> None:
        from PIL import Image

        source = DigitsSource(train)
        size = recipe.image_resize
        mean, std = (value[0] / 255 for value in normalisation(recipe))
        large = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in source.pixels]
        self.images = (np.stack(large)[:, None] - mean) / std
        self.labels = np.array(source.targets, np.int32)
        self.blank, self.reach = -mean / std, recipe.shift if train else 0
        self.seed, self.epoch = recipe.seed, 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int32]:
        image = self.images[index].astype(np.float32)
        if self.reach:
            size = image.shape[-1]
            y, x = np.random.default_rng([self.seed, self.epoch, index]).integers(0, 2 * self.reach + 1, 2)
            wide = np.pad(image[0], self.reach, constant_values=self.blank)
            image = np.ascontiguousarray(wide[y : y + size, x : x + size][None])
        return image, self.labels[index]


class Data:
    """A split of the recipe's data set: ``pipeline`` gives batches of (images, targets).

    ``classes`` are their names, in the order of those that are given, if any are: they are matched by name. ``samples`` and ``steps``
    count images over all processes and batches of an epoch on this one.

    Raises:
        ValueError: ``data_dir`` is missing, or the split holds less than one batch.
        FileNotFoundError: It has no such split.
    """

    def __init__(
        self,
        recipe: Recipe,
        train: bool,
        rank: int = 0,
        size: int = 1,
        classes: list[str] | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.recipe, self.train = recipe, train
        self.shards: dict[str, Any] = {"num_shards": size, "shard_id": rank} if size > 1 else {}
        asked = 1 if ms.get_context("device_target") == "CPU" else max(recipe.num_parallel_workers, 1)
        self.workers = min(asked, multiprocessing.cpu_count())  # MindSpore refuses more
        if recipe.dataset == "digits":
            self.digits = _Digits(recipe, train)
            self.classes, self.samples = DigitsSource.classes, len(self.digits)
        else:
            self.source = open_source(dataclasses.replace(recipe, dataset="folder"), train, classes)
            if not train and not classes:
                match_imagenet(self.source, num_classes)
            self.classes = self.source.classes
            self.samples = self._images().get_dataset_size() * size
        self.steps = self.pipeline(0).get_dataset_size()
        if not self.steps:
            raise ValueError(f"the global batch of {recipe.batch_size * size} exceeds the {self.samples} samples of an epoch")

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch from ``start`` on. Those before it are made too, since the draws of the later ones follow theirs."""
        batches = self.pipeline(epoch).create_tuple_iterator(num_epochs=1)
        for step, batch in enumerate(batches):
            if step >= start:
                yield batch

    def pipeline(self, epoch: int) -> Any:
        """MindSpore's dataset for an epoch; iterated over once more, it goes on with other draws."""
        recipe = self.recipe
        ds.config.set_seed(int(np.random.SeedSequence([recipe.seed, epoch]).generate_state(1)[0]))
        if recipe.dataset == "digits":
            self.digits.epoch = epoch
            data = ds.GeneratorDataset(self.digits, ["image", "label"], shuffle=self.train and recipe.shuffle, **self.shards)
            return data.batch(recipe.batch_size, drop_remainder=self.train and recipe.drop_remainder)
        return self._augmented(epoch) if self.train else self._plain()

    def _images(self) -> Any:
        from mindcv.data import create_dataset

        recipe = self.recipe
        more = {"num_samples": recipe.num_samples, "num_aug_repeats": recipe.aug_repeats} if self.train else {}
        return create_dataset(
            "imagenet",
            root=str(Path(self.source.where).parent),
            split=Path(self.source.where).name,
            class_indexing={name: number for number, name in enumerate(self.classes)},
            shuffle=self.train and recipe.shuffle,
            num_parallel_workers=self.workers,
            **self.shards,
            **{name: value for name, value in more.items() if value},
        )

    def _augmented(self, epoch: int) -> Any:
        from mindcv.data import create_loader, create_transforms
        from mindcv.data.mixup import Mixup
        from mindspore.dataset.transforms.transforms import TensorOperation

        recipe = self.recipe
        transforms = create_transforms(
            "imagenet",
            is_training=True,
            **_size_and_scale(recipe),
            scale=tuple(recipe.scale),
            ratio=tuple(recipe.ratio),
            hflip=recipe.hflip,
            vflip=recipe.vflip,
            color_jitter=recipe.color_jitter,
            auto_augment=mindcv_policy(recipe.auto_augment),
            re_prob=recipe.re_prob,
            re_scale=tuple(recipe.re_scale),
            re_ratio=tuple(recipe.re_ratio),
            re_max_attempts=recipe.re_max_attempts,
            re_value="random" if recipe.re_value == "random" else int(recipe.re_value),
        )
        for i, one in enumerate(transforms):
            if not isinstance(one, TensorOperation):
                transforms[i] = _Seeded(one, (recipe.seed, epoch, i))
        loader = create_loader(
            self._images(),
            recipe.batch_size,
            drop_remainder=recipe.drop_remainder,
            is_training=True,
            transform=transforms,
            num_parallel_workers=self.workers,
        )
        if recipe.mixup + recipe.cutmix == 0:
            return loader
        mixup = Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            prob=recipe.cutmix_prob,
            label_smoothing=0.0,  # the loss smooths
            num_classes=recipe.num_classes or len(self.classes),
        )
        return loader.map(
            _Seeded(mixup, (recipe.seed, epoch, len(transforms))), input_columns=["image", "label"], num_parallel_workers=self.workers
        )

    def _plain(self) -> Any:
        from mindcv.data import create_loader

        transforms = eval_transforms(self.recipe)
        return create_loader(self._images(), self.recipe.batch_size, transform=transforms, num_parallel_workers=self.workers)


_DRAWING = threading.Lock()


class _Seeded:
    """A transform in Python, which draws from the global generators: in each of its calls, which are counted, they are its own."""

    def __init__(self, transform: Callable[..., Any], seed: tuple[int, ...]) -> None:
        self.transform, self.seed, self.calls = transform, seed, 0

    def __call__(self, *columns: Any) -> Any:
        state = np.random.SeedSequence([*self.seed, self.calls]).generate_state(2)
        self.calls += 1
        with _DRAWING:
            random.seed(int(state[0]))
            np.random.seed(state[1])
            return self.transform(*columns)


def eval_transforms(recipe: Recipe) -> list[Any]:
    """MindCV's evaluation transforms: decode, resize, centre crop, normalise, channels first."""
    from mindcv.data import create_transforms

    transforms: list[Any] = create_transforms("imagenet", is_training=False, crop_pct=recipe.crop_pct, **_size_and_scale(recipe))
    return transforms


def _size_and_scale(recipe: Recipe) -> dict[str, Any]:
    mean, std = normalisation(recipe)
    return {"image_resize": recipe.image_resize, "interpolation": recipe.interpolation, "mean": mean, "std": std}


def normalisation(recipe: Recipe) -> tuple[list[float], list[float]]:
    """``mean`` and ``std`` of images in 0 to 255, as MindCV takes them."""
    by = 1.0 if max(recipe.mean) > 1 else 255.0
    return [value * by for value in recipe.mean], [value * by for value in recipe.std]


def mindcv_policy(policy: str | None) -> str | None:
    """timm's name of an augmentation policy in MindCV's words."""
    if policy is None:
        return None
    head, dash, rest = policy.partition("-")
    return {"original": "autoaug", "originalr": "autoaugr", "rand": "randaug"}.get(head, head) + dash + rest
