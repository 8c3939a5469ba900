"""Kernels for any grid and for float32: a loop over blocks of keys, and the positional part one axis at a time ("loop")."""

import triton
import triton.language as tl

from convit.kernels.gpsa.gpu_triton.common import BACKWARD_LIMIT, LARGE, LN2, LOG2E, addresses, axis_weights, cap, exp, peak, place


@triton.jit
def _norms(pid, w_ptr, sum_ptr, GH, GW, BM: tl.constexpr, BK: tl.constexpr):
    """Sums of the unnormalised rows of Px, then of Py: [H, GW + GH]. One program: a head, an axis, BM rows."""
    blocks_x = (GW + BM - 1) // BM
    blocks = blocks_x + (GH + BM - 1) // BM
    h = (pid // blocks).to(tl.int64)
    block = pid % blocks
    is_x = block < blocks_x
    size = tl.where(is_x, GW, GH)
    w = tl.load(w_ptr + h * 3 + tl.where(is_x, 0, 1)) * LOG2E
    w2 = tl.load(w_ptr + h * 3 + 2) * LOG2E
    i = tl.where(is_x, block, block - blocks_x) * BM + tl.arange(0, BM)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, size, BK):
        to = (start + tl.arange(0, BK)).to(tl.float32)
        total += tl.sum(axis_weights(w, w2, i.to(tl.float32)[:, None], to[None, :], size), 1)
    tl.store(sum_ptr + h * (GW + GH) + tl.where(is_x, 0, GW) + i, total, mask=i < size)


@triton.jit
def _mix_weights(w, w2, sum_ptr, to, t, size, TRANSPOSE: tl.constexpr):
    """[BM, BK] weights of patches ``t`` of a line for its patches ``to``; the transpose is normalised, the other is not."""
    if TRANSPOSE:
        norm = tl.load(sum_ptr + t, mask=t < size, other=float("inf"))
        return axis_weights(w, w2, t.to(tl.float32)[None, :], to.to(tl.float32)[:, None], size) * (1.0 / norm)[None, :]
    return axis_weights(w, w2, to.to(tl.float32)[:, None], t.to(tl.float32)[None, :], size)


