// The row blocks of infer.h, written once for float32 (CONVIT_BF16 0) and bfloat16 products (1). As in kernels.inc.h, everything has
// internal linkage and nothing of the C++ library is called.
//
// One register tile does all products: 8 rows by 3 vectors of columns, A by broadcast. While it works it asks for the panel that comes
// next, one line a step: weights come from the third cache or from memory, and a panel's first tile would wait for them.

typedef std::int64_t i64;
typedef std::uint16_t u16;
#if CONVIT_BF16
typedef u16 T;
constexpr i64 step = 2;  // elements of a row that one multiply-add takes
#else
typedef float T;
constexpr i64 step = 1;
#endif
constexpr i64 W = 16;

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE i64 min(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 round_up(i64 a, i64 b) { return (a + b - 1) / b * b; }
INLINE __mmask16 first(i64 count) { return count >= W ? __mmask16(0xffff) : __mmask16((1u << count) - 1); }
INLINE __m512 load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
INLINE __m512 load(const u16* p, __mmask16 mask = 0xffff) {
    const __m256i x = _mm256_maskz_loadu_epi16(mask, p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
INLINE __m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
INLINE void store(float* p, __m512 x, __mmask16 mask) { _mm512_mask_storeu_ps(p, mask, x); }
#if CONVIT_BF16
INLINE __m256i narrow(__m512 x) {
    const __m256bh y = _mm512_cvtneps_pbh(x);
    __m256i bits;
    __builtin_memcpy(&bits, &y, 32);
    return bits;
}
INLINE void store(u16* p, __m512 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
INLINE void store(u16* p, __m512 x, __mmask16 mask) { _mm256_mask_storeu_epi16(p, mask, narrow(x)); }
#endif

// ---- matrix product

struct Tile {
    const T* a;  // [rows][lda]
    i64 lda;
    const T* b;  // a panel: [depth][NV * W][step]
    i64 depth;   // in steps
    const char* ahead;  // what the second cache should have next: a line of it for each step
};

template <int R, int NV>
INLINE void accumulate(const Tile& t, __m512 (&acc)[R][NV]) {
    UNROLL
    for (int r = 0; r < R; ++r) {
        UNROLL
        for (int n = 0; n < NV; ++n) acc[r][n] = _mm512_setzero_ps();
    }
    // three pointers and one stride address eight rows without arithmetic: x86 scales an index by 1, 2, 4 and 8
    const i64 lda = t.lda;
    const T *a0 = t.a, *a3 = a0 + 3 * lda, *a6 = a0 + 6 * lda;
    const T* b = t.b;
    const char* ahead = t.ahead;
    for (i64 k = 0; k < t.depth; ++k) {
#if CONVIT_BF16
        __m512bh bv[NV];
        UNROLL
        for (int n = 0; n < NV; ++n) {
            const __m512i bits = _mm512_loadu_si512(b + n * W * 2);
            __builtin_memcpy(&bv[n], &bits, 64);
        }
#else
        __m512 bv[NV];
        UNROLL
        for (int n = 0; n < NV; ++n) bv[n] = _mm512_loadu_ps(b + n * W);
#endif
        __builtin_prefetch(ahead + k * 64, 0, 2);
        UNROLL
        for (int r = 0; r < R; ++r) {
            const T* p = r < 3 || r == 4 ? a0 + r * lda : r == 6 ? a6 : a3 + (r - 3) * lda;
#if CONVIT_BF16
            int pair;
            __builtin_memcpy(&pair, p, 4);
            const __m512i bits = _mm512_set1_epi32(pair);
            __m512bh av;
            __builtin_memcpy(&av, &bits, 64);
            UNROLL
            for (int n = 0; n < NV; ++n) acc[r][n] = _mm512_dpbf16_ps(acc[r][n], av, bv[n]);
#else
            const __m512 av = _mm512_set1_ps(*p);
            UNROLL
            for (int n = 0; n < NV; ++n) acc[r][n] = _mm512_fmadd_ps(av, bv[n], acc[r][n]);
#endif
        }
        a0 += step;
        a3 += step;
        a6 += step;
        b += NV * W * step;
    }
}

template <int R, int NV, class Epilogue>
INLINE void row_tiles(i64 row, i64 rows, i64 col, const T* a, i64 lda, const T* b, i64 depth, const char* ahead, const Epilogue& epilogue) {
    for (; row + R <= rows; row += R) {
        __m512 acc[R][NV];
        accumulate<R, NV>({a + row * lda, lda, b, depth, ahead}, acc);
        ahead += depth * 64;
        UNROLL
        for (int r = 0; r < R; ++r) {
            UNROLL
            for (int n = 0; n < NV; ++n) epilogue(row + r, col + n * W, acc[r][n]);
        }
    }
    if constexpr (R > 1)
        if (row < rows) row_tiles<R / 2, NV>(row, rows, col, a, lda, b, depth, ahead, epilogue);
}

// epilogue(row, column, vector) for a [rows][in] times the columns of a product from `begin` up to `end`, panel by panel, and for the rows
// of the weight from `from` (even) on, `in` of them.
template <class Epilogue>
INLINE void multiply(const Product& p, i64 rows, const T* a, i64 lda, i64 begin, i64 end, i64 from, i64 in, const Epilogue& epilogue) {
    const i64 total = round_up(p.in, step) / step, depth = round_up(in, step) / step, vectors = (p.out + W - 1) / W;
    const T* b = static_cast<const T*>(p.weight);
    for (i64 v = 0; v * W < end && v < vectors;) {
        const i64 count = panel_vectors(vectors - v), col = v * W;
        if (col + count * W > begin) {
            const T* slice = b + from * count * W;
            const bool more = v + count < vectors;
            const char* ahead = more ? reinterpret_cast<const char*>(slice + total * step * count * W) : static_cast<const char*>(p.next);
            if (count == 3)
                row_tiles<8, 3>(0, rows, col, a, lda, slice, depth, ahead, epilogue);
            else if (count == 2)
                row_tiles<8, 2>(0, rows, col, a, lda, slice, depth, ahead, epilogue);
            else
                row_tiles<8, 1>(0, rows, col, a, lda, slice, depth, ahead, epilogue);
        }
        b += total * step * count * W;
        v += count;
    }
}

template <class Epilogue>
INLINE void multiply(const Product& p, i64 rows, const T* a, i64 lda, const Epilogue& epilogue) {
    multiply(p, rows, a, lda, 0, p.out, 0, p.in, epilogue);
}

INLINE __m512 bias(const Product& p, i64 col) { return p.bias == nullptr ? _mm512_setzero_ps() : load(p.bias + col); }

// ---- what lies between the products

// Row by row, in place if y is x. What is written of y beyond dim, up to the next multiple of 16, is 0.
template <class To>
static void norm_rows(const Norm& norm, i64 dim, i64 rows, const float* x, i64 ldx, To* y, i64 ldy) {
    const i64 whole = dim / W * W;
    const __mmask16 rest = first(dim - whole);
    for (i64 r = 0; r < rows; ++r, x += ldx, y += ldy) {
        __m512 sum = load(x + whole, rest), square = _mm512_setzero_ps();
        for (i64 c = 0; c < whole; c += W) sum = _mm512_add_ps(sum, load(x + c));
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / float(dim));
        for (i64 c = 0; c < dim; c += W) {
            const __m512 d = _mm512_maskz_sub_ps(first(dim - c), load(x + c), mean);
            square = _mm512_fmadd_ps(d, d, square);
        }
        const float variance = _mm512_reduce_add_ps(square) / float(dim) + norm.eps;
        const __m512 rstd = _mm512_div_ps(_mm512_set1_ps(1.f), _mm512_sqrt_ps(_mm512_set1_ps(variance)));
        for (i64 c = 0; c < dim; c += W) {
            const __m512 d = _mm512_mul_ps(_mm512_sub_ps(load(x + c), mean), rstd);
            store(y + c, _mm512_fmadd_ps(d, load(norm.weight + c), load(norm.bias + c)));
        }
    }
}

// x Phi(x) = x / 2 + |x| (Phi(|x|) - 1/2), what is in brackets from the polynomial of one of 16 intervals up to 5.5, 1/2 beyond.
INLINE __m512 gelu(__m512 x, const float* table) {
    constexpr int degree = CONVIT_BF16 ? 3 : 5;
    const __m512 size = _mm512_abs_ps(x), t = _mm512_min_ps(_mm512_mul_ps(size, _mm512_set1_ps(16.f / 5.5f)), _mm512_set1_ps(15.999f));
    const __m512i i = _mm512_cvttps_epi32(t);
    const __m512 f = _mm512_sub_ps(t, _mm512_add_ps(_mm512_cvtepi32_ps(i), _mm512_set1_ps(0.5f)));
    __m512 p = _mm512_permutexvar_ps(i, load(table + degree * W));
    UNROLL
    for (int d = degree - 1; d >= 0; --d) p = _mm512_fmadd_ps(p, f, _mm512_permutexvar_ps(i, load(table + d * W)));
    p = _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(size, _mm512_set1_ps(5.5f), _CMP_GE_OQ), _mm512_set1_ps(0.5f));
    return _mm512_fmadd_ps(size, p, _mm512_mul_ps(x, _mm512_set1_ps(0.5f)));
}

// x += the perceptron of its norm
static void perceptron(const Memory& m, const Layer& layer, i64 rows, float* x, i64 ldx, const Scratch& s) {
    T *y = static_cast<T*>(s.y), *h = static_cast<T*>(s.h);
    norm_rows(layer.norm2, m.net->dim, rows, x, ldx, y, s.ldy);
    const float* table = m.gelu + (layer.tanh_form ? 6 * W : 0);
    for (i64 begin = 0, count; begin < layer.hidden; begin += count) {
        count = layer.hidden - begin <= hidden_most ? layer.hidden - begin : hidden_chunk;
        multiply(layer.fc1, rows, y, s.ldy, begin, begin + count, 0, layer.fc1.in,
                 [&](i64 r, i64 c, __m512 acc) { store(h + r * s.ldh + c - begin, gelu(_mm512_add_ps(acc, bias(layer.fc1, c)), table)); });
        multiply(layer.fc2, rows, h, s.ldh, 0, layer.fc2.out, begin, count, [&](i64 r, i64 c, __m512 acc) {
            float* to = x + r * ldx + c;
            if (begin == 0) acc = _mm512_add_ps(acc, bias(layer.fc2, c));
            store(to, _mm512_add_ps(load(to), acc));
        });
    }
}

static void project(const Layer& layer, i64 rows, const T* heads, i64 ld, float* x, i64 ldx) {
    multiply(layer.proj, rows, heads, ld, [&](i64 r, i64 c, __m512 acc) {
        float* to = x + r * ldx + c;
        store(to, _mm512_add_ps(load(to), _mm512_add_ps(acc, bias(layer.proj, c))));
    });
}

static void embed(const Memory& m, i64 begin, i64 end, const Scratch& s) {
    const Network& net = *m.net;
    const i64 patches = m.grid_h * m.grid_w, width = m.grid_w * net.patch_w, height = m.grid_h * net.patch_h;
    T* y = static_cast<T*>(s.y);
    for (i64 r = begin; r < end; ++r) {
        const i64 b = r / patches, n = r % patches;
        const float* corner = m.images + (b * net.channels * height + n / m.grid_w * net.patch_h) * width + n % m.grid_w * net.patch_w;
        T* to = y + (r - begin) * s.ldy;
        for (i64 c = 0; c < net.channels; ++c)
            for (i64 row = 0; row < net.patch_h; ++row, to += net.patch_w)
                for (i64 i = 0; i < net.patch_w; i += W) {
                    const __mmask16 mask = first(net.patch_w - i);
                    store(to + i, load(corner + (c * height + row) * width + i, mask), mask);
                }
        if (net.patch.in % step) *to = 0;
    }
    multiply(net.patch, end - begin, y, s.ldy, [&](i64 r, i64 c, __m512 acc) {
        acc = _mm512_add_ps(acc, bias(net.patch, c));
        if (m.position != nullptr)
            acc = _mm512_add_ps(acc, load(m.position + (begin + r) % patches * net.dim + c, first(net.dim - c)));
        store(m.x + (begin + r) * m.ldx + c, acc);
    });
}

static void query_key_value(const Memory& m, const Layer& layer, const float* x, i64 begin, i64 end, bool keys_only, const Scratch& s) {
    T *y = static_cast<T*>(s.y), *to = static_cast<T*>(m.qkv) + begin * m.ld_qkv;
    norm_rows(layer.norm1, m.net->dim, end - begin, x + begin * m.ldx, m.ldx, y, s.ldy);
    multiply(layer.qkv, end - begin, y, s.ldy, keys_only ? m.net->dim : 0, layer.qkv.out, 0, layer.qkv.in,
             [&](i64 r, i64 c, __m512 acc) { store(to + r * m.ld_qkv + c, _mm512_add_ps(acc, bias(layer.qkv, c))); });
}

static void after_attention(const Memory& m, const Layer& layer, float* x, i64 begin, i64 end, const Scratch& s) {
    x += begin * m.ldx;
    project(layer, end - begin, static_cast<const T*>(m.heads) + begin * m.ld_heads, m.ld_heads, x, m.ldx);
    perceptron(m, layer, end - begin, x, m.ldx, s);
}

// Plain attention of one query over the keys and values of its image, head by head. scores: [tokens rounded up to 16].
static void attend_one(const Memory& m, const Layer& layer, const T* q, const T* rows, i64 tokens, float* scores, T* to) {
    const i64 dim = m.net->dim, head = dim / layer.heads;
    for (i64 h = 0; h < layer.heads; ++h) {
        const T *query = q + h * head, *keys = rows + dim + h * head, *values = keys + dim;
        float top = -__builtin_inff();
        bool nan = false;
        for (i64 n = 0; n < tokens; ++n) {
            __m512 sum = _mm512_setzero_ps();
            for (i64 d = 0; d < head; d += W) {
                const __mmask16 mask = first(head - d);
                sum = _mm512_fmadd_ps(load(query + d, mask), load(keys + n * m.ld_qkv + d, mask), sum);
            }
            const float score = _mm512_reduce_add_ps(sum) * layer.scale;
            nan |= score != score;
            top = score > top ? score : top;
            scores[n] = score;
        }
        float total = 0;
        for (i64 n = 0; n < tokens; ++n) {
            scores[n] = __builtin_expf(scores[n] - top);
            total += scores[n];
        }
        const __m512 weight = _mm512_set1_ps(nan ? __builtin_nanf("") : 1.f / total);
        for (i64 d = 0; d < head; d += W) {
            const __mmask16 mask = first(head - d);
            __m512 sum = _mm512_setzero_ps();
            for (i64 n = 0; n < tokens; ++n) sum = _mm512_fmadd_ps(_mm512_set1_ps(scores[n]), load(values + n * m.ld_qkv + d, mask), sum);
            store(to + h * head + d, _mm512_mul_ps(sum, weight), mask);
        }
    }
}

// The head, or the rows themselves where there is none, from the `rows` of x to the output's rows from `at` on.
static void logits(const Memory& m, i64 rows, const float* x, i64 ldx, i64 at, const Scratch& s) {
    const Network& net = *m.net;
    const i64 width = net.head.weight == nullptr ? net.dim : net.classes;
    if (net.head.weight == nullptr) {
        for (i64 r = 0; r < rows; ++r)
            for (i64 c = 0; c < width; c += W) store(m.out + (at + r) * width + c, load(x + r * ldx + c), first(width - c));
        return;
    }
    T* y = static_cast<T*>(s.y);
    for (i64 r = 0; r < rows; ++r)
        for (i64 c = 0; c < net.dim; c += W) store(y + r * s.ldy + c, load(x + r * ldx + c));
    multiply(net.head, rows, y, s.ldy, [&](i64 r, i64 c, __m512 acc) {
        store(m.out + (at + r) * width + c, _mm512_add_ps(acc, bias(net.head, c)), first(width - c));
    });
}

static void last_layer(const Memory& m, i64 begin, i64 end, const Scratch& s) {
    const Network& net = *m.net;
    const Layer& layer = net.layers[net.depth - 1];
    const i64 tokens = m.grid_h * m.grid_w + net.prefix, rows = end - begin, ldx = m.ldx;
    T *y = static_cast<T*>(s.y), *q = static_cast<T*>(s.h), *heads = static_cast<T*>(m.heads) + begin * m.ld_heads;
    for (i64 r = 0; r < rows; ++r)
        for (i64 c = 0; c < net.dim; c += W) store(s.x + r * ldx + c, load(m.x + (begin + r) * tokens * ldx + c));
    norm_rows(layer.norm1, net.dim, rows, s.x, ldx, y, s.ldy);
    multiply(layer.qkv, rows, y, s.ldy, 0, net.dim, 0, layer.qkv.in, [&](i64 r, i64 c, __m512 acc) {
        if (c < net.dim) store(q + r * s.ldh + c, _mm512_add_ps(acc, bias(layer.qkv, c)));
    });
    for (i64 r = 0; r < rows; ++r)
        attend_one(m, layer, q + r * s.ldh, static_cast<const T*>(m.qkv) + (begin + r) * tokens * m.ld_qkv, tokens,
                   s.scores, heads + r * m.ld_heads);
    project(layer, rows, heads, m.ld_heads, s.x, ldx);
    perceptron(m, layer, rows, s.x, ldx, s);
    norm_rows(net.norm, net.dim, rows, s.x, ldx, s.x, ldx);
    logits(m, rows, s.x, ldx, begin, s);
}

// The last norm, the pooling and the head of images begin .. end - 1, all of whose tokens are there. Changes them.
static void finish(const Memory& m, i64 begin, i64 end, const Scratch& s) {
    const Network& net = *m.net;
    const i64 patches = m.grid_h * m.grid_w, tokens = patches + net.prefix, ldx = m.ldx;
    for (i64 b = begin; b < end; ++b) {
        float* x = m.x + b * tokens * ldx;
        if (net.pool == Pool::none) {
            norm_rows(net.norm, net.dim, tokens, x, ldx, x, ldx);
            for (i64 r = 0; r < tokens; r += s.rows) logits(m, min(s.rows, tokens - r), x + r * ldx, ldx, b * tokens + r, s);
            continue;
        }
        if (net.pool == Pool::token) {
            norm_rows(net.norm, net.dim, 1, x, ldx, x, ldx);
        } else {
            norm_rows(net.norm, net.dim, patches, x + net.prefix * ldx, ldx, x + net.prefix * ldx, ldx);
            for (i64 c = 0; c < net.dim; c += W) {
                __m512 sum = _mm512_setzero_ps();
                for (i64 r = net.prefix; r < tokens; ++r) sum = _mm512_add_ps(sum, load(x + r * ldx + c));
                store(x + c, _mm512_div_ps(sum, _mm512_set1_ps(float(patches))));
            }
        }
        logits(m, 1, x, ldx, b, s);
    }
}
