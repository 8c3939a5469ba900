"""What the kernels of both families share: addresses, the weights along one axis, the guard of exponents, the last reduction."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FORWARD_LIMIT = tl.constexpr(16777216.0)  # 2^24: half a unit of the exponent is lost, of every key of a row alike
LARGE = tl.constexpr(4096.0)  # log-sum-exp from which on its rounding shows in the weights
BACKWARD_LIMIT = tl.constexpr(1048576.0)  # 2^20: what dk and dv are told of a row is rounded to a sixteenth


@triton.jit
def addresses(ptr, i, stride_n, d):
    """Addresses of rows i, columns d; 64-bit, since i * stride_n may pass 2^31."""
    return ptr + i.to(tl.int64)[:, None] * stride_n + d[None, :]


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def peak(w, w2, at, size):
    """The key coordinate of the largest logit w (j - at) + w2 (j - at)^2 over 0 <= j < size."""
    vertex = at + tl.where(w2 < 0, w / tl.where(w2 < 0, -2.0 * w2, 1.0), 0.0)
    low = tl.where(w2 < 0, tl.floor(tl.minimum(tl.maximum(vertex, 0.0), size - 1.0)), 0.0)
    high = tl.where(w2 < 0, tl.minimum(low + 1.0, size - 1.0), size - 1.0)
    return tl.where((high - low) * (w + w2 * (high + low - 2.0 * at)) > 0, high, low)


@triton.jit
def axis_weights(w, w2, at, to, size):
    """Position weights along one axis, before normalisation: in [0, 1], 1 at the largest, 0 where ``to`` is outside.

    w, w2 scalars for exponents of 2; ``at`` the query and ``to`` the key coordinates, float32, of shapes that broadcast.
    """
    best = peak(w, w2, at, size)
    logit = (to - best) * (
        w + w2 * (to + (best - 2.0 * at))
    )  # coordinates are exact: one rounding in the sum; never above 0 but for rounding: -|logit| costs nothing and cannot overflow
    return tl.where(to < size, tl.exp2(-tl.abs(logit)), 0.0)


@triton.jit
def cap(magnitude, scale_log2, LIMIT: tl.constexpr):
    """The factor of the exponent s * scale_log2 that keeps a row finite: exponents past LIMIT are scaled down to it.

    A fused multiply-add forms s * scale_log2 - m exactly, but m is rounded, and past 2^24 the difference could overflow exp2. Scores
    that large differ by less than a unit of the exponent only where float32 cannot tell them apart.
    """
    return tl.where(magnitude * scale_log2 > LIMIT, LIMIT / magnitude, scale_log2)


@triton.jit
def place(pid, blocks, H):
    """Program -> (block, batch*head, batch, head); one axis of programs, since the others stop at 65,535."""
    bh = pid // blocks
    return pid % blocks, bh.to(tl.int64), (bh // H).to(tl.int64), (bh % H).to(tl.int64)


@triton.jit
def reduce_kernel(part_ptr, gating_ptr, dw_ptr, dgating_ptr, H, B, parts, BLOCK: tl.constexpr):
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
    gate = 1.0 / (1.0 + exp(-lam))
    tl.store(dw_ptr + h * 3 + c - 1, total * gate, mask=c > 0)
    tl.store(dgating_ptr + h + c, total * (gate / (1.0 + exp(lam))), mask=c == 0)
