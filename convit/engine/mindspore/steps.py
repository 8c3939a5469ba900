"""The graphs of a train step, with MindCV's network and optimiser: gradients and update apart, so that a step can be skipped."""

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops


class Gradients(nn.Cell):
    """Images and targets to the loss and its gradients, with the network and weights of a train step of MindCV's."""

    def __init__(self, step: Any, scale: float) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.grad, self.weights, self.scale = step.network, step.grad, step.weights, scale

    def construct(self, images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        loss = self.network(images, targets)
        gradients = self.grad(self.network, self.weights)(images, targets, ops.ones_like(loss) * self.scale)
        if self.scale != 1.0:
            gradients = _times(gradients, 1 / self.scale)
        return loss, gradients


# gradients are handed over one by one: a graph takes a tuple for a constant, and is compiled anew for each


class Sum(nn.Cell):
    """Gradients of one batch, then of another, to their sums."""

    def construct(self, *gradients: Tensor) -> tuple[Tensor, ...]:
        half = len(gradients) // 2
        sums: tuple[Tensor, ...] = ()
        for i in range(half):
            sums = sums + (gradients[i] + gradients[half + i],)
        return sums


class Mean(nn.Cell):
    """Gradients, summed over ``count`` batches, to their means over batches and processes."""

    def __init__(self, step: Any, count: int) -> None:
        super().__init__(auto_prefix=False)
        self.reduce, self.count = step.grad_reducer, count

    def construct(self, *gradients: Tensor) -> tuple[Tensor, ...]:
        if self.count > 1:
            gradients = _times(gradients, 1 / self.count)
        return tuple(self.reduce(gradients))


class Norm(nn.Cell):
    """The norm of tensors taken together, in float32."""

    def construct(self, *tensors: Tensor) -> Tensor:
        total = ops.zeros((), ms.float32)
        for tensor in tensors:
            total = total + ops.square(ops.cast(tensor, ms.float32)).sum()
        return ops.sqrt(total)


class Update(nn.Cell):
    """Gradients to new weights."""

    def __init__(self, step: Any, clip: float | None) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer, self.clip = step.optimizer, clip

    def construct(self, *gradients: Tensor) -> Any:
        if self.clip is not None:
            gradients = ops.clip_by_global_norm(gradients, self.clip)
        return self.optimizer(gradients)


class Average(nn.Cell):
    """The moving average of the weights: each call moves it towards them."""

    def __init__(self, weights: Any) -> None:
        super().__init__(auto_prefix=False)
        self.weights = ms.ParameterTuple(weights)
        self.average = self.weights.clone("ema", init="same")

    def construct(self, decay: Tensor) -> Tensor:
        for i in range(len(self.weights)):
            ops.assign(self.average[i], self.average[i] * decay + self.weights[i] * (1 - decay))
        return decay

    def swap(self) -> None:
        """Exchange the weights with their average."""
        for weight, average in zip(self.weights, self.average, strict=True):
            mine, other = weight.asnumpy().copy(), average.asnumpy().copy()
            ops.assign(weight, Tensor(other))
            ops.assign(average, Tensor(mine))


def _times(gradients: tuple[Tensor, ...], factor: float) -> tuple[Tensor, ...]:
    scaled: tuple[Tensor, ...] = ()
    for gradient in gradients:
        scaled = scaled + (gradient * factor,)
    return scaled
