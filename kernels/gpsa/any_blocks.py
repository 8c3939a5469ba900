"""GPSA for MindSpore from plain products, never N x N: the content softmax in blocks of queries, the position softmax by its factors.

    out = (1 - g) softmax(scale q k^T) v + g (Py (x) Px) v

``content`` holds the scores of one block of queries at a time, forward and backward: saved are q, k and v alone, and the backward
pass forms each block again. ``mixed`` contracts v with the factored position softmax, along y and then along x, in
O(N (gh + gw) D) a head, and mixes the halves. All in float32 for narrower inputs, in the input's own type otherwise; one rounding
at the end. Deviation from ``any_mindspore.py``: the halves are mixed after their products with v, so there is no attention dropout.
"""

from functools import lru_cache
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from convit.kernels.gpsa.any_mindspore import softmax

# Rows of a block, and the most blocks: they are unrolled in a graph
_ROWS = 128
_MOST_BLOCKS = 32


def rows_per_block(tokens: int) -> int:
    """Queries of one block: as few blocks as hold ``_ROWS`` each, of about equal size."""
    blocks = min(-(-tokens // _ROWS), _MOST_BLOCKS)
    return -(-tokens // blocks)


class _Content(nn.Cell):
    """softmax(scale q k^T) v for q, k, v [B, H, N, D] of one type, ``rows`` queries at a time."""

    def __init__(self, scale: float, rows: int, dtype: ms.Type) -> None:
        super().__init__()
        self.scale, self.rows = Tensor(scale, dtype), rows  # a Python number would be a float32
        # primitives: functions of mindspore.ops do not compile inside a bprop
        self.softmax = ops.Softmax(-1)
        self.matmul = ops.BatchMatMul()
        self.matmul_nt = ops.BatchMatMul(transpose_b=True)
        self.matmul_tn = ops.BatchMatMul(transpose_a=True)
        self.concat = ops.Concat(2)
        self.sum = ops.ReduceSum(keep_dims=True)

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ()
        for start in range(0, q.shape[2], self.rows):
            block = q[:, :, start : start + self.rows] * self.scale
            out += (self.matmul(self.softmax(self.matmul_nt(block, k)), v),)  # type: ignore[assignment]
        return self.concat(out)

    def bprop(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (), ops.zeros_like(k), ops.zeros_like(v)
        for start in range(0, q.shape[2], self.rows):
            block = q[:, :, start : start + self.rows] * self.scale
            grad = dout[:, :, start : start + self.rows]
            attn = self.softmax(self.matmul_nt(block, k))
            dattn = self.matmul_nt(grad, v)
            dscores = attn * (dattn - self.sum(attn * dattn, -1))
            dq += (self.matmul(dscores, k) * self.scale,)  # type: ignore[assignment]
            dk = dk + self.matmul_tn(dscores, block)
            dv = dv + self.matmul_tn(attn, grad)
        return self.concat(dq), dk, dv


@lru_cache(256)
def _build_content(scale: float, rows: int, dtype: ms.Type) -> _Content:
    return _Content(scale, rows, dtype)


@ms.constexpr
def _content(scale: float, tokens: int, dtype: ms.Type) -> _Content:
    return _build_content(scale, rows_per_block(tokens), dtype)


@ms.constexpr
def _axis(size: int, dtype: ms.Type) -> Tensor:
    """Offsets from each place of an axis to each other, [1, size, size]."""
    return Tensor((np.arange(size) - np.arange(size)[:, None])[None], dtype)


def _table(size: int, linear: Tensor, square: Tensor) -> Tensor:
    """One factor of the position softmax, [H, size, size], from the weights of d and d^2 [H]."""
    d = _axis(size, linear.dtype)
    return softmax(ops.reshape(linear, (-1, 1, 1)) * d + ops.reshape(square, (-1, 1, 1)) * (d * d))


def positional(v: Tensor, pos_weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """(Py (x) Px) v for v [B, H, N, D] and ``pos_weight`` [H, 3] of one type."""
    (gh, gw), (batch, heads, tokens, dim) = grid, v.shape
    out = v
    # Along y, then along x: the second product then reads what the first wrote, without a copy. The table of an axis of one place is
    # one, and left out. A table needs all axes of what it multiplies: with fewer, MindSpore's gradient fails where there is one head.
    if gh > 1:
        py = _table(gh, pos_weight[:, 1], pos_weight[:, 2])
        out = ops.matmul(py, ops.reshape(out, (batch, heads, gh, gw * dim)))
    if gw > 1:
        px = _table(gw, pos_weight[:, 0], pos_weight[:, 2])
        out = ops.matmul(ops.reshape(px, (1, heads, 1, gw, gw)), ops.reshape(out, (batch, heads, gh, gw, dim)))
    return ops.reshape(out, (batch, heads, tokens, dim))


def mixed(content: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1 - g) content + g (Py (x) Px) v for content and v [B, H, N, D], in the type of ``v``."""
    dtype = ms.float64 if v.dtype == ms.float64 else ms.float32
    position = positional(ops.cast(v, dtype), ops.cast(pos_weight, dtype), grid)
    gating = ops.reshape(ops.cast(gating, dtype), (1, -1, 1, 1))
    gate, content_gate = ops.sigmoid(gating), ops.sigmoid(-gating)  # 1 - gate would have no digits where the gate is near 1
    return ops.cast(content_gate * ops.cast(content, dtype) + gate * position, v.dtype)


def why_not(problem: Any) -> str | None:
    if problem.framework != "mindspore":
        return "the tensors are not MindSpore tensors"
    if problem.dropout_p > 0:
        return "attention dropout is not supported: one mask must cover both softmaxes"
    if 0 in (problem.batch, problem.tokens):
        return "empty tensors are not supported"
    return None


def content(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v, [B, H, N, D], in the type it is computed in."""
    dtype = ms.float64 if q.dtype == ms.float64 else ms.float32
    return _content(scale, q.shape[2], dtype)(ops.cast(q, dtype), ops.cast(k, dtype), ops.cast(v, dtype))


def gpsa(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float, dropout_p: float
) -> Tensor:
    """Arguments as ``convit.mindspore.gpsa`` checked them. Returns [B, H, N, D]."""
    return mixed(content(q, k, v, scale), v, pos_weight, gating, grid)


def attention_packed(qkv: Tensor, scale: float, dropout_p: float) -> Tensor:
    """Plain attention: qkv [B, N, 3, H, D] to [B, N, H, D]."""
    q, k, v = ops.unstack(ops.transpose(qkv, (2, 0, 3, 1, 4)))
    return ops.cast(ops.transpose(content(q, k, v, scale), (0, 2, 1, 3)), qkv.dtype)
