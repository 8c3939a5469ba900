"""Data for training and evaluation: readers, transforms and a loader that can start at any step of any epoch.

The order is that of ``convit.engine.order``, and the random part of a sample a function of (seed, epoch, position in the epoch). So a
dead worker costs nothing but time. timm supplies transforms and mixing; its loaders are not used, because they can only start at the
beginning of an epoch.
"""

import logging
import math
import random
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from convit.engine.images import BadImage
from convit.engine.order import Order, mix_seed
from convit.engine.preparation import Preparation, unit_scale
from convit.engine.recipe import Recipe
from convit.engine.sources import DigitsSource, Source, choose_samples, match_imagenet, open_source, read_sample, read_some
from convit.engine.world import World

logger = logging.getLogger("convit")

WORKER_RESTARTS = 3


class Batch(NamedTuple):
    """``images`` [n, C, H, W] float32, ``targets`` [n] int64; ``share`` of the optimiser step's samples; ``bad`` ones met on the way."""

    images: Tensor
    targets: Tensor
    share: float
    bad: list[BadImage]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the generators of Python, NumPy and torch (CPU) start from ``seed``; outside they are as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


# --- transforms ---


def train_transform(recipe: Recipe) -> Any:
    """timm's training transform, PIL image to [C, H, W]."""
    from timm.data import create_transform
    from timm.data.random_erasing import RandomErasing

    mean, std = unit_scale(recipe.mean, recipe.std)
    trivial = recipe.auto_augment == "trivialaugwide"  # MindCV's, and torchvision's
    jitter: Any = None if trivial else recipe.color_jitter
    area: Any = tuple(recipe.scale)
    aspect: Any = tuple(recipe.ratio)
    try:
        transform = create_transform(
            recipe.image_resize,
            is_training=True,
            scale=area,
            ratio=aspect,
            hflip=recipe.hflip,
            vflip=recipe.vflip,
            color_jitter=tuple(jitter) if isinstance(jitter, list) else jitter,
            auto_augment=None if trivial else timm_policy(recipe.auto_augment),
            interpolation=recipe.interpolation,
            mean=mean,
            std=std,
        )
    except (AssertionError, KeyError, IndexError, ValueError) as error:
        policies = "randaug-m9-mstd0.5, autoaug, autoaugr, augmix-m3, trivialaugwide (MindCV), rand-..., original, v0, 3a (timm)"
        raise ValueError(f"auto_augment {recipe.auto_augment!r} is no policy of the kinds {policies} {error}".rstrip()) from None
    if trivial:
        from torchvision.transforms import InterpolationMode, TrivialAugmentWide

        mode = InterpolationMode.BICUBIC if recipe.interpolation == "bicubic" else InterpolationMode.BILINEAR
        place = next(i for i, one in enumerate(transform.transforms) if "ToTensor" in type(one).__name__)
        transform.transforms.insert(place, TrivialAugmentWide(interpolation=mode))
    if recipe.re_prob > 0:  # added here for the ranges, which create_transform fixes
        (low, high), (narrow, wide) = recipe.re_scale, recipe.re_ratio
        mode = "pixel" if recipe.re_value == "random" else "const"
        transform.transforms.append(RandomErasing(recipe.re_prob, low, high, narrow, wide, mode=mode, device="cpu"))
    return transform


def eval_transform(recipe: Recipe) -> Callable[[Any], Tensor]:
    """timm's evaluation transform, PIL image to [C, H, W]: resize, centre crop, normalise."""
    return partial(_prepared, Preparation.of_recipe(recipe))


def _prepared(prepare: Preparation, image: Any) -> Tensor:
    return torch.from_numpy(prepare(image))


def timm_policy(policy: str | None) -> str | None:
    """MindCV's name of an augmentation policy in timm's words: autoaug -> original, autoaugr -> originalr, randaug -> rand."""
    if policy is None:
        return None
    head, dash, rest = policy.partition("-")
    return {"autoaug": "original", "autoaugr": "originalr", "randaug": "rand"}.get(head, head) + dash + rest


def _digits(source: DigitsSource, recipe: Recipe) -> tuple[Tensor, Tensor, float]:
    """Normalised images [n, 1, s, s], targets [n], and what the edge of an image is filled with."""
    (mean, *_), (std, *_) = unit_scale(recipe.mean, recipe.std)
    size = (recipe.image_resize, recipe.image_resize)
    large = torch.nn.functional.interpolate(torch.from_numpy(source.pixels)[:, None], size=size, mode="bilinear", align_corners=False)
    return (large - mean) / std, torch.tensor(source.targets), -mean / std


# --- training ---


