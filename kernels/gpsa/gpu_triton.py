"""GPSA on NVIDIA (sm_80 and later) and AMD (gfx942) GPUs in Triton: the kernels of the operator in ``torch_operator.py``.

    out_i = sum_j ((1 - g) Pc + g P)_ij v_j,    Pc = softmax(scale q k^T),    P = Py (x) Px,    g = sigmoid(gating)

q, k, v [B, H, N, D]; patches i = yi * gw + xi. Weights of P are computed where they are used, from ``pos_weight``: a row of Px or
Py is exp((j - j*) (w + w2 (j + j* - 2i))) with j* the key of the largest logit, exact at any locality strength; no table is stored.

1. float16 and bfloat16 on a padded grid of at most 256 slots ("tile"): a program holds BM query rows against all keys, laid on a
   grid padded to powers of two, so that its tile of P is the outer product of a row of Py and one of Px. The gate is folded into
   the row of Py; one product with v remains. Backward: dq with the gate and weight gradients; dk and dv; a reduction.
2. Otherwise ("loop"): P v by one small product along each axis, then a plain online softmax that adds it in the epilogue.
   Backward: P^T dO by the same products, the weight gradient from moments of one axis at a time, then dq; dk and dv.

Nothing N x N leaves the chip, nothing is added atomically: the same input gives the same bits. Deviations from ``reference.py``:
no attention dropout; no float64; past 2^24 the exponent of a score is scaled down instead of overflowing (``_cap``).
"""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from convit.kernels.gpsa import torch_operator

_INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_ENOUGH = 512  # batch times heads from which on one program takes several query blocks, or many lines of an axis
_SLOTS = 256  # the largest padded grid that the tile kernels hold


class _Config(NamedTuple):
    rows: int  # BM: query rows of a tile (fwd, dq), or of a step (dkdv)
    keys: int  # BN: keys of a step (fwd, dq), or of a tile (dkdv); steps of a program at most (fwd_tile, dq_tile)
    warps: int
    stages: int


# kernel -> [(family, arithmetic, largest BD, configuration)]; the first row that fits is taken, "" fits any. Chosen by compiling
# (bench/aot.py): no stack, then the fewest instructions. What bench/gpu.sh measures to be faster goes above the general row.
_CONFIGS = {
    "fwd_tile": [
        ("sm80", "half", 64, _Config(32, 8, 4, 1)),
        ("sm80", "half", 128, _Config(64, 4, 8, 1)),
        ("", "half", 128, _Config(64, 4, 4, 1)),
    ],
    "dq_tile": [
        ("sm80", "half", 64, _Config(32, 32, 4, 1)),
        ("sm80", "half", 128, _Config(64, 64, 8, 1)),
        ("sm90", "half", 128, _Config(64, 32, 4, 1)),
        ("gfx942", "half", 64, _Config(64, 32, 4, 1)),
        ("", "half", 64, _Config(64, 64, 4, 1)),
        ("", "half", 128, _Config(64, 64, 4, 1)),
    ],
    "dkdv_tile": [
        ("sm80", "half", 64, _Config(32, 128, 8, 1)),
        ("sm80", "half", 128, _Config(32, 64, 4, 1)),
        ("", "half", 64, _Config(32, 256, 8, 1)),
        ("gfx942", "half", 128, _Config(32, 64, 4, 1)),
        ("sm100", "half", 128, _Config(32, 128, 4, 1)),
        ("", "half", 128, _Config(32, 128, 8, 1)),
    ],
    "fwd_loop": [
        ("", "half", 128, _Config(128, 64, 8, 2)),
        ("", "tf32", 128, _Config(64, 32, 4, 1)),
        ("gfx942", "ieee", 128, _Config(64, 32, 4, 1)),
        ("", "ieee", 64, _Config(32, 32, 4, 1)),
        ("", "ieee", 128, _Config(32, 32, 8, 1)),
    ],
    "dq_loop": [
        ("sm80", "half", 64, _Config(64, 32, 4, 2)),
        ("", "half", 64, _Config(64, 64, 4, 2)),
        ("sm80", "half", 128, _Config(64, 64, 8, 1)),
        ("sm90", "half", 128, _Config(64, 32, 4, 1)),
        ("", "half", 128, _Config(64, 64, 4, 2)),
        ("", "tf32", 128, _Config(32, 32, 4, 1)),
        ("gfx942", "ieee", 128, _Config(32, 32, 4, 1)),
        ("", "ieee", 64, _Config(32, 32, 8, 1)),
        ("", "ieee", 128, _Config(16, 32, 8, 1)),
    ],
    "dkdv_loop": [
        ("sm80", "half", 64, _Config(32, 64, 4, 2)),
        ("gfx942", "half", 128, _Config(64, 64, 4, 1)),
        ("", "half", 64, _Config(64, 64, 4, 2)),
        ("sm90", "half", 128, _Config(32, 64, 4, 1)),
        ("", "half", 128, _Config(64, 64, 4, 2)),
        ("", "tf32", 64, _Config(32, 64, 4, 1)),
        ("", "tf32", 128, _Config(32, 32, 4, 1)),
        ("gfx942", "ieee", 128, _Config(32, 64, 4, 1)),
        ("", "ieee", 64, _Config(32, 32, 4, 1)),
        ("sm80", "ieee", 128, _Config(32, 32, 4, 1)),
        ("", "ieee", 128, _Config(32, 32, 8, 1)),
    ],
    "mix": [
        ("", "half", 128, _Config(64, 64, 4, 2)),
        ("gfx942", "", 128, _Config(64, 64, 4, 1)),
        ("", "tf32", 64, _Config(64, 64, 4, 1)),
        ("", "", 128, _Config(64, 32, 8, 1)),
    ],
    "moments": [
        ("", "half", 128, _Config(64, 64, 8, 2)),
        ("gfx942", "", 128, _Config(64, 64, 8, 1)),
        ("", "tf32", 64, _Config(64, 64, 8, 1)),
        ("", "tf32", 128, _Config(32, 64, 4, 1)),
        ("", "ieee", 128, _Config(32, 32, 4, 1)),
    ],
}
_SMALL = _Config(64, 64, 4, 1)  # of the two kernels that touch no tensor


# ---------------------------------------------------------------------------------------------------------------- shared parts
@triton.jit
def _rows(ptr, i, stride_n, d):
    """Addresses of rows i, columns d; 64-bit, since i * stride_n may pass 2^31."""
    return ptr + i.to(tl.int64)[:, None] * stride_n + d[None, :]


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2E)


@triton.jit
def _peak(w, w2, at, size):
    """The key coordinate of the largest logit w (j - at) + w2 (j - at)^2 over 0 <= j < size."""
    vertex = at + tl.where(w2 < 0, w / tl.where(w2 < 0, -2.0 * w2, 1.0), 0.0)
    low = tl.where(w2 < 0, tl.floor(tl.minimum(tl.maximum(vertex, 0.0), size - 1.0)), 0.0)
    high = tl.where(w2 < 0, tl.minimum(low + 1.0, size - 1.0), size - 1.0)
    return tl.where((high - low) * (w + w2 * (high + low - 2.0 * at)) > 0, high, low)


