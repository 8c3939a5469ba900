"""GPSA for any torch device from the framework's own parts, never N x N in our hands.

    out = (1 - g) * scaled_dot_product_attention(q, k, v) + g * (Py (x) Px) v

The content half is the framework's fused attention. The positional half contracts v with the factored position softmax
(``reference.position_tables``): first along y, then along x, O(N * (gh + gw) * D) per head. Gradients are autograd's.
Deviation from ``reference.py``: the halves are mixed after their products with v, not before, so attention dropout (one mask
over the mix) cannot be expressed.

The framework's fused attention has a first derivative in reverse mode and no other: for those the content half is formed in full, and
for tensors of a subclass (DTensor), which often knows no fused attention.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from convit.kernels.eager import eager, plain, tangents, transformed, without_autocast
from convit.kernels.gpsa.reference import plain_attention, position_tables

if TYPE_CHECKING:
    from convit.dispatch import Problem


class _SecondDerivative(torch.autograd.Function):
    """The identity of ``out``, the fused attention of q, k and v. Where a graph is made of the gradient, it is ``plain_attention``'s."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled() and not tangents():
            return grads[0], None, None, None, None
        pull = torch.func.vjp(lambda q, k, v: plain_attention(q, k, v, ctx.scale), *ctx.saved_tensors)[1]
        return None, *pull(grads[0]), None


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0) -> Tensor:
    """The framework's ``scaled_dot_product_attention``, with every derivative."""
    if tangents() or transformed() or not plain(q, k, v):
        return plain_attention(q, k, v, scale, dropout_p)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    if not out.requires_grad or dropout_p > 0 or not eager(q, k, v):
        return out
    result: Tensor = _SecondDerivative.apply(out, q, k, v, scale)
    return result


def why_not(problem: "Problem") -> str | None:
    if problem.framework != "torch":
        return "the tensors are not torch tensors"
    if problem.dropout_p > 0:
        return "attention dropout is not supported: one mask must cover both softmaxes"
    return None


def gpsa(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float, dropout_p: float
) -> Tensor:
    """Arguments as ``convit.gpsa`` checked them. Returns [B, H, N, D]."""
    (gh, gw), (batch, heads, _, dim) = grid, v.shape
    with without_autocast(q.device.type):
        dtype = torch.promote_types(v.dtype, torch.float32)
        px, py = position_tables(pos_weight.to(dtype), grid)
        gating = gating.to(dtype).view(1, heads, 1, 1)
        # along y, then along x: the second product then reads what the first wrote, without a copy
        columns = torch.matmul(py, v.to(dtype).reshape(batch, heads, gh, gw * dim)).view(batch, heads, gh, gw, dim)
        position = torch.matmul(px[:, None], columns).view(batch, heads, gh * gw, dim)
        content = fused_attention(q, k, v, scale).to(dtype)
        # from the larger share towards the smaller one: in float32, 1 - sigmoid has no digits left where it is small
        opened = gating > 0
        share = torch.sigmoid(torch.where(opened, -gating, gating))
        return torch.lerp(torch.where(opened, position, content), torch.where(opened, content, position), share).to(v.dtype)
