"""GPSA on CPU for MindSpore: the C++ kernels of ``csrc/gpsa.h`` as custom operators, in graph mode and pynative.

    out, lse [B, H, N] = forward(q, k, v, pos_weight [H, 3], gating [H], settings)
    dq, dk, dv, dpos_weight, dgating = backward(grad_out, q, k, v, pos_weight, gating, settings, lse)

q, k, v and out are [B, N, H, D] (``gpsa_bnhd``, what the projections give, nothing is transposed) or [B, H, N, D] (``gpsa``);
settings is the constant [grid_h, grid_w, scale]. ``lse`` is the float32 log-sum-exp of the scaled content scores.

Deviations from ``reference_mindspore.py``: no attention dropout, no float16, no second derivative.
"""

from functools import lru_cache

import mindspore as ms
from mindspore import Tensor, ops

from convit.kernels import aot


@lru_cache(None)
def _build(heads_first: bool) -> ops.Custom:
    layout = "bhnd" if heads_first else "bnhd"

    def forward_shapes(q, k, v, pos_weight, gating, settings):
        return q, ([q[0], q[1], q[2]] if heads_first else [q[0], q[2], q[1]])

    def forward_types(q, k, v, pos_weight, gating, settings):
        return q, ms.float32

    def gradients(grad_out, q, k, v, pos_weight, gating, settings, lse):
        return q, k, v, pos_weight, gating

    backward = ops.Custom(aot.symbol(f"convit_gpsa_backward_{layout}"), gradients, gradients, func_type="aot")

    def bprop(q, k, v, pos_weight, gating, settings, outputs, grads):
        dq, dk, dv, dpos_weight, dgating = backward(grads[0], q, k, v, pos_weight, gating, settings, outputs[1])
        return dq, dk, dv, dpos_weight, dgating, ops.zeros_like(settings)

    return ops.Custom(aot.symbol(f"convit_gpsa_forward_{layout}"), forward_shapes, forward_types, func_type="aot", bprop=bprop)


@lru_cache(256)
def _build_settings(grid: tuple[int, int], scale: float) -> Tensor:
    return Tensor([float(grid[0]), float(grid[1]), scale], ms.float32)


@ms.constexpr
def _operator(heads_first: bool) -> ops.Custom:
    return _build(heads_first)


@ms.constexpr
def _settings(grid: tuple[int, int], scale: float) -> Tensor:
    return _build_settings(tuple(grid), scale)


def why_not(problem) -> str | None:
    if problem.framework != "mindspore":
        return "the tensors are not MindSpore tensors"
    if problem.device != "cpu":
        return f"it runs on CPU and device_target is {problem.device}: mindspore.set_context(device_target='CPU')"
    if problem.dtype not in ("float32", "bfloat16"):
        return f"{problem.dtype} is not supported (float32 and bfloat16 are)"
    if problem.dropout_p > 0:
        return "attention dropout is not supported: no N x N mask is formed"
    path, reason = aot.library()
    return None if path else reason


def gpsa(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float, dropout_p: float
) -> Tensor:
    """Arguments as ``convit.mindspore.gpsa`` checked them, [B, H, N, D]. Returns [B, H, N, D]."""
    pos_weight, gating = ops.cast(pos_weight, ms.float32), ops.cast(gating, ms.float32)
    return _operator(True)(q, k, v, pos_weight, gating, _settings(grid, scale))[0]


def gpsa_bnhd(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float, dropout_p: float
) -> Tensor:
    """The same with q, k, v and the output [B, N, H, D]."""
    pos_weight, gating = ops.cast(pos_weight, ms.float32), ops.cast(gating, ms.float32)
    return _operator(False)(q, k, v, pos_weight, gating, _settings(grid, scale))[0]
