"""The MindSpore half of ``ascend.py``."""

from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

import convit.mindspore
from convit.dispatch import use_backend
from convit.kernels.gpsa.definition import relative_positions
from convit.mindspore.ops import gpsa

PACKAGES = ("mindspore", "mindcv", "te")
PEER = "mindcv"


def start(device: str) -> None:
    ms.set_device("Ascend" if device == "npu" else "CPU")
    ms.set_context(mode=ms.GRAPH_MODE)


def backends(device: str) -> tuple[str, ...]:
    return ("flash", "blocks", "akg", "tbe", "reference") if device == "npu" else ("blocks", "reference")


def synchronize() -> None:
    ms.runtime.synchronize()


def tensors(arrays: list[np.ndarray]) -> list[Tensor]:
    return [Tensor(x) for x in arrays]


def arrays(results: list[Tensor]) -> list[np.ndarray]:
    return [x.asnumpy() for x in results]


class Attend(nn.Cell):
    def __init__(self, grid: tuple[int, int], backend: str) -> None:
        super().__init__()
        self.grid, self.backend = grid, backend

    def construct(self, q, k, v, pos_weight, gating):
        return gpsa(q, k, v, pos_weight, gating, self.grid, backend=self.backend)


class Plain(nn.Cell):
    """The framework's fused attention, and the position softmax times v as one more product: what one would write without us."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.rel = Tensor(relative_positions(grid).reshape(-1, 3).T, ms.float32)

    def construct(self, q, k, v, pos_weight, gating):
        _, heads, tokens, dim = q.shape
        content = ops.flash_attention_score(q, k, v, heads, scalar_value=dim**-0.5, input_layout="BNSD")
        logits = ops.reshape(ops.matmul(pos_weight, self.rel), (1, heads, tokens, tokens))
        position = ops.matmul(ops.cast(ops.softmax(logits, -1), v.dtype), v)
        gate = ops.cast(ops.reshape(ops.sigmoid(gating), (1, -1, 1, 1)), v.dtype)
        return content + gate * (position - content)


class Weighted(nn.Cell):
    def __init__(self, attend: nn.Cell) -> None:
        super().__init__()
        self.attend = attend

    def construct(self, q, k, v, pos_weight, gating, weights):
        return ops.cast(self.attend(q, k, v, pos_weight, gating) * weights, ms.float32).sum()


def operator(backend: str, grid: tuple[int, int]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward of (q, k, v, pos_weight, gating), and the gradients for a further argument, that of the output."""
    attend = Plain(grid) if backend == "yardstick" else Attend(grid, backend)
    return attend, ms.grad(Weighted(attend), grad_position=(0, 1, 2, 3, 4))


def model(name: str, backend: str, batch: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward, and a training step, in float16 (O2)."""
    if backend == PEER:
        from mindcv.models import create_model

        net = create_model(name)
    else:
        net = convit.mindspore.create_model(name)
    images = Tensor(np.random.default_rng(0).standard_normal((batch, 3, 224, 224)), ms.float32)
    labels = ops.zeros((batch,), ms.int32)
    ms.amp.auto_mixed_precision(net, "O2")
    train = nn.TrainOneStepCell(nn.WithLossCell(net, nn.CrossEntropyLoss()), nn.SGD(net.trainable_params(), 1e-4))
    forced = None if backend == PEER else backend

    def forward() -> Tensor:
        net.set_train(False)
        with use_backend(forced):
            return net(images)

    def step() -> None:
        train.set_train()
        with use_backend(forced):
            train(images, labels)

    return forward, step
