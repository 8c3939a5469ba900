// One head forward; the order of work is in kernels.inc.h.

struct ForwardScratch {
    i64 padded;  // D rounded up to whole vectors
    float *k, *v, *along_x, *position, *rows, *qt, *st, *o, *max, *sum, *factor, *weight;
    i64 size;

    __attribute__((always_inline)) inline ForwardScratch(const Shape& s, float* base) {
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
        along_x = take(n * padded);
        position = take(n * padded);
        rows = take(query_block * padded);
        qt = take(padded * query_block);
        st = take(min(n, key_tile) * query_block);
        o = take(query_block * padded);
        max = take(query_block);
        sum = take(query_block);
        factor = take(query_block);
        weight = take(query_block);
        size = at;
    }
};

static i64 forward_scratch(const Shape& s) { return ForwardScratch(s, nullptr).size; }

static void forward(const ForwardJob& job) {
    const Shape& s = *job.shape;
    const i64 n = s.tokens(), dim = s.dim;
    const ForwardScratch x(s, job.scratch);
    const i64 padded = x.padded;
    load_rows(s.dtype, job.k, job.b, job.h, 0, n, dim, padded, x.k);
    load_rows(s.dtype, job.v, job.b, job.h, 0, n, dim, padded, x.v);
    const i64 y0 = job.begin / s.grid_w, y1 = (job.end - 1) / s.grid_w + 1;
    if (job.px != nullptr)
        position_product(s, job.px, job.py, y0, y1, x.v, padded, x.along_x, x.position);
    else
        for (i64 i = 0; i < n * padded; i += W) store(x.position + i, vec{});

    const bool direct = s.dtype == DType::float32 && dim == padded;  // whole vectors: the product writes the output itself
    for (i64 i0 = job.begin; i0 < job.end; i0 += query_block) {
        const i64 count = min(query_block, job.end - i0), cols = round_up(count, W);
        const float* rows = x.rows;
        i64 row_stride = padded;
        if (s.dtype == DType::float32 && dim % 4 == 0) {  // each row of q is read once: straight from where it is
            rows = static_cast<const float*>(row_of(s.dtype, job.q, job.b, job.h, i0));
            row_stride = job.q.stride_n;
        } else {
            load_rows(s.dtype, job.q, job.b, job.h, i0, i0 + count, dim, padded, x.rows);
        }
        transpose(rows, count, dim, row_stride, s.scale * log2_e, x.qt, cols);
        for (i64 c = 0; c < cols; ++c) {
            x.max[c] = lowest;
            x.sum[c] = 0.f;
        }
        float* to = direct ? static_cast<float*>(job.out.data) + job.b * job.out.stride_b + job.h * job.out.stride_h + i0 * job.out.stride_n : x.o;
        const i64 to_stride = direct ? job.out.stride_n : padded;
        for (i64 j0 = 0; j0 < n; j0 += key_tile) {
            const i64 keys = min(key_tile, n - j0);
            vec before[query_vectors];
            for (i64 c = 0; c < cols; c += W) before[c / W] = load(x.max + c);
            multiply<true>(keys, cols, dim, x.k + j0 * padded, padded, x.qt, cols, StoreMax{x.st, cols, x.max});
            for (i64 c = 0; c < cols; c += W) {
                const vec m = load(x.max + c);
                vec part[4] = {};
                i64 j = 0;
                for (; j + 4 <= keys; j += 4)
                    for (i64 u = 0; u < 4; ++u) {
                        float* p = x.st + (j + u) * cols + c;
                        const vec e = exp2(load(p) - m);
                        store(p, e);
                        part[u] += e;
                    }
                for (; j < keys; ++j) {
                    float* p = x.st + j * cols + c;
                    const vec e = exp2(load(p) - m);
                    store(p, e);
                    part[0] += e;
                }
                const vec shrink = exp2(before[c / W] - m);
                store(x.factor + c, shrink);
                store(x.sum + c, load(x.sum + c) * shrink + ((part[0] + part[1]) + (part[2] + part[3])));
            }
            const float* v = x.v + j0 * padded;
            if (j0 + keys == n) {
                for (i64 c = 0; c < cols; c += W) store(x.weight + c, job.content_gate / load(x.sum + c));
                const Finish finish{to, to_stride, j0 == 0 ? nullptr : x.o, x.position + (i0 - y0 * s.grid_w) * padded, padded, x.factor, x.weight};
                multiply<false>(count, padded, keys, x.st, cols, v, padded, finish);
            } else if (j0 == 0) {
                multiply<false>(count, padded, keys, x.st, cols, v, padded, Store{x.o, padded});
            } else {
                multiply<false>(count, padded, keys, x.st, cols, v, padded, Rescale{x.o, padded, x.factor});
            }
        }
        for (i64 i = 0; i < count; ++i) {
            if (!direct) store_row(s.dtype, job.out, job.b, job.h, i0 + i, dim, x.o + i * padded);
            job.lse[i0 + i] = (x.max[i] + __builtin_log2f(x.sum[i])) * ln_2;
        }
    }
}
