"""GPSA as the paper defines it, in MindSpore: what ``reference.py`` is for torch, for graph mode and pynative alike.

    content   Pc_ij = softmax_j(scale * q_i . k_j)
    position  P_ij  = softmax_j(w0 * dx + w1 * dy + w2 * (dx^2 + dy^2)),   dx = xj - xi, dy = yj - yi
    out_i           = sum_j ((1 - g) Pc + g P)_ij v_j,                     g = sigmoid(gating)

Both softmaxes are formed in full; attention dropout acts on the mix. Gradients are MindSpore's. Scores, softmaxes and the mix
are computed in float32 for narrower inputs, in the input's own type otherwise; one rounding at the end.
"""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

# Why a custom operator cannot serve a graph that was compiled for any batch
UNKNOWN_BATCH = "the batch is not known when the graph is compiled, and MindSpore's custom operators need it: leave out set_inputs"


@ms.constexpr
def relative_positions(grid: tuple[int, int], dtype: ms.Type) -> Tensor:
    """(dx, dy, dx^2 + dy^2) from patch i to patch j: [N, N, 3], patches in row-major order of ``grid`` (gh, gw)."""
    gh, gw = grid
    y, x = (axis.reshape(-1) for axis in np.meshgrid(np.arange(gh), np.arange(gw), indexing="ij"))
    dx = x[None, :] - x[:, None]
    dy = y[None, :] - y[:, None]
    return Tensor(np.stack([dx, dy, dx**2 + dy**2], axis=-1), dtype)


@ms.constexpr
def number(x: float, dtype: ms.Type) -> Tensor:
    """``x`` in full: MindSpore takes a Python number for a float32."""
    return Tensor(x, dtype)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """``ops.softmax``, but for one key, which has all the weight: in pynative mode MindSpore (2.7 to 2.10) takes wrong gradients of every
    softmax that comes after the gradient of such a one."""
    return ops.ones_like(x) if x.shape[axis] == 1 else ops.softmax(x, axis)


def why_not(problem: Any) -> str | None:
    if problem.framework != "mindspore":
        return "the tensors are not MindSpore tensors"
    return None


def attention_map(q: Tensor, k: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float) -> Tensor:
    """The gated mix of the two softmaxes, [B, H, N, N], in the type it is computed in."""
    dtype = ms.float64 if q.dtype == ms.float64 else ms.float32
    # ops.matmul has no gradient where all axes but one are 1
    scores = ops.BatchMatMul(transpose_b=True)(ops.cast(q, dtype), ops.cast(k, dtype)) * number(scale, dtype)
    content = softmax(scores)
    heads, tokens = q.shape[1], q.shape[2]
    rel = ops.reshape(relative_positions(grid, dtype), (tokens * tokens, 3))
    logits = ops.matmul(ops.cast(pos_weight, dtype), ops.swapaxes(rel, 0, 1))
    position = softmax(ops.reshape(logits, (1, heads, tokens, tokens)))
    gate = ops.reshape(ops.sigmoid(ops.cast(gating, dtype)), (1, heads, 1, 1))
    return (1 - gate) * content + gate * position


def gpsa(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float, dropout_p: float
) -> Tensor:
    """The definition; arguments as ``convit.mindspore.gpsa`` checked them. Returns [B, H, N, D]."""
    attn = attention_map(q, k, pos_weight, gating, grid, scale)
    if dropout_p > 0:
        attn = ops.dropout(attn, dropout_p)
    return ops.cast(ops.BatchMatMul()(attn, ops.cast(v, attn.dtype)), v.dtype)