class _Samples(Dataset[Any]):
    """Maps (epoch, position, index) to (image, target, bad). An unreadable image is replaced by the next readable one."""

    def __init__(self, source: Source, chosen: list[int], transform: Any, channels: int, seed: int) -> None:
        self.source, self.chosen, self.transform, self.channels, self.seed = source, chosen, transform, channels, seed

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int, list[BadImage]]:
        epoch, position, which = key
        image, index, bad = read_some(self.source, self.chosen, which, self.channels)
        with seeded(mix_seed(self.seed, epoch, position)):
            return self.transform(image), self.source.targets[index], bad


def _collate(samples: list[tuple[Tensor, int, list[BadImage]]]) -> tuple[Tensor, Tensor, list[BadImage]]:
    images, targets, bad = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(targets), [one for group in bad for one in group]


class TrainData:
    """The training split, as batches of this process from any step of any epoch."""

    def __init__(self, recipe: Recipe, world: World, device: torch.device) -> None:
        self.recipe, self.world, self.device = recipe, world, device
        self.source = open_source(recipe, train=True)
        self.order = Order(recipe, self.source.targets, world)
        self.num_classes = recipe.num_classes or len(self.source.classes)
        self.classes = self.source.classes
        self.accumulation = recipe.gradient_accumulation_steps
        self._loader: _Loader | None = None
        if isinstance(self.source, DigitsSource):
            self._images, self._targets, self._blank = _digits(self.source, recipe)
        else:
            self._transform = train_transform(recipe)

    def batches(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """This process's batches of ``epoch`` from ``start``, ``accumulation`` of them per step."""
        made = self._digits(epoch, start) if isinstance(self.source, DigitsSource) else self._load(epoch, start)
        for number, (images, targets, bad) in enumerate(made):
            step = start + number // self.accumulation
            yield Batch(images, targets, len(targets) / self.order.size(step), bad)

    def _digits(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, list[BadImage]]]:
        order, shifts = self.order.of(epoch), self.order.shifts(epoch)
        padded = torch.nn.functional.pad(self._images[:, 0], [self.recipe.shift] * 4, value=self._blank)
        pixels = torch.arange(self.recipe.image_resize)
        for step in range(start, self.order.steps):
            for part in self.order.parts(step):
                index = torch.tensor([self.order.chosen[i] for i in order[part]])
                shift = torch.from_numpy(shifts[part])
                rows, columns = shift[:, 0, None, None] + pixels[:, None], shift[:, 1, None, None] + pixels
                yield padded[index[:, None, None], rows, columns].unsqueeze(1), self._targets[index], []

    def _passes(self, epoch: int, first: int) -> Iterator[list[tuple[int, int, int]]]:
        """This process's forward passes from number ``first`` of the epoch, as (epoch, position, index) of their samples."""
        order = self.order.of(epoch)
        for number in range(first, self.order.steps * self.accumulation):
            step, part = divmod(number, self.accumulation)
            yield [(epoch, int(position), int(order[position])) for position in self.order.parts(step)[part]]

    def _load(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, list[BadImage]]]:
        if self._loader is None:
            recipe = self.recipe
            samples = _Samples(self.source, self.order.chosen, self._transform, recipe.in_channels, recipe.seed)
            self._loader = _Loader(samples, _collate, recipe.num_parallel_workers, self.device)
        return self._loader.run(lambda done: self._passes(epoch, start * self.accumulation + done))

    def close(self) -> None:
        """End the data-loading processes."""
        if self._loader is not None:
            self._loader.close()


class _Batches:
    """A batch sampler that yields whatever it is told to."""

    keys: Iterable[list[Any]] = ()

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.keys)


