// One head backward; the order of work is in kernels.inc.h.

struct BackwardScratch {
    i64 padded;
    // The operands of the products: left and right rows of k, left rows of v, right rows of a block of q and grad. In float32 left and
    // right rows are the same. The positional half, which comes before, has float32 rows of v and grad in the place of k_left and v_left.
    float *k_left, *v_left, *k_right, *dpx, *dpy, *rows, *q_right, *grad_right, *qt, *gt, *p, *dp, *weights, *slopes, *slopes_across;
    float *dq, *lse, *max, *sum, *delta;
    i64 size;

    __attribute__((always_inline)) inline BackwardScratch(const Shape& s, bool position, float* base) {
        const i64 n = s.tokens();
        const bool paired = pairs_of(s.dtype);
        padded = round_up(s.dim, W);
        i64 at = 0;
        auto take = [&](i64 count) {
            float* p = base + at;
            at += round_up(count, 16);
            return p;
        };
        k_left = take(n * padded);
        v_left = take(n * padded);
        k_right = paired ? take((n + 1) / 2 * padded) : k_left;
        dpx = take(position ? s.grid_w * s.grid_w : 0);
        dpy = take(position ? s.grid_h * s.grid_h : 0);
        rows = take(backward_block * padded);
        q_right = take(backward_block * padded);
        grad_right = take(backward_block * padded);
        qt = take(padded * backward_block);
        gt = take(padded * backward_block);
        p = take(n * backward_block);
        dp = take(n * backward_block);
        weights = paired ? take(n * backward_block / 2) : p;
        slopes = paired ? take(n * backward_block / 2) : dp;
        slopes_across = paired ? take((n + 1) / 2 * backward_block) : dp;
        dq = take(backward_block * padded);
        lse = take(backward_block);
        max = take(backward_block);
        sum = take(backward_block);
        delta = take(backward_block);
        size = at;
    }
};

static i64 backward_scratch(const Shape& s, bool position) { return BackwardScratch(s, position, nullptr).size; }
static i64 backward_sums(const Shape& s) { return round_up(2 * s.tokens() * round_up(s.dim, W), 16); }  // in whole cache lines

CONVIT_INLINE void clear(float* p, i64 count) {
    for (i64 i = 0; i < count; i += W) store(p + i, vec{});
}

// dk = 0 and dv = g P^T grad with the tables' gradients; or all zero where the position joins the content's weights.
static void backward_position(const BackwardJob& job) {
    const Shape& s = *job.shape;
    const BackwardScratch x(s, job.px != nullptr, job.scratch);
    const i64 gh = s.grid_h, gw = s.grid_w, n = s.tokens(), padded = x.padded, line = gw * padded;
    float *dk = job.sums, *dv = job.sums + n * padded, *v = x.k_left, *grad = x.v_left, *lines = dk;
    double* dw = job.partial;
    for (i64 i = 0; i < 4; ++i) dw[i] = 0;
    if (job.px == nullptr || job.folded_x != nullptr) return clear(job.sums, 2 * n * padded);
    load_rows(s.dtype, job.v, job.b, job.h, 0, n, s.dim, padded, v);
    load_rows(s.dtype, job.grad_out, job.b, job.h, 0, n, s.dim, padded, grad);
    // along y first: lines[s][x] = sum_t py[s][t] v[t][x]; then dpx[x][z] = sum_s grad[s][x] . lines[s][z]
    multiply<Floats, true>(gh, line, gh, job.py, gh, v, line, Store{lines, line});
    multiply_transposed(gw, grad, lines, padded, gh, line, padded, x.dpx);
    dw[3] = table_gradient(job.px, x.dpx, gw, dw[0], dw[2]);
    // along x first, and dpy[s][t] = grad[s] . lines[t]
    for (i64 y = 0; y < gh; ++y) multiply<Floats, true>(gw, padded, gw, job.px, gw, v + y * line, padded, Store{lines + y * line, padded});
    multiply_transposed(gh, grad, lines, line, 1, 0, line, x.dpy);
    table_gradient(job.py, x.dpy, gh, dw[1], dw[2]);
    for (i64 y = 0; y < gh; ++y) multiply<Floats, false>(gw, padded, gw, job.px, gw, grad + y * line, padded, Store{lines + y * line, padded});
    multiply<Floats, false>(gh, line, gh, job.py, gh, lines, line, Store{dv, line});
    for (i64 i = 0; i < gh * line; i += W) store(dv + i, load(dv + i) * job.gate);
    clear(dk, n * padded);
}

