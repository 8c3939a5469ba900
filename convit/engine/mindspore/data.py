"""The data of the MindSpore engine: images as the PyTorch engine reads and orders them, MindCV's transforms and mixing, whole batches.

What is random in a sample follows from (seed, epoch, position in the epoch), and the mixing of a batch from (seed, epoch, step,
process, part). So any step of any epoch can be the first, and neither the number of workers nor that of processes changes an image.
"""

import json
import multiprocessing
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
from mindspore import Tensor
from PIL import Image

from convit.engine.images import BadImage
from convit.engine.order import Order, mix_seed
from convit.engine.preparation import full_scale
from convit.engine.recipe import Recipe
from convit.engine.sources import DigitsSource, choose_samples, match_imagenet, open_source, read_sample, read_some, tell_replaced
from convit.engine.world import World

_DRAWING = threading.Lock()


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Inside, the generators of MindSpore's and MindCV's transforms start from the numbers; Python's and NumPy's go on as before."""
    with _DRAWING:
        states, before = (random.getstate(), np.random.get_state()), ds.config.get_seed()
        ds.config.set_seed(mix_seed(*numbers) | 1 << 31)  # sets all three; one seed, MindSpore's default, would mean none
        try:
            yield
        finally:
            ds.config.set_seed(before)
            random.setstate(states[0])
            np.random.set_state(states[1])


class _Digits:
    """scikit-learn's digits, normalised and drawn large: ``images`` [n, 1, s, s] float32; ``blank`` is what lies around them."""

    def __init__(self, source: DigitsSource, recipe: Recipe) -> None:
        size = (recipe.image_resize, recipe.image_resize)
        (mean, *_), (std, *_) = normalisation(recipe)
        large = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in source.pixels]
        self.images = ((np.stack(large)[:, None] * 255 - mean) / std).astype(np.float32)
        self.blank = np.float32(-mean / std)

    def moved(self, index: int, shift: np.ndarray, reach: int) -> np.ndarray:
        if not reach:
            return self.images[index]
        size, (y, x) = self.images.shape[-1], shift
        wide = np.pad(self.images[index, 0], reach, constant_values=self.blank)
        return np.ascontiguousarray(wide[None, y : y + size, x : x + size])