@triton.jit
def mix_kernel(
    in_ptr, w_ptr, sum_ptr,  # [B,H,N,D], [H,3], [H,GW+GH] (read if TRANSPOSE, written if SUMS)
    content_ptr, gating_ptr, out_ptr,  # [B,N,H,D] and [H] (read if CONTENT), [B,N,H,D]
    stride_b, stride_h, stride_n, H, GH, GW,
    X: tl.constexpr, TRANSPOSE: tl.constexpr, SUMS: tl.constexpr, CONTENT: tl.constexpr, SHORT: tl.constexpr, LINES: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Product with Px along x, or with Py along y, or with its transpose. One program: LINES lines of the axis, BM patches each.

    SHORT: a line fits into one tile, and its weights are made once for all lines. SUMS: the first programs leave the sums for later.
    CONTENT: the product is position's share of what is written, beside the content that is read.
    """
    pid = tl.program_id(0)
    if SUMS:
        norms = H * ((GW + BM - 1) // BM + (GH + BM - 1) // BM)
        if pid < norms:
            _norms(pid, w_ptr, sum_ptr, GH, GW, BM, BK)
            return
        pid -= norms
    size = GW if X else GH
    count = GH if X else GW
    step = 1 if X else GW
    blocks = (size + BM - 1) // BM
    block, bh, b, h = place(pid, blocks * ((count + LINES - 1) // LINES), H)
    to = (block % blocks) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    w = tl.load(w_ptr + h * 3 + (0 if X else 1)) * LOG2E
    w2 = tl.load(w_ptr + h * 3 + 2) * LOG2E
    in_ptr += b * stride_b + h * stride_h
    out_ptr += (b * GH * GW * H + h) * D
    if CONTENT:
        content_ptr += (b * GH * GW * H + h) * D
        lam = tl.load(gating_ptr + h)
        gate = 1.0 / (1.0 + exp(-lam))
        rest = 1.0 / (1.0 + exp(lam))
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
            x = tl.load(addresses(in_ptr, first + t * step, stride_n, d), mask=(t < size)[:, None] & (d < D)[None, :], other=0.0)
            acc = tl.dot(p, x, input_precision=PRECISION)  # [BM, BD]
        else:
            acc = tl.zeros((BM, BD), tl.float32)
            total = tl.zeros((BM,), tl.float32)
            for start in range(0, size, BK):
                t = start + tl.arange(0, BK)
                x = tl.load(addresses(in_ptr, first + t * step, stride_n, d), mask=(t < size)[:, None] & (d < D)[None, :], other=0.0)
                p = _mix_weights(w, w2, sum_ptr, to, t, size, TRANSPOSE)
                if not TRANSPOSE:
                    total += tl.sum(p, 1)
                acc = tl.dot(p.to(x.dtype), x, acc, input_precision=PRECISION)
            if not TRANSPOSE:
                acc = acc * (1.0 / total)[:, None]
        mask = (to < size)[:, None] & (d < D)[None, :]
        if CONTENT:
            content = tl.load(addresses(content_ptr, first + to * step, H * D, d), mask=mask, other=0.0)
            acc = acc * gate + content.to(tl.float32) * rest
        tl.store(addresses(out_ptr, first + to * step, H * D, d), acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def moments_kernel(
    do_ptr, u_ptr, a_ptr, v_ptr, w_ptr, part_ptr,  # [B,H,N,D], Py v and Px^T dO [B,N,H,D], [B,H,N,D], [H,3], [B*H,parts,4]
    stride_ob, stride_oh, stride_on, stride_vb, stride_vh, stride_vn, H, GH, GW, parts, part0,
    AXES: tl.constexpr, LINES: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Shares of dpos_weight and of the sum of P dA by one axis at a time: moments of P dP under P, dP never stored.

    dPx = sum_y dO (Py v)^T, dPy = sum_x (Px^T dO) v^T. One program: an axis of AXES, BM of its patches, LINES of its lines.
    """
    blocks_x = (GW + BM - 1) // BM
    blocks_y = (GH + BM - 1) // BM
    programs_x = blocks_x * ((GH + LINES - 1) // LINES)
    programs_y = blocks_y * ((GW + LINES - 1) // LINES)
    if AXES == "xy":
        part, bh, b, h = place(tl.program_id(0), programs_x + programs_y, H)
        is_x = part < programs_x
        block = tl.where(is_x, part, part - programs_x)
    else:
        part, bh, b, h = place(tl.program_id(0), programs_x if AXES == "x" else programs_y, H)
        is_x = tl.full((), AXES == "x", tl.int1)
        block = part
    blocks = tl.where(is_x, blocks_x, blocks_y)
    size = tl.where(is_x, GW, GH)
    count = tl.where(is_x, GH, GW)
    step = tl.where(is_x, 1, GW)
    along = tl.where(is_x, GW, 1)
    i = (block % blocks) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    at = i.to(tl.float32)
    w = tl.load(w_ptr + h * 3 + tl.where(is_x, 0, 1)) * LOG2E
    w2 = tl.load(w_ptr + h * 3 + 2) * LOG2E
    q_mask = (i < size)[:, None] & (d < D)[None, :]
    whole = (b * GH * GW * H + h) * D
    left_ptr = tl.where(is_x, do_ptr + b * stride_ob + h * stride_oh, a_ptr + whole)
    right_ptr = tl.where(is_x, u_ptr + whole, v_ptr + b * stride_vb + h * stride_vh)
    left_step = tl.where(is_x, stride_on, H * D)
    right_step = tl.where(is_x, H * D, stride_vn)
    # moments of order 0, 1, 2 about the largest weight, of P dP (c) and of P (p)
    best = peak(w, w2, at, size)
    p0 = tl.zeros((BM,), tl.float32)
    p1 = tl.zeros((BM,), tl.float32)
    p2 = tl.zeros((BM,), tl.float32)
    c0 = tl.zeros((BM,), tl.float32)
    c1 = tl.zeros((BM,), tl.float32)
    c2 = tl.zeros((BM,), tl.float32)
    for start in range(0, size, BK):
        t = start + tl.arange(0, BK)
        kv_mask = (t < size)[:, None] & (d < D)[None, :]
        dp = tl.zeros((BM, BK), tl.float32)
        for line in range(block // blocks * LINES, tl.minimum(block // blocks * LINES + LINES, count)):
            left = tl.load(addresses(left_ptr, line * along + i * step, left_step, d), mask=q_mask, other=0.0)  # [BM, BD]
            right = tl.load(addresses(right_ptr, line * along + t * step, right_step, d), mask=kv_mask, other=0.0)  # [BK, BD]
            dp = tl.dot(left, tl.trans(right), dp, input_precision=PRECISION)
        p = axis_weights(w, w2, at[:, None], t.to(tl.float32)[None, :], size)  # [BM, BK]
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
    first = tl.sum(c1, 0)
    part_ptr += (bh * parts + part0 + part) * 4
    tl.store(part_ptr, tl.where(is_x, tl.sum(c0, 0), 0.0))  # either axis has all of P dA
    tl.store(part_ptr + 1, tl.where(is_x, first, 0.0))
    tl.store(part_ptr + 2, tl.where(is_x, 0.0, first))
    tl.store(part_ptr + 3, tl.sum(c2 + 2.0 * (best - at) * c1, 0))  # the distance is r + best - at


@triton.jit
def delta_kernel(
    do_ptr, content_ptr, part_ptr,  # [B,H,N,D], [B,N,H,D], [B*H,parts,4]
    stride_ob, stride_oh, stride_on, H, N, parts, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Minus the sum of dO . content over BM queries: what dq_loop leaves for the gate's gradient, where the content is not its own."""
    block, bh, b, h = place(tl.program_id(0), (N + BM - 1) // BM, H)
    i = block * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    mask = (i < N)[:, None] & (d < D)[None, :]
    do = tl.load(addresses(do_ptr + b * stride_ob + h * stride_oh, i, stride_on, d), mask=mask, other=0.0).to(tl.float32)
    content = tl.load(addresses(content_ptr + (b * N * H + h) * D, i, H * D, d), mask=mask, other=0.0).to(tl.float32)
    c = tl.arange(0, 4)
    tl.store(part_ptr + (bh * parts + block) * 4 + c, tl.where(c == 0, -tl.sum(tl.sum(do * content, 1), 0), 0.0))


@triton.jit
def _fwd_loop_step(
    q, k_ptr, v_ptr, j, N, stride_kn, stride_vn, m, total, acc, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BD)
    kv_mask = (d < D)[None, :] & (j < N)[:, None] if MASK else (d < D)[None, :]
    k = tl.load(addresses(k_ptr, j, stride_kn, d), mask=kv_mask, other=0.0)  # [BN, BD]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
    if MASK:
        s = tl.where((j < N)[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2((s - safe[:, None]) * scale_log2) if EXACT else tl.exp2(s * scale_log2 - (safe * scale_log2)[:, None])
    alpha = tl.exp2((m - safe) * scale_log2)
    total = total * alpha + tl.sum(p, 1)
    v = tl.load(addresses(v_ptr, j, stride_vn, d), mask=kv_mask, other=0.0)  # [BN, BD]
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, total, acc


@triton.jit
def _fwd_loop_pass(
    q, k_ptr, v_ptr, N, stride_kn, stride_vn, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr, TAIL: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """All keys: the rows' largest score, sum of weights, and weighted sum of v."""
    m = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    full = N if MASK else N // BN * BN
    for start in range(0, full, BN):
        j = start + tl.arange(0, BN)
        m, total, acc = _fwd_loop_step(
            q, k_ptr, v_ptr, j, N, stride_kn, stride_vn, m, total, acc, scale_log2, D, BD, PRECISION, MASK, EXACT
        )  # fmt: skip
    if TAIL:
        j = full + tl.arange(0, BN)
        m, total, acc = _fwd_loop_step(
            q, k_ptr, v_ptr, j, N, stride_kn, stride_vn, m, total, acc, scale_log2, D, BD, PRECISION, True, EXACT
        )  # fmt: skip
    return m, total, acc


@triton.jit
def fwd_loop_kernel(
    q_ptr, k_ptr, v_ptr, position_ptr, gating_ptr,  # [B,H,N,D] x3, P v [B,N,H,D], [H]
    out_ptr, lse_ptr,  # [B,N,H,D], [B,H,N]
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    scale_log2, H, N,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    NEGATIVE: tl.constexpr, POSITION: tl.constexpr, EXACT: tl.constexpr, LARGE_SCORES: tl.constexpr,
):  # fmt: skip
    """The exponent s f - m f is one fused multiply-add, exact but for the rounding of m f, which past 2^24 may lift it above 0. The sum
    of the weights shows that: it is at least 1 and at most N otherwise. Such rows are done again, with (s - m) f (LARGE_SCORES), or all
    are done so at once (EXACT)."""
    block, bh, b, h = place(tl.program_id(0), (N + BM - 1) // BM, H)
    i = block * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    q_mask = (i < N)[:, None] & (d < D)[None, :]
    q = tl.load(addresses(q_ptr + b * stride_qb + h * stride_qh, i, stride_qn, d), mask=q_mask, other=0.0)  # [BM, BD]
    if NEGATIVE:
        q = -q
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    m, total, acc = _fwd_loop_pass(q, k_ptr, v_ptr, N, stride_kn, stride_vn, scale_log2, D, BD, BM, BN, PRECISION, MASK, TAIL, EXACT)
    fine = (total >= 0.5) & (total <= 2.0 * N)
    if LARGE_SCORES and tl.min(fine.to(tl.int32), 0) == 0:
        m, total, acc = _fwd_loop_pass(q, k_ptr, v_ptr, N, stride_kn, stride_vn, scale_log2, D, BD, BM, BN, PRECISION, MASK, TAIL, True)
    rows = addresses((b * N * H + h) * D, i, H * D, d)
    if POSITION:
        lam = tl.load(gating_ptr + h)
        o = acc * (1.0 / (total * (1.0 + exp(lam))))[:, None]
        o += tl.load(position_ptr + rows, mask=q_mask, other=0.0).to(tl.float32) * (1.0 / (1.0 + exp(-lam)))
    else:
        o = acc * (1.0 / total)[:, None]
    tl.store(out_ptr + rows, o.to(q.dtype), mask=q_mask)
    tl.store(lse_ptr + bh * N + i, (m * scale_log2 + tl.log2(total)) * LN2, mask=i < N)


@triton.jit
def _dq_loop_step(
    q, do, k_ptr, v_ptr, j, N, stride_kn, stride_vn, row_scale, row_shift, centre, excess, acc, mean,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BD)
    kv_mask = (d < D)[None, :] & (j < N)[:, None] if MASK else (d < D)[None, :]
    k = tl.load(addresses(k_ptr, j, stride_kn, d), mask=kv_mask, other=0.0)  # [BN, BD]
    v = tl.load(addresses(v_ptr, j, stride_vn, d), mask=kv_mask, other=0.0)  # [BN, BD]
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
def dq_loop_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, gating_ptr, lse_ptr,  # [B,H,N,D] x4, [B,N,H,D], [H], [B,H,N]
    dq_ptr, stats_ptr, part_ptr,  # [B,N,H,D], [3,B,H,N], [B*H,parts,4]
    stride_ob, stride_oh, stride_on, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    scale, H, N, total, parts,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    LARGE_SCORES: tl.constexpr,
):  # fmt: skip
    """dq, the rows' statistics for dk and dv (factor and shift of the exponent, delta = row sum of Pc dA), minus the sum of delta.

    delta is not to be had from the rounded output: with g near 1 what is left after taking out the positional part is rounding.
    dO . out only centres dA; the exact delta is the centre plus the row sum of what was centred, and dq is corrected by the mean key.
    Where scores are large, so is the rounding of lse: there the weights are divided by their own sum (LARGE_SCORES).
    """
    blocks = (N + BM - 1) // BM
    block, bh, b, h = place(tl.program_id(0), blocks, H)
    i = block * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    q_mask = (i < N)[:, None] & (d < D)[None, :]
    q = tl.load(addresses(q_ptr + b * stride_qb + h * stride_qh, i, stride_qn, d), mask=q_mask, other=0.0)  # [BM, BD]
    do = tl.load(addresses(do_ptr + b * stride_ob + h * stride_oh, i, stride_on, d), mask=q_mask, other=0.0)  # [BM, BD]
    rows = addresses((b * N * H + h) * D, i, H * D, d)
    out = tl.load(out_ptr + rows, mask=q_mask, other=0.0)
    centre = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + bh * N + i, mask=i < N, other=1e30)
    factor = cap(tl.abs(lse), LOG2E, BACKWARD_LIMIT)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    weight = tl.full((BM,), 1.0, tl.float32)
    if LARGE_SCORES and tl.max(tl.where(i < N, tl.abs(lse), 0.0), 0) > LARGE:
        weight = tl.where(i < N, 0.0, 1.0)
        for start in range(0, N, BN):
            j = start + tl.arange(0, BN)
            k = tl.load(addresses(k_ptr, j, stride_kn, d), mask=(j < N)[:, None] & (d < D)[None, :], other=0.0)  # [BN, BD]
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
            weight += tl.sum(tl.where((j < N)[None, :], tl.exp2(s * (scale * factor)[:, None] - (lse * factor)[:, None]), 0.0), 1)
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
    excess = excess / weight
    delta = centre + excess
    dq = (acc - excess[:, None] * mean) * (scale / (1.0 + exp(tl.load(gating_ptr + h))) / weight)[:, None]
    tl.store(dq_ptr + rows, dq.to(q.dtype), mask=q_mask)
    stats_ptr += bh * N + i
    tl.store(stats_ptr, scale * factor, mask=i < N)
    tl.store(stats_ptr + total, lse * factor + tl.log2(weight), mask=i < N)
    tl.store(stats_ptr + total + total, delta, mask=i < N)
    part = part_ptr + (bh * parts + block) * 4
    tl.store(part, -tl.sum(delta, 0))
    tl.store(part + 1 + tl.arange(0, 2), tl.zeros((2,), tl.float32))
    tl.store(part + 3, 0.0)


@triton.jit
def dkdv_loop_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, position_ptr, gating_ptr, stats_ptr,  # [B,H,N,D] x4, P^T dO [B,N,H,D], [H], [3,B,H,N]
    dk_ptr, dv_ptr,  # [B,N,H,D] x2
    stride_ob, stride_oh, stride_on, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    scale, H, N, total,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys, over all queries. Tiles are [keys, queries]."""
    block, bh, b, h = place(tl.program_id(0), (N + BN - 1) // BN, H)
    j = block * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    kv_mask = (j < N)[:, None] & (d < D)[None, :]
    k = tl.load(addresses(k_ptr + b * stride_kb + h * stride_kh, j, stride_kn, d), mask=kv_mask, other=0.0)  # [BN, BD]
    v = tl.load(addresses(v_ptr + b * stride_vb + h * stride_vh, j, stride_vn, d), mask=kv_mask, other=0.0)  # [BN, BD]
    do_ptr += b * stride_ob + h * stride_oh
    q_ptr += b * stride_qb + h * stride_qh
    stats_ptr += bh * N
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    for start in range(0, N, BM):
        i = start + tl.arange(0, BM)
        q_mask = (i < N)[:, None] & (d < D)[None, :]
        q = tl.load(addresses(q_ptr, i, stride_qn, d), mask=q_mask, other=0.0)  # [BM, BD]
        do = tl.load(addresses(do_ptr, i, stride_on, d), mask=q_mask, other=0.0)  # [BM, BD]
        row_scale = tl.load(stats_ptr + i, mask=i < N, other=0.0)
        row_shift = tl.load(stats_ptr + total + i, mask=i < N, other=1e30)
        delta = tl.load(stats_ptr + total + total + i, mask=i < N, other=0.0)
        p = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BN, BM]
        p = tl.exp2(p * row_scale[None, :] - row_shift[None, :])
        da = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BN, BM]
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dk = tl.dot((p * (da - delta[None, :])).to(q.dtype), q, dk, input_precision=PRECISION)
    lam = tl.load(gating_ptr + h)
    rest = 1.0 / (1.0 + exp(lam))
    rows = addresses((b * N * H + h) * D, j, H * D, d)
    dv = dv * rest + tl.load(position_ptr + rows, mask=kv_mask, other=0.0).to(tl.float32) * (1.0 / (1.0 + exp(-lam)))
    tl.store(dk_ptr + rows, (dk * (scale * rest)).to(k.dtype), mask=kv_mask)
    tl.store(dv_ptr + rows, dv.to(v.dtype), mask=kv_mask)
