"""The graphs of a train step, with MindCV's network and optimiser: gradients and update apart, so that a step can be skipped."""

from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

GROWTH_INTERVAL = 2000  # steps without overflow before the loss scale doubles, as in MindCV


class LossScale(nn.Cell):
    """The factor of the loss that keeps float16's small gradients; if ``dynamic``, halved by an overflow (not below 1), doubled after
    many steps without."""

    def __init__(self, first: float, dynamic: bool) -> None:
        super().__init__(auto_prefix=False)
        self.dynamic = dynamic
        self.value = Parameter(Tensor(first, ms.float32), name="loss_scale", requires_grad=False)
        self.good = Parameter(Tensor(0, ms.int32), name="loss_scale_good_steps", requires_grad=False)

    def construct(self, finite: Tensor) -> Tensor:
        """Take note of a step, whether its gradients were ``finite``."""
        if self.dynamic:
            good = ops.select(finite, self.good + 1, ops.zeros_like(self.good))
            grown = ops.select(good == GROWTH_INTERVAL, self.value * 2, self.value)
            ops.assign(self.value, ops.select(finite, grown, ops.maximum(self.value / 2, ops.ones_like(self.value))))
            ops.assign(self.good, good % GROWTH_INTERVAL)
        return finite


class EachMean(nn.Cell):
    """The mean of MindCV's binary cross-entropy over batch and classes.

    In PyNative mode MindSpore 2.10 divides the gradients of its own mean by the size of the first batch that the process has seen.
    """

    def __init__(self, loss: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.loss = loss
        loss.reduction = "none"

    def construct(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.loss(logits, targets).mean()


class Gradients(nn.Cell):
    """Images and targets to the loss and its gradients times ``share``, with the network and weights of a train step of MindCV's."""

    def __init__(self, step: Any, scale: LossScale) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.grad, self.weights, self.scale = step.network, step.grad, step.weights, scale

    def construct(self, images: Tensor, targets: Tensor, share: Tensor) -> tuple[Tensor, ...]:
        loss, scale = self.network(images, targets), self.scale.value
        gradients = self.grad(self.network, self.weights)(images, targets, ops.ones_like(loss) * ops.cast(scale, loss.dtype))
        return loss, _times(gradients, share / scale)


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


class WholeStep(nn.Cell):
    """A step in one graph, for MindSpore's own loop: one whose gradients are not finite changes no weight, and is counted."""

    def __init__(self, step: Any, scale: LossScale, clip: float | None, average: "Average | None", decay: float, warmup: bool) -> None:
        super().__init__(auto_prefix=False)
        self.gradients, self.mean, self.norm = Gradients(step, scale), Mean(step, 1), Norm()
        self.scale, self.update, self.optimizer, self.average = scale, Update(step, clip), step.optimizer, average
        self.decay, self.warmup, self.whole = decay, warmup, Tensor(1.0, ms.float32)
        self.updates = Parameter(Tensor(0, ms.float32), name="updates", requires_grad=False)
        self.skipped = Parameter(Tensor(0, ms.int32), name="skipped", requires_grad=False)
        self.skipped_in_row = Parameter(Tensor(0, ms.int32), name="skipped_in_row", requires_grad=False)
        self.longest_row = Parameter(Tensor(0, ms.int32), name="longest_row", requires_grad=False)

    def construct(self, images: Tensor, targets: Tensor) -> Tensor:
        loss, gradients = self.gradients(images, targets, self.whole)
        gradients = self.mean(*gradients)
        finite = ops.isfinite(self.norm(*gradients))
        hopeless = self.scale.value == 1 if self.scale.dynamic else ops.ones_like(finite)
        loss = ops.depend(loss, self.scale(finite))
        if finite:
            loss = ops.depend(loss, self.update(*gradients))
            ops.assign(self.skipped_in_row, ops.zeros_like(self.skipped_in_row))
            if self.average is not None:
                ops.assign_add(self.updates, ops.ones_like(self.updates))
                decay = self.decay * (1 - ops.exp(-self.updates / 2000)) if self.warmup else ops.ones_like(self.updates) * self.decay
                loss = ops.depend(loss, self.average(decay))
        else:
            ops.assign_add(self.optimizer.global_step, ops.ones_like(self.optimizer.global_step))  # the schedule goes on
            ops.assign_add(self.skipped, ops.ones_like(self.skipped))
            ops.assign(self.skipped_in_row, self.skipped_in_row + ops.cast(hopeless, ms.int32))
            ops.assign(self.longest_row, ops.maximum(self.longest_row, self.skipped_in_row))
        return loss


def _times(gradients: tuple[Tensor, ...], factor: float | Tensor) -> tuple[Tensor, ...]:
    scaled: tuple[Tensor, ...] = ()
    for gradient in gradients:
        scaled = scaled + (gradient * factor,)
    return scaled
