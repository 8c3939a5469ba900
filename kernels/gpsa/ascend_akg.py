"""GPSA for MindSpore with its fused part as AKG custom operators: for Ascend's vector unit, and for CPU by the same definitions.

    S = scale * k q^T        (framework)     keys by queries: [B*H, gh, gw, L], L = N queries, padded to 16 on Ascend
    A = (1-g) softmax(S) + g Py Px           ``_mix``, one pass over a tile of queries: scores in, attention out
    out = A^T v              (framework)

The queries are the last axis, the lanes of the vector unit. So the softmax over the keys is plain vector arithmetic, in float32
whatever the scores' type, where a softmax along the lanes would need reductions that Ascend has in float16 only; the gate and
the rows of the position tables are vectors over the lanes too, never broadcast scalars.

Backward, from dA = v dO^T (the framework's): ``_delta`` = sum_j Pc dA, ``_dscores`` = (1-g) Pc (dA - delta), and the sums of
dA Py and dA Px (``_dpx``, ``_dpy``), of which the gradients of gate and tables are products. One output an operator: MindSpore
2.10 returns zeros for a hybrid operator with two. Saved: S and A.

Deviation from ``any_mindspore.py``: the scores and the mix are rounded to the type of q, because the framework's matrix
product reads and writes that.

The functions above the line are written in MindSpore's hybrid DSL: Python to read and to run, compiled by AKG.
"""
# ruff: noqa: F821  (output_tensor, allocate, float32 and exp are words of the DSL)

import functools
import importlib.util
import inspect
import json
import linecache
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from convit.kernels.gpsa.any_mindspore import UNKNOWN_BATCH, softmax

# Ascend's unified buffer holds a tile of whole key columns. The code that AKG emits takes about 40 bytes a score (float32 copy,
# exponential, products, double-buffered input and output); 910B has 192 KB of buffer, 910 has 256. Tiles of 16 queries are the least
# a vector takes; with them AKG gives up double buffering as it must, up to 24 x 24 keys in 256 KB.
_BYTES_PER_SCORE = 40
_UNIFIED_BUFFER = 192 * 1024
_MOST_KEYS = 576
_COMPILE_SECONDS = 60


def _mix(s, px, py, g):
    out = output_tensor(s.shape, s.dtype)
    t = allocate(s.shape, "float32")
    e = allocate(s.shape, "float32")
    top = allocate(g.shape, "float32")
    total = allocate(g.shape, "float32")
    c = allocate(g.shape, "float32")
    for b in range(s.shape[0]):
        for y in range(s.shape[1]):
            for x in range(s.shape[2]):
                for i in range(s.shape[3]):
                    t[b, y, x, i] = float32(s[b, y, x, i])
    for b in range(s.shape[0]):
        for i in range(s.shape[3]):
            top[b, i] = float32(-3e38)
            for y in range(s.shape[1]):
                for x in range(s.shape[2]):
                    top[b, i] = max(top[b, i], t[b, y, x, i])
    for b in range(s.shape[0]):
        for y in range(s.shape[1]):
            for x in range(s.shape[2]):
                for i in range(s.shape[3]):
                    e[b, y, x, i] = exp(t[b, y, x, i] - top[b, i])
    for b in range(s.shape[0]):
        for i in range(s.shape[3]):
            total[b, i] = float32(0.0)
            for y in range(s.shape[1]):
                for x in range(s.shape[2]):
                    total[b, i] = total[b, i] + e[b, y, x, i]
    for b in range(s.shape[0]):
        for i in range(s.shape[3]):
            c[b, i] = (float32(1.0) - g[b, i]) / total[b, i]
    for b in range(s.shape[0]):
        for y in range(s.shape[1]):
            for x in range(s.shape[2]):
                for i in range(s.shape[3]):
                    out[b, y, x, i] = float32(c[b, i] * e[b, y, x, i] + g[b, i] * py[b, y, i] * px[b, x, i])
    return out