class Data:
    """The training split: ``batches`` from any step of any epoch, and ``pipeline`` for MindSpore's own loop.

    Raises:
        ValueError: ``data_dir`` is missing, holds less than one batch, or ``auto_augment`` is no policy.
        FileNotFoundError: It has no such split.
    """

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.recipe, self.world = recipe, world
        self.source = open_source(recipe, train=True)
        self.order = Order(recipe, self.source.targets, world)
        self.classes, self.num_classes = self.source.classes, recipe.num_classes or len(self.source.classes)
        self.parts = recipe.gradient_accumulation_steps
        self.per_epoch = self.order.steps * self.parts
        self.digits = _Digits(self.source, recipe) if isinstance(self.source, DigitsSource) else None
        self.transforms = [] if self.digits else train_transforms(recipe)
        self.tells = False
        self.mixup: Callable[..., Any] | None = None
        if recipe.mixup + recipe.cutmix > 0:
            from mindcv.data.mixup import Mixup

            self.mixup = Mixup(
                mixup_alpha=recipe.mixup,
                cutmix_alpha=recipe.cutmix,
                prob=recipe.cutmix_prob,
                label_smoothing=0.0,  # the loss smooths
                num_classes=self.num_classes,
            )
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.per_epoch * self.recipe.epoch_size

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """This process's forward pass ``number``, counted from the first epoch on: images, targets, and as JSON the unreadable images."""
        epoch, within = divmod(int(number), self.per_epoch)
        step, part = divmod(within, self.parts)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self.order.of(epoch), self.order.shifts(epoch)
        _, order, shifts = self._order
        images, targets, bad = [], [], list[BadImage]()
        for position in self.order.parts(step)[part]:
            if self.digits:
                index = self.order.chosen[order[position]]
                images.append(self.digits.moved(index, shifts[position], self.recipe.shift))
            else:
                image, index, more = read_some(self.source, self.order.chosen, int(order[position]), self.recipe.in_channels)
                images.append(transformed(image, self.transforms, self.recipe.seed, epoch, int(position)))
                bad += more
            targets.append(self.source.targets[index])
        if self.tells:
            tell_replaced(bad)
        found = np.stack(images), np.array(targets, np.int32)
        if self.mixup is not None:
            found = self._mix(*found, epoch, step, part)
        return (*found, np.array(json.dumps(bad)))

    def _mix(self, images: np.ndarray, targets: np.ndarray, *at: int) -> tuple[np.ndarray, np.ndarray]:
        assert self.mixup is not None
        off = 0 < self.recipe.mixup_off_epoch <= at[0]
        if off or len(images) % 2:  # pairs are mixed; an odd rest of the data stays as it is
            return images, np.eye(self.num_classes, dtype=np.float32)[targets]
        with _seeded(self.recipe.seed, *at, self.world.rank, 3):
            mixed: tuple[np.ndarray, np.ndarray] = self.mixup(images, targets)
        return mixed

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, list[BadImage]]]:
        """This process's forward passes of an epoch from its step ``start`` on."""
        first = epoch * self.per_epoch
        numbers = list(range(first + start * self.parts, first + self.per_epoch))
        for images, targets, bad in _rows(self, numbers, self.recipe):
            yield Tensor(images), Tensor(targets), bad

    def pipeline(self, epoch: int) -> Any:
        """MindSpore's dataset of images and targets; iterated over once more, it is the next epoch. What is replaced is logged here."""
        self.tells = True
        return _dataset(self, _Epochs(epoch, self.per_epoch), self.recipe).project(["image", "label"])


