"""GPSA for MindSpore on Ascend with its fused part as TBE operators, for installations whose AKG does not compile for the chip.

The operators, their layout (keys by queries, queries on the lanes), their arithmetic and the gradient are those of ``ascend_akg``;
here each is a compute function over the names of ``tbe.dsl``, scheduled by TBE's ``auto_schedule`` and built by CANN when MindSpore
first runs it. A function takes the DSL as its first argument, so that it can be evaluated without CANN.
Row vectors come with their missing axes as ones: px [M, 1, gw, L], py [M, gh, 1, L], g and delta [M, 1, 1, L].

The entry functions follow TBE's convention: a dict (shape, dtype, format ...) for each input and output, then ``kernel_name``.
"""

import importlib.util
import os
from typing import Any

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops import CustomRegOp, DataType

from convit.kernels.gpsa import ascend_akg
from convit.kernels.gpsa.any_mindspore import UNKNOWN_BATCH

KEYS = [1, 2]  # the axes of the keys
_DTYPES = {"float16": DataType.F16_Default, "float32": DataType.F32_Default}


def _shape(x) -> list[int]:
    return [int(n) for n in x.shape]


def _exponentials(dsl, s):
    """exp(s - max) [M, gh, gw, L] and its sum over the keys [M, 1, 1, L], in float32."""
    s = dsl.cast_to(s, "float32")
    top = dsl.broadcast(dsl.reduce_max(s, KEYS, keepdims=True), _shape(s))
    e = dsl.vexp(dsl.vsub(s, top))
    return e, dsl.reduce_sum(e, KEYS, keepdims=True)


def _content_weight(dsl, g, total):
    """(1 - g) / total, [M, 1, 1, L]."""
    return dsl.vdiv(dsl.vadds(dsl.vmuls(g, -1.0), 1.0), total)


def mix_compute(dsl, s, px, py, g):
    shape = _shape(s)
    e, total = _exponentials(dsl, s)
    content = dsl.vmul(e, dsl.broadcast(_content_weight(dsl, g, total), shape))
    tall = [shape[0], shape[1], 1, shape[3]]
    gated = dsl.vmul(py, dsl.broadcast(g, tall))
    position = dsl.vmul(dsl.broadcast(gated, shape), dsl.broadcast(px, shape))
    return dsl.cast_to(dsl.vadd(content, position), s.dtype)


def delta_compute(dsl, s, g, da):
    e, total = _exponentials(dsl, s)
    dot = dsl.reduce_sum(dsl.vmul(e, dsl.cast_to(da, "float32")), KEYS, keepdims=True)
    return dsl.vdiv(dot, total)


def dscores_compute(dsl, s, g, delta, da):
    shape = _shape(s)
    e, total = _exponentials(dsl, s)
    content = dsl.vmul(e, dsl.broadcast(_content_weight(dsl, g, total), shape))
    excess = dsl.vsub(dsl.cast_to(da, "float32"), dsl.broadcast(delta, shape))
    return dsl.cast_to(dsl.vmul(content, excess), s.dtype)


def dpx_compute(dsl, da, px, py):
    return dsl.reduce_sum(dsl.vmul(dsl.cast_to(da, "float32"), dsl.broadcast(py, _shape(da))), [1], keepdims=True)


def dpy_compute(dsl, da, px, py):
    return dsl.reduce_sum(dsl.vmul(dsl.cast_to(da, "float32"), dsl.broadcast(px, _shape(da))), [2], keepdims=True)


COMPUTE = {"mix": mix_compute, "delta": delta_compute, "dscores": dscores_compute, "dpx": dpx_compute, "dpy": dpy_compute}


def _build(compute, inputs: list[dict[str, Any]], output: dict[str, Any], kernel_name: str) -> None:
    """Schedule and build one operator with CANN's TBE.

    Raises:
        ValueError: A dtype that the operators do not take.
    """
    from tbe import dsl, tvm

    for x in (*inputs, output):
        if x["dtype"].lower() not in _DTYPES:
            raise ValueError(f"{kernel_name}: dtypes are {' and '.join(_DTYPES)}, got {x['dtype']}")
    tensors = [tvm.placeholder(x["shape"], name=f"x{i}", dtype=x["dtype"].lower()) for i, x in enumerate(inputs)]
    result = compute(dsl, *tensors)
    with tvm.target.cce():
        schedule = dsl.auto_schedule(result)
    dsl.build(schedule, {"name": kernel_name, "tensor_list": [*tensors, result]})


def gpsa_mix(s, px, py, g, out, kernel_name="gpsa_mix"):
    _build(mix_compute, [s, px, py, g], out, kernel_name)


def gpsa_delta(s, g, da, out, kernel_name="gpsa_delta"):
    _build(delta_compute, [s, g, da], out, kernel_name)