def _delta(s, g, da):
    out = output_tensor(g.shape, "float32")
    t = allocate(s.shape, "float32")
    e = allocate(s.shape, "float32")
    w = allocate(s.shape, "float32")
    top = allocate(g.shape, "float32")
    total = allocate(g.shape, "float32")
    dot = allocate(g.shape, "float32")
    for b in range(s.shape[0]):
        for y in range(s.shape[1]):
            for x in range(s.shape[2]):
                for i in range(s.shape[3]):
                    t[b, y, x, i] = float32(s[b, y, x, i])
    for b in range(s.shape[0]):
        for i in range(s.shape[3]):
            top[b, i] = float32(-3e38)
            for y in range(s.shape[1]):
                for x in range(s.shape[2]):
                    top[b, i] = max(top[b, i], t[b, y, x, i])
    for b in range(s.shape[0]):
        for y in range(s.shape[1]):
            for x in range(s.shape[2]):
                for i in range(s.shape[3]):
                    e[b, y, x, i] = exp(t[b, y, x, i] - top[b, i])
    for b in range(s.shape[0]):
        for i in range(s.shape[3]):
            total[b, i] = float32(0.0)
            for y in range(s.shape[1]):
                for x in range(s.shape[2]):
                    total[b, i] = total[b, i] + e[b, y, x, i]
    for b in range(s.shape[0]):
        for y in range(s.shape[1]):
            for x in range(s.shape[2]):
                for i in range(s.shape[3]):
                    w[b, y, x, i] = e[b, y, x, i] * float32(da[b, y, x, i])
    for b in range(s.shape[0]):
        for i in range(s.shape[3]):
            dot[b, i] = float32(0.0)
            for y in range(s.shape[1]):
                for x in range(s.shape[2]):
                    dot[b, i] = dot[b, i] + w[b, y, x, i]
    for b in range(s.shape[0]):
        for i in range(s.shape[3]):
            out[b, i] = dot[b, i] / total[b, i]
    return out


def _dscores(s, g, delta, da):
    out = output_tensor(s.shape, s.dtype)
    t = allocate(s.shape, "float32")
    e = allocate(s.shape, "float32")
    top = allocate(g.shape, "float32")
    total = allocate(g.shape, "float32")
    c = allocate(g.shape, "float32")
    for b in range(s.shape[0]):
        for y in range(s.shape[1]):
            for x in range(s.shape[2]):
                for i in range(s.shape[3]):
                    t[b, y, x, i] = float32(s[b, y, x, i])
    for b in range(s.shape[0]):
        for i in range(s.shape[3]):
            top[b, i] = float32(-3e38)
            for y in range(s.shape[1]):
                for x in range(s.shape[2]):
                    top[b, i] = max(top[b, i], t[b, y, x, i])
    for b in range(s.shape[0]):
        for y in range(s.shape[1]):
            for x in range(s.shape[2]):
                for i in range(s.shape[3]):
                    e[b, y, x, i] = exp(t[b, y, x, i] - top[b, i])
    for b in range(s.shape[0]):
        for i in range(s.shape[3]):
            total[b, i] = float32(0.0)
            for y in range(s.shape[1]):
                for x in range(s.shape[2]):
                    total[b, i] = total[b, i] + e[b, y, x, i]
    for b in range(s.shape[0]):
        for i in range(s.shape[3]):
            c[b, i] = (float32(1.0) - g[b, i]) / total[b, i]
    for b in range(s.shape[0]):
        for y in range(s.shape[1]):
            for x in range(s.shape[2]):
                for i in range(s.shape[3]):
                    out[b, y, x, i] = float32(c[b, i] * e[b, y, x, i] * (float32(da[b, y, x, i]) - delta[b, i]))
    return out


def _dpx(da, px, py):
    out = output_tensor(px.shape, "float32")
    w = allocate(da.shape, "float32")
    for b in range(da.shape[0]):
        for y in range(da.shape[1]):
            for x in range(da.shape[2]):
                for i in range(da.shape[3]):
                    w[b, y, x, i] = float32(da[b, y, x, i]) * py[b, y, i]
    for b in range(da.shape[0]):
        for x in range(da.shape[2]):
            for i in range(da.shape[3]):
                out[b, x, i] = float32(0.0)
                for y in range(da.shape[1]):
                    out[b, x, i] = out[b, x, i] + w[b, y, x, i]
    return out


