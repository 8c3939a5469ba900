"""GPSA for any torch device from the framework's own parts, never N x N in our hands.

    out = (1 - g) * scaled_dot_product_attention(q, k, v) + g * (Py (x) Px) v

The content half is the framework's fused attention. The positional half contracts v with the factored position softmax
(``reference.position_tables``): first along y, then along x, O(N * (gh + gw) * D) per head. Gradients are autograd's.
Deviation from ``reference.py``: the halves are mixed after their products with v, not before, so attention dropout (one mask
over the mix) cannot be expressed.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from convit.kernels.gpsa.reference import position_tables


def why_not(problem) -> str | None:
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
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(v.dtype, torch.float32)
        px, py = position_tables(pos_weight.to(dtype), grid)
        gate = torch.sigmoid(gating.to(dtype)).view(1, heads, 1, 1)
        # along y, then along x: the second product then reads what the first wrote, without a copy
        columns = torch.matmul(py, v.to(dtype).reshape(batch, heads, gh, gw * dim)).view(batch, heads, gh, gw, dim)
        position = torch.matmul(px[:, None], columns).view(batch, heads, gh * gw, dim)
        content = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return torch.lerp(content.to(dtype), position, gate).to(v.dtype)
