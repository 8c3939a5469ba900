"""The C++ kernels under MindSpore, and MindSpore's reference, against the definition in NumPy's float64."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import convit.mindspore
from convit import use_backend, why_not
from convit.dispatch import Problem
from convit.kernels import aot
from convit.kernels.gpsa import cpu_aot
from convit.kernels.gpsa.definition import gpsa, gpsa_with_gradients, relative_error
from convit.mindspore.ops import attention_packed, gpsa_packed

# relative Frobenius error against float64
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3, "float64": 1e-13}
NAMES = ("out", "q", "k", "v", "pos_weight", "gating")
SHAPES = [(2, 4, 5, 3, 8), (1, 1, 1, 1, 1), (1, 3, 1, 7, 5), (2, 2, 14, 14, 48)]


def arguments(shape, seed=0):
    batch, heads, gh, gw, dim = shape
    rng = np.random.default_rng(seed)
    q, k, v, grad = rng.standard_normal((4, batch, heads, gh * gw, dim))
    return q, k, v, rng.standard_normal((heads, 3)), rng.standard_normal(heads), grad


class Attention(nn.Cell):
    """gpsa and its product with a gradient; ``packed`` takes the other entry of the backend."""

    def __init__(self, grid, scale, backend, packed):
        super().__init__()
        self.grid, self.scale, self.backend, self.packed = grid, scale, backend, packed

    def construct(self, q, k, v, pos_weight, gating, grad):
        if self.packed:
            wide = ms.float32 if q.dtype == ms.bfloat16 else q.dtype  # MindSpore stacks and transposes no bfloat16
            qkv = ops.stack((ops.cast(q, wide), ops.cast(k, wide), ops.cast(v, wide)), 2)
            qkv = ops.cast(ops.transpose(qkv, (0, 3, 2, 1, 4)), q.dtype)
            out = gpsa_packed(qkv, pos_weight, gating, self.grid, self.scale, 0.0)
            out = ops.transpose(ops.cast(out, wide), (0, 2, 1, 3))
        else:
            out = convit.mindspore.gpsa(q, k, v, pos_weight, gating, self.grid, scale=self.scale, backend=self.backend)
        return (ops.cast(out, grad.dtype) * grad).sum(), out


def run(values, shape, scale, dtype, backend, packed=False):
    grid = shape[2:4]
    narrow = dtype if dtype != ms.bfloat16 else ms.float32
    inputs = [Tensor(x, narrow) for x in values]
    inputs[:3] = [x.astype(dtype) for x in inputs[:3]]
    with use_backend(backend):
        cell = Attention(grid, scale, backend, packed)
        (_, out), grads = ms.value_and_grad(cell, (0, 1, 2, 3, 4), has_aux=True)(*inputs)
    return [np.asarray(x.astype(narrow).asnumpy(), np.float64) for x in (out, *grads)]


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_reference_is_the_definition(mode, shape):
    values, scale = arguments(shape), 0.3
    got = run(values, shape, scale, ms.float64, "reference")
    for name, x, y in zip(NAMES, got, gpsa_with_gradients(*values[:5], shape[2:4], scale, values[5]), strict=True):
        if np.linalg.norm(y) < 1e-9:  # one token: the softmaxes are constant
            assert np.abs(x).max() < 1e-12, name
        else:
            assert relative_error(x, y) <= TOLERANCE["float64"], name


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_gradients_of_the_definition(shape):
    """Against differences along one random direction an argument."""
    (*inputs, grad), scale = arguments(shape), 0.3
    rng, h = np.random.default_rng(1), 1e-5
    gradients = gpsa_with_gradients(*inputs, shape[2:4], scale, grad)[1:]
    for i, (x, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        direction = rng.standard_normal(x.shape)
        ahead, behind = (gpsa(*inputs[:i], x + s * h * direction, *inputs[i + 1 :], shape[2:4], scale) for s in (1, -1))
        slope = ((ahead - behind) * grad).sum() / (2 * h)
        assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-6, abs=1e-8), NAMES[1 + i]


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_aot_is_the_definition(mode, shape, dtype, packed):
    values, scale, kind = arguments(shape), shape[4] ** -0.5, getattr(ms, dtype)
    if dtype == "bfloat16":  # what is measured is the kernel, not the rounding of its inputs
        values = tuple(Tensor(x, ms.float32).astype(ms.bfloat16).astype(ms.float32).asnumpy().astype(np.float64) for x in values)
    expected = gpsa_with_gradients(*values[:5], shape[2:4], scale, values[5])
    for name, x, y in zip(NAMES, run(values, shape, scale, kind, "aot", packed), expected, strict=True):
        if np.linalg.norm(y) < 1e-9:  # one token: the softmaxes are constant
            assert np.abs(x).max() < 1e-5, name
        else:
            error = np.linalg.norm(x - y) / np.linalg.norm(y)
            worst = np.unravel_index(np.abs(x - y).argmax(), x.shape)
            assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.2e}; at {worst} {x[worst]!r}, expected {y[worst]!r}"


def test_the_same_bits_again(mode):
    values = arguments(SHAPES[3])
    first, second = (run(values, SHAPES[3], 0.2, ms.float32, "aot") for _ in range(2))
    assert all((x == y).all() for x, y in zip(first, second, strict=True))


def test_plain_attention_is_the_same_kernel_with_the_gate_shut(mode):
    qkv = Tensor(np.random.default_rng(0).standard_normal((2, 13, 3, 4, 8)), ms.float32)

    class Plain(nn.Cell):
        def construct(self, qkv):
            out = attention_packed(qkv, 0.4, 0.0)
            return (out * out).sum(), out

    results = []
    for backend in ("aot", "reference"):
        with use_backend(backend):
            (_, out), grad = ms.value_and_grad(Plain(), 0, has_aux=True)(qkv)
        results.append((out.asnumpy(), grad.asnumpy()))
    for x, y in zip(*results, strict=True):
        assert np.abs(x - y).max() <= 1e-5 * np.abs(y).max()


def test_a_forced_backend_is_plain_attentions_too(monkeypatch):
    qkv, seen = Tensor(np.random.default_rng(0).standard_normal((1, 5, 3, 2, 8)), ms.float32), []
    plain = cpu_aot.attention_packed
    monkeypatch.setattr(cpu_aot, "attention_packed", lambda *args: (seen.append(1), plain(*args))[1])
    ms.set_context(mode=ms.PYNATIVE_MODE)
    for backend, calls in ((None, 1), ("aot", 2), ("reference", 2), ("blocks", 2)):
        with use_backend(backend):
            attention_packed(qkv, 0.4, 0.0)
        assert len(seen) == calls, backend


def problem(**changes):
    return Problem(**{"framework": "mindspore", "device": "cpu", "dtype": "float32", "batch": 1, "heads": 2, "tokens": 4,
                      "head_dim": 8, "grid": (2, 2)} | changes)  # fmt: skip


def test_aot_is_built_and_says_why_not():
    assert aot.library()[0], aot.library()[1]
    assert why_not("aot", problem()) is None
    assert "set_context(device_target='CPU')" in why_not("aot", problem(device="ascend"))
    assert "float16 is not supported" in why_not("aot", problem(dtype="float16"))
    assert "dropout" in why_not("aot", problem(dropout_p=0.1))
    assert why_not("sdpa", problem()) and why_not("reference", problem()) is None
    assert why_not("reference", problem(framework="torch")) is not None


def test_automatic_choice_and_refusal(mode):
    q, k, v, pos_weight, gating, _ = (Tensor(x, ms.float32) for x in arguments(SHAPES[0]))
    automatic = convit.mindspore.gpsa(q, k, v, pos_weight, gating, (5, 3))
    forced = convit.mindspore.gpsa(q, k, v, pos_weight, gating, (5, 3), backend="aot")
    assert (automatic.asnumpy() == forced.asnumpy()).all()
    scaled = convit.mindspore.gpsa(q, k, v, pos_weight, gating, (5, 3), scale=8**-0.5)
    np.testing.assert_allclose(automatic.asnumpy(), scaled.asnumpy(), rtol=1e-6)  # the default: D ** -0.5
    half = [x.astype(ms.float16) for x in (q, k, v)]
    assert convit.mindspore.gpsa(*half, pos_weight, gating, (5, 3)).dtype == ms.float16
    with pytest.raises(RuntimeError, match=r"backend 'aot' cannot run[\s\S]*float16 is not supported[\s\S]*reference +can run it"):
        convit.mindspore.gpsa(*half, pos_weight, gating, (5, 3), backend="aot")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"grid": (5, 4)}, ValueError, r"grid must have gh \* gw == N = 15, got 5 x 4"),
        ({"grid": 15}, TypeError, "grid must be a pair"),
        ({"pos_weight": np.zeros((4, 2))}, ValueError, r"pos_weight must be \[H, 3\] = \[4, 3\], got \[4, 2\]"),
        ({"gating": np.zeros(3)}, ValueError, r"gating must be \[H\] = \[4\], got \[3\]"),
        ({"k": np.zeros((2, 4, 14, 8))}, ValueError, "k must have the shape of q"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\)"),
        ({"backend": "aott"}, ValueError, "did you mean 'aot'"),
        ({"k": np.zeros((2, 4, 15, 8), np.float16)}, TypeError, "q, k and v must have one dtype, got Float32, Float16 and Float32"),
        ({"gating": np.zeros(4, np.int32)}, TypeError, "gating must be floating point, got Int32"),
        ({"q": np.zeros((4, 15, 8))}, ValueError, r"q must be \[B, H, N, D\], got shape \[4, 15, 8\]"),
        ({name: np.zeros((2, 4, 15, 0)) for name in "qkv"}, ValueError, "at least one channel per head, got D = 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_arguments(mode, change, error, message):
    values = dict(zip(NAMES[1:], arguments(SHAPES[0]), strict=False)) | {"grid": (5, 3)} | change
    narrow = {np.dtype("float64"): np.float32}
    tensors = {name: Tensor(x.astype(narrow.get(x.dtype, x.dtype))) if isinstance(x, np.ndarray) else x for name, x in values.items()}
    with pytest.raises(error, match=message):
        convit.mindspore.gpsa(**tensors)


def test_arrays_are_refused():
    values = [x.astype(np.float32) for x in arguments(SHAPES[0])[:5]]
    with pytest.raises(TypeError, match=r"q must be a mindspore\.Tensor"):
        convit.mindspore.gpsa(*values, (5, 3))