def _dpy(da, px, py):
    out = output_tensor(py.shape, "float32")
    w = allocate(da.shape, "float32")
    for b in range(da.shape[0]):
        for y in range(da.shape[1]):
            for x in range(da.shape[2]):
                for i in range(da.shape[3]):
                    w[b, y, x, i] = float32(da[b, y, x, i]) * px[b, x, i]
    for b in range(da.shape[0]):
        for y in range(da.shape[1]):
            for i in range(da.shape[3]):
                out[b, y, i] = float32(0.0)
                for x in range(da.shape[2]):
                    out[b, y, i] = out[b, y, i] + w[b, y, x, i]
    return out


# ----------------------------------------------------------------------------------------------------------------------
# operator -> its function, its inputs and its output; the names are those of ``tensors``
OPERATORS = {
    "mix": (_mix, ("s", "px", "py", "g"), "s"),
    "delta": (_delta, ("s", "g", "da"), "g"),
    "dscores": (_dscores, ("s", "g", "delta", "da"), "s"),
    "dpx": (_dpx, ("da", "px", "py"), "px"),
    "dpy": (_dpy, ("da", "px", "py"), "py"),
}


def tensors(name: str, maps: int, grid: tuple[int, int], lanes: int, dtype: str) -> list[tuple[list[int], str]]:
    """(shape, dtype) of the inputs of operator ``name``, then of its output; ``maps`` is batch times heads."""
    gh, gw = grid
    scores, row = ([maps, gh, gw, lanes], dtype), ([maps, lanes], "float32")
    known = {"s": scores, "da": scores, "g": row, "delta": row}
    known |= {"px": ([maps, gw, lanes], "float32"), "py": ([maps, gh, lanes], "float32")}
    _, inputs, output = OPERATORS[name]
    return [known[x] for x in (*inputs, output)]


def source(name: str, dtype: str) -> str:
    """The text of an operator for scores of ``dtype``: the DSL has no cast to "the type of s", so the store is spelled out."""
    function, _, output = OPERATORS[name]
    text = inspect.getsource(function)  # type: ignore[arg-type]
    if dtype == "float16" and output == "s":
        text = text.replace("out[b, y, x, i] = float32(", "out[b, y, x, i] = float16(")
    return text


