"""GPSA as the paper defines it: the definition every kernel is checked against.

d'Ascoli et al. 2021 (arXiv:2103.10697), equations 7 and 8. Per head, for patches i and j of a grid:

    content   Pc_ij = softmax_j(scale * q_i . k_j)
    position  P_ij  = softmax_j(w0 * dx + w1 * dy + w2 * (dx^2 + dy^2)),   dx = xj - xi, dy = yj - yi
    out_i           = sum_j ((1 - g) Pc + g P)_ij v_j,                     g = sigmoid(gating)

Both softmaxes are formed in full. The implementations in the wild divide the mix by its row sum afterwards; that sum is one, so
nothing is divided here. Attention dropout acts on the mix. Gradients are autograd's. Scores, softmaxes and the mix are
computed in float32 for narrower inputs, in the input's own type otherwise; one rounding at the end.

``position_tables`` gives the exact factors of the position softmax that the fast paths use in place of the N x N matrix.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from convit.kernels.eager import without_autocast

if TYPE_CHECKING:
    from convit.dispatch import Problem


def relative_positions(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """(dx, dy, dx^2 + dy^2) from patch i to patch j: [N, N, 3] integers, patches in row-major order of ``grid`` (gh, gw)."""
    gh, gw = grid
    y, x = torch.meshgrid(torch.arange(gh, device=device), torch.arange(gw, device=device), indexing="ij")
    x, y = x.reshape(-1), y.reshape(-1)
    dx = x[None, :] - x[:, None]
    dy = y[None, :] - y[:, None]
    return torch.stack([dx, dy, dx**2 + dy**2], dim=-1)


def position_attention(pos_weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """The position softmax P, [H, N, N], from ``pos_weight`` [H, 3]."""
    rel = relative_positions(grid, pos_weight.device).to(pos_weight.dtype)
    return torch.einsum("ijc,hc->hij", rel, pos_weight).softmax(dim=-1)


def position_tables(pos_weight: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Factors of the position softmax: Px [H, gw, gw] and Py [H, gh, gh], with P = Py (x) Px exactly.

    The logits are a sum of a function of dx and one of dy, so their softmax over a rectangular grid is the product of the
    softmaxes along each axis.
    """
    gh, gw = grid

    def table(size: int, linear: Tensor) -> Tensor:
        r = torch.arange(size, device=pos_weight.device, dtype=pos_weight.dtype)
        d = r[None, :] - r[:, None]
        return (linear[:, None, None] * d + pos_weight[:, 2, None, None] * d**2).softmax(dim=-1)

    return table(gw, pos_weight[:, 0]), table(gh, pos_weight[:, 1])


def why_not(problem: "Problem") -> str | None:
    if problem.framework != "torch":
        return "the tensors are not torch tensors"
    return None


def gated_mix(q: Tensor, k: Tensor, position: Tensor, gating: Tensor, scale: float) -> Tensor:
    """(1 - g) Pc + g P, [B, H, N, N], from the position softmax P [H, N, N] or [B, H, N, N], in the type it is computed in."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    content = ((q.to(dtype) @ k.to(dtype).transpose(-2, -1)) * scale).softmax(dim=-1)
    gate = torch.sigmoid(gating.to(dtype)).view(1, -1, 1, 1)
    return (1 - gate) * content + gate * position.to(dtype)


def attention_map(q: Tensor, k: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float) -> Tensor:
    """The gated mix of the two softmaxes, [B, H, N, N], in the type it is computed in."""
    position = position_attention(pos_weight.to(torch.promote_types(q.dtype, torch.float32)), grid)
    return gated_mix(q, k, position, gating, scale)


def gpsa(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float, dropout_p: float
) -> Tensor:
    """The definition; arguments as ``convit.gpsa`` checked them. Returns [B, H, N, D]."""
    with without_autocast(q.device.type):
        attn = F.dropout(attention_map(q, k, pos_weight, gating, grid, scale), dropout_p)
        return (attn @ v.to(attn.dtype)).to(v.dtype)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0) -> Tensor:
    """softmax(scale q k^T) v formed in full, in float32 for narrower inputs: differentiable to any order, in any mode."""
    with without_autocast(q.device.type):
        dtype = torch.promote_types(v.dtype, torch.float32)
        attn = ((q.to(dtype) @ k.to(dtype).transpose(-2, -1)) * scale).softmax(dim=-1)
        return (F.dropout(attn, dropout_p) @ v.to(dtype)).to(v.dtype)
