"""``convit.mindspore.gpsa``: check the arguments, choose a backend, call it; in pynative and inside a graph.

In graph mode the checks and the choice run once, while the graph is compiled, on shapes and types alone: ``use_backend`` and
``CONVIT_BACKEND`` take effect at that time, and a compiled graph keeps its backend.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

import mindspore as ms
from mindspore import Tensor, ops

from convit.dispatch import Problem, choose, forced_backend, order, why_not
from convit.kernels.gpsa import any_blocks, ascend_flash, cpu_aot
from convit.kernels.gpsa.any_mindspore import softmax

Kernel: TypeAlias = Callable[..., Tensor]

# backends that have plain attention, too
_ATTENTION = {"aot": cpu_aot, "flash": ascend_flash, "blocks": any_blocks}


def device_target() -> str:
    """Where MindSpore runs: "cpu", "gpu" or "ascend"."""
    return str(ms.get_context("device_target")).lower()


def _chosen(shapes: tuple[Any, ...], dtypes: tuple[Any, ...], grid: tuple[Any, ...], dropout_p: float, backend: str | None) -> ModuleType:
    batch, heads, tokens, head_dim = check(shapes, dtypes, grid, dropout_p)
    dtype = str(dtypes[0]).lower()
    problem = Problem("mindspore", device_target(), dtype, batch, heads, tokens, head_dim, tuple(grid), dropout_p)
    return choose(problem, forced_backend(backend))


# What a constexpr returns while a graph is compiled, a function here, becomes part of the graph. The choice depends on more than
# the arguments (use_backend, CONVIT_BACKEND, device_target), so no result is reused.
@ms.constexpr(reuse_result=False)
def _kernel(shapes: tuple[Any, ...], dtypes: tuple[Any, ...], grid: tuple[Any, ...], dropout_p: float, backend: str | None) -> Kernel:
    """The chosen backend's function for q, k, v of [B, H, N, D]."""
    function: Kernel = _chosen(shapes, dtypes, grid, dropout_p, backend).gpsa
    return function


@ms.constexpr(reuse_result=False)
def _packed_kernel(shapes: tuple[Any, ...], dtypes: tuple[Any, ...], grid: tuple[Any, ...], dropout_p: float) -> Kernel:
    """The chosen backend's function for q, k, v in one [B, N, 3, H, D]."""
    kernel = _chosen(shapes, dtypes, grid, dropout_p, None)
    return getattr(kernel, "gpsa_packed", None) or _unpacked(kernel.gpsa)


def _unpacked(kernel: Kernel) -> Kernel:
    def gpsa_packed(qkv: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float, dropout_p: float) -> Tensor:
        q, k, v = ops.unstack(ops.transpose(qkv, (2, 0, 3, 1, 4)))
        return ops.transpose(kernel(q, k, v, pos_weight, gating, grid, scale, dropout_p), (0, 2, 1, 3))

    return gpsa_packed


@ms.constexpr(reuse_result=False)
def _attention_kernel(shape: tuple[Any, ...], dtype: ms.Type, dropout_p: float) -> Kernel:
    """The attention of MHSA for qkv [B, N, 3, H, D]: by the backend that would do GPSA's, if it has one; else by plain products."""
    batch, heads, tokens, head_dim = shape
    problem = Problem("mindspore", device_target(), str(dtype).lower(), batch, heads, tokens, head_dim, (1, tokens), dropout_p)
    forced = forced_backend(None)
    for name in (forced,) if forced else order(problem):
        if name in _ATTENTION and why_not(name, problem) is None:
            function: Kernel = _ATTENTION[name].attention_packed
            return function
    return _plain_attention


def _plain_attention(qkv: Tensor, scale: float, dropout_p: float) -> Tensor:
    q, k, v = ops.unstack(ops.transpose(qkv, (2, 0, 3, 1, 4)))
    scores = ops.cast(ops.BatchMatMul(transpose_b=True)(q * scale, k), ms.float32)
    attn = ops.cast(softmax(scores), v.dtype)
    if dropout_p > 0:
        attn = ops.dropout(attn, dropout_p)
    return ops.transpose(ops.BatchMatMul()(attn, v), (0, 2, 1, 3))


