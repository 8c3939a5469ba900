// One head forward; the order of work is in kernels.inc.h.

struct ForwardScratch {
    i64 padded;  // D rounded up to whole vectors
    float *k, *v, *wide, *along_x, *position, *rows, *qt, *st, *pairs, *o, *max, *sum, *factor, *weight;
    i64 size;

    __attribute__((always_inline)) inline ForwardScratch(const Shape& s, float* base) {
        const i64 n = s.tokens();
        const bool by_contraction = n > fold_tokens, paired = pairs_of(s.dtype);
        padded = round_up(s.dim, W);
        i64 at = 0;
        auto take = [&](i64 count) {
            float* p = base + at;
            at += round_up(count, 16);
            return p;
        };
        k = take(n * padded);
        v = take(n * padded);
        wide = paired && by_contraction ? take(n * padded) : v;  // v in float32, for the position
        along_x = take(by_contraction ? n * padded : 0);
        position = take(by_contraction ? n * padded : 0);
        rows = take(query_block * padded);
        qt = take(padded * query_block);
        st = take(min(n, key_tile) * query_block);
        pairs = take(paired ? min(n + 1, key_tile) / 2 * query_block : 0);
        o = take(query_block * padded);
        max = take(query_block);
        sum = take(query_block);
        factor = take(query_block);
        weight = take(query_block);
        size = at;
    }
};

static i64 forward_scratch(const Shape& s) { return ForwardScratch(s, nullptr).size; }

// Where all keys are one tile, the position joins the weights themselves: a = weight p + py px in one column of vectors, as the left
// factor of the product with v. float32 in place, pairs to `pairs`.
template <class Unit>
CONVIT_INLINE void fold(const ForwardJob& job, i64 i, float* p, i64 rows, i64 cols, vec weight, [[maybe_unused]] float* pairs) {
    const i64 gw = job.shape->grid_w, ld = job.folded_stride;
    const float *px = job.folded_x + i, *py = job.folded_y + i;
    i64 x = 0;
    vec along_y = load(py);
    const auto next = [&](i64 j) __attribute__((always_inline)) {
        const vec a = load(p + j * cols) * weight + along_y * load(px + x * ld);
        if (++x == gw) {
            x = 0;
            py += ld;
            along_y = load(py);
        }
        return a;
    };
    for (i64 j = 0; j < rows; j += Unit::per_unit) {
        const vec a = next(j);
        if constexpr (Unit::per_unit == 1) {
            store(p + j * cols, a);
        } else {
#if CONVIT_PAIRS
            store(pairs + j / 2 * cols, pair(a, j + 1 < rows ? next(j + 1) : vec{}));
#endif
        }
    }
}

