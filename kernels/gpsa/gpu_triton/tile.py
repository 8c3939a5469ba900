"""Kernels for small grids in half precision: all keys of a head at once, on a grid padded to powers of two ("tile")."""

import triton
import triton.language as tl

from convit.kernels.gpsa.gpu_triton.common import BACKWARD_LIMIT, FORWARD_LIMIT, LARGE, LN2, LOG2E, addresses, axis_weights, cap, exp, place


@triton.jit
def _pin(x):
    """x as the result of a reduction, which the compiler computes once where it lies instead of again in each layout it is used in."""
    return tl.sum(x[:, :, None], 2)


@triton.jit
def _table(w, w2, at, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Rows ``at`` of Px or Py, [rows, PADDED] float32."""
    p = axis_weights(w, w2, at.to(tl.float32)[:, None], tl.arange(0, PADDED).to(tl.float32)[None, :], SIZE)
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
    return tl.load(w_ptr) * LOG2E, tl.load(w_ptr + 1) * LOG2E, tl.load(w_ptr + 2) * LOG2E


@triton.jit
def _slots(first, SLOTS: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr, GWP: tl.constexpr):
    """Token and validity of each slot of whole rows of the padded grid, from row ``first`` on."""
    s = tl.arange(0, SLOTS)
    y = first + s // GWP
    x = s % GWP
    return y * GW + x, (y < GH) & (x < GW)


@triton.jit
def _head(
    k_ptr, v_ptr, w_ptr, gating_ptr, b, h, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    GH: tl.constexpr, GW: tl.constexpr, GHP: tl.constexpr, GWP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    POSITION: tl.constexpr,
):  # fmt: skip
    """What all query blocks of a head share in the forward pass: k, v, w1, w2, the gate before the sigmoid, its odds, and Px."""
    BN: tl.constexpr = GHP * GWP
    d = tl.arange(0, BD)
    j, key_mask = _slots(0, BN, GH, GW, GWP)
    kv_mask = key_mask[:, None] & (d < D)[None, :]
    k = tl.load(addresses(k_ptr + b * stride_kb + h * stride_kh, j, stride_kn, d), mask=kv_mask, other=0.0)  # [BN, BD]
    v = tl.load(addresses(v_ptr + b * stride_vb + h * stride_vh, j, stride_vn, d), mask=kv_mask, other=0.0)  # [BN, BD]
    if POSITION:
        w0, w1, w2 = _pos_weight(w_ptr, h)
        lam = tl.load(gating_ptr + h)
        lam = tl.where(lam > 60.0, 60.0, lam)  # tl.minimum would make 60 of a NaN
        return k, v, w1, w2, lam, exp(lam), _pin(_table(w0, w2, tl.arange(0, GWP), GW, GWP))  # [GWP, GWP]
    else:
        return k, v, 0.0, 0.0, 0.0, 0.0, 0.0


@triton.jit
def _attend(
    q_ptr, k, v, w1, w2, lam, odds, px, out_ptr, lse_ptr, b, bh, h, y0, stride_qb, stride_qh, stride_qn, scale_log2, H,
    GH: tl.constexpr, GW: tl.constexpr, GHP: tl.constexpr, GWP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr, NEGATIVE: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
    """The forward pass of BM query slots from row ``y0`` of the grid on, with all keys of their head."""
    N: tl.constexpr = GH * GW
    BN: tl.constexpr = GHP * GWP
    BY: tl.constexpr = BM // GWP
    d = tl.arange(0, BD)
    i, query_mask = _slots(y0, BM, GH, GW, GWP)
    q_mask = query_mask[:, None] & (d < D)[None, :]
    q = tl.load(addresses(q_ptr + b * stride_qb + h * stride_qh, i, stride_qn, d), mask=q_mask, other=0.0)  # [BM, BD]
    if NEGATIVE:
        q = -q
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
    s = tl.where(_slots(0, BN, GH, GW, GWP)[1][None, :], s, float("-inf"))
    m = tl.max(s, 1)
    factor = cap(tl.abs(m), scale_log2, FORWARD_LIMIT)
    if POSITION:
        # The mix times l, and times 1 / max(g, 1 - g) so that it neither overflows float16 nor vanishes: with lam = gating,
        #     e^-max(lam, 0) p + (e^lam e^-max(lam, 0) l) Py Px,    normalised by l' (1 + e^lam), l' = e^-max(lam, 0) l.
        # The first factor is a shift of the exponent, the second goes into the row of Py. Past 60 the shift changes nothing.
        raised = tl.maximum(lam, 0.0) * LOG2E
        shift = m * factor + raised
        p = tl.exp2(s * factor[:, None] - shift[:, None])
        total = tl.sum(p, 1)
        py = _pin(_table(w1, w2, y0 + tl.arange(0, BY), GH, GHP))  # [BY, GHP]
        py = py[:, None, :] * tl.reshape(total * odds, (BY, GWP))[:, :, None]  # [BY, GWP, GHP]
        p += tl.reshape(py[:, :, :, None] * px[None, :, None, :], (BM, BN))
        inverse = 1.0 / (total * (1.0 + odds))
        lse = m * scale_log2 + raised + tl.log2(total)
    else:
        shift = m * factor
        p = tl.exp2(s * factor[:, None] - shift[:, None])
        total = tl.sum(p, 1)
        inverse = 1.0 / total
        lse = m * scale_log2 + tl.log2(total)
    o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * inverse[:, None]
    tl.store(addresses(out_ptr + (b * N * H + h) * D, i, H * D, d), o.to(v.dtype), mask=q_mask)
    tl.store(lse_ptr + bh * N + i, lse * LN2, mask=query_mask)


@triton.jit
def fwd_tile_kernel(
    q_ptr, k_ptr, v_ptr, w_ptr, gating_ptr,  # [B,H,N,D] x3, [H,3], [H]
    out_ptr, lse_ptr,  # [B,N,H,D], [B,H,N]
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    scale_log2, H, BH,
    GH: tl.constexpr, GW: tl.constexpr, GHP: tl.constexpr, GWP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
    NEGATIVE: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
    """One program: STEPS blocks of BM query slots. Queries and keys lie on the padded grid: a block has BM / GWP rows of Py and
    all of them share the rows of Px.

    Where STEPS is 0 it takes one block, of every so many of the BH heads of all images: with two stages the next head's q, k and v are
    loaded while this one's are computed with. (Addresses hoisted out of that loop would take registers that it has not.)
    """
    BY: tl.constexpr = BM // GWP
    ROWS: tl.constexpr = BY * STEPS if STEPS else BY
    blocks: tl.constexpr = (GH + ROWS - 1) // ROWS
    if STEPS:
        block, bh, b, h = place(tl.program_id(0), blocks, H)
        k, v, w1, w2, lam, odds, px = _head(
            k_ptr, v_ptr, w_ptr, gating_ptr, b, h, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
            GH, GW, GHP, GWP, D, BD, POSITION,
        )  # fmt: skip
        for step in range(STEPS):
            _attend(
                q_ptr, k, v, w1, w2, lam, odds, px, out_ptr, lse_ptr, b, bh, h, (block * STEPS + step) * BY,
                stride_qb, stride_qh, stride_qn, scale_log2, H, GH, GW, GHP, GWP, D, BD, BM, PRECISION, NEGATIVE, POSITION,
            )  # fmt: skip
    else:
        block = tl.program_id(0) % blocks
        for at in tl.range(tl.program_id(0) // blocks, BH, tl.num_programs(0) // blocks, disable_licm=True):
            _, bh, b, h = place(at, 1, H)
            k, v, w1, w2, lam, odds, px = _head(
                k_ptr, v_ptr, w_ptr, gating_ptr, b, h, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
                GH, GW, GHP, GWP, D, BD, POSITION,
            )  # fmt: skip
            _attend(
                q_ptr, k, v, w1, w2, lam, odds, px, out_ptr, lse_ptr, b, bh, h, block * BY,
                stride_qb, stride_qh, stride_qn, scale_log2, H, GH, GW, GHP, GWP, D, BD, BM, PRECISION, NEGATIVE, POSITION,
            )  # fmt: skip


@triton.jit
def _position_parts(
    do_ptr, v_ptr, stride_on, stride_vn, w0, w1, w2,
    GH: tl.constexpr, GW: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a whole head: the sum of P dA, and its covariances with dx, dy and dx^2 + dy^2.

    By dPx = sum_y dO_y (Py v)_y^T, dPy = (Px^T dO) v^T: [columns, columns] and [rows, rows], CHANNELS of D at a time.
    """
    x = tl.arange(0, PX)
    y = tl.arange(0, PY)
    py = _table(w1, w2, y, GH, PY)  # [PY, PY]
    px = _table(w0, w2, x, GW, PX)  # [PX, PX]
    GROUPS: tl.constexpr = 4 if CHANNELS >= 4 else CHANNELS  # a batch of products, so that warps share the channels
    K: tl.constexpr = CHANNELS // GROUPS
    dpx = tl.zeros((GROUPS, PX, PX), tl.float32)
    dpy = tl.zeros((GROUPS, PY, PY), tl.float32)
    column = tl.arange(0, PX * CHANNELS) // CHANNELS
    channel = tl.arange(0, PX * CHANNELS) % CHANNELS
    row = tl.arange(0, PY * CHANNELS) // CHANNELS
    row_channel = tl.arange(0, PY * CHANNELS) % CHANNELS
    for first in tl.static_range(0, BD, CHANNELS):
        v_at = v_ptr + (y[None, :] * GW + column[:, None]).to(tl.int64) * stride_vn + (first + channel)[:, None]
        v_mask = (y < GH)[None, :] & ((column < GW) & (first + channel < D))[:, None]
        v = tl.load(v_at, mask=v_mask, other=0.0)  # [PX * CHANNELS, PY]: a row of the grid in a column
        do_at = do_ptr + (row[:, None] * GW + x[None, :]).to(tl.int64) * stride_on + (first + row_channel)[:, None]
        do_mask = (x < GW)[None, :] & ((row < GH) & (first + row_channel < D))[:, None]
        do = tl.load(do_at, mask=do_mask, other=0.0)  # [PY * CHANNELS, PX]: a column of the grid in a column
        u = tl.dot(v, tl.trans(py).to(v.dtype), input_precision=PRECISION).to(v.dtype)  # Py v, [PX * CHANNELS, PY]
        u = tl.permute(tl.reshape(u, (PX, GROUPS, K * PY)), (1, 0, 2))
        flat = tl.reshape(tl.permute(tl.reshape(do, (PY, GROUPS, K, PX)), (1, 2, 0, 3)), (GROUPS, K * PY, PX))
        dpx = tl.dot(u, flat, dpx, input_precision=PRECISION)  # [GROUPS, keys, queries]
        u = tl.dot(do, px.to(do.dtype), input_precision=PRECISION).to(do.dtype)  # Px^T dO, [PY * CHANNELS, PX]
        u = tl.permute(tl.reshape(u, (PY, GROUPS, K * PX)), (1, 0, 2))
        flat = tl.reshape(tl.permute(tl.reshape(v, (PX, GROUPS, K, PY)), (1, 2, 0, 3)), (GROUPS, K * PX, PY))
        dpy = tl.dot(u, flat, dpy, input_precision=PRECISION)
    dpx = tl.trans(tl.sum(dpx, 0))
    dpy = tl.sum(dpy, 0)
    px1, px2 = _centred(px, x, PX)
    py1, py2 = _centred(py, y, PY)
    gate = tl.sum(tl.sum(px * dpx, 1), 0)
    w2_part = tl.sum(tl.sum(px2 * dpx, 1), 0) + tl.sum(tl.sum(py2 * dpy, 1), 0)
    return gate, tl.sum(tl.sum(px1 * dpx, 1), 0), tl.sum(tl.sum(py1 * dpy, 1), 0), w2_part


@triton.jit
def _position_parts_of_rows(
    do_ptr, v_ptr, stride_on, stride_vn, w0, w1, w2, y,
    GH: tl.constexpr, GW: tl.constexpr, GHP: tl.constexpr, GWP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of STEPS blocks of BM query slots from row ``y`` of the grid on, by dA = dO v^T: less work where that is few rows.

    Sums over yj of dA times a row of Py, and of Py times the centred dy and dy^2; with a table of Px they give every moment.
    """
    BY: tl.constexpr = BM // GWP
    PART: tl.constexpr = BP // GWP
    d = tl.arange(0, BD)
    m0 = tl.zeros((BY, GWP, GWP), tl.float32)
    m1 = tl.zeros((BY, GWP, GWP), tl.float32)
    m2 = tl.zeros((BY, GWP, GWP), tl.float32)
    for step in range(STEPS):
        y0 = y + step * BY
        i, query_mask = _slots(y0, BM, GH, GW, GWP)
        do = tl.load(addresses(do_ptr, i, stride_on, d), mask=query_mask[:, None] & (d < D)[None, :], other=0.0)  # [BM, BD]
        at = (y0 + tl.arange(0, BY)).to(tl.float32)[:, None]
        to = tl.arange(0, GHP).to(tl.float32)[None, :]
        py = axis_weights(w1, w2, at, to, GH)  # [BY, GHP]
        inverse = 1.0 / tl.sum(py, 1)[:, None]
        mean1 = tl.sum(py * (to - at), 1)[:, None] * inverse
        mean2 = tl.sum(py * (to - at) * (to - at), 1)[:, None] * inverse
        for first in range(0, GH, PART):
            j, key_mask = _slots(first, BP, GH, GW, GWP)
            v = tl.load(addresses(v_ptr, j, stride_vn, d), mask=key_mask[:, None] & (d < D)[None, :], other=0.0)  # [BP, BD]
            da = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BM, BP], zero at padded rows and slots
            da = tl.reshape(da, (BY, GWP, PART, GWP))
            r = (first + tl.arange(0, PART)).to(tl.float32)[None, :] - at
            weight = axis_weights(w1, w2, at, r + at, GH) * inverse  # [BY, PART]
            m0 += tl.sum(da * _pin(weight)[:, None, :, None], 2)
            m1 += tl.sum(da * _pin(weight * (r - mean1))[:, None, :, None], 2)
            m2 += tl.sum(da * _pin(weight * (r * r - mean2))[:, None, :, None], 2)
    px = _table(w0, w2, tl.arange(0, GWP), GW, GWP)  # [GWP, GWP]
    px1, px2 = _centred(px, tl.arange(0, GWP), GWP)
    gate = tl.sum(tl.reshape(m0 * px[None, :, :], (BM * GWP,)), 0)
    w0_part = tl.sum(tl.reshape(m0 * px1[None, :, :], (BM * GWP,)), 0)
    w1_part = tl.sum(tl.reshape(m1 * px[None, :, :], (BM * GWP,)), 0)
    return gate, w0_part, w1_part, tl.sum(tl.reshape(m0 * px2[None, :, :] + m2 * px[None, :, :], (BM * GWP,)), 0)


@triton.jit
def dq_tile_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, w_ptr, gating_ptr, lse_ptr,  # [B,H,N,D] x4, [H,3], [H], [B,H,N]
    dq_ptr, stats_ptr, part_ptr,  # [B,N,H,D], [3,B,H,N], [B*H,blocks,4]
    stride_ob, stride_oh, stride_on, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    scale, H, total,
    GH: tl.constexpr, GW: tl.constexpr, GHP: tl.constexpr, GWP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, CHANNELS: tl.constexpr,
    STEPS: tl.constexpr, PRECISION: tl.constexpr, LARGE_SCORES: tl.constexpr,
):  # fmt: skip
    """dq, the rows' statistics for dk and dv, and this program's share of (dgating, dpos_weight) up to factors of the head.

    The keys come BN slots at a time, BP for the positional part by rows: dA and the scores of a whole row do not fit into registers
    together.
    delta, the row sum of Pc dA, is then known only after the last: dA is centred by its mean over 16 keys spread over the grid (any
    mean of them serves), and dq corrected by the mean key.
    Where scores are large, so is the rounding of lse: there the weights are divided by their own sum (LARGE_SCORES).
    """
    N: tl.constexpr = GH * GW
    BY: tl.constexpr = BM // GWP
    ROWS: tl.constexpr = BN // GWP
    blocks: tl.constexpr = (GH + BY * STEPS - 1) // (BY * STEPS)
    block, bh, b, h = place(tl.program_id(0), blocks, H)
    d = tl.arange(0, BD)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    some = tl.arange(0, 16) * N // 16  # keys spread over the grid
    v_some = tl.load(addresses(v_ptr, some, stride_vn, d), mask=(d < D)[None, :], other=0.0)  # [16, BD]
    do_ptr += b * stride_ob + h * stride_oh
    q_ptr += b * stride_qb + h * stride_qh
    dq_ptr += (b * N * H + h) * D
    lse_ptr += bh * N
    stats_ptr += bh * N
    w0, w1, w2 = _pos_weight(w_ptr, h)
    lam = tl.load(gating_ptr + h)
    dq_scale = scale / (1.0 + exp(lam))
    rest_shift = tl.log2(1.0 + exp(lam))  # -log2(1 - g), a shift of the exponent for dk and dv
    # first the positional part, so that its tiles are dead before the content's are made
    if CHANNELS:
        gate_part, w0_part, w1_part, w2_part = _position_parts(
            do_ptr, v_ptr, stride_on, stride_vn, w0, w1, w2, GH, GW, max(GHP, 16), max(GWP, 16), D, BD, CHANNELS, PRECISION
        )  # fmt: skip
    else:
        gate_part, w0_part, w1_part, w2_part = _position_parts_of_rows(
            do_ptr, v_ptr, stride_on, stride_vn, w0, w1, w2, block * STEPS * BY,
            GH, GW, GHP, GWP, D, BD, BM, BP, STEPS, PRECISION,
        )  # fmt: skip
    part = part_ptr + (bh * blocks + block) * 4
    tl.store(part + 1, w0_part)
    tl.store(part + 2, w1_part)
    tl.store(part + 3, w2_part)
    deltas = tl.zeros((BM,), tl.float32)
    for step in range(STEPS):
        y0 = (block * STEPS + step) * BY
        i, query_mask = _slots(y0, BM, GH, GW, GWP)
        q_mask = query_mask[:, None] & (d < D)[None, :]
        do = tl.load(addresses(do_ptr, i, stride_on, d), mask=q_mask, other=0.0)  # [BM, BD]
        q = tl.load(addresses(q_ptr, i, stride_qn, d), mask=q_mask, other=0.0)  # [BM, BD]
        lse = tl.load(lse_ptr + i, mask=query_mask, other=1e30)
        factor = cap(tl.abs(lse), LOG2E, BACKWARD_LIMIT)
        row_scale = scale * factor
        row_shift = lse * factor
        centre = tl.sum(tl.dot(do, tl.trans(v_some), input_precision=PRECISION), 1) * (1.0 / 16)
        weight = tl.full((BM,), 1.0, tl.float32)
        if LARGE_SCORES and tl.max(tl.where(query_mask, tl.abs(lse), 0.0), 0) > LARGE:
            weight = tl.where(query_mask, 0.0, 1.0)
            for first in range(0, GH, ROWS):
                j, key_mask = _slots(first, BN, GH, GW, GWP)
                k = tl.load(addresses(k_ptr, j, stride_kn, d), mask=key_mask[:, None] & (d < D)[None, :], other=0.0)  # [BN, BD]
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
                weight += tl.sum(tl.where(key_mask[None, :], tl.exp2(s * row_scale[:, None] - row_shift[:, None]), 0.0), 1)
        excess = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, BD), tl.float32)
        mean = tl.zeros((BM, BD), tl.float32)
        for first in range(0, GH, ROWS):
            j, key_mask = _slots(first, BN, GH, GW, GWP)
            kv_mask = key_mask[:, None] & (d < D)[None, :]
            k = tl.load(addresses(k_ptr, j, stride_kn, d), mask=kv_mask, other=0.0)  # [BN, BD]
            v = tl.load(addresses(v_ptr, j, stride_vn, d), mask=kv_mask, other=0.0)  # [BN, BD]
            da = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BM, BN]
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
            p = tl.exp2(s * row_scale[:, None] - row_shift[:, None])
            p = tl.where(key_mask[None, :], p, 0.0)
            ds = p * (da - centre[:, None])
            excess += tl.sum(ds, 1)
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
            mean = tl.dot(p.to(k.dtype), k, mean, input_precision=PRECISION)
        excess = excess / weight
        dq = (acc - excess[:, None] * mean) * (dq_scale / weight)[:, None]
        delta = centre + excess
        tl.store(addresses(dq_ptr, i, H * D, d), dq.to(q.dtype), mask=q_mask)
        tl.store(stats_ptr + i, row_scale, mask=query_mask)
        tl.store(stats_ptr + total + i, row_shift + (tl.log2(weight) + rest_shift), mask=query_mask)
        tl.store(stats_ptr + total + total + i, delta, mask=query_mask)
        deltas += delta  # zero at padded rows
    tl.store(part, gate_part - tl.sum(deltas, 0))


@triton.jit
def dkdv_tile_kernel(
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
    block, bh, b, h = place(tl.program_id(0), (GH + ROWS - 1) // ROWS, H)
    d = tl.arange(0, BD)
    j, key_mask = _slots(block * ROWS, BN, GH, GW, GWP)
    kv_mask = key_mask[:, None] & (d < D)[None, :]
    k = tl.load(addresses(k_ptr + b * stride_kb + h * stride_kh, j, stride_kn, d), mask=kv_mask, other=0.0)  # [BN, BD]
    v = tl.load(addresses(v_ptr + b * stride_vb + h * stride_vh, j, stride_vn, d), mask=kv_mask, other=0.0)  # [BN, BD]
    do_ptr += b * stride_ob + h * stride_oh
    q_ptr += b * stride_qb + h * stride_qh
    stats_ptr += bh * N
    w0, w1, w2 = _pos_weight(w_ptr, h)
    gate = 1.0 / (1.0 + exp(-tl.load(gating_ptr + h)))
    px = _pin(tl.trans(_table(w0, w2, tl.arange(0, GWP), GW, GWP)))  # [GWP keys, GWP queries]
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    for y0 in range(0, GH, BY):
        i, query_mask = _slots(y0, BM, GH, GW, GWP)
        q_mask = query_mask[:, None] & (d < D)[None, :]
        q = tl.load(addresses(q_ptr, i, stride_qn, d), mask=q_mask, other=0.0)  # [BM, BD]
        do = tl.load(addresses(do_ptr, i, stride_on, d), mask=q_mask, other=0.0)  # [BM, BD]
        row_scale = tl.load(stats_ptr + i, mask=query_mask, other=0.0)
        row_shift = tl.load(stats_ptr + total + i, mask=query_mask, other=1e30)
        delta = tl.load(stats_ptr + total + total + i, mask=query_mask, other=0.0)
        at = (y0 + tl.arange(0, BY)).to(tl.float32)[None, :]
        to = (block * ROWS + tl.arange(0, ROWS)).to(tl.float32)[:, None]
        py = axis_weights(w1, w2, at, tl.arange(0, GHP).to(tl.float32)[:, None], GH)  # [GHP, BY]
        norm = gate / tl.sum(py, 0)
        if ROWS != GHP:
            py = axis_weights(w1, w2, at, to, GH)  # [ROWS, BY]
        py = _pin(py * norm[None, :])
        # rows of padded slots may hold anything: they are not stored, and no row meets another
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BN, BM]
        p = tl.exp2(s * row_scale[None, :] - row_shift[None, :])  # (1 - g) Pc
        mix = p + tl.reshape(py[:, None, :, None] * px[None, :, None, :], (BN, BM))
        dv = tl.dot(mix.to(do.dtype), do, dv, input_precision=PRECISION)
        da = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BN, BM]
        dk = tl.dot((p * (da - delta[None, :])).to(q.dtype), q, dk, input_precision=PRECISION)
    tl.store(addresses(dk_ptr + (b * N * H + h) * D, j, H * D, d), (dk * scale).to(k.dtype), mask=kv_mask)
    tl.store(addresses(dv_ptr + (b * N * H + h) * D, j, H * D, d), dv.to(v.dtype), mask=kv_mask)
