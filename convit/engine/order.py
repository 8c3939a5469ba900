"""Which images a step takes, in both engines: the order of an epoch and the parts of every process. Imports no framework.

The order of an epoch is a function of (seed, epoch), and what is random in a sample should be one of (seed, epoch, position in the
epoch), whatever the number of processes or workers: a resumed run then sees exactly what it would have seen, and N processes see the
images that one process with an N-fold batch sees.
"""

import hashlib
import struct

import numpy as np

from convit.engine.recipe import Recipe
from convit.engine.sources import choose_samples
from convit.engine.world import World


def mix_seed(*numbers: int) -> int:
    """A 32-bit seed that depends on every number and their order."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=4).digest(), "little")


class Order:
    """The samples of a training split, in the order of every epoch.

    A step's samples are consecutive in the epoch's order; forward pass a of process r takes the share a * processes + r of them.

    Attributes:
        chosen: Indices of the samples to train on.
        shares: Forward passes of an optimiser step on all processes together.
        samples, steps: Of an epoch.

    Raises:
        ValueError: They are less than one global batch.
    """

    def __init__(self, recipe: Recipe, targets: list[int], world: World) -> None:
        self.recipe, self.world = recipe, world
        self.chosen = choose_samples(targets, recipe.num_classes, recipe.sampling_ratio, recipe.num_samples)
        self.labels = np.asarray(targets)[self.chosen]
        self.shares = recipe.gradient_accumulation_steps * world.size
        self.global_batch = recipe.batch_size * self.shares
        self.samples = len(self.of(0))
        whole, rest = divmod(self.samples, self.global_batch)
        # a rest too small to give every share a sample is dropped in any case
        self.steps = whole + (not recipe.drop_remainder and rest >= self.shares)
        if not self.steps:
            raise ValueError(f"the global batch of {self.global_batch} exceeds the {self.samples} samples of an epoch")

    def of(self, epoch: int) -> np.ndarray:
        """Indices into ``chosen`` in the order of ``epoch``: [samples]."""
        count, recipe = len(self.chosen), self.recipe
        random = np.random.default_rng(mix_seed(recipe.seed, epoch))
        if recipe.class_balanced:
            shares = 1 / np.bincount(self.labels)[self.labels]
            return random.choice(count, count, p=shares / shares.sum())
        order = random.permutation(count) if recipe.shuffle else np.arange(count)
        return np.repeat(order, recipe.aug_repeats)[:count] if recipe.aug_repeats > 1 else order

    def parts(self, step: int) -> list[np.ndarray]:
        """Positions of this process's forward passes in ``step``. The copies of repeated augmentation go to different ones (as FAIR's)."""
        first = step * self.global_batch
        positions = np.arange(first, first + self.size(step))
        if self.recipe.aug_repeats > 1:
            return [positions[share :: self.shares] for share in range(self.world.rank, self.shares, self.world.size)]
        return np.array_split(positions, self.shares)[self.world.rank :: self.world.size]

    def size(self, step: int) -> int:
        """Samples of ``step`` on all processes."""
        return min(self.global_batch, self.samples - step * self.global_batch)

    def shifts(self, epoch: int) -> np.ndarray:
        """By how many pixels down and right each position of ``epoch`` is moved within a margin of ``shift``: [samples, 2]."""
        return np.random.default_rng(mix_seed(self.recipe.seed, epoch, 1)).integers(0, 2 * self.recipe.shift + 1, (self.samples, 2))
