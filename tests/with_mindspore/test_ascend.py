"""What MindSpore does on Ascend, without one: device_target is said to be Ascend, and ``flash_attention_score`` is stood in for.

The stand-in has the signature of the operator and refuses what its documentation refuses. In graph mode the true operator's own
inference gives the shape and type of the result, before the graph is pruned of it.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import convit.mindspore
from convit import use_backend, why_not
from convit.dispatch import Problem, choose, order
from convit.kernels.gpsa import any_blocks, ascend_akg, ascend_flash
from convit.kernels.gpsa.any_mindspore import softmax
from convit.kernels.gpsa.definition import gpsa_with_gradients, relative_error
from convit.mindspore.ops import attention_packed, gpsa_packed

TRUE = ops.flash_attention_score
NAMES = ("out", "dq", "dk", "dv", "dpos_weight", "dgating")


@ms.constexpr(reuse_result=False)
def documented(shapes, dtypes, heads, scale, layout):
    """Raise for what the operator's documentation refuses; return the axes that make [B, H, N, D] of the layout."""
    if not (shapes[0] == shapes[1] == shapes[2] and len(shapes[0]) == 4 and dtypes[0] == dtypes[1] == dtypes[2]):
        raise TypeError(f"shapes {shapes}, types {dtypes}")
    if dtypes[0] not in (ms.float16, ms.bfloat16) or type(scale) is not float:
        raise TypeError(f"type {dtypes[0]}, scalar_value {scale!r}")
    axes = {"BNSD": (0, 1, 2, 3), "BSND": (0, 2, 1, 3)}[layout]
    batch, n1, tokens, dim = (shapes[0][i] for i in axes)
    if n1 != heads or heads > 256 or (batch or 1) > 2048 or tokens < 1 or dim % 16 or dim > 512:
        raise ValueError(f"head_num {heads}, {layout} {shapes[0]}")
    return axes


@ms.constexpr(reuse_result=False)
def in_graph():
    return ms.get_context("mode") == ms.GRAPH_MODE


def stand_in(query, key, value, head_num, real_shift=None, drop_mask=None, padding_mask=None, attn_mask=None, prefix=None,
             actual_seq_qlen=None, actual_seq_kvlen=None, keep_prob=1.0, scalar_value=1.0, pre_tokens=2147483647,
             next_tokens=2147483647, inner_precise=0, input_layout="BSH", sparse_mode=0):  # fmt: skip
    axes = documented((query.shape, key.shape, value.shape), (query.dtype, key.dtype, value.dtype), head_num, scalar_value, input_layout)
    q, k, v = (ops.transpose(ops.cast(x, ms.float32), axes) for x in (query, key, value))
    attn = softmax(ops.BatchMatMul(transpose_b=True)(q, k) * scalar_value)
    # the operator multiplies attention rounded to the type of v
    out = ops.BatchMatMul()(ops.cast(ops.cast(attn, value.dtype), ms.float32), v)
    out = ops.cast(ops.transpose(out, axes), query.dtype)
    if in_graph():
        true = TRUE(query, key, value, head_num, scalar_value=scalar_value, input_layout=input_layout)
        return ops.cast(ops.reshape(out, true.shape), true.dtype)
    return out


@pytest.fixture
def ascend(monkeypatch):
    monkeypatch.setattr("convit.mindspore.ops.device_target", lambda: "ascend")
    monkeypatch.setattr(ascend_flash, "chip", lambda: "ascend910b")
    monkeypatch.setattr(ops, "flash_attention_score", stand_in)


def row(what: str, result: str, unproven: str) -> None:
    """A row of the table of ``make ascend-check``, which runs this file too."""
    if "ASCEND_CHECK_ENVS" in os.environ:
        print("\nROW " + json.dumps({"op": "flash", "rung": f"MindSpore {ms.__version__}: {what}", "result": result, "unproven": unproven}))