@triton.jit
def _axis_weights(w, w2, at, to, size):
    """Position weights along one axis, before normalisation: in [0, 1], 1 at the largest, 0 where ``to`` is outside.

    w, w2 scalars for exponents of 2; ``at`` the query and ``to`` the key coordinates, float32, of shapes that broadcast.
    """
    best = _peak(w, w2, at, size)
    logit = (to - best) * (
        w + w2 * (to + (best - 2.0 * at))
    )  # coordinates are exact: one rounding in the sum; never above 0 but for rounding: -|logit| costs nothing and cannot overflow
    return tl.where(to < size, tl.exp2(-tl.abs(logit)), 0.0)


@triton.jit
def _cap(magnitude, scale_log2):
    """The factor of the exponent s * scale_log2 that keeps a row finite.

    A fused multiply-add forms s * scale_log2 - m exactly, but m is rounded: past 2^24 the difference could overflow exp2. Scores
    that large cannot be told apart to one unit of the exponent in float32 anyway.
    """
    limit = 16777216.0
    return tl.where(magnitude * scale_log2 > limit, limit / magnitude, scale_log2)


@triton.jit
def _place(pid, blocks, H):
    """Program -> (block, batch*head, batch, head); one axis of programs, since the others stop at 65,535."""
    bh = pid // blocks
    return pid % blocks, bh.to(tl.int64), (bh // H).to(tl.int64), (bh % H).to(tl.int64)


# ------------------------------------------------------------------------------------------------------- small grids: whole rows
@triton.jit
def _pin(x):
    """x as the result of a reduction, which the compiler computes once where it lies instead of again in each layout it is used in."""
    return tl.sum(x[:, :, None], 2)


@triton.jit
def _table(w, w2, at, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Rows ``at`` of Px or Py, [rows, PADDED] float32."""
    p = _axis_weights(w, w2, at.to(tl.float32)[:, None], tl.arange(0, PADDED).to(tl.float32)[None, :], SIZE)
    return p * (1.0 / tl.sum(p, 1))[:, None]


@triton.jit
def _centred(p, at, PADDED: tl.constexpr):
    """p times the distance, and times its square, each less its mean under p: [rows, PADDED]."""
    r = tl.arange(0, PADDED).to(tl.float32)[None, :] - at.to(tl.float32)[:, None]
    return p * (r - tl.sum(p * r, 1)[:, None]), p * (r * r - tl.sum(p * r * r, 1)[:, None])


@triton.jit
def _pos_weight(w_ptr, h):
    """w0, w1, w2 of head h for exponents of 2."""
    w_ptr += h * 3
    return tl.load(w_ptr) * _LOG2E, tl.load(w_ptr + 1) * _LOG2E, tl.load(w_ptr + 2) * _LOG2E


@triton.jit
def _slots(first, SLOTS: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr, GWP: tl.constexpr):
    """Token and validity of each slot of whole rows of the padded grid, from row ``first`` on."""
    s = tl.arange(0, SLOTS)
    y = first + s // GWP
    x = s % GWP
    return y * GW + x, (y < GH) & (x < GW)


@triton.jit
def _fwd_tile_kernel(
    q_ptr, k_ptr, v_ptr, w_ptr, gating_ptr,  # [B,H,N,D] x3, [H,3], [H]
    out_ptr, lse_ptr,  # [B,N,H,D], [B,H,N]
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    scale_log2, H,
    GH: tl.constexpr, GW: tl.constexpr, GHP: tl.constexpr, GWP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
    """One program: STEPS blocks of BM query slots. Queries and keys lie on the padded grid: a block has BM / GWP rows of Py and
    all of them share the rows of Px."""
    N: tl.constexpr = GH * GW
    BN: tl.constexpr = GHP * GWP
    BY: tl.constexpr = BM // GWP
    block, bh, b, h = _place(tl.program_id(0), (GH + BY * STEPS - 1) // (BY * STEPS), H)
    d = tl.arange(0, BD)
    j, key = _slots(0, BN, GH, GW, GWP)
    key_mask = key[:, None] & (d < D)[None, :]
    k = tl.load(_rows(k_ptr + b * stride_kb + h * stride_kh, j, stride_kn, d), mask=key_mask, other=0.0)  # [BN, BD]
    v = tl.load(_rows(v_ptr + b * stride_vb + h * stride_vh, j, stride_vn, d), mask=key_mask, other=0.0)  # [BN, BD]
    q_ptr += b * stride_qb + h * stride_qh
    out_ptr += (b * N * H + h) * D
    lse_ptr += bh * N
    if POSITION:
        w0, w1, w2 = _pos_weight(w_ptr, h)
        lam = tl.minimum(tl.load(gating_ptr + h), 60.0)
        odds = _exp(lam)
        px = _pin(_table(w0, w2, tl.arange(0, GWP), GW, GWP))  # [GWP, GWP]
    for step in range(STEPS):
        y0 = (block * STEPS + step) * BY
        i, query = _slots(y0, BM, GH, GW, GWP)
        row_mask = query[:, None] & (d < D)[None, :]
        q = tl.load(_rows(q_ptr, i, stride_qn, d), mask=row_mask, other=0.0)  # [BM, BD]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
        s = tl.where(key[None, :], s, float("-inf"))
        m = tl.max(s, 1)
        factor = _cap(tl.abs(m), scale_log2)
        if POSITION:
            # The mix times l, and times 1 / max(g, 1 - g) so that it neither overflows float16 nor vanishes: with lam = gating,
            #     e^-max(lam, 0) p + (e^lam e^-max(lam, 0) l) Py Px,    normalised by l' (1 + e^lam), l' = e^-max(lam, 0) l.
            # The first factor is a shift of the exponent, the second goes into the row of Py. Past 60 the shift changes nothing.
            shift = m * factor + tl.maximum(lam, 0.0) * _LOG2E
            p = tl.exp2(s * factor[:, None] - shift[:, None])
            total = tl.sum(p, 1)
            py = _pin(_table(w1, w2, y0 + tl.arange(0, BY), GH, GHP))  # [BY, GHP]
            py = py[:, None, :] * tl.reshape(total * odds, (BY, GWP))[:, :, None]  # [BY, GWP, GHP]
            p += tl.reshape(py[:, :, :, None] * px[None, :, None, :], (BM, BN))
            inverse = 1.0 / (total * (1.0 + odds))
        else:
            shift = m * factor
            p = tl.exp2(s * factor[:, None] - shift[:, None])
            total = tl.sum(p, 1)
            inverse = 1.0 / total
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * inverse[:, None]
        tl.store(_rows(out_ptr, i, H * D, d), o.to(v.dtype), mask=row_mask)
        tl.store(lse_ptr + i, (shift + tl.log2(total)) * _LN2, mask=query)


@triton.jit
def _dq_tile_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, w_ptr, gating_ptr, lse_ptr,  # [B,H,N,D] x4, [H,3], [H], [B,H,N]
    dq_ptr, stats_ptr, part_ptr,  # [B,N,H,D], [3,B,H,N], [B*H,blocks,4]
    stride_ob, stride_oh, stride_on, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    scale, H, total,
    GH: tl.constexpr, GW: tl.constexpr, GHP: tl.constexpr, GWP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, the rows' statistics for dk and dv, and this program's share of (dgating, dpos_weight) up to factors of the head.

    The keys come BN slots at a time, BP for the positional part: dA and the scores of a whole row do not fit into registers together.
    delta, the row sum of Pc dA, is then known only after the last: dA is centred by its mean over all keys, and dq corrected by the
    mean key.
    """
    N: tl.constexpr = GH * GW
    BY: tl.constexpr = BM // GWP
    ROWS: tl.constexpr = BN // GWP
    PART: tl.constexpr = BP // GWP
    blocks: tl.constexpr = (GH + BY * STEPS - 1) // (BY * STEPS)
    block, bh, b, h = _place(tl.program_id(0), blocks, H)
    d = tl.arange(0, BD)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    v_mean = tl.zeros((BD,), tl.float32)
    for first in range(0, GH, PART):
        j, key = _slots(first, BP, GH, GW, GWP)
        v = tl.load(_rows(v_ptr, j, stride_vn, d), mask=key[:, None] & (d < D)[None, :], other=0.0)  # [BP, BD]
        v_mean += tl.sum(v.to(tl.float32), 0) * (1.0 / N)
    do_ptr += b * stride_ob + h * stride_oh
    q_ptr += b * stride_qb + h * stride_qh
    dq_ptr += (b * N * H + h) * D
    lse_ptr += bh * N
    stats_ptr += bh * N
    w0, w1, w2 = _pos_weight(w_ptr, h)
    lam = tl.load(gating_ptr + h)
    dq_scale = scale / (1.0 + _exp(lam))
    rest = tl.log2(1.0 + _exp(lam))  # -log2(1 - g), a shift of the exponent for dk and dv
    # first the positional part, so that its tiles are dead before the content's are made: sums over yj of dA times a row of Py,
    # and of Py times the centred dy and dy^2; with a table of Px they give every moment
    m0 = tl.zeros((BY, GWP, GWP), tl.float32)
    m1 = tl.zeros((BY, GWP, GWP), tl.float32)
    m2 = tl.zeros((BY, GWP, GWP), tl.float32)
    for step in range(STEPS):
        y0 = (block * STEPS + step) * BY
        i, query = _slots(y0, BM, GH, GW, GWP)
        do = tl.load(_rows(do_ptr, i, stride_on, d), mask=query[:, None] & (d < D)[None, :], other=0.0)  # [BM, BD]
        y = (y0 + tl.arange(0, BY)).to(tl.float32)[:, None]
        to = tl.arange(0, GHP).to(tl.float32)[None, :]
        py = _axis_weights(w1, w2, y, to, GH)  # [BY, GHP]
        inverse = 1.0 / tl.sum(py, 1)[:, None]
        mean1 = tl.sum(py * (to - y), 1)[:, None] * inverse
        mean2 = tl.sum(py * (to - y) * (to - y), 1)[:, None] * inverse
        for first in range(0, GH, PART):
            j, key = _slots(first, BP, GH, GW, GWP)
            v = tl.load(_rows(v_ptr, j, stride_vn, d), mask=key[:, None] & (d < D)[None, :], other=0.0)  # [BP, BD]
            da = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BM, BP], zero at padded rows and slots
            da = tl.reshape(da, (BY, GWP, PART, GWP))
            r = (first + tl.arange(0, PART)).to(tl.float32)[None, :] - y
            weight = _axis_weights(w1, w2, y, r + y, GH) * inverse  # [BY, PART]
            m0 += tl.sum(da * _pin(weight)[:, None, :, None], 2)
            m1 += tl.sum(da * _pin(weight * (r - mean1))[:, None, :, None], 2)
            m2 += tl.sum(da * _pin(weight * (r * r - mean2))[:, None, :, None], 2)
    px = _table(w0, w2, tl.arange(0, GWP), GW, GWP)  # [GWP, GWP]
    px1, px2 = _centred(px, tl.arange(0, GWP), GWP)
    part = part_ptr + (bh * blocks + block) * 4
    gate_part = tl.sum(tl.reshape(m0 * px[None, :, :], (BM * GWP,)), 0)
    tl.store(part + 1, tl.sum(tl.reshape(m0 * px1[None, :, :], (BM * GWP,)), 0))
    tl.store(part + 2, tl.sum(tl.reshape(m1 * px[None, :, :], (BM * GWP,)), 0))
    tl.store(part + 3, tl.sum(tl.reshape(m0 * px2[None, :, :] + m2 * px[None, :, :], (BM * GWP,)), 0))
    deltas = tl.zeros((BM,), tl.float32)
    for step in range(STEPS):
        y0 = (block * STEPS + step) * BY
        i, query = _slots(y0, BM, GH, GW, GWP)
        row_mask = query[:, None] & (d < D)[None, :]
        do = tl.load(_rows(do_ptr, i, stride_on, d), mask=row_mask, other=0.0)  # [BM, BD]
        q = tl.load(_rows(q_ptr, i, stride_qn, d), mask=row_mask, other=0.0)  # [BM, BD]
        lse = tl.load(lse_ptr + i, mask=query, other=1e30)
        factor = _cap(tl.abs(lse), _LOG2E)
        row_scale = scale * factor
        row_shift = lse * factor
        centre = tl.sum(do.to(tl.float32) * v_mean[None, :], 1)
        excess = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, BD), tl.float32)
        mean = tl.zeros((BM, BD), tl.float32)
        for first in range(0, GH, ROWS):
            j, key = _slots(first, BN, GH, GW, GWP)
            key_mask = key[:, None] & (d < D)[None, :]
            k = tl.load(_rows(k_ptr, j, stride_kn, d), mask=key_mask, other=0.0)  # [BN, BD]
            v = tl.load(_rows(v_ptr, j, stride_vn, d), mask=key_mask, other=0.0)  # [BN, BD]
            da = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BM, BN]
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
            p = tl.exp2(s * row_scale[:, None] - row_shift[:, None])
            p = tl.where(key[None, :], p, 0.0)
            ds = p * (da - centre[:, None])
            excess += tl.sum(ds, 1)
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
            mean = tl.dot(p.to(k.dtype), k, mean, input_precision=PRECISION)
        dq = (acc - excess[:, None] * mean) * dq_scale
        delta = centre + excess
        tl.store(_rows(dq_ptr, i, H * D, d), dq.to(q.dtype), mask=row_mask)
        tl.store(stats_ptr + i, row_scale, mask=query)
        tl.store(stats_ptr + total + i, row_shift + rest, mask=query)
        tl.store(stats_ptr + total + total + i, delta, mask=query)
        deltas += delta  # zero at padded rows
    tl.store(part, gate_part - tl.sum(deltas, 0))


