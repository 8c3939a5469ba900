"""Rungs in MindSpore 2.10 on CPU: plain Python, compiled in both modes with gradients, refusals, a whole model.

python on_mindspore.py plain|graph|pynative|refusals|model
"""

import importlib.util
import json
import sys
import time
from pathlib import Path
from unittest.mock import patch

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

import convit.mindspore
from convit.dispatch import Problem, choose, use_backend, why_not
from convit.kernels.gpsa import ascend_akg, ascend_tbe
from convit.kernels.gpsa.definition import relative_error as error
from convit.kernels.gpsa.definition import softmax

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
from ascend_mindspore import Attend, Weighted

ms.set_device("CPU")

NO_NPU = "`ccec`, execution on an NPU, speed"


def row(op: str, rung: str, result: str, unproven: str) -> None:
    print("ROW " + json.dumps({"op": op, "rung": rung, "result": result, "unproven": unproven}), flush=True)


def inputs(maps: int, gh: int, gw: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of the operators, float32: keys by queries."""
    rng = np.random.default_rng(seed)
    n = gh * gw
    px, py = rng.random((maps, gw, n)), rng.random((maps, gh, n))
    values = {
        "s": 3 * rng.standard_normal((maps, gh, gw, n)),
        "px": px / px.sum(1, keepdims=True),
        "py": py / py.sum(1, keepdims=True),
        "g": rng.random((maps, n)),
        "da": rng.standard_normal((maps, gh, gw, n)),
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def expected(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What each operator must return, in float64, written from the formula; adds ``delta`` to ``x``."""
    s, px, py, g, da = (x[name].astype(np.float64) for name in ("s", "px", "py", "g", "da"))
    content = softmax(s, (1, 2))
    gate = g[:, None, None]
    delta = (content * da).sum((1, 2))
    x["delta"] = delta.astype(np.float32)
    return {
        "mix": (1 - gate) * content + gate * py[:, :, None] * px[:, None],
        "delta": delta,
        "dscores": (1 - gate) * content * (da - delta[:, None, None]),
        "dpx": np.einsum("myxi,myi->mxi", da, py),
        "dpy": np.einsum("myxi,mxi->myi", da, px),
    }


class NumpyDsl:
    """The names of ``tbe.dsl`` that ``ascend_tbe`` uses, in NumPy. Broadcasts are explicit, as in TBE: unequal shapes are an error."""

    @staticmethod
    def _same(a, b):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(f"TBE takes equal shapes and types, got {a.shape} {a.dtype} and {b.shape} {b.dtype}")
        return a, b

    def cast_to(self, x, dtype):
        return x.astype(dtype)

    def reduce_max(self, x, axis, keepdims=False):
        return x.max(tuple(axis), keepdims=keepdims)

    def reduce_sum(self, x, axis, keepdims=False):
        return x.sum(tuple(axis), keepdims=keepdims, dtype=x.dtype)

    def broadcast(self, x, shape):
        return np.broadcast_to(x, shape)

    def vexp(self, x):
        return np.exp(x)

    def vmuls(self, x, scalar):
        return x * x.dtype.type(scalar)

    def vadds(self, x, scalar):
        return x + x.dtype.type(scalar)

    def vadd(self, a, b):
        return np.add(*self._same(a, b))

    def vsub(self, a, b):
        return np.subtract(*self._same(a, b))

    def vmul(self, a, b):
        return np.multiply(*self._same(a, b))

    def vdiv(self, a, b):
        return np.divide(*self._same(a, b))


def plain() -> None:
    worst = {"akg": {}, "tbe": {}}
    for gh, gw in ((7, 11), (4, 4), (1, 5), (1, 1)):
        x = inputs(2, gh, gw)
        want = expected(x)
        for name, (function, names, _) in ascend_akg.OPERATORS.items():
            got = ms.ops.kernel(function)(*(x[n] for n in names))
            worst["akg"][name] = max(worst["akg"].get(name, 0), error(got, want[name]))
    for gh, gw in ((14, 14), (7, 11), (1, 5), (1, 1)):
        x = inputs(2, gh, gw)
        want = expected(x)
        for name, (_, names, _) in ascend_akg.OPERATORS.items():
            shapes = [shape for shape, _ in ascend_tbe.tensors(name, 2, (gh, gw), gh * gw, "float32")]
            tensors = [x[n].reshape(shape) for n, shape in zip(names, shapes[:-1], strict=True)]
            got = ascend_tbe.COMPUTE[name](NumpyDsl(), *tensors)
            if list(got.shape) != shapes[-1]:
                raise AssertionError(f"{name} returns {got.shape}, registered as {shapes[-1]}")
            worst["tbe"][name] = max(worst["tbe"].get(name, 0), error(got.reshape(want[name].shape), want[name]))
    for tool, errors in worst.items():
        what = {"akg": "the hybrid functions as plain Python", "tbe": "the compute functions on NumPy's version of the DSL"}[tool]
        text = ", ".join(f"{name} {e:.1e}" for name, e in errors.items())
        if max(errors.values()) > 1e-6:
            raise AssertionError(f"{tool}: {text}")
        row(tool.upper(), f"1: {what}, float32 against float64", text, "the compilers")
    half = {}
    for name in ("mix", "dscores"):
        x = inputs(2, 14, 14)
        x |= {n: x[n].astype("float16").astype("float32") for n in ("s", "da")}
        want = expected(x)[name]
        names = ascend_akg.OPERATORS[name][1]
        shapes = [shape for shape, _ in ascend_tbe.tensors(name, 2, (14, 14), 196, "float16")]
        tensors = [x[n].reshape(s).astype("float16" if n in ("s", "da") else "float32") for n, s in zip(names, shapes[:-1], strict=True)]
        half[name] = error(ascend_tbe.COMPUTE[name](NumpyDsl(), *tensors), want)
    if max(half.values()) > 5e-4:
        raise AssertionError(f"TBE in float16: {half}")
    text = ", ".join(f"{name} {e:.1e}" for name, e in half.items())
    row("TBE", "1: the same with float16 scores, float32 inside", text, "the compilers")


def compiled(mode: str) -> None:
    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
    names = ("out", "dq", "dk", "dv", "dpos_weight", "dgating")
    shapes = ((2, 4, 14, 14, 48), (1, 2, 4, 4, 8), (1, 3, 7, 11, 20))
    for batch, heads, gh, gw, dim in shapes if mode == "graph" else shapes[:2]:
        rng = np.random.default_rng(1)
        shape = (batch, heads, gh * gw, dim)
        pos = rng.standard_normal((heads, 3))
        pos[:, 2] = -np.abs(pos[:, 2])
        gating = rng.standard_normal(heads)
        gating[0] = 100.0
        arrays = [*(rng.standard_normal(shape) for _ in range(3)), pos, gating]
        arrays = [a.astype(np.float32) for a in arrays]
        weights = rng.standard_normal(shape).astype(np.float32)

        def outcome(backend: str, dtype: str, arrays=arrays, weights=weights, grid=(gh, gw)) -> list[np.ndarray]:
            tensors = [Tensor(a.astype(dtype)) for a in arrays]
            out = Attend(grid, backend)(*tensors)
            gradients = ms.grad(Weighted(Attend(grid, backend)), grad_position=(0, 1, 2, 3, 4))(*tensors, Tensor(weights.astype(dtype)))
            return [out.asnumpy(), *(g.asnumpy() for g in gradients)]

        want = outcome("reference", "float64")
        start = time.monotonic()
        ours = [error(a, b) for a, b in zip(outcome("akg", "float32"), want, strict=True)]
        seconds = time.monotonic() - start
        eager = [error(a, b) for a, b in zip(outcome("reference", "float32"), want, strict=True)]
        for name, mine, theirs in zip(names, ours, eager, strict=True):
            if mine > max(2 * theirs, 2e-6):
                raise AssertionError(f"{mode} {shape} grid {gh}x{gw} {name}: {mine:.1e}, the eager path {theirs:.1e}")
        result = f"{list(shape)}, {gh} x {gw}: {', '.join(f'{n} {e:.0e}' for n, e in zip(names, ours, strict=True))} ({seconds:.0f} s)"
        row("AKG", f"2: compiled and run on CPU, {mode}, float32, against float64", result, NO_NPU)


def refusals() -> None:
    problem = Problem("mindspore", "cpu", "float32", 1, 2, 12, 8, (3, 4))
    cases = {
        "tbe on CPU": (why_not("tbe", problem), "Ascend only"),
        "akg, float16 on CPU": (why_not("akg", problem._replace(dtype="float16")), "float16 is not supported"),
        "akg, no compiler in the wheel": (why_not("akg", problem._replace(device="ascend")), "has no AKG compiler for Ascend"),
        "tbe, MindSpore too new": (why_not("tbe", problem._replace(device="ascend")), "selects no tbe operator"),
    }
    ascend = problem._replace(device="ascend")
    with patch.object(ascend_akg, "not_taken", lambda kind: None):  # as where the installed MindSpore takes them
        cases["akg without CANN"] = (why_not("akg", ascend), "set_env.sh")
        cases["tbe without CANN"] = (why_not("tbe", ascend), "set_env.sh")
        cases["akg, 28 x 28 on Ascend"] = (why_not("akg", ascend._replace(tokens=784, grid=(28, 28))), "unified buffer")
    with patch.object(importlib.util, "find_spec", lambda name: None):
        cases["akg without decorator"] = (why_not("akg", problem), "pip install decorator")
    with patch.object(ascend_akg, "compile_attrs", lambda *_: {}):
        # AKG's own tiling, which this grid does not survive
        cases["akg, a grid the compiler refuses"] = (why_not("akg", problem._replace(tokens=77, grid=(7, 11))), "refuses the grid 7 x 11")
    with patch.object(ascend_akg, "_COMPILE_SECONDS", 0.05):
        cases["akg, compiler too slow"] = (why_not("akg", problem), "was stopped")
    for what, (got, want) in cases.items():
        if got is None or want not in got:
            raise AssertionError(f"{what}: {got!r} does not say {want!r}")
    try:
        choose(problem, "tbe")
    except RuntimeError as refused:
        if "Ascend only" not in str(refused):
            raise
    else:
        raise AssertionError("a forced tbe ran on CPU")
    x = inputs(1, 3, 4)
    op = ascend_tbe.operator("mix", 1, (3, 4), 12, "float32")
    tensors = [
        Tensor(x[n].reshape(s))
        for n, (s, _) in zip(["s", "px", "py", "g"], ascend_tbe.tensors("mix", 1, (3, 4), 12, "float32"), strict=False)
    ]
    try:
        op(*tensors)
    except Exception as refused:
        if "Unsupported func type" not in str(refused):
            raise
    else:
        raise AssertionError("MindSpore ran a TBE operator on CPU")
    for name in ascend_tbe.ENTRY:
        info = ascend_tbe.op_info(name)
        entry = ascend_tbe.ENTRY[name].__code__
        parameters = entry.co_varnames[: entry.co_argcount]
        registered = (*(x["name"] for x in info["inputs"]), *(x["name"] for x in info["outputs"]), "kernel_name")
        if parameters != registered or info["target"] != "Ascend":
            raise AssertionError(f"{name}: entry takes {parameters}, registered {registered} for {info['target']}")
        ascend_tbe.operator(name, 1, (3, 4), 12, "float16")
    row(
        "TBE",
        "3: op info and `ops.Custom` constructed, entry signatures as registered",
        f"{len(ascend_tbe.ENTRY)} operators",
        "the real `te` and `tbe`",
    )
    row("TBE", "4: MindSpore on CPU refuses the operator", "as it must", "")
    row("dispatch", "refusals name the mend", ", ".join(cases), "")


def model() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(0)
    net = convit.mindspore.create_model("convit_tiny", num_classes=10)
    rng = np.random.default_rng(2)
    images = Tensor(rng.standard_normal((1, 3, 224, 224)).astype(np.float32))
    labels = Tensor(np.array([3]), ms.int32)
    net.set_train(False)
    parameters = net.trainable_params()

    def outcome(backend: str):
        with use_backend(backend):

            def loss(x, y):
                logits = net(x)
                return ops.cross_entropy(logits, y), logits

            (value, logits), gradients = ms.value_and_grad(loss, None, parameters, has_aux=True)(images, labels)
            return logits.asnumpy(), float(value), [g.asnumpy() for g in gradients]

    want = outcome("reference")
    start = time.monotonic()
    got = outcome("akg")
    seconds = time.monotonic() - start
    logits = error(got[0], want[0].astype(np.float64))
    flat = [np.concatenate([g.ravel() for g in x[2]]).astype(np.float64) for x in (got, want)]
    gradients = error(flat[0], flat[1])
    each = max(
        error(a, b.astype(np.float64)) for a, b in zip(got[2], want[2], strict=True) if np.linalg.norm(b) > 1e-6 * np.linalg.norm(flat[1])
    )
    if max(logits, gradients) > 1e-5:
        raise AssertionError(f"convit_tiny: logits {logits:.1e}, gradients {gradients:.1e}")
    optimizer = nn.SGD(parameters, 0.01)
    with use_backend("akg"):
        step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.CrossEntropyLoss()), optimizer)
        step.set_train()
        losses = [float(step(images, labels)) for _ in range(3)]
    if not losses[-1] < losses[0]:
        raise AssertionError(f"three training steps do not lower the loss: {losses}")
    result = f"logits {logits:.0e}, gradients {gradients:.0e} (worst parameter {each:.0e})"
    result += f", 3 training steps: loss {losses[0]:.2f} to {losses[-1]:.2f} ({seconds:.0f} s)"
    row("AKG", "2: convit_tiny at 224 on CPU, `akg` forced, against the reference, float32, graph", result, NO_NPU)


if __name__ == "__main__":
    rung = sys.argv[1]
    {"plain": plain, "refusals": refusals, "model": model}.get(rung, lambda: compiled(rung))()