def problem(**changes):
    return Problem(**{"framework": "mindspore", "device": "ascend", "dtype": "float16", "batch": 2, "heads": 4, "tokens": 196,
                      "head_dim": 48, "grid": (14, 14)} | changes)  # fmt: skip


def test_the_stand_in_has_the_operators_signature():
    ours, theirs = inspect.signature(stand_in).parameters, inspect.signature(TRUE).parameters
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize(
    "change, chosen, reason",
    [
        ({}, "ascend_flash", None),
        ({"dtype": "bfloat16"}, "ascend_flash", None),
        ({"head_dim": 64}, "ascend_flash", None),
        ({"dtype": "float32"}, "any_blocks", "float32 is not supported"),
        ({"head_dim": 24}, "any_blocks", "no multiple of 16"),
        ({"head_dim": 528}, "any_blocks", "no multiple of 16 up to 512"),
        ({"batch": 4096}, "any_blocks", "B is to be 1 to 2048"),
        ({"heads": 300}, "any_blocks", "H 1 to 256"),
        ({"dropout_p": 0.1}, "any_mindspore", "one mask must cover both softmaxes"),
        ({"batch": 0}, "any_mindspore", "at least one token"),
    ],
    ids=lambda x: next(iter(x.items()), "") if isinstance(x, dict) else None,
)
def test_first_choice_on_ascend(ascend, change, chosen, reason):
    assert choose(problem(**change), None).__name__.endswith(chosen)
    refusal = why_not("flash", problem(**change))
    assert refusal is None if reason is None else reason in refusal


@pytest.mark.parametrize(
    "name, able", [("ascend910b", True), ("ascend910_93", True), ("", True), ("ascend910", False), ("ascend310p", False)]
)
def test_chips(monkeypatch, name, able):
    monkeypatch.setattr(ascend_flash, "chip", lambda: name)
    reason = why_not("flash", problem())
    assert reason is None if able else "Atlas A2" in reason
    assert why_not("blocks", problem()) is None


def test_flash_elsewhere_and_without_the_operator(monkeypatch):
    assert "Ascend only" in why_not("flash", problem(device="cpu"))
    assert "MindSpore" in why_not("flash", problem(framework="torch")) and "MindSpore" in why_not("blocks", problem(framework="torch"))
    monkeypatch.delattr(ops, "flash_attention_score")
    assert "has no flash_attention_score" in why_not("flash", problem())
    assert choose(problem(), None).__name__.endswith("any_blocks")


def test_akg_and_tbe_by_name_only_and_only_where_mindspore_takes_them(ascend, monkeypatch, tmp_path):
    """Forced, they say in one line what to take instead; the line goes by the compiler in the wheel and by the release."""
    assert {"akg", "tbe"}.isdisjoint(order(problem()))
    for name, reason in (("akg", "no AKG compiler for Ascend|selects no akg operator"), ("tbe", "selects no tbe operator")):
        with pytest.raises(RuntimeError, match=rf"\n  {name} +MindSpore {ms.__version__} .*({reason}).*take flash or blocks"):
            choose(problem(), name)
    (tmp_path / "lib/plugin/ascend").mkdir(parents=True)
    (tmp_path / "lib/plugin/ascend/libakg.so").touch()
    monkeypatch.setattr(ms, "__file__", str(tmp_path / "__init__.py"))
    for release, taken in (("2.0.0", True), ("2.3.0rc1", True), ("2.3.1", False), ("2.7.0", False), ("2.10.0", False)):
        monkeypatch.setattr(ms, "__version__", release)
        for kind in ("akg", "tbe"):
            assert (ascend_akg.not_taken(kind) is None) == taken