@triton.jit
def _dkdv_tile_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, w_ptr, gating_ptr, stats_ptr,  # [B,H,N,D] x4, [H,3], [H], [3,B,H,N]
    dk_ptr, dv_ptr,  # [B,N,H,D] x2
    stride_ob, stride_oh, stride_on, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    scale, H, total,
    GH: tl.constexpr, GW: tl.constexpr, GHP: tl.constexpr, GWP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN slots: whole rows of the padded grid, against all queries. Tiles are [keys, queries]."""
    N: tl.constexpr = GH * GW
    ROWS: tl.constexpr = BN // GWP
    BY: tl.constexpr = BM // GWP
    block, bh, b, h = _place(tl.program_id(0), (GH + ROWS - 1) // ROWS, H)
    d = tl.arange(0, BD)
    j, key = _slots(block * ROWS, BN, GH, GW, GWP)
    key_mask = key[:, None] & (d < D)[None, :]
    k = tl.load(_rows(k_ptr + b * stride_kb + h * stride_kh, j, stride_kn, d), mask=key_mask, other=0.0)  # [BN, BD]
    v = tl.load(_rows(v_ptr + b * stride_vb + h * stride_vh, j, stride_vn, d), mask=key_mask, other=0.0)  # [BN, BD]
    do_ptr += b * stride_ob + h * stride_oh
    q_ptr += b * stride_qb + h * stride_qh
    stats_ptr += bh * N
    w0, w1, w2 = _pos_weight(w_ptr, h)
    gate = 1.0 / (1.0 + _exp(-tl.load(gating_ptr + h)))
    px = _pin(tl.trans(_table(w0, w2, tl.arange(0, GWP), GW, GWP)))  # [GWP keys, GWP queries]
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    for y0 in range(0, GH, BY):
        i, query = _slots(y0, BM, GH, GW, GWP)
        row_mask = query[:, None] & (d < D)[None, :]
        q = tl.load(_rows(q_ptr, i, stride_qn, d), mask=row_mask, other=0.0)  # [BM, BD]
        do = tl.load(_rows(do_ptr, i, stride_on, d), mask=row_mask, other=0.0)  # [BM, BD]
        row_scale = tl.load(stats_ptr + i, mask=query, other=0.0)
        row_shift = tl.load(stats_ptr + total + i, mask=query, other=1e30)
        delta = tl.load(stats_ptr + total + total + i, mask=query, other=0.0)
        at = (y0 + tl.arange(0, BY)).to(tl.float32)[None, :]
        to = (block * ROWS + tl.arange(0, ROWS)).to(tl.float32)[:, None]
        py = _axis_weights(w1, w2, at, tl.arange(0, GHP).to(tl.float32)[:, None], GH)  # [GHP, BY]
        norm = gate / tl.sum(py, 0)
        if ROWS != GHP:
            py = _axis_weights(w1, w2, at, to, GH)  # [ROWS, BY]
        py = _pin(py * norm[None, :])
        # rows of padded slots may hold anything: they are not stored, and no row meets another
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BN, BM]
        p = tl.exp2(s * row_scale[None, :] - row_shift[None, :])  # (1 - g) Pc
        mix = p + tl.reshape(py[:, None, :, None] * px[None, :, None, :], (BN, BM))
        dv = tl.dot(mix.to(do.dtype), do, dv, input_precision=PRECISION)
        da = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BN, BM]
        dk = tl.dot((p * (da - delta[None, :])).to(q.dtype), q, dk, input_precision=PRECISION)
    tl.store(_rows(dk_ptr + (b * N * H + h) * D, j, H * D, d), (dk * scale).to(k.dtype), mask=key_mask)
    tl.store(_rows(dv_ptr + (b * N * H + h) * D, j, H * D, d), dv.to(v.dtype), mask=key_mask)


# -------------------------------------------------------------------------------------------------------- large grids: per axis
@triton.jit
def _norm_kernel(w_ptr, sum_ptr, GH, GW, BM: tl.constexpr, BK: tl.constexpr):
    """Sums of the unnormalised rows of Px, then of Py: [H, GW + GH]. One program: a head, an axis, BM rows."""
    blocks_x = (GW + BM - 1) // BM
    blocks = blocks_x + (GH + BM - 1) // BM
    h = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    is_x = block < blocks_x
    size = tl.where(is_x, GW, GH)
    w = tl.load(w_ptr + h * 3 + tl.where(is_x, 0, 1)) * _LOG2E
    w2 = tl.load(w_ptr + h * 3 + 2) * _LOG2E
    i = tl.where(is_x, block, block - blocks_x) * BM + tl.arange(0, BM)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, size, BK):
        to = (start + tl.arange(0, BK)).to(tl.float32)
        total += tl.sum(_axis_weights(w, w2, i.to(tl.float32)[:, None], to[None, :], size), 1)
    tl.store(sum_ptr + h * (GW + GH) + tl.where(is_x, 0, GW) + i, total, mask=i < size)


@triton.jit
def _mix_weights(w, w2, sum_ptr, to, t, size, TRANSPOSE: tl.constexpr):
    """[BM, BK] weights of patches ``t`` of a line for its patches ``to``; the transpose is normalised, the other is not."""
    if TRANSPOSE:
        norm = tl.load(sum_ptr + t, mask=t < size, other=float("inf"))
        return _axis_weights(w, w2, t.to(tl.float32)[None, :], to.to(tl.float32)[:, None], size) * (1.0 / norm)[None, :]
    return _axis_weights(w, w2, to.to(tl.float32)[:, None], t.to(tl.float32)[None, :], size)


@triton.jit
def _mix_kernel(
    in_ptr, w_ptr, sum_ptr, out_ptr,  # [B,H,N,D], [H,3], [H,GW+GH] (read if TRANSPOSE), [B,N,H,D]
    stride_b, stride_h, stride_n, H, GH, GW,
    X: tl.constexpr, TRANSPOSE: tl.constexpr, SHORT: tl.constexpr, LINES: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Product with Px along x, or with Py along y, or with its transpose. One program: LINES lines of the axis, BM patches each.

    SHORT: a line fits into one tile, and its weights are made once for all lines.
    """
    size = GW if X else GH
    count = GH if X else GW
    step = 1 if X else GW
    blocks = (size + BM - 1) // BM
    block, bh, b, h = _place(tl.program_id(0), blocks * ((count + LINES - 1) // LINES), H)
    to = (block % blocks) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    w = tl.load(w_ptr + h * 3 + (0 if X else 1)) * _LOG2E
    w2 = tl.load(w_ptr + h * 3 + 2) * _LOG2E
    in_ptr += b * stride_b + h * stride_h
    out_ptr += (b * GH * GW * H + h) * D
    if TRANSPOSE:
        sum_ptr += h * (GW + GH) + (0 if X else GW)
    if SHORT:
        t = tl.arange(0, BK)
        p = _mix_weights(w, w2, sum_ptr, to, t, size, TRANSPOSE)
        if not TRANSPOSE:
            p = p * (1.0 / tl.sum(p, 1))[:, None]
        p = p.to(in_ptr.dtype.element_ty)
    for line in range(block // blocks * LINES, tl.minimum(block // blocks * LINES + LINES, count)):
        first = line * GW if X else line
        if SHORT:
            x = tl.load(_rows(in_ptr, first + t * step, stride_n, d), mask=(t < size)[:, None] & (d < D)[None, :], other=0.0)
            acc = tl.dot(p, x, input_precision=PRECISION)  # [BM, BD]
        else:
            acc = tl.zeros((BM, BD), tl.float32)
            total = tl.zeros((BM,), tl.float32)
            for start in range(0, size, BK):
                t = start + tl.arange(0, BK)
                x = tl.load(_rows(in_ptr, first + t * step, stride_n, d), mask=(t < size)[:, None] & (d < D)[None, :], other=0.0)
                p = _mix_weights(w, w2, sum_ptr, to, t, size, TRANSPOSE)
                if not TRANSPOSE:
                    total += tl.sum(p, 1)
                acc = tl.dot(p.to(x.dtype), x, acc, input_precision=PRECISION)
            if not TRANSPOSE:
                acc = acc * (1.0 / total)[:, None]
        rows = _rows(out_ptr, first + to * step, H * D, d)
        tl.store(rows, acc.to(out_ptr.dtype.element_ty), mask=(to < size)[:, None] & (d < D)[None, :])


@triton.jit
def _moments_kernel(
    do_ptr, u_ptr, w_ptr, part_ptr,  # [B,H,N,D], [B,N,H,D] = product of v with the other axis, [H,3], [B*H,parts,4]
    stride_b, stride_h, stride_n, H, GH, GW, parts, part0,
    X: tl.constexpr, GATE: tl.constexpr, LINES: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One axis's share of dpos_weight: moments of P dP, dP = dO u^T summed over LINES lines, never stored. GATE: also sum P dP."""
    size = GW if X else GH
    count = GH if X else GW
    step = 1 if X else GW
    blocks = (size + BM - 1) // BM
    block, bh, b, h = _place(tl.program_id(0), blocks * ((count + LINES - 1) // LINES), H)
    i = (block % blocks) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    at = i.to(tl.float32)
    w = tl.load(w_ptr + h * 3 + (0 if X else 1)) * _LOG2E
    w2 = tl.load(w_ptr + h * 3 + 2) * _LOG2E
    row_mask = (i < size)[:, None] & (d < D)[None, :]
    do_ptr += b * stride_b + h * stride_h
    u_ptr += (b * GH * GW * H + h) * D
    # moments of order 0, 1, 2 about the largest weight, of P dP (c) and of P (p)
    best = _peak(w, w2, at, size)
    p0 = tl.zeros((BM,), tl.float32)
    p1 = tl.zeros((BM,), tl.float32)
    p2 = tl.zeros((BM,), tl.float32)
    c0 = tl.zeros((BM,), tl.float32)
    c1 = tl.zeros((BM,), tl.float32)
    c2 = tl.zeros((BM,), tl.float32)
    for start in range(0, size, BK):
        t = start + tl.arange(0, BK)
        mask = (t < size)[:, None] & (d < D)[None, :]
        dp = tl.zeros((BM, BK), tl.float32)
        for line in range(block // blocks * LINES, tl.minimum(block // blocks * LINES + LINES, count)):
            first = line * GW if X else line
            do = tl.load(_rows(do_ptr, first + i * step, stride_n, d), mask=row_mask, other=0.0)  # [BM, BD]
            u = tl.load(_rows(u_ptr, first + t * step, H * D, d), mask=mask, other=0.0)  # [BK, BD]
            dp = tl.dot(do, tl.trans(u), dp, input_precision=PRECISION)
        p = _axis_weights(w, w2, at[:, None], t.to(tl.float32)[None, :], size)  # [BM, BK]
        r = t.to(tl.float32)[None, :] - best[:, None]
        p0 += tl.sum(p, 1)
        c0 += tl.sum(p * dp, 1)
        p = p * r
        p1 += tl.sum(p, 1)
        c1 += tl.sum(p * dp, 1)
        p = p * r
        p2 += tl.sum(p, 1)
        c2 += tl.sum(p * dp, 1)
    inverse = 1.0 / p0
    c0 = c0 * inverse  # expectation of dP, then its covariances with r and r^2
    c1 = (c1 - c0 * p1) * inverse
    c2 = (c2 - c0 * p2) * inverse
    part = part_ptr + (bh * parts + part0 + block) * 4
    tl.store(part, tl.sum(c0, 0) if GATE else 0.0)
    tl.store(part + 1, tl.sum(c1, 0) if X else 0.0)
    tl.store(part + 2, 0.0 if X else tl.sum(c1, 0))
    tl.store(part + 3, tl.sum(c2 + 2.0 * (best - at) * c1, 0))  # the distance is r + best - at


@triton.jit
def _fwd_loop_step(
    q, k_ptr, v_ptr, j, N, stride_kn, stride_vn, m, total, acc, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BD)
    mask = (d < D)[None, :] & (j < N)[:, None] if MASK else (d < D)[None, :]
    k = tl.load(_rows(k_ptr, j, stride_kn, d), mask=mask, other=0.0)  # [BN, BD]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
    if MASK:
        s = tl.where((j < N)[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    factor = _cap(tl.abs(safe), scale_log2)
    p = tl.exp2(s * factor[:, None] - (safe * factor)[:, None])
    alpha = tl.exp2((m - safe) * factor)
    total = total * alpha + tl.sum(p, 1)
    v = tl.load(_rows(v_ptr, j, stride_vn, d), mask=mask, other=0.0)  # [BN, BD]
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, total, acc


@triton.jit
def _fwd_loop_kernel(
    q_ptr, k_ptr, v_ptr, position_ptr, gating_ptr,  # [B,H,N,D] x3, P v [B,N,H,D], [H]
    out_ptr, lse_ptr,  # [B,N,H,D], [B,H,N]
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    scale_log2, H, N,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    POSITION: tl.constexpr,
):  # fmt: skip
    block, bh, b, h = _place(tl.program_id(0), (N + BM - 1) // BM, H)
    i = block * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    row_mask = (i < N)[:, None] & (d < D)[None, :]
    q = tl.load(_rows(q_ptr + b * stride_qb + h * stride_qh, i, stride_qn, d), mask=row_mask, other=0.0)  # [BM, BD]
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    m = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    full = N if MASK else N // BN * BN
    for start in range(0, full, BN):
        j = start + tl.arange(0, BN)
        m, total, acc = _fwd_loop_step(q, k_ptr, v_ptr, j, N, stride_kn, stride_vn, m, total, acc, scale_log2, D, BD, PRECISION, MASK)
    if TAIL:
        j = full + tl.arange(0, BN)
        m, total, acc = _fwd_loop_step(q, k_ptr, v_ptr, j, N, stride_kn, stride_vn, m, total, acc, scale_log2, D, BD, PRECISION, True)
    rows = _rows((b * N * H + h) * D, i, H * D, d)
    if POSITION:
        lam = tl.load(gating_ptr + h)
        o = acc * (1.0 / (total * (1.0 + _exp(lam))))[:, None]
        o += tl.load(position_ptr + rows, mask=row_mask, other=0.0).to(tl.float32) * (1.0 / (1.0 + _exp(-lam)))
    else:
        o = acc * (1.0 / total)[:, None]
    tl.store(out_ptr + rows, o.to(q.dtype), mask=row_mask)
    lse = m * _cap(tl.abs(m), scale_log2) + tl.log2(total)
    tl.store(lse_ptr + bh * N + i, lse * _LN2, mask=i < N)


@triton.jit
def _dq_loop_step(
    q, do, k_ptr, v_ptr, j, N, stride_kn, stride_vn, row_scale, row_shift, centre, excess, acc, mean,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BD)
    mask = (d < D)[None, :] & (j < N)[:, None] if MASK else (d < D)[None, :]
    k = tl.load(_rows(k_ptr, j, stride_kn, d), mask=mask, other=0.0)  # [BN, BD]
    v = tl.load(_rows(v_ptr, j, stride_vn, d), mask=mask, other=0.0)  # [BN, BD]
    p = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
    p = tl.exp2(p * row_scale[:, None] - row_shift[:, None])
    if MASK:
        p = tl.where((j < N)[None, :], p, 0.0)
    da = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BM, BN]
    ds = p * (da - centre[:, None])
    excess += tl.sum(ds, 1)
    acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    mean = tl.dot(p.to(k.dtype), k, mean, input_precision=PRECISION)
    return excess, acc, mean


@triton.jit
def _dq_loop_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, gating_ptr, lse_ptr,  # [B,H,N,D] x4, [B,N,H,D], [H], [B,H,N]
    dq_ptr, stats_ptr, part_ptr,  # [B,N,H,D], [3,B,H,N], [B*H,parts,4]
    stride_ob, stride_oh, stride_on, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    scale, H, N, total, parts,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, the rows' statistics for dk and dv (factor and shift of the exponent, delta = row sum of Pc dA), minus the sum of delta.

    delta is not to be had from the rounded output: with g near 1 what is left after taking out the positional part is rounding.
    dO . out only centres dA; the exact delta is the centre plus the row sum of what was centred, and dq is corrected by the mean key.
    """
    blocks = (N + BM - 1) // BM
    block, bh, b, h = _place(tl.program_id(0), blocks, H)
    i = block * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    row_mask = (i < N)[:, None] & (d < D)[None, :]
    q = tl.load(_rows(q_ptr + b * stride_qb + h * stride_qh, i, stride_qn, d), mask=row_mask, other=0.0)  # [BM, BD]
    do = tl.load(_rows(do_ptr + b * stride_ob + h * stride_oh, i, stride_on, d), mask=row_mask, other=0.0)  # [BM, BD]
    rows = _rows((b * N * H + h) * D, i, H * D, d)
    out = tl.load(out_ptr + rows, mask=row_mask, other=0.0)
    centre = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + bh * N + i, mask=i < N, other=1e30)
    factor = _cap(tl.abs(lse), _LOG2E)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    excess = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    mean = tl.zeros((BM, BD), tl.float32)
    full = N if MASK else N // BN * BN
    for start in range(0, full, BN):
        j = start + tl.arange(0, BN)
        excess, acc, mean = _dq_loop_step(
            q, do, k_ptr, v_ptr, j, N, stride_kn, stride_vn, scale * factor, lse * factor, centre, excess, acc, mean,
            D, BD, PRECISION, MASK,
        )  # fmt: skip
    if TAIL:
        j = full + tl.arange(0, BN)
        excess, acc, mean = _dq_loop_step(
            q, do, k_ptr, v_ptr, j, N, stride_kn, stride_vn, scale * factor, lse * factor, centre, excess, acc, mean,
            D, BD, PRECISION, True,
        )  # fmt: skip
    delta = centre + excess
    dq = (acc - excess[:, None] * mean) * (scale / (1.0 + _exp(tl.load(gating_ptr + h))))
    tl.store(dq_ptr + rows, dq.to(q.dtype), mask=row_mask)
    stats_ptr += bh * N + i
    tl.store(stats_ptr, scale * factor, mask=i < N)
    tl.store(stats_ptr + total, lse * factor, mask=i < N)
    tl.store(stats_ptr + total + total, delta, mask=i < N)
    part = part_ptr + (bh * parts + block) * 4
    tl.store(part, -tl.sum(delta, 0))
    tl.store(part + 1 + tl.arange(0, 2), tl.zeros((2,), tl.float32))
    tl.store(part + 3, 0.0)


@triton.jit
def _dkdv_loop_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, position_ptr, gating_ptr, stats_ptr,  # [B,H,N,D] x4, P^T dO [B,N,H,D], [H], [3,B,H,N]
    dk_ptr, dv_ptr,  # [B,N,H,D] x2
    stride_ob, stride_oh, stride_on, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    scale, H, N, total,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys, over all queries. Tiles are [keys, queries]."""
    block, bh, b, h = _place(tl.program_id(0), (N + BN - 1) // BN, H)
    j = block * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    key_mask = (j < N)[:, None] & (d < D)[None, :]
    k = tl.load(_rows(k_ptr + b * stride_kb + h * stride_kh, j, stride_kn, d), mask=key_mask, other=0.0)  # [BN, BD]
    v = tl.load(_rows(v_ptr + b * stride_vb + h * stride_vh, j, stride_vn, d), mask=key_mask, other=0.0)  # [BN, BD]
    do_ptr += b * stride_ob + h * stride_oh
    q_ptr += b * stride_qb + h * stride_qh
    stats_ptr += bh * N
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    for start in range(0, N, BM):
        i = start + tl.arange(0, BM)
        row_mask = (i < N)[:, None] & (d < D)[None, :]
        q = tl.load(_rows(q_ptr, i, stride_qn, d), mask=row_mask, other=0.0)  # [BM, BD]
        do = tl.load(_rows(do_ptr, i, stride_on, d), mask=row_mask, other=0.0)  # [BM, BD]
        row_scale = tl.load(stats_ptr + i, mask=i < N, other=0.0)
        row_shift = tl.load(stats_ptr + total + i, mask=i < N, other=1e30)
        delta = tl.load(stats_ptr + total + total + i, mask=i < N, other=0.0)
        p = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BN, BM]
        p = tl.exp2(p * row_scale[None, :] - row_shift[None, :])
        da = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BN, BM]
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dk = tl.dot((p * (da - delta[None, :])).to(q.dtype), q, dk, input_precision=PRECISION)
    lam = tl.load(gating_ptr + h)
    rest = 1.0 / (1.0 + _exp(lam))
    rows = _rows((b * N * H + h) * D, j, H * D, d)
    dv = dv * rest + tl.load(position_ptr + rows, mask=key_mask, other=0.0).to(tl.float32) * (1.0 / (1.0 + _exp(-lam)))
    tl.store(dk_ptr + rows, (dk * (scale * rest)).to(k.dtype), mask=key_mask)
    tl.store(dv_ptr + rows, dv.to(v.dtype), mask=key_mask)


@triton.jit
def _reduce_kernel(part_ptr, gating_ptr, dw_ptr, dgating_ptr, H, B, parts, BLOCK: tl.constexpr):
    """[B*H, parts, 4] -> dpos_weight [H, 3] and dgating [H], summed in a fixed order. One program per head."""
    h = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, 4)
    acc = tl.zeros((BLOCK, 4), tl.float32)
    for start in range(0, B * parts, BLOCK):
        r = start + tl.arange(0, BLOCK)
        rows = ((r // parts).to(tl.int64) * H + h) * parts + r % parts
        acc += tl.load(part_ptr + rows[:, None] * 4 + c[None, :], mask=(r < B * parts)[:, None], other=0.0)
    total = tl.sum(acc, 0)  # [4]
    lam = tl.load(gating_ptr + h)
    gate = 1.0 / (1.0 + _exp(-lam))
    tl.store(dw_ptr + h * 3 + c - 1, total * gate, mask=c > 0)
    tl.store(dgating_ptr + h + c, total * (gate / (1.0 + _exp(lam))), mask=c == 0)


# ------------------------------------------------------------------------------------------------------------------- launchers
def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _padded(grid: tuple[int, int]) -> tuple[int, int] | None:
    """The padded key grid of the tile kernels, at least 16 slots; ``None`` if ``grid`` is too large or too awkward for them."""
    gh, gw = grid
    columns = _power_of_two(gw)
    rows = max(_power_of_two(gh), 16 // columns)
    return (rows, columns) if rows * columns <= _SLOTS and max(rows, columns) <= 64 else None


@functools.cache
def _family(index: int) -> str:
    """Key of the configuration table: "sm80", "sm90", ..., "gfx942"; the interpreter is "interpret"."""
    if _INTERPRET:
        return "interpret"
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, _ = torch.cuda.get_device_capability(index)
    return f"sm{major}0"


def _config(kernel: str, family: str, arithmetic: str, block_d: int) -> _Config:
    for chip, kind, largest, config in _CONFIGS[kernel]:
        if chip in ("", family) and kind in ("", arithmetic) and block_d <= largest:
            return config
    raise AssertionError(f"no configuration of {kernel} for {family}, {arithmetic}, D <= {block_d}")


def _precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s input precision: torch's own setting decides whether float32 products may use tf32."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    try:
        allowed = matmul.allow_tf32
    except RuntimeError:  # torch 2.9 renamed the setting; once a program has used the new name, reading the old one is an error
        allowed = matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


class _Call:
    """A launch with all but its tensors: made once for a plan."""

    __slots__ = ("kernel", "programs", "config", "numbers", "device", "constants", "compiled", "run", "tail")

    def __init__(self, kernel, programs: int, config: _Config, numbers: tuple, device: int, constants: dict[str, Any]):
        self.kernel, self.programs, self.config, self.numbers = kernel, programs, config, numbers
        self.device, self.constants = device, constants
        self.compiled: Any = None  # what Triton launched last
        self.run: Callable | None = None  # launches it for tensors at multiples of 16 bytes
        self.tail: tuple = ()  # what it is given after the tensors


# Triton's own launch binds the arguments and works out anew which kernel they mean: tens of microseconds. Here only the alignment of
# the tensors is open, so the compiled kernel is called. Before 3.3 that takes other arguments; on AMD more than alignment matters.
_DIRECT = not _INTERPRET and torch.version.hip is None and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


def _launch(call: _Call, *tensors: Tensor) -> None:
    run = call.run
    if run is not None or _DIRECT:
        addresses, bits = [x.data_ptr() for x in tensors], 0
        for address in addresses:
            bits |= address
        aligned = bits % 16 == 0
        if run is not None and aligned:
            run(*addresses, *call.tail, stream=driver.active.get_current_stream(call.device))
            return
    options = {"num_warps": call.config.warps, "num_stages": call.config.stages}
    call.compiled = call.kernel[(call.programs,)](*tensors, *call.numbers, **options, **call.constants)
    if _DIRECT and aligned:
        call.tail = (*call.numbers, *(call.constants[name] for name in call.kernel.arg_names[len(tensors) + len(call.numbers) :]))
        call.run = call.compiled[(call.programs, 1, 1)]


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


class _Plan:
    """What every call with the same shapes and strides launches, worked out once."""

    def __init__(
        self, shape: torch.Size, half: bool, grid: tuple[int, int], scale: float, strides: tuple, device: int, family: str, precision: str
    ):
        self.batch, self.heads, self.tokens, dim = shape
        self.grid, self.scale, self.device, self.family = grid, scale, device, family
        self.strides = tuple(step for x in strides for step in x[:3])
        # float32 tiles of a whole key row do not fit: it takes the loops at any N
        self.arithmetic = "half" if half else precision
        self.padded = _padded(grid) if half else None
        self.block_d = max(16, _power_of_two(dim))
        self.lines = 32 if self.batch * self.heads >= _ENOUGH else 4  # of an axis that one program takes: its weights serve them all
        self.common: dict[str, Any] = {"D": dim, "BD": self.block_d, "PRECISION": precision}
        if self.padded:
            self.tile = {"GH": grid[0], "GW": grid[1], "GHP": self.padded[0], "GWP": self.padded[1], **self.common}
        self.mixes: dict[tuple, _Call] = {}

    def config(self, kernel: str) -> _Config:
        return _config(kernel, self.family, self.arithmetic, self.block_d)

    def call(self, kernel, blocks: int, config: _Config, *numbers: float, **constants: Any) -> _Call:
        """A launch of ``blocks`` programs for each head of each image."""
        return _Call(kernel, self.batch * self.heads * blocks, config, numbers, self.device, constants)

    def ragged(self, config: _Config) -> dict[str, bool]:
        """How the loops treat a last step that N does not fill: a masked copy of the step behind the loop (TAIL), or, where the
        products are long code on the CUDA cores, masks in every step."""
        ragged = self.tokens % config.keys != 0
        return {"MASK": ragged and self.arithmetic != "half", "TAIL": ragged and self.arithmetic == "half"}

    def tile_rows(self, slots: int) -> int:
        """``slots`` as whole rows of the padded grid, no more than it has and no less than a matrix instruction takes."""
        assert self.padded is not None  # only the tile kernels ask
        rows, columns = self.padded
        return max(min(slots, rows * columns), columns, 16)

    def query_blocks(self, config: _Config) -> tuple[int, int, int]:
        """Query slots of a step, steps of a program, programs of a head: as few programs as still fill the chip."""
        assert self.padded is not None
        slots = self.tile_rows(config.rows)
        blocks = -(-self.grid[0] // (slots // self.padded[1]))
        steps = min(blocks, config.keys) if self.batch * self.heads >= _ENOUGH else 1
        return slots, steps, -(-blocks // steps)

    def line_blocks(self, x: bool, rows: int) -> int:
        """Programs of a head over the lines of one axis, ``rows`` patches of ``lines`` lines each."""
        count, size = self.grid if x else self.grid[::-1]
        return -(-count // self.lines) * -(-size // rows)

    @functools.cached_property
    def fwd_tile(self) -> _Call:
        c = self.config("fwd_tile")
        rows, steps, blocks = self.query_blocks(c)
        numbers = *self.strides, self.scale * _LOG2E.value, self.heads
        return self.call(_fwd_tile_kernel, blocks, c, *numbers, BM=rows, STEPS=steps, POSITION=True, **self.tile)

    @functools.cached_property
    def dq_blocks(self) -> int:
        """Programs of a head in the kernel of dq."""
        c = self.config("dq_tile" if self.padded else "dq_loop")
        return self.query_blocks(c)[2] if self.padded else -(-self.tokens // c.rows)

    @functools.cached_property
    def moment_axes(self) -> list[bool]:
        return [is_x for is_x in (True, False) if self.grid[is_x] > 1] or [True]

    @functools.cached_property
    def parts(self) -> int:
        """Programs of a head that leave a share of the gradients of the gate and the position weights."""
        rows = self.config("moments").rows
        return self.dq_blocks + (0 if self.padded else sum(self.line_blocks(is_x, rows) for is_x in self.moment_axes))

    @functools.cached_property
    def dq_tile(self) -> _Call:
        assert self.padded is not None
        c = self.config("dq_tile")
        rows, steps, blocks = self.query_blocks(c)
        keys = self.tile_rows(c.keys)
        # the positional part takes all keys at once where that needs no stack
        part = self.padded[0] * self.padded[1] if self.block_d <= 64 and self.family != "sm100" else keys
        numbers = *self.strides, self.scale, self.heads, self.batch * self.heads * self.tokens
        return self.call(_dq_tile_kernel, blocks, c, *numbers, BM=rows, BN=keys, BP=part, STEPS=steps, **self.tile)

    @functools.cached_property
    def dkdv_tile(self) -> _Call:
        c = self.config("dkdv_tile")
        rows, keys = self.tile_rows(c.rows), self.tile_rows(c.keys)
        assert self.padded is not None
        blocks = -(-self.grid[0] // (keys // self.padded[1]))
        numbers = *self.strides, self.scale, self.heads, self.batch * self.heads * self.tokens
        return self.call(_dkdv_tile_kernel, blocks, c, *numbers, BM=rows, BN=keys, **self.tile)

    @functools.cached_property
    def fwd_loop(self) -> _Call:
        c = self.config("fwd_loop")
        numbers = *self.strides, self.scale * _LOG2E.value, self.heads, self.tokens
        constants = {"BM": c.rows, "BN": c.keys, "POSITION": True, **self.ragged(c), **self.common}
        return self.call(_fwd_loop_kernel, -(-self.tokens // c.rows), c, *numbers, **constants)

    @functools.cached_property
    def dq_loop(self) -> _Call:
        c = self.config("dq_loop")
        numbers = *self.strides, self.scale, self.heads, self.tokens, self.batch * self.heads * self.tokens, self.parts
        return self.call(_dq_loop_kernel, self.dq_blocks, c, *numbers, BM=c.rows, BN=c.keys, **self.ragged(c), **self.common)

    @functools.cached_property
    def dkdv_loop(self) -> _Call:
        c = self.config("dkdv_loop")
        numbers = *self.strides, self.scale, self.heads, self.tokens, self.batch * self.heads * self.tokens
        return self.call(_dkdv_loop_kernel, -(-self.tokens // c.keys), c, *numbers, BM=c.rows, BN=c.keys, **self.common)

    @functools.cached_property
    def norm(self) -> _Call:
        (gh, gw), c = self.grid, _SMALL
        blocks = -(-gw // c.rows) + -(-gh // c.rows)
        return _Call(_norm_kernel, self.heads * blocks, c, (gh, gw), self.device, {"BM": c.rows, "BK": c.keys})

    @functools.cached_property
    def moments(self) -> list[tuple[bool, _Call]]:
        """Axis and launch; one axis at least, since the gate goes with the first."""
        c, part0 = self.config("moments"), self.dq_blocks
        calls: list[tuple[bool, _Call]] = []
        for is_x in self.moment_axes:
            numbers = *self.strides[:3], self.heads, *self.grid, self.parts, part0
            constants = {"X": is_x, "GATE": not calls, "LINES": self.lines, "BM": c.rows, "BK": c.keys, **self.common}
            blocks = self.line_blocks(is_x, c.rows)
            calls.append((is_x, self.call(_moments_kernel, blocks, c, *numbers, **constants)))
            part0 += blocks
        return calls

    @functools.cached_property
    def reduce(self) -> _Call:
        return _Call(_reduce_kernel, self.heads, _SMALL, (self.heads, self.batch, self.parts), self.device, {"BLOCK": 256})

    def mix(self, strides: tuple[int, ...], is_x: bool, transpose: bool) -> _Call:
        """Product of a tensor of these strides with one factor or its transpose."""
        key = strides, is_x, transpose
        if key not in self.mixes:
            c = self.config("mix")
            constants = {"X": is_x, "TRANSPOSE": transpose, "SHORT": self.grid[is_x] <= c.keys, "LINES": self.lines}
            constants |= {"BM": c.rows, "BK": c.keys, **self.common}
            blocks = self.line_blocks(is_x, c.rows)
            self.mixes[key] = self.call(_mix_kernel, blocks, c, *strides[:3], self.heads, *self.grid, **constants)
        return self.mixes[key]


_cached_plan = functools.lru_cache(maxsize=1024)(_Plan)


def _plan(q: Tensor, grid_h: int, grid_w: int, scale: float, *strides: tuple[int, ...]) -> _Plan:
    device = q.get_device()
    return _cached_plan(
        q.shape, q.dtype != torch.float32, (grid_h, grid_w), scale, strides, device, _family(device), _precision(q.dtype)
    )  # fmt: skip


def _current(q: Tensor):
    """Makes the device of ``q`` the current one for a while, which Triton launches on."""
    device = q.get_device()
    return contextlib.nullcontext() if device < 0 or device == torch.cuda.current_device() else torch.cuda.device(device)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid_h: int, grid_w: int, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = _unit(q), _unit(k), _unit(v)
    out = torch_operator.empty_heads(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    plan = _plan(q, grid_h, grid_w, scale, q.stride(), k.stride(), v.stride())
    with _current(q):
        if plan.padded:
            _launch(plan.fwd_tile, q, k, v, pos_weight, gating, out, lse)
        else:
            position = _mix(plan, v, pos_weight, None, (True, False))
            _launch(plan.fwd_loop, q, k, v, position, gating, out, lse)
    return out, lse


def _mix(plan: _Plan, x: Tensor, pos_weight: Tensor, sums: Tensor | None, axes: tuple[bool, ...]) -> Tensor:
    """Product of ``x`` [B, H, N, D] with Px (True) and Py (False) in turn, or with their transposes where ``sums`` are given."""
    for is_x in axes:
        if plan.grid[is_x] == 1:
            continue  # one patch along this axis: the factor is 1
        out = torch_operator.empty_heads(x)
        _launch(plan.mix(x.stride(), is_x, sums is not None), x, pos_weight, pos_weight if sums is None else sums, out)
        x = out
    return x if x.transpose(1, 2).is_contiguous() else torch_operator.empty_heads(x).copy_(x)


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, out: Tensor, lse: Tensor,
    grid_h: int, grid_w: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_out, q, k, v = _unit(grad_out), _unit(q), _unit(k), _unit(v)
    if not out.transpose(1, 2).is_contiguous():  # a compiler may have kept it in a layout of its own
        out = torch_operator.empty_heads(out).copy_(out)
    lse = lse.contiguous()
    dq, dk, dv = torch_operator.empty_heads(q), torch_operator.empty_heads(k), torch_operator.empty_heads(v)
    if dq.numel() == 0:
        return dq, dk, dv, torch.zeros_like(pos_weight), torch.zeros_like(gating)
    plan = _plan(q, grid_h, grid_w, scale, grad_out.stride(), q.stride(), k.stride(), v.stride())
    stats = lse.new_empty((3, *lse.shape))
    part = lse.new_empty((plan.batch * plan.heads, plan.parts, 4))
    dpos_weight, dgating = torch.empty_like(pos_weight), torch.empty_like(gating)
    with _current(q):
        if plan.padded:
            _launch(plan.dq_tile, grad_out, q, k, v, pos_weight, gating, lse, dq, stats, part)
            _launch(plan.dkdv_tile, grad_out, q, k, v, pos_weight, gating, stats, dk, dv)
        else:
            sums = lse.new_empty((plan.heads, sum(plan.grid)))
            _launch(plan.norm, pos_weight, sums)
            _launch(plan.dq_loop, grad_out, q, k, v, out, gating, lse, dq, stats, part)
            for is_x, call in plan.moments:
                _launch(call, grad_out, _mix(plan, v, pos_weight, None, (not is_x,)), pos_weight, part)
            position = _mix(plan, grad_out, pos_weight, sums, (True, False))
            _launch(plan.dkdv_loop, grad_out, q, k, v, position, gating, stats, dk, dv)
        _launch(plan.reduce, part, gating, dpos_weight, dgating)
    return dq, dk, dv, dpos_weight, dgating


torch_operator.register("CPU" if _INTERPRET else "CUDA", _forward, _backward)


# --------------------------------------------------------------------------------------------------------------------- backend
@functools.cache
def _no_device() -> str | None:
    if _INTERPRET:
        return None
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is usable (torch.cuda.is_available() is false)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"compute capability {major}.{minor} is older than 8.0"
    return None


def why_not(problem) -> str | None:
    if problem.framework != "torch":
        return "the tensors are not torch tensors"
    device = "cpu" if _INTERPRET else "cuda"
    if problem.device != device:
        return f"tensor is on {problem.device}" + (", and TRITON_INTERPRET runs the kernels on cpu" if _INTERPRET else "")
    if problem.dropout_p > 0:
        return "attention dropout is not supported"
    if problem.dtype not in ("float32", "float16", "bfloat16"):
        return f"{problem.dtype} is not supported (float32, float16 and bfloat16 are)"
    if _INTERPRET and problem.dtype == "bfloat16":
        return "Triton's interpreter computes bfloat16 wrongly"
    if problem.head_dim > 128:
        return f"head dimension {problem.head_dim} is larger than 128"
    return _no_device()


gpsa = torch_operator.gpsa
