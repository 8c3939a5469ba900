// One head backward; the order of work is in kernels.inc.h.

struct BackwardScratch {
    i64 padded;
    float *k, *v, *grad, *dk, *dv, *lines, *dpx, *dpy, *rows, *qt, *gt, *p, *dp, *dq, *lse, *sum, *delta;
    i64 size;

    __attribute__((always_inline)) inline BackwardScratch(const Shape& s, bool position, float* base) {
        const i64 n = s.tokens();
        padded = round_up(s.dim, W);
        i64 at = 0;
        auto take = [&](i64 count) {
            float* p = base + at;
            at += round_up(count, 16);
            return p;
        };
        k = take(n * padded);
        v = take(n * padded);
        grad = take(n * padded);
        dk = take(n * padded);
        dv = take(n * padded);
        lines = dk;  // the positional half is done before dk is begun
        dpx = take(position ? s.grid_w * s.grid_w : 0);
        dpy = take(position ? s.grid_h * s.grid_h : 0);
        rows = take(backward_block * padded);
        qt = take(padded * backward_block);
        gt = take(padded * backward_block);
        p = take(n * backward_block);
        dp = take(n * backward_block);
        dq = take(backward_block * padded);
        lse = take(backward_block);
        sum = take(backward_block);
        delta = take(backward_block);
        size = at;
    }
};

static i64 backward_scratch(const Shape& s, bool position) { return BackwardScratch(s, position, nullptr).size; }

// Gradients of the positional half, not yet scaled by the gate but in dv; returns sum(grad_out * P v).
static double position_backward(const BackwardJob& job, const BackwardScratch& x) {
    const Shape& s = *job.shape;
    const i64 gh = s.grid_h, gw = s.grid_w, padded = x.padded, line = gw * padded;
    if (job.px == nullptr) {
        for (i64 i = 0; i < gh * line; i += W) store(x.dv + i, vec{});
        return 0;
    }
    double* dw = job.partial;
    // along y first: lines[s][x] = sum_t py[s][t] v[t][x]; then dpx[x][z] = sum_s grad[s][x] . lines[s][z]
    multiply<true>(gh, line, gh, job.py, gh, x.v, line, Store{x.lines, line});
    multiply_transposed(gw, x.grad, x.lines, padded, gh, line, padded, x.dpx);
    const double product = table_gradient(job.px, x.dpx, gw, dw[0], dw[2]);
    // along x first, and dpy[s][t] = grad[s] . lines[t]
    for (i64 y = 0; y < gh; ++y) multiply<true>(gw, padded, gw, job.px, gw, x.v + y * line, padded, Store{x.lines + y * line, padded});
    multiply_transposed(gh, x.grad, x.lines, line, 1, 0, line, x.dpy);
    table_gradient(job.py, x.dpy, gh, dw[1], dw[2]);
    // dv = g P^T grad
    for (i64 y = 0; y < gh; ++y) multiply<false>(gw, padded, gw, job.px, gw, x.grad + y * line, padded, Store{x.lines + y * line, padded});
    multiply<false>(gh, line, gh, job.py, gh, x.lines, line, Store{x.dv, line});
    for (i64 i = 0; i < gh * line; i += W) store(x.dv + i, load(x.dv + i) * job.gate);
    return product;
}

static void backward(const BackwardJob& job) {
    const Shape& s = *job.shape;
    const i64 n = s.tokens(), dim = s.dim;
    const BackwardScratch x(s, job.px != nullptr, job.scratch);
    const i64 padded = x.padded;
    load_rows(s.dtype, job.k, job.b, job.h, 0, n, dim, padded, x.k);
    load_rows(s.dtype, job.v, job.b, job.h, 0, n, dim, padded, x.v);
    load_rows(s.dtype, job.grad_out, job.b, job.h, 0, n, dim, padded, x.grad);
    for (i64 i = 0; i < 4; ++i) job.partial[i] = 0;
    double gate_gradient = position_backward(job, x);
    for (i64 i = 0; i < n * padded; i += W) store(x.dk + i, vec{});

    for (i64 i0 = 0; i0 < n; i0 += backward_block) {
        const i64 count = min(backward_block, n - i0), cols = round_up(count, W);
        float* grad = x.grad + i0 * padded;
        load_rows(s.dtype, job.q, job.b, job.h, i0, i0 + count, dim, padded, x.rows);
        transpose(x.rows, count, dim, padded, s.scale * log2_e, x.qt, cols);
        transpose(grad, count, dim, padded, 1.f, x.gt, cols);
        for (i64 c = 0; c < cols; ++c) {
            x.lse[c] = c < count ? job.lse[i0 + c] * log2_e : 0.f;
            x.sum[c] = x.delta[c] = 0.f;
        }
        multiply<true>(n, cols, dim, x.k, padded, x.qt, cols, StoreExp2{x.p, cols, x.lse, x.sum});
        multiply<true>(n, cols, dim, x.v, padded, x.gt, cols, StoreDot{x.dp, x.p, cols, x.delta});
        // p is not normalised yet (lse is rounded, and shifts the exponent only): delta is; the rows of grad, q and dq carry 1 / sum
        for (i64 c = 0; c < cols; c += W) {
            const vec delta = load(x.delta + c) / load(x.sum + c);
            store(x.delta + c, delta);
            for (i64 j = 0; j < n; ++j) {
                float* p = x.dp + j * cols + c;
                store(p, load(x.p + j * cols + c) * (load(p) - delta));
            }
        }
        for (i64 i = 0; i < count; ++i) {
            gate_gradient -= x.delta[i];
            const float weight = job.content_gate / x.sum[i];
            for (i64 d = 0; d < padded; d += W) {
                store(grad + i * padded + d, load(grad + i * padded + d) * weight);
                store(x.rows + i * padded + d, load(x.rows + i * padded + d) * (weight * s.scale));
            }
        }
        multiply<true>(n, padded, count, x.p, cols, grad, padded, Add{x.dv, padded});
        multiply<true>(n, padded, count, x.dp, cols, x.rows, padded, Add{x.dk, padded});
        for (i64 j = 0; j < n; j += key_tile) {  // in steps: one long float32 sum over the keys would lose digits
            const i64 keys = min(key_tile, n - j);
            if (j == 0)
                multiply<false>(count, padded, keys, x.dp, cols, x.k, padded, Store{x.dq, padded});
            else
                multiply<false>(count, padded, keys, x.dp + j * cols, cols, x.k + j * padded, padded, Add{x.dq, padded});
        }
        for (i64 i = 0; i < count; ++i) {
            float* dq = x.dq + i * padded;
            const float weight = job.content_gate / x.sum[i] * s.scale;
            for (i64 d = 0; d < padded; d += W) store(dq + d, load(dq + d) * weight);
            store_row(s.dtype, job.dq, job.b, job.h, i0 + i, dim, dq);
        }
    }
    for (i64 j = 0; j < n; ++j) {
        store_row(s.dtype, job.dk, job.b, job.h, j, dim, x.dk + j * padded);
        store_row(s.dtype, job.dv, job.b, job.h, j, dim, x.dv + j * padded);
    }
    job.partial[3] = gate_gradient;
}