def check(shapes: tuple[Any, ...], dtypes: tuple[Any, ...], grid: tuple[Any, ...], dropout_p: float) -> tuple[int, int, int, int]:
    """Raise for wrong arguments of ``gpsa``, given the shapes and types of its five tensors; return B, H, N, D."""
    names = ("q", "k", "v", "pos_weight", "gating")
    for name, dtype in zip(names, dtypes, strict=True):
        if not isinstance(dtype, ms.Type):
            raise TypeError(f"{name} must be a mindspore.Tensor, got something with the dtype {dtype!r}")
        if dtype not in (ms.float16, ms.bfloat16, ms.float32, ms.float64):
            raise TypeError(f"{name} must be floating point, got {dtype}")
    if not dtypes[0] == dtypes[1] == dtypes[2]:
        raise TypeError(f"q, k and v must have one dtype, got {dtypes[0]}, {dtypes[1]} and {dtypes[2]}")
    q_shape = shapes[0]
    if len(q_shape) != 4:
        raise ValueError(f"q must be [B, H, N, D], got shape {list(q_shape)}")
    for name, shape in zip(names[1:3], shapes[1:3], strict=True):
        if shape != q_shape:
            raise ValueError(f"{name} must have the shape of q, {list(q_shape)}, got {list(shape)}")
    batch, heads, tokens, head_dim = q_shape
    if head_dim == 0:
        raise ValueError("q must have at least one channel per head, got D = 0")
    if shapes[3] != (heads, 3):
        raise ValueError(f"pos_weight must be [H, 3] = [{heads}, 3], got {list(shapes[3])}")
    if shapes[4] != (heads,):
        raise ValueError(f"gating must be [H] = [{heads}], got {list(shapes[4])}")
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"grid must be a pair (gh, gw), got {grid!r}")
    gh, gw = grid
    if gh < 0 or gw < 0 or gh * gw != tokens:
        raise ValueError(f"grid must have gh * gw == N = {tokens}, got {gh} x {gw}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    return batch, heads, tokens, head_dim


@ms.constexpr
def _scale(scale: float | None, head_dim: int) -> float:
    return float(head_dim**-0.5 if scale is None else scale)  # operators take no integer, and no number of NumPy's


def gpsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating: Tensor,
    grid: tuple[int, int],
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Gated positional self-attention (d'Ascoli et al. 2021, equations 7 and 8) for MindSpore tensors.

    Per head, the output is ``((1 - g) Pc + g P) v`` with the content softmax ``Pc = softmax(scale * q k^T)``, the position softmax
    ``P = softmax(w0 dx + w1 dy + w2 (dx^2 + dy^2))`` over the patches of the grid and ``g = sigmoid(gating)``.

    Args:
        q, k, v: [B, H, N, D], one floating dtype.
        pos_weight: [H, 3], the weights (w0, w1, w2) of (dx, dy, dx^2 + dy^2).
        gating: [H], before the sigmoid.
        grid: (gh, gw) with gh * gw == N; patches are in row-major order.
        scale: Of the content scores; default D ** -0.5.
        dropout_p: Attention dropout on the mix of the softmaxes, in [0, 1).
        backend: Force one of ``convit.backends()``; default: context, environment, automatic by ``device_target``.

    Returns:
        [B, H, N, D] in the dtype of ``v``.

    Raises:
        ValueError: A shape, grid, probability or backend name is wrong.
        TypeError: An argument is no tensor, or the dtypes differ or are not floating.
        RuntimeError: The forced backend cannot run this, or none can; each one's reason is listed.
    """
    shapes = (q.shape, k.shape, v.shape, pos_weight.shape, gating.shape)
    dtypes = (q.dtype, k.dtype, v.dtype, pos_weight.dtype, gating.dtype)
    kernel = _kernel(shapes, dtypes, grid, dropout_p, backend)
    return kernel(q, k, v, pos_weight, gating, grid, _scale(scale, q.shape[3]), dropout_p)


def gpsa_packed(qkv: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float, dropout_p: float) -> Tensor:
    """``gpsa`` with q, k, v in one [B, N, 3, H, D], as one matrix product gives them, and the output [B, N, H, D]."""
    batch, tokens, _, heads, head_dim = qkv.shape
    shape = (batch, heads, tokens, head_dim)
    dtypes = (qkv.dtype, qkv.dtype, qkv.dtype, pos_weight.dtype, gating.dtype)
    kernel = _packed_kernel((shape, shape, shape, pos_weight.shape, gating.shape), dtypes, grid, dropout_p)
    return kernel(qkv, pos_weight, gating, grid, scale, dropout_p)


def attention_packed(qkv: Tensor, scale: float, dropout_p: float) -> Tensor:
    """Plain attention, qkv [B, N, 3, H, D] to [B, N, H, D]; softmax in float32, attention dropout ``dropout_p``."""
    batch, tokens, _, heads, head_dim = qkv.shape
    return _attention_kernel((batch, heads, tokens, head_dim), qkv.dtype, dropout_p)(qkv, scale, dropout_p)