class _Loader:
    """A DataLoader that starts anywhere and outlives its workers: where one dies, new ones go on with the same batch."""

    def __init__(self, samples: Dataset[Any], collate: Callable[[list[Any]], Any], workers: int, device: torch.device) -> None:
        self.samples, self.collate, self.workers, self.device = samples, collate, workers, device
        self.deaths = 0
        self.keys = _Batches()
        self.loader: DataLoader[Any] | None = None

    def run(self, keys: Callable[[int], Iterable[list[Any]]]) -> Iterator[Any]:
        """What ``collate`` makes of the batches of ``keys(done)``: those that are left when ``done`` are done."""
        done = 0
        handler = None  # the one before ours: it must not be back while a death that we know of can still be signalled
        try:
            while True:
                self.keys.keys = keys(done)
                try:
                    batches = iter(self._start())
                    handler = handler or _quiet_child_signals()
                    for batch in batches:
                        done += 1
                        yield batch
                    return
                except (RuntimeError, OSError, EOFError) as error:
                    # a worker's own exception arrives as "Caught ..."; the rest are the many ways in which its death shows
                    if not self.workers or str(error).startswith("Caught "):
                        raise
                    self.deaths += 1
                    self.close()
                    if self.deaths > WORKER_RESTARTS:
                        raise RuntimeError(f"data-loading workers died {self.deaths} times; the last: {error}") from None
                    logger.warning("a data-loading worker died (%s); started new ones, no sample is lost", error or type(error).__name__)
        finally:
            if handler is not None:
                signal.signal(signal.SIGCHLD, handler)

    def _start(self) -> DataLoader[Any]:
        if self.loader is None:
            self.loader = DataLoader(
                self.samples,
                batch_sampler=self.keys,
                num_workers=self.workers,
                collate_fn=self.collate,
                pin_memory=self.device.type == "cuda",
                persistent_workers=self.workers > 0,
                worker_init_fn=_one_thread,
                generator=torch.Generator(),  # its own, so that starting an epoch in the middle draws nothing from ours
            )
        return self.loader

    def close(self) -> None:
        """End the workers: they end with their loader, which nothing else holds."""
        self.loader = None


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _quiet_child_signals() -> Any:
    """Let a dead worker be noticed where its data is awaited: torch's handler raises wherever the training step happens to be.

    Returns the handler to set again afterwards, if there is one.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGCHLD, signal.SIG_DFL)


# --- evaluation ---


class _EvalSamples(Dataset[Any]):
    def __init__(self, source: Source, chosen: list[int], transform: Any, channels: int) -> None:
        self.source, self.chosen, self.transform, self.channels = source, chosen, transform, channels

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, which: int) -> tuple[Tensor, int] | BadImage:
        index = self.chosen[which]
        image = read_sample(self.source, index, self.channels)
        return image if isinstance(image, BadImage) else (self.transform(image), self.source.targets[index])


def _collate_eval(samples: list[Any]) -> tuple[Tensor | None, Tensor | None, list[BadImage]]:
    good = [sample for sample in samples if not isinstance(sample, BadImage)]
    bad = [sample for sample in samples if isinstance(sample, BadImage)]
    if not good:
        return None, None, bad
    return torch.stack([image for image, _ in good]), torch.tensor([target for _, target in good]), bad


class EvalData:
    """This process's part of the validation split, in order, nothing padded or repeated. Unreadable images are left out and named.

    Args:
        recipe: Where it is, and how it is transformed.
        world: The processes that share it.
        device: Where its images go.
        classes: Names of the model's classes in order, to match the split's by name; ``None``: as ``match_imagenet`` says.
        num_classes: Of the model; images of classes beyond are left out.
    """

    def __init__(
        self, recipe: Recipe, world: World, device: torch.device, classes: list[str] | None = None, num_classes: int | None = None
    ) -> None:
        self.recipe = recipe
        self.source = open_source(recipe, train=False, classes=classes)
        if not classes:
            match_imagenet(self.source, num_classes)
        chosen = choose_samples(self.source.targets, num_classes)
        self.size = len(chosen)
        most = math.ceil(self.size / world.size)  # images of a process
        self.rounds = math.ceil(most / recipe.batch_size)
        self.chosen = np.array_split(chosen, world.size)[world.rank].tolist()
        self.bad: list[BadImage] = []
        self._loader: _Loader | None = None
        if isinstance(self.source, DigitsSource):
            self._images, self._targets, _ = _digits(self.source, recipe)
        else:
            samples = _EvalSamples(self.source, self.chosen, eval_transform(recipe), recipe.in_channels)
            self._loader = _Loader(samples, _collate_eval, recipe.num_parallel_workers, device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, targets) per batch, as many on every process, some of them empty; ``bad`` lists what this pass left out."""
        self.bad = []
        batch, side = self.recipe.batch_size, self.recipe.image_resize
        firsts = range(0, len(self.chosen), batch)
        nothing = torch.empty(0, self.recipe.in_channels, side, side), torch.empty(0, dtype=torch.int64)
        if self._loader is None:
            for first in firsts:
                index = torch.tensor(self.chosen[first : first + batch])
                yield self._images[index], self._targets[index]
        else:
            keys = [list(range(first, min(first + batch, len(self.chosen)))) for first in firsts]
            for images, targets, bad in self._loader.run(lambda done: keys[done:]):
                self.bad += bad
                yield nothing if images is None else (images, targets)
        for _ in range(self.rounds - len(firsts)):
            yield nothing

    def close(self) -> None:
        """End the data-loading processes."""
        if self._loader is not None:
            self._loader.close()
