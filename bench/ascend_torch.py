"""The PyTorch half of ``ascend.py``: torch_npu and triton-ascend."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import convit
from convit.kernels.gpsa.reference import relative_positions

PACKAGES = ("torch", "torch-npu", "triton-ascend", "triton", "timm")
PEER = "timm"


def start(device: str) -> None:
    global _device
    _device = device
    if device == "npu":
        import torch_npu  # noqa: F401


def backends(device: str) -> tuple[str, ...]:
    return ("triton", "sdpa", "reference") if device == "npu" else ("sdpa", "reference")


def synchronize() -> None:
    if _device == "npu":
        torch.npu.synchronize()


def tensors(arrays: list[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(x).to(_device) for x in arrays]


def arrays(results: list[Tensor]) -> list[np.ndarray]:
    return [x.detach().cpu().numpy() for x in results]


def operator(backend: str, grid: tuple[int, int]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward of (q, k, v, pos_weight, gating), and the gradients for a further argument, that of the output."""

    def plain(q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor) -> Tensor:
        """The framework's fused attention, and the position softmax times v as one more product: what one would write without us."""
        rel = relative_positions(grid, q.device).to(pos_weight.dtype)
        position = torch.einsum("ijc,hc->hij", rel, pos_weight).softmax(-1).to(v.dtype) @ v
        return torch.lerp(F.scaled_dot_product_attention(q, k, v), position, gating.sigmoid().to(v.dtype).view(1, -1, 1, 1))

    def attend(*inputs: Tensor) -> Tensor:
        return plain(*inputs) if backend == "yardstick" else convit.gpsa(*inputs, grid, backend=backend)

    def forward(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return attend(*inputs)

    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs[:5]]
        return torch.autograd.grad(attend(*leaves), leaves, inputs[5])

    return forward, gradients


def model(name: str, backend: str, batch: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward, and a training step, under autocast to float16 (bfloat16 on CPU)."""
    if backend == PEER:
        import timm

        net = timm.create_model(name)
    else:
        net = convit.create_model(name)
    net = net.to(_device)
    images, labels = torch.randn(batch, 3, 224, 224).to(_device), torch.zeros(batch, dtype=torch.long).to(_device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    forced, half = None if backend == PEER else backend, torch.float16 if _device == "npu" else torch.bfloat16

    def forward() -> Tensor:
        with torch.no_grad(), convit.use_backend(forced), torch.autocast(_device, half):
            return net(images)

    def step() -> None:
        optimizer.zero_grad()
        with convit.use_backend(forced):
            with torch.autocast(_device, half):
                loss = F.cross_entropy(net(images), labels)
            loss.backward()
        optimizer.step()

    return forward, step