// Where the position is folded, N^2 multiply-adds a table take the place of contractions over D: with dA_ij = grad_i . v_j, along the
// queries, the sums over the keys' rows t, py[y_i][t] dA_ij, for each column z of keys, and over the columns, px[x_i][z] dA_ij, for each t.
// What is left is to add up the queries of a column, or of a row.
static void backward_tables(const BackwardJob& job) {
    const i64 gh = job.shape->grid_h, gw = job.shape->grid_w, ld = job.folded_stride;
    const float *by_column = job.table_sums, *by_row = by_column + gw * ld;
    float *dpx = job.table_sums + (gw + gh) * ld, *dpy = dpx + gw * gw;
    for (i64 x = 0; x < gw; ++x)
        for (i64 z = 0; z < gw; ++z) {
            float sum = 0;
            for (i64 y = 0; y < gh; ++y) sum += by_column[z * ld + y * gw + x];
            dpx[x * gw + z] = sum;
        }
    for (i64 y = 0; y < gh; ++y)
        for (i64 t = 0; t < gh; ++t) {
            float sum = 0;
            for (i64 x = 0; x < gw; ++x) sum += by_row[t * ld + y * gw + x];
            dpy[y * gh + t] = sum;
        }
    double* dw = job.partial;
    dw[3] = table_gradient(job.px, dpx, gw, dw[0], dw[2]);
    table_gradient(job.py, dpy, gh, dw[1], dw[2]);
}

// One column of vectors of a block: from p, not yet normalised, and dp to the left factors of dv (the weights, with the position where it
// is folded), of dk and of dq (the slopes dS, without the scale).
template <class Unit>
CONVIT_INLINE void weights_and_slopes(const BackwardJob& job, const BackwardScratch& x, i64 i, i64 c, i64 rows, i64 cols, vec weight, vec delta) {
    const i64 gw = job.shape->grid_w, ld = job.folded_stride;
    const float *px = job.folded_x == nullptr ? nullptr : job.folded_x + i + c, *py = px == nullptr ? nullptr : job.folded_y + i + c;
    float *by_column = px == nullptr ? nullptr : job.table_sums + i + c, *by_row = px == nullptr ? nullptr : by_column + gw * ld;
    i64 at_x = 0;
    for (i64 z = 0; px != nullptr && z < gw; ++z) store(by_column + z * ld, vec{});
    vec along_y = px == nullptr ? vec{} : load(py), gated = along_y * job.gate, row_sum{};
    [[maybe_unused]] vec slopes[2] = {};
    for (i64 j = 0; j < rows; ++j) {
        const i64 at = j * cols + c;
        vec w = load(x.p + at) * weight;
        const vec product = load(x.dp + at), slope = w * (product - delta);
        if (px != nullptr) {
            const vec along_x = load(px + at_x * ld);
            w += gated * along_x;
            row_sum += product * along_x;
            store(by_column + at_x * ld, load(by_column + at_x * ld) + product * along_y);
            if (++at_x == gw) {
                store(by_row, row_sum);
                at_x = 0, row_sum = vec{};
                py += ld, by_row += ld;
                along_y = load(py), gated = along_y * job.gate;
            }
        }
        if constexpr (Unit::per_unit == 1) {
            store(x.weights + at, w);
            store(x.slopes + at, slope);
        } else {
#if CONVIT_PAIRS
            to_bf16(w, reinterpret_cast<u16_alias*>(x.weights) + at);
            to_bf16(slope, reinterpret_cast<u16_alias*>(x.slopes) + at);
            slopes[j % 2] = slope;
            if (j % 2 == 1 || j + 1 == rows) store(x.slopes_across + j / 2 * cols + c, pair(slopes[0], j % 2 == 1 ? slopes[1] : vec{}));
#endif
        }
    }
}

