"""GPSA on CPU for MindSpore: the C++ kernels of ``csrc/gpsa.h`` as custom operators, in graph mode and pynative.

    out, lse [B, H, N] = forward(q, k, v, pos_weight [H, 3], gating [H], settings)
    dq, dk, dv, dpos_weight, dgating = backward(grad_out, q, k, v, pos_weight, gating, settings, lse)

q, k, v and out are [B, H, N, D] (``gpsa``), or q, k and v lie in one [B, N, 3, H, D], as one matrix product gives them, and out is
[B, N, H, D] (``gpsa_packed``; nothing is transposed). settings is the constant [grid_h, grid_w, scale]. ``lse`` is the float32
log-sum-exp of the scaled content scores. With the gate closed, the same kernel is plain attention (``attention_packed``).

Deviations from ``any_mindspore.py``: no attention dropout, no float16, no second derivative.
"""

from functools import lru_cache
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from convit.kernels import aot
from convit.kernels.gpsa.any_mindspore import UNKNOWN_BATCH


@lru_cache(None)
def _build() -> ops.Custom:
    def outputs(q, k, v, pos_weight, gating, settings):
        return q, q[:3]

    def output_types(q, k, v, pos_weight, gating, settings):
        return q, ms.float32

    def gradients(grad_out, q, k, v, pos_weight, gating, settings, lse):
        return q, k, v, pos_weight, gating

    backward = ops.Custom(aot.symbol("convit_gpsa_backward"), gradients, gradients, func_type="aot")

    def bprop(q, k, v, pos_weight, gating, settings, results, grads):
        dq, dk, dv, dpos_weight, dgating = backward(grads[0], q, k, v, pos_weight, gating, settings, results[1])
        return dq, dk, dv, dpos_weight, dgating, ops.zeros_like(settings)

    return ops.Custom(aot.symbol("convit_gpsa_forward"), outputs, output_types, func_type="aot", bprop=bprop)


@lru_cache(None)
def _build_packed() -> ops.Custom:
    def outputs(qkv, pos_weight, gating, settings):
        return [qkv[0], qkv[1], qkv[3], qkv[4]], [qkv[0], qkv[3], qkv[1]]

    def output_types(qkv, pos_weight, gating, settings):
        return qkv, ms.float32

    def gradients(grad_out, qkv, pos_weight, gating, settings, lse):
        return qkv, pos_weight, gating

    backward = ops.Custom(aot.symbol("convit_gpsa_packed_backward"), gradients, gradients, func_type="aot")

    def bprop(qkv, pos_weight, gating, settings, results, grads):
        dqkv, dpos_weight, dgating = backward(grads[0], qkv, pos_weight, gating, settings, results[1])
        return dqkv, dpos_weight, dgating, ops.zeros_like(settings)

    return ops.Custom(aot.symbol("convit_gpsa_packed_forward"), outputs, output_types, func_type="aot", bprop=bprop)


@lru_cache(256)
def _build_settings(grid: tuple[int, int], scale: float) -> Tensor:
    return Tensor([float(grid[0]), float(grid[1]), scale], ms.float32)


@lru_cache(None)
def _build_closed(heads: int) -> tuple[Tensor, Tensor]:
    return Tensor(np.zeros((heads, 3), np.float32)), Tensor(np.full(heads, -np.inf, np.float32))


@ms.constexpr
def _operator() -> ops.Custom:
    return _build()


@ms.constexpr
def _packed_operator() -> ops.Custom:
    return _build_packed()


@ms.constexpr
def _settings(grid: tuple[int, int], scale: float) -> Tensor:
    return _build_settings(tuple(grid), scale)


@ms.constexpr
def _closed(heads: int) -> tuple[Tensor, Tensor]:
    """Position weights and gating of ``heads`` heads that do not look at the position."""
    return _build_closed(heads)


def why_not(problem: Any) -> str | None:
    if problem.framework != "mindspore":
        return "the tensors are not MindSpore tensors"
    if problem.device != "cpu":
        return f"it runs on CPU and device_target is {problem.device}: mindspore.set_context(device_target='CPU')"
    if problem.dtype not in ("float32", "bfloat16"):
        return f"{problem.dtype} is not supported (float32 and bfloat16 are)"
    if problem.batch is None:
        return UNKNOWN_BATCH
    if problem.dropout_p > 0:
        return "attention dropout is not supported: no N x N mask is formed"
    path, reason = aot.library()
    return None if path else reason


def gpsa(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float, dropout_p: float
) -> Tensor:
    """Arguments as ``convit.mindspore.gpsa`` checked them, [B, H, N, D]. Returns [B, H, N, D]."""
    pos_weight, gating = ops.cast(pos_weight, ms.float32), ops.cast(gating, ms.float32)
    return _operator()(q, k, v, pos_weight, gating, _settings(grid, scale))[0]


def gpsa_packed(qkv: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float, dropout_p: float) -> Tensor:
    """The same with q, k and v in one [B, N, 3, H, D]. Returns [B, N, H, D]."""
    pos_weight, gating = ops.cast(pos_weight, ms.float32), ops.cast(gating, ms.float32)
    return _packed_operator()(qkv, pos_weight, gating, _settings(grid, scale))[0]


def attention_packed(qkv: Tensor, scale: float, dropout_p: float) -> Tensor:
    """Plain attention: qkv [B, N, 3, H, D] to [B, N, H, D]."""
    pos_weight, gating = _closed(qkv.shape[3])
    return _packed_operator()(qkv, pos_weight, gating, _settings((1, qkv.shape[1]), scale))[0]