class Attention(nn.Cell):
    """gpsa by one of its two entries, and the product with a gradient."""

    def __init__(self, grid, scale, backend, packed):
        super().__init__()
        self.grid, self.scale, self.backend, self.packed = grid, scale, backend, packed

    def construct(self, q, k, v, pos_weight, gating, grad):
        if self.packed:
            qkv = ops.transpose(ops.stack((q, k, v), 2), (0, 3, 2, 1, 4))
            out = ops.transpose(gpsa_packed(qkv, pos_weight, gating, self.grid, self.scale, 0.0), (0, 2, 1, 3))
        else:
            out = convit.mindspore.gpsa(q, k, v, pos_weight, gating, self.grid, scale=self.scale, backend=self.backend)
        return (ops.cast(out, ms.float32) * ops.cast(grad, ms.float32)).sum(), out


def arrays(batch, heads, grid, dim, dtype=np.float32):
    rng = np.random.default_rng(0)
    q, k, v, grad = rng.standard_normal((4, batch, heads, grid[0] * grid[1], dim)).astype(dtype)
    pos_weight = rng.standard_normal((heads, 3)).astype(np.float32)
    pos_weight[:, 2] = -abs(pos_weight[:, 2])
    return q, k, v, pos_weight, rng.standard_normal(heads).astype(np.float32), grad


def run(values, grid, scale, backend, packed=False):
    with use_backend(backend):
        cell = Attention(grid, scale, backend, packed)
        (_, out), grads = ms.value_and_grad(cell, (0, 1, 2, 3, 4), has_aux=True)(*map(Tensor, values))
    return [np.asarray(x.asnumpy(), np.float64) for x in (out, *grads)]


def check(got, values, grid, scale, floor):
    """Against float64, twice the error of the reference in the same type allowed."""
    want = gpsa_with_gradients(*values[:5], grid, scale, values[5])
    ms.set_context(mode=ms.PYNATIVE_MODE)  # the peer's graphs need not be compiled
    peer = run(values, grid, scale, "reference")
    errors = {}
    for name, x, y, z in zip(NAMES, got, want, peer, strict=True):
        errors[name] = relative_error(x, y)
        assert errors[name] <= max(2 * relative_error(z, y), floor), name
    return errors


@pytest.mark.parametrize("grid, packed", [((7, 5), False), ((1, 3), True), ((14, 14), True)], ids=str)
def test_flash(ascend, mode, grid, packed):
    values, scale = arrays(2, 3, grid, 16, np.float16), 0.3
    # the attention of the content half is rounded once more than the reference's
    errors = check(run(values, grid, scale, "flash", packed), values, grid, scale, 1e-3)
    if grid == (14, 14) and packed:
        shown = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
        row(
            f"`flash` around a stand-in of the operator, {mode}, float16, 14 x 14, against float64",
            shown,
            "the operator's own arithmetic and gradient, speed",
        )


@pytest.mark.parametrize(
    "grid, dtype, floor, packed, heads",
    [
        ((7, 5), "float32", 2e-6, False, 3),
        ((7, 5), "float32", 2e-6, True, 1),  # one head, one place along an axis: see any_blocks.positional
        ((12, 23), "float16", 1e-3, True, 3),
        ((1, 3), "float64", 1e-13, False, 3),
        ((3, 1), "float32", 2e-6, True, 3),
    ],
)
def test_blocks(monkeypatch, mode, grid, dtype, floor, packed, heads):
    values, scale = arrays(2, heads, grid, 8, dtype), -0.3
    if dtype == "float64":
        values = tuple(x.astype(dtype) for x in values)
    monkeypatch.setattr("convit.mindspore.ops.device_target", lambda: "ascend")
    check(run(values, grid, scale, "blocks", packed), values, grid, scale, floor)