template <class Unit>
static void forward_in(const ForwardJob& job) {
    const Shape& s = *job.shape;
    const i64 n = s.tokens(), dim = s.dim, depth = depth_of<Unit>(dim), k_stride = left_stride<Unit>(dim);
    const ForwardScratch x(s, job.scratch);
    const i64 padded = x.padded;
    const float scale = s.scale * log2_e, factor = score_factor<Unit>(scale);
    left_rows<Unit>(s, job.k, job.b, job.h, 0, n, x.k);
    right_rows<Unit>(s, job.v, job.b, job.h, 0, n, padded, x.v);
    const bool folded = job.folded_x != nullptr, contracted = job.px != nullptr && !folded;
    const i64 y0 = job.begin / s.grid_w, y1 = (job.end - 1) / s.grid_w + 1;
    if (contracted) {
        if (x.wide != x.v) load_rows(s.dtype, job.v, job.b, job.h, 0, n, dim, padded, x.wide);
        position_product(s, job.px, job.py, y0, y1, x.wide, padded, x.along_x, x.position);
    }

    const bool direct = s.dtype == DType::float32 && dim == padded;  // whole vectors: the product writes the output itself
    for (i64 i0 = job.begin; i0 < job.end; i0 += query_block) {
        const i64 count = min(query_block, job.end - i0), cols = round_up(count, W);
        across_rows<Unit>(s, job.q, job.b, job.h, i0, count, scale, x.rows, x.qt, cols);
        for (i64 c = 0; c < cols; ++c) {
            x.max[c] = lowest;
            x.sum[c] = 0.f;
        }
        float* to = direct ? static_cast<float*>(job.out.data) + job.b * job.out.stride_b + job.h * job.out.stride_h + i0 * job.out.stride_n : x.o;
        const i64 to_stride = direct ? job.out.stride_n : padded;
        prefetch_rows(s.dtype, read_only(job.out), job.b, job.h, i0, i0 + count, dim);
        prefetch_rows(s.dtype, job.k, job.next_b, job.next_h, i0, i0 + count, dim);
        for (i64 j0 = 0; j0 < n; j0 += key_tile) {
            const i64 keys = min(key_tile, n - j0), key_depth = depth_of<Unit>(keys);
            vec before[query_vectors];
            for (i64 c = 0; c < cols; c += W) before[c / W] = load(x.max + c);
            multiply<Unit, true>(keys, cols, depth, x.k + j0 * k_stride, k_stride, x.qt, cols, StoreMax{x.st, cols, x.max});
            for (i64 c = 0; c < cols; c += W) {
                const vec m = load(x.max + c), shrink = j0 == 0 ? vec{} : exp2((before[c / W] - m) * factor);
                store(x.factor + c, shrink);
                const vec sum = load(x.sum + c) * shrink + exponentials<Unit>(x.st + c, keys, cols, m, factor);
                store(x.sum + c, sum);
                const vec weight = job.content_gate / sum;
                store(x.weight + c, weight);
                if (folded) fold<Unit>(job, i0 + c, x.st + c, keys, cols, weight, x.pairs + c);
#if CONVIT_PAIRS
                if (Unit::per_unit > 1 && !folded)
                    for (i64 j = 0; j < keys; j += 2)
                        store(x.pairs + j / 2 * cols + c, pair(load(x.st + j * cols + c), j + 1 < keys ? load(x.st + (j + 1) * cols + c) : vec{}));
#endif
            }
            if (j0 == 0) {
                prefetch_rows(s.dtype, job.v, job.next_b, job.next_h, i0, i0 + count, dim);
                prefetch_rows(s.dtype, job.q, job.next_b, job.next_h, i0, i0 + count, dim);
            }
            const float *left = Unit::per_unit == 1 ? x.st : x.pairs, *v = x.v + j0 / Unit::per_unit * padded;
            const float* position = contracted ? x.position + (i0 - y0 * s.grid_w) * padded : nullptr;
            if (folded)
                multiply<Unit, false>(count, padded, key_depth, left, cols, v, padded, Store{to, to_stride});
            else if (j0 + keys == n)
                multiply<Unit, false>(count, padded, key_depth, left, cols, v, padded,
                                      Finish{to, to_stride, j0 == 0 ? nullptr : x.o, position, padded, x.factor, x.weight});
            else if (j0 == 0)
                multiply<Unit, false>(count, padded, key_depth, left, cols, v, padded, Store{x.o, padded});
            else
                multiply<Unit, false>(count, padded, key_depth, left, cols, v, padded, Rescale{x.o, padded, x.factor});
        }
        for (i64 i = 0; i < count; ++i) {
            if (!direct) store_row(s.dtype, job.out, job.b, job.h, i0 + i, dim, x.o + i * padded);
            if (job.lse != nullptr) job.lse[i0 + i] = (x.max[i] * factor + __builtin_log2f(x.sum[i])) * ln_2;
        }
    }
}

static void forward(const ForwardJob& job) {
#if CONVIT_PAIRS
    if (pairs_of(job.shape->dtype)) return forward_in<Pairs>(job);
#endif
    forward_in<Floats>(job);
}