template <class Unit>
static void backward_queries_in(const BackwardJob& job) {
    const Shape& s = *job.shape;
    const i64 n = s.tokens(), dim = s.dim, depth = depth_of<Unit>(dim), stride = left_stride<Unit>(dim);
    const BackwardScratch x(s, job.px != nullptr, job.scratch);
    const i64 padded = x.padded;
    const float scale = s.scale * log2_e, factor = score_factor<Unit>(scale);
    left_rows<Unit>(s, job.k, job.b, job.h, 0, n, x.k_left);
    left_rows<Unit>(s, job.v, job.b, job.h, 0, n, x.v_left);
    if (x.k_right != x.k_left) right_rows<Unit>(s, job.k, job.b, job.h, 0, n, padded, x.k_right);

    for (i64 i0 = job.begin; i0 < job.end; i0 += backward_block) {
        const i64 count = min(backward_block, job.end - i0), cols = round_up(count, W), query_depth = depth_of<Unit>(count);
        across_rows<Unit>(s, job.q, job.b, job.h, i0, count, scale, x.rows, x.qt, cols);
        across_rows<Unit>(s, job.grad_out, job.b, job.h, i0, count, 1.f, x.rows, x.gt, cols);
        right_rows<Unit>(s, job.q, job.b, job.h, i0, i0 + count, padded, x.q_right);
        right_rows<Unit>(s, job.grad_out, job.b, job.h, i0, i0 + count, padded, x.grad_right);
        prefetch_rows(s.dtype, read_only(job.dq), job.b, job.h, i0, i0 + count, dim);
        prefetch_rows(s.dtype, read_only(job.dk), job.b, job.h, i0, i0 + count, dim);
        prefetch_rows(s.dtype, read_only(job.dv), job.b, job.h, i0, i0 + count, dim);
        bool shift_is_exact = true;
        for (i64 c = 0; c < cols; ++c) {
            x.lse[c] = c < count ? job.lse[i0 + c] * log2_e : 0.f;
            x.sum[c] = x.delta[c] = 0.f;
            x.max[c] = lowest;
            shift_is_exact = shift_is_exact && !(__builtin_fabsf(x.lse[c]) > 65536.f);
        }
        // lse shifts the exponent only: the sum is taken anew, with it the rounding of lse goes. Where that is large, the maximum instead
        if (many_registers && shift_is_exact) {
            multiply<Unit, true>(n, cols, depth, x.k_left, stride, x.qt, cols, StoreExp2{x.p, cols, factor, x.lse, x.sum});
        } else {  // 16 registers hold the tile or the exponentials; factor is 1 there
            multiply<Unit, true>(n, cols, depth, x.k_left, stride, x.qt, cols, StoreMax{x.p, cols, x.max});
            const float* shift = shift_is_exact ? x.lse : x.max;
            for (i64 c = 0; c < cols; c += W) store(x.sum + c, exponentials<Unit>(x.p + c, n, cols, load(shift + c), factor));
        }
        prefetch_rows(s.dtype, job.k, job.next_b, job.next_h, i0, i0 + count, dim);
        prefetch_rows(s.dtype, job.v, job.next_b, job.next_h, i0, i0 + count, dim);
        multiply<Unit, true>(n, cols, depth, x.v_left, stride, x.gt, cols, StoreDot{x.dp, x.p, cols, x.delta});
        for (i64 c = 0; c < cols; c += W) {
            const vec sum = load(x.sum + c), delta = load(x.delta + c) / sum;
            store(x.delta + c, delta);
            weights_and_slopes<Unit>(job, x, i0, c, n, cols, job.content_gate / sum, delta);
        }
        double& content = job.content[i0 / backward_block];
        content = 0;
        for (i64 i = 0; i < count; ++i) content += x.delta[i];
        prefetch_rows(s.dtype, job.q, job.next_b, job.next_h, i0, i0 + count, dim);
        prefetch_rows(s.dtype, job.grad_out, job.next_b, job.next_h, i0, i0 + count, dim);
        const i64 row = cols / Unit::per_unit;
        if (job.blocks == nullptr) {
            multiply<Unit, true>(n, padded, query_depth, x.weights, row, x.grad_right, padded, Add{job.sums + n * padded, padded});
            multiply<Unit, true>(n, padded, query_depth, x.slopes, row, x.q_right, padded, Add{job.sums, padded});
        } else {
            float* dk = job.blocks + (i0 - job.begin) / backward_block * backward_sums(s);
            multiply<Unit, true>(n, padded, query_depth, x.weights, row, x.grad_right, padded, Store{dk + n * padded, padded});
            multiply<Unit, true>(n, padded, query_depth, x.slopes, row, x.q_right, padded, Store{dk, padded});
        }
        for (i64 j = 0; j < n; j += key_tile) {  // in steps: one long float32 sum over the keys would lose digits
            const i64 key_depth = depth_of<Unit>(min(key_tile, n - j)), from = j / Unit::per_unit;
            const float *slopes = x.slopes_across + from * cols, *k = x.k_right + from * padded;
            if (j == 0)
                multiply<Unit, false>(count, padded, key_depth, slopes, cols, k, padded, Store{x.dq, padded});
            else
                multiply<Unit, false>(count, padded, key_depth, slopes, cols, k, padded, Add{x.dq, padded});
        }
        for (i64 i = 0; i < count; ++i) {
            float* dq = x.dq + i * padded;
            for (i64 d = 0; d < padded; d += W) store(dq + d, load(dq + d) * s.scale);
            store_row(s.dtype, job.dq, job.b, job.h, i0 + i, dim, dq);
        }
    }
}

static void backward_queries(const BackwardJob& job) {
#if CONVIT_PAIRS
    if (pairs_of(job.shape->dtype)) return backward_queries_in<Pairs>(job);
#endif
    backward_queries_in<Floats>(job);
}

static void backward_keys(const BackwardJob& job, i64 count, bool last) {
    const Shape& s = *job.shape;
    if (last && job.begin == 0 && job.end > 0 && job.folded_x != nullptr) backward_tables(job);
    const i64 n = s.tokens(), dim = s.dim, padded = round_up(dim, W), size = n * padded;
    for (i64 j = job.begin; j < job.end; ++j) {
        float *dk = job.sums + j * padded, *dv = dk + size;
        for (i64 t = 0; t < count; ++t) {
            const float* block = job.blocks + t * backward_sums(s) + j * padded;
            for (i64 d = 0; d < padded; d += W) {
                store(dk + d, load(dk + d) + load(block + d));
                store(dv + d, load(dv + d) + load(block + size + d));
            }
        }
        if (!last) continue;
        for (i64 d = 0; d < padded; d += W) store(dk + d, load(dk + d) * s.scale);
        store_row(s.dtype, job.dk, job.b, job.h, j, dim, dk);
        store_row(s.dtype, job.dv, job.b, job.h, j, dim, dv);
    }
}