@pytest.mark.parametrize("backend", ["flash", "blocks", "reference"])
def test_one_patch_and_what_comes_after_it(ascend, mode, backend):
    """MindSpore's gradient of a softmax over one key makes those of later ones wrong."""
    dtype = np.float16 if backend == "flash" else np.float32
    values = arrays(1, 1, (1, 1), 16, dtype)
    out, *gradients = run(values, (1, 1), 0.3, backend)
    exact = 1e-3 if backend == "flash" else 1e-6
    assert np.allclose(out, values[2], atol=exact) and np.allclose(gradients.pop(2), values[5], atol=exact)
    assert all(np.allclose(x, 0, atol=10 * exact) for x in gradients)
    values = arrays(1, 1, (2, 3), 16, dtype)
    for got, want in zip(run(values, (2, 3), 0.3, backend), gpsa_with_gradients(*values[:5], (2, 3), 0.3, values[5]), strict=True):
        assert relative_error(got, want) < (1e-2 if backend == "flash" else 1e-5)


def test_blocks_never_hold_a_full_map():
    for tokens in (1, 127, 128, 129, 196, 784, 4096, 65536):
        rows = any_blocks.rows_per_block(tokens)
        assert rows <= max(128, -(-tokens // 32)) and -(-tokens // rows) <= 32


@pytest.mark.parametrize("scale", [1, np.float64(-0.5), 0.0])
def test_any_number_is_a_scale(ascend, scale):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    q, k, v, pos_weight, gating, _ = arrays(1, 2, (2, 3), 16, np.float16)
    inputs = [Tensor(x) for x in (q, k, v, pos_weight, gating)]
    for backend in ("flash", "blocks"):
        out, expected = (convit.mindspore.gpsa(*inputs, (2, 3), scale=scale, backend=name) for name in (backend, "reference"))
        assert relative_error(out.asnumpy(), expected.asnumpy()) < 2e-3


@pytest.mark.parametrize("level, backend", [("O2", None), ("O0", None), ("O2", "flash"), ("O0", "blocks")])
def test_a_graph_for_any_batch(ascend, level, backend):
    ms.set_context(mode=ms.GRAPH_MODE)
    net = convit.mindspore.create_model("convit_tiny", num_classes=10, image_size=32, depth=2, local_up_to_layer=1)
    ms.amp.auto_mixed_precision(net, level)
    net.set_train(False)
    images = Tensor(np.random.default_rng(0).standard_normal((3, 3, 32, 32)), ms.float32)
    with use_backend(backend):
        expected = net(images).asnumpy()
        net.set_inputs(Tensor(shape=[None, 3, 32, 32], dtype=ms.float32))
        for batch in (3, 1):
            assert relative_error(net(images[:batch]).asnumpy(), expected[:batch]) < 2e-3
    for name in ("akg", "tbe"):  # custom operators need it
        assert "leave out set_inputs" in why_not(name, problem(batch=None))


@pytest.mark.parametrize("backend", ["flash", "blocks"])
def test_plain_attention(ascend, mode, backend):
    qkv = Tensor(np.random.default_rng(0).standard_normal((2, 13, 3, 4, 16)), ms.float16)

    class Plain(nn.Cell):
        def construct(self, qkv):
            out = attention_packed(qkv, 0.4, 0.0)
            return (ops.cast(out, ms.float32) ** 2).sum(), out

    results = []
    for name in (backend, "reference"):
        with use_backend(name):
            (_, out), grad = ms.value_and_grad(Plain(), 0, has_aux=True)(qkv)
        results.append((out.asnumpy(), grad.asnumpy()))
    for x, y in zip(*results, strict=True):
        assert x.dtype == np.float16 and relative_error(x, y) <= 2e-3


def test_the_true_operator_infers_and_stops_at_the_missing_device(monkeypatch):
    """Forward and backward compile up to the choice of a kernel: only the NPU is missing."""
    ms.set_context(mode=ms.GRAPH_MODE)
    monkeypatch.setattr("convit.mindspore.ops.device_target", lambda: "ascend")
    seen = []

    @ms.constexpr(reuse_result=False)
    def note(shape, dtype):
        seen.append((shape, str(dtype)))
        return 0

    class Forward(nn.Cell):
        def construct(self, q, k, v, pos_weight, gating):
            if q.dtype == ms.bfloat16:  # CPU stacks no bfloat16
                return convit.mindspore.gpsa(q, k, v, pos_weight, gating, (3, 3))
            return gpsa_packed(ops.stack((q, k, v), 2), pos_weight, gating, (3, 3), 0.25, 0.0)

    class Backward(nn.Cell):
        def __init__(self):
            super().__init__()
            self.forward, self.gradient = Forward(), ops.GradOperation(get_all=True)

        def construct(self, q, k, v, pos_weight, gating):
            gradients = self.gradient(self.forward)(q, k, v, pos_weight, gating)
            for x in gradients:
                note(x.shape, x.dtype)
            return gradients

    inferred = []
    for dtype, shape in ((ms.float16, (2, 9, 4, 48)), (ms.bfloat16, (2, 4, 9, 48))):
        seen.clear()
        # before 2.8 ops.zeros makes no bfloat16 on CPU
        inputs = [Tensor(np.zeros(size, np.float32), kind) for size, kind in (*[(shape, dtype)] * 3, ((4, 3), ms.float32), (4, ms.float32))]
        for cell in (Forward(), Backward()):
            with use_backend("flash"), pytest.raises(RuntimeError, match=r"Unsupported op \[FlashAttentionScore\w*\] on CPU"):
                cell(*inputs)
        assert seen == [(x.shape, str(x.dtype)) for x in inputs]
        inferred.append(f"{list(seen[0][0])} {seen[0][1]}")
    row(
        "the true operator, forward and backward",
        f"compiled as far as the choice of a kernel, gradients of q inferred as {' and '.join(inferred)}",
        "execution",
    )
    ms.set_context(mode=ms.PYNATIVE_MODE)


def test_a_model_on_ascend(ascend):
    """convit_tiny of two blocks in float16 (O2), GPSA and MHSA: ``flash`` agrees with the reference, and trains as a graph."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_seed(0)
    images, label = Tensor(np.random.default_rng(0).standard_normal((1, 3, 64, 64)), ms.float32), Tensor([3], ms.int32)
    net = convit.mindspore.create_model("convit_tiny", num_classes=10, image_size=64, depth=2, local_up_to_layer=1)
    ms.amp.auto_mixed_precision(net, "O2")
    net.set_train(False)
    logits = {}
    for backend in ("reference", None):
        with use_backend(backend):
            logits[backend] = net(images)
    assert relative_error(logits[None].asnumpy(), logits["reference"].asnumpy()) < 2e-3
    expected = float(nn.CrossEntropyLoss()(logits[None], label))
    ms.set_context(mode=ms.GRAPH_MODE)
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.CrossEntropyLoss()), nn.SGD(net.trainable_params(), 0.01))
    step.set_train()
    losses = [float(step(images, label)) for _ in range(3)]
    assert abs(losses[0] - expected) < 1e-2 * expected and losses[2] < losses[0]  # the loss, too, is float16's
    result = f"logits as the reference's, three training steps: loss {losses[0]:.2f} to {losses[2]:.2f}"
    row("convit_tiny of two blocks in float16 (O2), stand-in, graph", result, "speed")
    ms.set_context(mode=ms.PYNATIVE_MODE)


def test_what_runs_first_on_a_real_machine_is_rehearsed(tmp_path):
    """The MindSpore half of bench/ascend.py, on CPU; the other half's is in tests/test_npu.py. A half leaves the other's results."""
    script, out = Path(__file__).resolve().parents[2] / "bench/ascend.py", tmp_path / "ascend.json"
    out.write_text('{"torch": 1}')
    command = [sys.executable, str(script), "--half", "mindspore", "--device", "cpu", "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["torch"] == 1 and found["mindspore"]["environment"]["mindspore"] == ms.__version__
    parts = found["mindspore"]["operators"]
    assert [title.split()[0] for title in parts] == ["blocks", "reference"]
    for part in parts.values():
        assert max(part["relative error"].values()) < 1e-5 and part["same bits"] and part["forward ms"] > 0