def padded(tokens: int, device: str) -> int:
    """Queries a tile row is padded to: Ascend moves blocks of 32 bytes."""
    return -(-tokens // 16) * 16 if device == "ascend" else tokens


def lanes_per_tile(tokens: int) -> int:
    """Queries in a tile of ``tokens`` keys."""
    return next((n for n in (64, 32) if tokens * n * _BYTES_PER_SCORE <= _UNIFIED_BUFFER), 16)


def compile_attrs(name: str, device: str, tokens: int) -> dict[str, Any]:
    """AKG's scheduling attributes for operator ``name``."""
    if device == "ascend":
        # Without these two the mix of a real batch is refused, and that of a small one stays on one core
        attrs = {"pragma_disable_schedule_shift": True, "enable_polytops": "always"}
        if name in ("mix", "delta", "dscores"):
            # tiles of one map, whole columns of keys, a few queries: AKG's own tiling overflows the unified buffer
            attrs["dim"] = f"0 0 1 1 0 1 {lanes_per_tile(tokens)} {lanes_per_tile(tokens)}"
        return attrs
    if device == "cpu":
        # Tiles of one: with its own tiling AKG's CPU scheduler refuses most grids, and its vector exp is good to 3e-5 only.
        return {"pragma_disable_schedule_shift": True, "dim": "0 0 1 1 0 1 1 1 0 2 1 1 0 3 1 1"}
    return {}


def _hybrid(name: str, dtype: str, device: str, tokens: int):
    """The operator's function as MindSpore's ``kernel`` wants it: with a source that ``inspect`` finds."""
    text = source(name, dtype)
    file = f"<convit {name} {dtype}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    scope: dict[str, Any] = {}
    exec(compile(text, file, "exec"), scope)
    return ms.ops.kernel(compile_attrs=compile_attrs(name, device, tokens))(scope[f"_{name}"])


def lowering(device: str, maps: int, grid: tuple[int, int], dtype: str) -> list[tuple[Any, ...]]:
    """The operators as requests to ``ascend_lower``."""
    process, tokens = {"ascend": "aicore", "gpu": "cuda"}.get(device, device), grid[0] * grid[1]
    lanes = padded(tokens, device)
    return [
        (f"_{name}", source(name, dtype), tensors(name, maps, grid, lanes, dtype), process, compile_attrs(name, device, tokens))
        for name in OPERATORS
    ]


@functools.cache
def _refusal(device: str, maps: int, grid: tuple[int, int], dtype: str) -> str | None:
    """Why AKG cannot compile the operators for these shapes, found out in a process of its own; None if it can."""
    requests = lowering(device, maps, grid, dtype)
    wheel = Path(ms.__file__).parent
    command = [sys.executable, "-I", str(Path(__file__).with_name("ascend_lower.py")), str(wheel)]
    environment = os.environ | {"LD_LIBRARY_PATH": f"{wheel}/lib/plugin/{device}:{wheel}/lib"}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
        )
        try:
            _, log = process.communicate(json.dumps(requests), timeout=_COMPILE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return f"AKG did not compile the grid {grid[0]} x {grid[1]} in {_COMPILE_SECONDS} s and was stopped"
    if process.returncode == 0:
        return None
    causes = [line for line in log.splitlines() if "Check failed" in line or "Error" in line] or log.splitlines() or ["no message"]
    return f"AKG's compiler refuses the grid {grid[0]} x {grid[1]}: {causes[-1].strip()[:200]}"


def gradient(delta, dscores, dpx, dpy):
    """``bprop`` of the mix, from the four backward operators."""

    def bprop(s, px, py, g, out, da):
        d = delta(s, g, da)
        gate = ops.expand_dims(g, 1)
        u = dpx(da, px, py)
        return dscores(s, g, d, da), gate * u, gate * dpy(da, px, py), ops.reduce_sum(px * u, 1) - d

    return bprop


@ms.constexpr
def _operator(name: str, maps: int, grid: tuple[int, int], lanes: int, dtype: str, device: str):
    """The custom operator ``name``; "mix" carries the gradient."""
    shape, out_dtype = tensors(name, maps, grid, lanes, dtype)[-1]
    out_dtype = getattr(ms, out_dtype)
    bprop = None
    if name == "mix":
        bprop = gradient(*(_operator(other, maps, grid, lanes, dtype, device) for other in OPERATORS if other != "mix"))
    function = _hybrid(name, dtype, device, grid[0] * grid[1])
    return ops.Custom(function, lambda *_: shape, lambda *_: out_dtype, func_type="hybrid", bprop=bprop)


@ms.constexpr(reuse_result=False)
def _device() -> str:
    return str(ms.get_context("device_target")).lower()


@ms.constexpr
def _axes(grid: tuple[int, int], lanes: int) -> tuple[Tensor, Tensor]:
    """Offsets dx [gw, lanes] and dy [gh, lanes] of key columns and rows from each query; zero beyond the last query."""
    gh, gw = grid
    y, x = np.divmod(np.arange(lanes), gw)
    live = np.arange(lanes) < gh * gw
    dx = np.where(live, np.arange(gw)[:, None] - x, 0)
    dy = np.where(live, np.arange(gh)[:, None] - y, 0)
    return Tensor(dx, ms.float32), Tensor(dy, ms.float32)


def _rows(offsets: Tensor, linear: Tensor, square: Tensor) -> Tensor:
    """Rows of a position table for every query: softmax over the keys of linear * d + square * d^2, [H, keys, lanes]."""
    logits = ops.reshape(linear, (-1, 1, 1)) * offsets + ops.reshape(square, (-1, 1, 1)) * offsets * offsets
    return softmax(logits, 1)


def not_taken(kind: str) -> str | None:
    """Why the installed MindSpore takes no custom operator of ``kind``, "akg" or "tbe", on Ascend; None if it does."""
    plugin = Path(ms.__file__).parent / "lib/plugin"
    if kind == "akg" and not (plugin / "ascend/libakg.so").exists():
        return f"MindSpore {ms.__version__} has no AKG compiler for Ascend: leave the choice to convit, or take flash or blocks"
    if _release() > (2, 3, 0):
        what = f"MindSpore {ms.__version__} selects no {kind} operator on Ascend (up to 2.3.0rc1 it did)"
        return f"{what}: leave the choice to convit, or take flash or blocks"
    return None


def _release() -> tuple[int, ...]:
    """The first three numbers of MindSpore's version."""
    return tuple(int("".join(filter(str.isdigit, part.split("rc")[0])) or 0) for part in ms.__version__.split(".")[:3])


def why_not(problem: Any) -> str | None:
    if problem.framework != "mindspore":
        return "the tensors are not MindSpore tensors"
    if problem.device == "gpu":
        return "AKG's CUDA keeps the temporaries of all maps in shared memory, more than a GPU has"
    if problem.device not in ("cpu", "ascend"):
        return f"AKG has no target {problem.device}"
    narrow = problem.device == "ascend"
    if problem.dtype != "float32" and not (narrow and problem.dtype == "float16"):
        return f"{problem.dtype} is not supported on {problem.device} ({'float32 or float16' if narrow else 'float32 only'})"
    if importlib.util.find_spec("decorator") is None:
        return "AKG's compiler needs the package decorator: pip install decorator"
    if problem.batch is None:
        return UNKNOWN_BATCH
    if problem.tokens * problem.batch == 0:
        return "empty tensors are not supported"
    if problem.device == "ascend":
        if (reason := not_taken("akg")) is not None:
            return reason
        if problem.tokens > _MOST_KEYS:
            return f"a column of {problem.tokens} keys does not fit the unified buffer (at most {_MOST_KEYS})"
        if not (os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_OPP_PATH")):
            return "CANN is not set up in this shell: source Ascend's set_env.sh"
        return None
    return _refusal("cpu", problem.batch * problem.heads, problem.grid, problem.dtype)


def scores(q: Tensor, k: Tensor, grid: tuple[int, int], scale: float, lanes: int) -> Tensor:
    """Keys by queries, [B * H, gh, gw, lanes], in the type of q."""
    batch, heads, tokens, _ = q.shape
    q = q * scale
    if lanes > tokens:
        q = ops.pad(q, (0, 0, 0, lanes - tokens))
    return ops.reshape(ops.BatchMatMul(transpose_b=True)(k, q), (batch * heads, grid[0], grid[1], lanes))


def rows(pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], batch: int, lanes: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every query its rows of the position tables and its gate: px [B*H, gw, lanes], py [B*H, gh, lanes], g [B*H, lanes]."""
    weight = ops.cast(pos_weight, ms.float32)
    dx, dy = _axes(grid, lanes)
    px = ops.tile(_rows(dx, weight[:, 0], weight[:, 2]), (batch, 1, 1))
    py = ops.tile(_rows(dy, weight[:, 1], weight[:, 2]), (batch, 1, 1))
    gate = ops.expand_dims(ops.sigmoid(ops.cast(gating, ms.float32)), 1)
    return px, py, ops.tile(gate, (batch, lanes))


def weighted(attn: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """A^T v without the padding: attn [B * H, gh, gw, lanes], v and the result [B, H, N, D]."""
    batch, heads, tokens, _ = v.shape
    attn = ops.reshape(attn, (batch, heads, tokens, attn.shape[3]))
    if dropout_p > 0:
        attn = ops.dropout(attn, dropout_p)
    return ops.BatchMatMul(transpose_a=True)(attn, v)[:, :, :tokens]


def gpsa(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float, dropout_p: float
) -> Tensor:
    """Arguments as ``convit.mindspore.gpsa`` checked them. Returns [B, H, N, D]."""
    batch, heads, tokens, _ = q.shape
    device = _device()
    lanes = padded(tokens, device)
    px, py, gate = rows(pos_weight, gating, grid, batch, lanes)
    mix = _operator("mix", batch * heads, grid, lanes, str(q.dtype).lower(), device)
    return weighted(mix(scores(q, k, grid, scale, lanes), px, py, gate), v, dropout_p)