def gpsa_dscores(s, g, delta, da, out, kernel_name="gpsa_dscores"):
    _build(dscores_compute, [s, g, delta, da], out, kernel_name)


def gpsa_dpx(da, px, py, out, kernel_name="gpsa_dpx"):
    _build(dpx_compute, [da, px, py], out, kernel_name)


def gpsa_dpy(da, px, py, out, kernel_name="gpsa_dpy"):
    _build(dpy_compute, [da, px, py], out, kernel_name)


ENTRY = {"mix": gpsa_mix, "delta": gpsa_delta, "dscores": gpsa_dscores, "dpx": gpsa_dpx, "dpy": gpsa_dpy}


def op_info(name: str) -> dict[str, Any]:
    """MindSpore's registration of operator ``name``: scores in float16 or float32, everything else in float32."""
    _, inputs, output = ascend_akg.OPERATORS[name]
    info = CustomRegOp(f"Gpsa{name.capitalize()}")
    for i, x in enumerate(inputs):
        info = info.input(i, x, "required")
    info = info.output(0, "out", "required")
    for dtype in _DTYPES.values():
        info = info.dtype_format(*(dtype if x in ("s", "da") else DataType.F32_Default for x in (*inputs, output)))
    registered: dict[str, Any] = info.target("Ascend").get_op_info()
    return registered


def tensors(name: str, maps: int, grid: tuple[int, int], lanes: int, dtype: str) -> list[tuple[list[int], str]]:
    """``ascend_akg.tensors`` with the missing axes of the rows as ones."""
    gh, gw = grid
    axes = {"px": [maps, 1, gw, lanes], "py": [maps, gh, 1, lanes], "g": [maps, 1, 1, lanes], "delta": [maps, 1, 1, lanes]}
    _, inputs, output = ascend_akg.OPERATORS[name]
    flat = ascend_akg.tensors(name, maps, grid, lanes, dtype)
    return [(axes.get(x, shape), kind) for x, (shape, kind) in zip((*inputs, output), flat, strict=True)]


def operator(name: str, maps: int, grid: tuple[int, int], lanes: int, dtype: str, bprop=None) -> ops.Custom:
    """The custom operator ``name``; constructing it needs no CANN, running it does."""
    shape, out_dtype = tensors(name, maps, grid, lanes, dtype)[-1]
    kind = getattr(ms, out_dtype)
    return ops.Custom(ENTRY[name], lambda *_: shape, lambda *_: kind, func_type="tbe", bprop=bprop, reg_info=op_info(name))


@ms.constexpr
def _mix(maps: int, grid: tuple[int, int], lanes: int, dtype: str) -> ops.Custom:
    delta, dscores, dpx, dpy = (operator(name, maps, grid, lanes, dtype) for name in ("delta", "dscores", "dpx", "dpy"))

    def bprop(s, px, py, g, out, da):
        d = delta(s, g, da)
        u = dpx(da, px, py)
        return dscores(s, g, d, da), g * u, g * dpy(da, px, py), ops.reduce_sum(px * u, (1, 2), True) - d

    return operator("mix", maps, grid, lanes, dtype, bprop)


def why_not(problem: Any) -> str | None:
    if problem.framework != "mindspore":
        return "the tensors are not MindSpore tensors"
    if problem.device != "ascend":
        return f"TBE operators run on Ascend only, the device target is {problem.device}"
    if problem.dtype not in _DTYPES:
        return f"{problem.dtype} is not supported ({' or '.join(_DTYPES)})"
    if problem.batch is None:
        return UNKNOWN_BATCH
    if problem.tokens * problem.batch == 0:
        return "empty tensors are not supported"
    if (reason := ascend_akg.not_taken("tbe")) is not None:
        return reason
    if importlib.util.find_spec("tbe") is None:
        where = "in this Python" if os.environ.get("ASCEND_HOME_PATH") else "in this shell: source Ascend's set_env.sh"
        return f"CANN's package tbe is not set up {where}"
    return None


def gpsa(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float, dropout_p: float
) -> Tensor:
    """Arguments as ``convit.mindspore.gpsa`` checked them. Returns [B, H, N, D]."""
    batch, heads, tokens, _ = q.shape
    maps = batch * heads
    lanes = ascend_akg.padded(tokens, "ascend")
    px, py, gate = ascend_akg.rows(pos_weight, gating, grid, batch, lanes)
    px, py, gate = ops.expand_dims(px, 1), ops.expand_dims(py, 2), ops.reshape(gate, (maps, 1, 1, lanes))
    mix = _mix(maps, grid, lanes, str(q.dtype).lower())
    attn = mix(ascend_akg.scores(q, k, grid, scale, lanes), px, py, gate)
    return ascend_akg.weighted(attn, v, dropout_p)
