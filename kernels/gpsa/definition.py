"""GPSA and its gradients in plain NumPy, in float64: what the tests and benchmarks of every framework can be checked against.

    content   Pc_ij = softmax_j(scale * q_i . k_j)
    position  P_ij  = softmax_j(w0 * dx + w1 * dy + w2 * (dx^2 + dy^2)),   dx = xj - xi, dy = yj - yi
    out_i           = sum_j ((1 - g) Pc + g P)_ij v_j,                     g = sigmoid(gating)

Shapes are those of ``convit.gpsa``: q, k, v [B, H, N, D], pos_weight [H, 3], gating [H], grid (gh, gw). Both softmaxes are formed
in full; nothing is factored and nothing is fast. ``reference.py`` and ``any_mindspore.py`` say the same in their frameworks.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class Outcome(NamedTuple):
    """The output and, for a gradient ``grad`` of it, those of the five tensors."""

    out: Array
    dq: Array
    dk: Array
    dv: Array
    dpos_weight: Array
    dgating: Array


def softmax(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(e / e.sum(axis, keepdims=True))


def sigmoid(x: Array) -> Array:
    return np.asarray(np.exp(-np.logaddexp(0, -x)))


def relative_positions(grid: tuple[int, int]) -> Array:
    """(dx, dy, dx^2 + dy^2) from patch i to patch j: [N, N, 3], patches in row-major order of ``grid``."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    dx, dy = x - x[:, None], y - y[:, None]
    return np.stack([dx, dy, dx**2 + dy**2], -1).astype(np.float64)


def position_attention(pos_weight: ArrayLike, grid: tuple[int, int]) -> Array:
    """The position softmax P, [H, N, N]."""
    return softmax(np.einsum("ijc,hc->hij", relative_positions(grid), np.asarray(pos_weight, np.float64)))


def content_attention(q: ArrayLike, k: ArrayLike, scale: float) -> Array:
    """The content softmax Pc, [B, H, N, N]."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    return softmax(scale * q @ k.swapaxes(-1, -2))


def attention_map(q: ArrayLike, k: ArrayLike, pos_weight: ArrayLike, gating: ArrayLike, grid: tuple[int, int], scale: float) -> Array:
    """The gated mix of the two softmaxes, [B, H, N, N]."""
    gate = sigmoid(np.asarray(gating, np.float64))[:, None, None]
    return np.asarray((1 - gate) * content_attention(q, k, scale) + gate * position_attention(pos_weight, grid))


def gpsa(q: ArrayLike, k: ArrayLike, v: ArrayLike, pos_weight: ArrayLike, gating: ArrayLike, grid: tuple[int, int], scale: float) -> Array:
    """The output, [B, H, N, D]."""
    return np.asarray(attention_map(q, k, pos_weight, gating, grid, scale) @ np.asarray(v, np.float64))


def gpsa_with_gradients(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    pos_weight: ArrayLike,
    gating: ArrayLike,
    grid: tuple[int, int],
    scale: float,
    grad: ArrayLike,
) -> Outcome:
    """The output and the gradients of ``sum(out * grad)``."""
    q, k, v, grad = (np.asarray(x, np.float64) for x in (q, k, v, grad))
    content, position = content_attention(q, k, scale), position_attention(pos_weight, grid)
    gate = sigmoid(np.asarray(gating, np.float64))[:, None, None]
    mix = (1 - gate) * content + gate * position
    dmix = grad @ v.swapaxes(-1, -2)
    dscores = scale * _softmax_gradient(content, (1 - gate) * dmix)
    dlogits = _softmax_gradient(position, gate * dmix.sum(0))
    dgate = (dmix * (position - content)).sum((0, 2, 3))
    return Outcome(
        out=mix @ v,
        dq=dscores @ k,
        dk=dscores.swapaxes(-1, -2) @ q,
        dv=mix.swapaxes(-1, -2) @ grad,
        dpos_weight=np.einsum("hij,ijc->hc", dlogits, relative_positions(grid)),
        dgating=dgate * (gate * (1 - gate))[:, 0, 0],
    )


def relative_error(got: Any, want: ArrayLike) -> float:
    """Relative Frobenius error of an array."""
    want = np.asarray(want, np.float64)
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


def _softmax_gradient(p: Array, dp: Array) -> Array:
    """Gradient of the logits whose softmax over the last axis is ``p``."""
    return np.asarray(p * (dp - (p * dp).sum(-1, keepdims=True)))
