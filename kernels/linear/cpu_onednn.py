"""Linear layers of PyTorch on CPU through oneDNN, forward and backward, the GELU in the same pass where no gradient is wanted.

    y [..., O] = x [..., I] weight^T [I, O] + bias [O];   y = gelu(y), exact or with the tanh

PyTorch leaves float32 products to MKL, which on processors of other makers falls back to slower code: on an AMD Zen 5 it reaches 0.43
of the rate of oneDNN, with AVX2 alone 0.85. PyTorch contains oneDNN too, behind the operator that its compiler uses for the same purpose.
The weight is given to it as it is: packing it beforehand gains under 5 %, and a packed copy could be stale.
"""

from typing import Any

import torch
from torch import Tensor, nn

from convit.kernels.eager import batched_gradient, eager, replaced_functions


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None = None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], gelu or "")
    return y


class _Linear(torch.autograd.Function):
    """The product and its gradients: by the same product, or PyTorch's own where a mode, a transform or a tangent is to see it.

    As PyTorch's own it saves ``x`` for the weight's gradient only and the weight for that of ``x``: what is not saved may be written to.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.shape = x.shape
        return _product(x.flatten(0, -2), weight, bias)  # of rows: of more dimensions it is a view, which nobody may write to

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grads[0].contiguous()
        product = _Linear.apply if eager(rows, x, weight) and not batched_gradient(rows) else _plain
        dx = product(rows, weight.t(), None).view(ctx.shape) if needs_x else None
        dweight = product(rows.t(), x.flatten(0, -2).t(), None) if needs_weight else None
        return dx, dweight, rows.sum(0) if needs_bias else None


def _plain(x: Tensor, weight: Tensor, _: None) -> Tensor:
    return x @ weight.t()


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why ``linear`` cannot take these tensors, or should not; ``None`` if it can."""
    if not x.is_cpu or x.layout != torch.strided or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"{x.layout} {x.dtype} on {x.device}: dense float32 on CPU only"
    dense = weight.layout == torch.strided and weight.is_cpu and weight.ndim == 2 and weight.is_contiguous()
    if not dense or x.ndim < 2 or x.shape[-1] != weight.shape[1]:
        return f"the weight must be contiguous [O, I] on CPU, x [..., I]; got {list(weight.shape)} and {list(x.shape)}"
    if bias is not None and not (bias.dtype == torch.float32 and bias.is_cpu and bias.shape == weight.shape[:1] and bias.is_contiguous()):
        return f"the bias must be contiguous float32 [{len(weight)}]"
    if not eager(x, weight, bias) or replaced_functions():
        return "a compiler, mode, transform, tensor subclass or somebody's own function chooses the product"
    if x.numel() == 0 or weight.numel() == 0:
        return f"nothing to gain for shape {list(x.shape)}"
    if not (torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return "this PyTorch has no oneDNN, or it is switched off"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the type of the product"
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None = None) -> Tensor:
    """The formula of the module's docstring; ``gelu`` is None, "none" (exact) or "tanh", as in ``torch.nn.functional.gelu``."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y = _Linear.apply(x, weight, bias).view(*x.shape[:-1], len(weight))
        return nn.functional.gelu(y, approximate=gelu) if gelu else y
    return _product(x, weight, bias, gelu)