class EvalData:
    """This process's part of the validation split, in order, nothing padded or repeated. Unreadable images are left out and named.

    Args:
        recipe: Where it is, and how it is transformed.
        world: The processes that share it.
        classes: Names of the model's classes in order, to match the split's by name; ``None``: as ``match_imagenet`` says.
        num_classes: Of the model; images of classes beyond are left out.
    """

    def __init__(self, recipe: Recipe, world: World, classes: list[str] | None = None, num_classes: int | None = None) -> None:
        self.recipe = recipe
        self.source = open_source(recipe, train=False, classes=classes)
        if not classes:
            match_imagenet(self.source, num_classes)
        self.classes = self.source.classes
        self.chosen = np.array_split(choose_samples(self.source.targets, num_classes), world.size)[world.rank].tolist()
        self.digits = _Digits(self.source, recipe) if isinstance(self.source, DigitsSource) else None
        self.transforms = eval_transforms(recipe)
        self.bad: list[BadImage] = []

    def __len__(self) -> int:
        return -(-len(self.chosen) // self.recipe.batch_size)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        images: list[Any] = []
        targets, bad = [], []
        for index in self.chosen[number * self.recipe.batch_size : (number + 1) * self.recipe.batch_size]:
            image = self.digits.images[index] if self.digits else read_sample(self.source, index, self.recipe.in_channels)
            if isinstance(image, BadImage):
                bad.append(image)
                continue
            images.append(image if self.digits else transformed(image, self.transforms))
            targets.append(self.source.targets[index])
        side = self.recipe.image_resize
        nothing = np.empty((0, self.recipe.in_channels, side, side), np.float32)
        return np.stack(images) if images else nothing, np.array(targets, np.int32), np.array(json.dumps(bad))

    def __iter__(self) -> Iterator[tuple[Tensor, np.ndarray]]:
        """(images, targets) per batch that holds any; ``bad`` lists what this pass left out."""
        self.bad = []
        if not self.chosen:
            return
        for images, targets, bad in _rows(self, list(range(len(self))), self.recipe):
            self.bad += bad
            if len(targets):
                yield Tensor(images), targets


class _Epochs(ds.Sampler):
    """The numbers of an epoch's forward passes; each time it is asked, of the next one."""

    def __init__(self, epoch: int, count: int) -> None:
        super().__init__(count)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        first, self.epoch = self.epoch * self.num_samples, self.epoch + 1
        return iter(range(first, first + self.num_samples))


def _dataset(source: Any, sampler: Any, recipe: Recipe) -> Any:
    """A GeneratorDataset of whole batches. On CPU, where the model takes nearly all of the time, a thread makes them; else processes."""
    workers = 1 if ms.get_context("device_target") == "CPU" else min(max(recipe.num_parallel_workers, 1), multiprocessing.cpu_count())
    return ds.GeneratorDataset(source, ["image", "label", "bad"], sampler=sampler, num_parallel_workers=workers)


def _rows(source: Any, numbers: list[int], recipe: Recipe) -> Iterator[tuple[np.ndarray, np.ndarray, list[BadImage]]]:
    for images, targets, bad in _dataset(source, numbers, recipe).create_tuple_iterator(num_epochs=1, output_numpy=True):
        yield images, targets, [BadImage(*one) for one in json.loads(str(bad))]


def transformed(image: Image.Image, transforms: list[Any], *seed: int) -> np.ndarray:
    """The image in mode "L" or "RGB" through ``transforms``, each with a seed of its own if there is one: [C, H, W] float32."""
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    for i, transform in enumerate(transforms):
        if seed:
            with _seeded(*seed, i):
                array = transform(array)
        else:
            array = transform(array)
    return np.asarray(array, np.float32).reshape(-1, *array.shape[-2:])


def train_transforms(recipe: Recipe) -> list[Any]:
    """MindCV's training transforms, of an image that is decoded.

    Raises:
        ValueError: ``auto_augment`` is no policy of MindCV's.
    """
    from mindcv.data import create_transforms
    from mindspore.dataset import vision

    try:
        transforms: list[Any] = create_transforms(
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
    except (AssertionError, KeyError, IndexError) as error:
        policies = "randaug-m9-mstd0.5, autoaug, autoaugr, 3a, augmix-m3, trivialaugwide"
        raise ValueError(f"auto_augment {recipe.auto_augment!r} is no policy of the kinds {policies} {error}".rstrip()) from None
    crop = vision.RandomResizedCrop(
        recipe.image_resize, tuple(recipe.scale), tuple(recipe.ratio), getattr(vision.Inter, recipe.interpolation.upper())
    )
    return [crop, *transforms[1:]]  # theirs, the first, decodes too


def eval_transforms(recipe: Recipe) -> list[Any]:
    """MindCV's evaluation transforms, of an image that is decoded: resize, centre crop, normalise, channels first."""
    from mindcv.data import create_transforms

    transforms: list[Any] = create_transforms("imagenet", is_training=False, crop_pct=recipe.crop_pct, **_size_and_scale(recipe))
    return transforms[1:]


def _size_and_scale(recipe: Recipe) -> dict[str, Any]:
    mean, std = normalisation(recipe)
    return {"image_resize": recipe.image_resize, "interpolation": recipe.interpolation, "mean": mean, "std": std}


def normalisation(recipe: Recipe) -> tuple[list[float], list[float]]:
    """``mean`` and ``std`` of images in 0 to 255, as MindCV takes them."""
    by = 255.0 / full_scale(recipe.mean, recipe.std)
    return [value * by for value in recipe.mean], [value * by for value in recipe.std]


def mindcv_policy(policy: str | None) -> str | None:
    """timm's name of an augmentation policy in MindCV's words."""
    if policy is None:
        return None
    head, dash, rest = policy.partition("-")
    return {"original": "autoaug", "originalr": "autoaugr", "rand": "randaug"}.get(head, head) + dash + rest
