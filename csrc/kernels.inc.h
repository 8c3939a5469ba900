// The kernels, written once for vectors of CONVIT_LANES floats. Each isa_*.cpp includes this file in a namespace of its own with its
// target in force. Everything has internal linkage and no function of the C++ library is called: an inline function that two
// instruction sets share would be linked once, in the wider one, and crash machines without it.
//
// One matrix product serves all: C[rows][cols] from A by broadcast and B by whole vectors, the result in registers until an "epilogue"
// stores it. With queries along the lanes, the scores of a block of queries are S^T = K Q^T [N][block], so that the softmax is free of
// shuffles and of special cases for the last keys, and S^T is at once the packed left factor of the product with V.
//
// forward, per head: the positional half by two contractions, V along x with px, then along y with py; per block of queries and
// tile of keys: S^T, running maximum (online softmax), exp2, product with V.
// backward, per head: the positional half's gradients by contractions with the tables; per block of queries, whole rows: P^T = exp2(S^T - lse),
// dP^T = V dO^T, delta = sum_j P dP, dS^T = P^T (dP^T - delta), then dV += P^T dO, dK += dS^T Q, dQ = dS K. Whole rows, unlike the
// usual tiles, give delta and the row sum without the saved output: a nearly closed content gate costs no digits.

typedef float vec __attribute__((vector_size(CONVIT_LANES * 4)));
typedef std::int32_t ivec __attribute__((vector_size(CONVIT_LANES * 4)));
typedef float vec_u __attribute__((vector_size(CONVIT_LANES * 4), aligned(4), may_alias));
typedef std::int64_t i64;

constexpr i64 W = CONVIT_LANES;
constexpr bool many_registers = CONVIT_REGISTERS >= 32;
constexpr i64 query_vectors = CONVIT_QUERY_VECTORS;
constexpr i64 query_block = query_vectors * W;
constexpr i64 backward_block = 2 * query_block;
constexpr i64 key_tile = 256;
constexpr float log2_e = 1.44269504088896341f, ln_2 = 0.693147180559945309f;
constexpr float lowest = -3.402823466e+38f;

// Arrays of vectors stay in registers only if every loop over them is unrolled.
#if defined(__clang__)
#define CONVIT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define CONVIT_UNROLL _Pragma("GCC unroll 16")
#endif
#define CONVIT_INLINE static inline __attribute__((always_inline))

CONVIT_INLINE i64 min(i64 a, i64 b) { return a < b ? a : b; }
CONVIT_INLINE i64 round_up(i64 a, i64 b) { return (a + b - 1) / b * b; }
CONVIT_INLINE vec load(const float* p) { return *reinterpret_cast<const vec_u*>(p); }
CONVIT_INLINE void store(float* p, vec x) { *reinterpret_cast<vec_u*>(p) = x; }
CONVIT_INLINE vec splat(float x) { return x - vec{}; }
CONVIT_INLINE vec maximum(vec a, vec b) { return a > b ? a : b; }

// 2^x for x <= 126, relative error 1e-7 and exactly 0 from -127 down. NaN stays NaN.
CONVIT_INLINE vec exp2(vec x) {
    constexpr float shift = 12583039.f;  // 1.5 * 2^23 + 127: the sum's last bits are the biased exponent
    const vec floor = splat(-127.f);
    x = x < floor ? floor : x;
    const vec t = x + shift;
    const vec f = x - (t - shift);  // [-0.5, 0.5]
    vec p = splat(1.534581243e-4f);  // minimax of 2^f, relative error 2e-9
    p = p * f + 1.3399930904e-3f;
    p = p * f + 9.6184890717e-3f;
    p = p * f + 5.55032864213e-2f;
    p = p * f + 0.240226462483f;
    p = p * f + 0.693147182465f;
    p = p * f + 1.f;
    return p * reinterpret_cast<vec>(reinterpret_cast<ivec>(t) << 23);
}

CONVIT_INLINE float exp2_one(float x) { return exp2(splat(x))[0]; }

CONVIT_INLINE double sum_lanes(vec x) {
    double sum = 0;
    for (i64 l = 0; l < W; ++l) sum += x[l];
    return sum;
}

CONVIT_INLINE float lane_sum(vec x) {
    float part[W];
    __builtin_memcpy(part, &x, sizeof part);
    for (i64 step = W / 2; step > 0; step /= 2)
        for (i64 l = 0; l < step; ++l) part[l] += part[l + step];
    return part[0];
}

// ------------------------------------------------------------------------------------------------------------ storage

typedef std::uint16_t bf16_alias __attribute__((may_alias));
typedef float f32_alias __attribute__((may_alias));

CONVIT_INLINE float from_bf16(std::uint16_t x) {
    const std::uint32_t bits = std::uint32_t(x) << 16;
    float y;
    __builtin_memcpy(&y, &bits, 4);
    return y;
}

CONVIT_INLINE std::uint16_t to_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return std::uint16_t(x != x ? (bits >> 16) | 0x40 : rounded);
}

CONVIT_INLINE const void* row_of(DType dtype, const Heads& x, i64 b, i64 h, i64 n) {
    const i64 offset = b * x.stride_b + h * x.stride_h + n * x.stride_n;
    return static_cast<const char*>(x.data) + offset * (dtype == DType::float32 ? 4 : 2);
}

// One row of `dim` elements, zero padded to `padded` floats.
CONVIT_INLINE void load_row(DType dtype, const void* from, i64 dim, i64 padded, float* to) {
    i64 d = 0;
    if (dtype == DType::float32) {
        const f32_alias* x = static_cast<const f32_alias*>(from);
        for (; d + W <= dim; d += W) store(to + d, *reinterpret_cast<const vec_u*>(x + d));
        for (; d < dim; ++d) to[d] = x[d];
    } else {
        const bf16_alias* x = static_cast<const bf16_alias*>(from);
        for (; d < dim; ++d) to[d] = from_bf16(x[d]);
    }
    for (; d < padded; ++d) to[d] = 0.f;
}

CONVIT_INLINE void store_row(DType dtype, const MutableHeads& x, i64 b, i64 h, i64 n, i64 dim, const float* from) {
    const i64 offset = b * x.stride_b + h * x.stride_h + n * x.stride_n;
    if (dtype == DType::float32) {
        f32_alias* to = static_cast<f32_alias*>(x.data) + offset;
        i64 d = 0;
        for (; d + W <= dim; d += W) *reinterpret_cast<vec_u*>(to + d) = load(from + d);
        for (; d < dim; ++d) to[d] = from[d];
    } else {
        bf16_alias* to = static_cast<bf16_alias*>(x.data) + offset;
        for (i64 d = 0; d < dim; ++d) to[d] = to_bf16(from[d]);
    }
}

// The rows of a head lie far apart in the packed projections and no hardware prefetcher follows them.
CONVIT_INLINE void prefetch_row(DType dtype, const Heads& x, i64 b, i64 h, i64 n, i64 dim) {
    const char* row = static_cast<const char*>(row_of(dtype, x, b, h, n));
    for (i64 at = 0; at < dim * (dtype == DType::float32 ? 4 : 2); at += 64) __builtin_prefetch(row + at, 0, 2);
}

static void load_rows(DType dtype, const Heads& x, i64 b, i64 h, i64 begin, i64 end, i64 dim, i64 padded, float* to) {
    for (i64 n = begin; n < end; ++n) {
        prefetch_row(dtype, x, b, h, min(n + 12, end - 1), dim);
        load_row(dtype, row_of(dtype, x, b, h, n), dim, padded, to + (n - begin) * padded);
    }
}

typedef float vec4 __attribute__((vector_size(16)));
typedef float vec4_u __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__clang__)
#define CONVIT_SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef std::int32_t ivec4 __attribute__((vector_size(16)));
#define CONVIT_SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, ivec4{i, j, k, l})
#endif

// to[c][r] = factor * from[r][c] for r < rows, c < cols; 0 for the other r < ld. ld is a multiple of 4. Rows of `from` are `stride` apart
// and readable, as `to` is writable, up to cols rounded up to 4.
static void transpose(const float* from, i64 rows, i64 cols, i64 stride, float factor, float* to, i64 ld) {
    i64 r = 0;
    for (; r + 4 <= rows; r += 4) {
        const float* x = from + r * stride;
        for (i64 c = 0; c < cols; c += 4) {
            const vec4 a = *reinterpret_cast<const vec4_u*>(x + c), b = *reinterpret_cast<const vec4_u*>(x + stride + c);
            const vec4 d = *reinterpret_cast<const vec4_u*>(x + 2 * stride + c), e = *reinterpret_cast<const vec4_u*>(x + 3 * stride + c);
            const vec4 ab_lo = CONVIT_SHUFFLE4(a, b, 0, 4, 1, 5), ab_hi = CONVIT_SHUFFLE4(a, b, 2, 6, 3, 7);
            const vec4 de_lo = CONVIT_SHUFFLE4(d, e, 0, 4, 1, 5), de_hi = CONVIT_SHUFFLE4(d, e, 2, 6, 3, 7);
            float* y = to + c * ld + r;
            *reinterpret_cast<vec4_u*>(y) = factor * CONVIT_SHUFFLE4(ab_lo, de_lo, 0, 1, 4, 5);
            *reinterpret_cast<vec4_u*>(y + ld) = factor * CONVIT_SHUFFLE4(ab_lo, de_lo, 2, 3, 6, 7);
            *reinterpret_cast<vec4_u*>(y + 2 * ld) = factor * CONVIT_SHUFFLE4(ab_hi, de_hi, 0, 1, 4, 5);
            *reinterpret_cast<vec4_u*>(y + 3 * ld) = factor * CONVIT_SHUFFLE4(ab_hi, de_hi, 2, 3, 6, 7);
        }
    }
    for (; r < ld; ++r)
        for (i64 c = 0; c < cols; ++c) to[c * ld + r] = r < rows ? factor * from[r * stride + c] : 0.f;
}

// ------------------------------------------------------------------------------------------------------ matrix product

// Epilogues: what becomes of a register tile at C[r][c]; begin/end bracket a tile, for what is kept per column.
struct Store {
    float* c;
    i64 ld;
    template <int R, int NV>
    __attribute__((always_inline)) inline void operator()(i64 row, i64 col, vec (&acc)[R][NV]) const {
        CONVIT_UNROLL
        for (int r = 0; r < R; ++r)
            CONVIT_UNROLL
            for (int n = 0; n < NV; ++n) store(c + (row + r) * ld + col + n * W, acc[r][n]);
    }
};

struct Add {
    float* c;
    i64 ld;
    template <int R, int NV>
    __attribute__((always_inline)) inline void operator()(i64 row, i64 col, vec (&acc)[R][NV]) const {
        CONVIT_UNROLL
        for (int r = 0; r < R; ++r)
            CONVIT_UNROLL
            for (int n = 0; n < NV; ++n) {
                float* p = c + (row + r) * ld + col + n * W;
                store(p, load(p) + acc[r][n]);
            }
    }
};

// c[r] = c[r] * factor[r] + acc[r]
struct Rescale {
    float* c;
    i64 ld;
    const float* factor;
    template <int R, int NV>
    __attribute__((always_inline)) inline void operator()(i64 row, i64 col, vec (&acc)[R][NV]) const {
        CONVIT_UNROLL
        for (int r = 0; r < R; ++r)
            CONVIT_UNROLL
            for (int n = 0; n < NV; ++n) {
                float* p = c + (row + r) * ld + col + n * W;
                store(p, load(p) * factor[row + r] + acc[r][n]);
            }
    }
};

// The last tile of keys: to[r] = (acc + before[r] * factor[r]) * weight[r] + position[r]; `before` is null if this tile is also the first.
struct Finish {
    float* to;
    i64 ld_to;
    const float *before, *position;
    i64 ld;
    const float *factor, *weight;
    template <int R, int NV>
    __attribute__((always_inline)) inline void operator()(i64 row, i64 col, vec (&acc)[R][NV]) const {
        CONVIT_UNROLL
        for (int r = 0; r < R; ++r)
            CONVIT_UNROLL
            for (int n = 0; n < NV; ++n) {
                const i64 at = (row + r) * ld + col + n * W;
                vec sum = acc[r][n];
                if (before != nullptr) sum += load(before + at) * factor[row + r];
                store(to + (row + r) * ld_to + col + n * W, sum * weight[row + r] + load(position + at));
            }
    }
};

// Store, and the maximum of each column. A NaN does not show in the maximum; it does in the sum that follows.
struct StoreMax {
    float* c;
    i64 ld;
    float* maxima;
    template <int R, int NV>
    __attribute__((always_inline)) inline void operator()(i64 row, i64 col, vec (&acc)[R][NV]) const {
        CONVIT_UNROLL
        for (int n = 0; n < NV; ++n) {
            vec m = load(maxima + col + n * W);
            CONVIT_UNROLL
            for (int r = 0; r < R; ++r) {
                store(c + (row + r) * ld + col + n * W, acc[r][n]);
                m = maximum(acc[r][n], m);
            }
            store(maxima + col + n * W, m);
        }
    }
};

// Store p = exp2(acc - shift[col]) and add it to sums[col].
struct StoreExp2 {
    float* c;
    i64 ld;
    const float* shift;
    float* sums;
    template <int R, int NV>
    __attribute__((always_inline)) inline void operator()(i64 row, i64 col, vec (&acc)[R][NV]) const {
        CONVIT_UNROLL
        for (int n = 0; n < NV; ++n) {
            const vec m = load(shift + col + n * W);
            vec sum{};
            CONVIT_UNROLL
            for (int r = 0; r < R; ++r) {
                const vec p = exp2(acc[r][n] - m);
                store(c + (row + r) * ld + col + n * W, p);
                sum += p;
            }
            store(sums + col + n * W, load(sums + col + n * W) + sum);
        }
    }
};

// Store dp = acc and add p * dp to sums[col].
struct StoreDot {
    float* c;
    const float* p;
    i64 ld;
    float* sums;
    template <int R, int NV>
    __attribute__((always_inline)) inline void operator()(i64 row, i64 col, vec (&acc)[R][NV]) const {
        CONVIT_UNROLL
        for (int n = 0; n < NV; ++n) {
            vec sum{};
            CONVIT_UNROLL
            for (int r = 0; r < R; ++r) {
                const i64 at = (row + r) * ld + col + n * W;
                store(c + at, acc[r][n]);
                sum += load(p + at) * acc[r][n];
            }
            store(sums + col + n * W, load(sums + col + n * W) + sum);
        }
    }
};

// A is [rows][K] with unit stride along K (by_rows) or along the rows; `lda` is the other stride.
template <bool by_rows, int R, int NV, class Epilogue>
CONVIT_INLINE void tile(i64 row, i64 col, i64 depth, const float* a, i64 lda, const float* b, i64 ldb, const Epilogue& epilogue) {
    vec acc[R][NV];
    CONVIT_UNROLL
    for (int r = 0; r < R; ++r) {
        CONVIT_UNROLL
        for (int n = 0; n < NV; ++n) acc[r][n] = vec{};  // not "= {}": that is a call to clear memory
    }
    const float* pa = by_rows ? a + row * lda : a + row;
    const float* pb = b + col;
    for (i64 k = 0; k < depth; ++k) {
        vec bv[NV];
        CONVIT_UNROLL
        for (int n = 0; n < NV; ++n) bv[n] = load(pb + n * W);
        CONVIT_UNROLL
        for (int r = 0; r < R; ++r) {
            const vec av = splat(by_rows ? pa[r * lda] : pa[r]);
            CONVIT_UNROLL
            for (int n = 0; n < NV; ++n) acc[r][n] += av * bv[n];
        }
        pa += by_rows ? 1 : lda;
        pb += ldb;
    }
    epilogue(row, col, acc);
}

template <bool by_rows, int R, int NV, class Epilogue>
CONVIT_INLINE void row_tiles(i64 row, i64 rows, i64 col, i64 depth, const float* a, i64 lda, const float* b, i64 ldb, const Epilogue& epilogue) {
    for (; row + R <= rows; row += R) tile<by_rows, R, NV>(row, col, depth, a, lda, b, ldb, epilogue);
    constexpr int next = R > 8 ? 8 : R > 4 ? 4 : R > 2 ? 2 : 1;
    if constexpr (R > 1)
        if (row < rows) row_tiles<by_rows, next, NV>(row, rows, col, depth, a, lda, b, ldb, epilogue);
}

// epilogue(A B), A [rows][depth], B [depth][cols], cols a multiple of W.
template <bool by_rows, class Epilogue>
static void multiply(i64 rows, i64 cols, i64 depth, const float* a, i64 lda, const float* b, i64 ldb, const Epilogue& epilogue) {
    i64 col = 0;
    while (col < cols) {
        const i64 left = (cols - col) / W;
        if (left == 3 || left >= 5) {
            row_tiles<by_rows, many_registers ? 8 : 4, 3>(0, rows, col, depth, a, lda, b, ldb, epilogue);
            col += 3 * W;
        } else if (left >= 2) {
            row_tiles<by_rows, many_registers ? 12 : 6, 2>(0, rows, col, depth, a, lda, b, ldb, epilogue);
            col += 2 * W;
        } else {
            row_tiles<by_rows, 8, 1>(0, rows, col, depth, a, lda, b, ldb, epilogue);
            col += W;
        }
    }
}

// c[r][s] = sum over `groups` g and k < depth of a[r * row + g * group + k] * b[s * row + g * group + k]; depth a multiple of W.
template <int R, int S>
CONVIT_INLINE void dot_tile(const float* a, const float* b, i64 row, i64 groups, i64 group, i64 depth, float* c, i64 ldc) {
    vec acc[R][S];
    CONVIT_UNROLL
    for (int r = 0; r < R; ++r) {
        CONVIT_UNROLL
        for (int s = 0; s < S; ++s) acc[r][s] = vec{};
    }
    for (i64 g = 0; g < groups; ++g)
        for (i64 k = 0; k < depth; k += W) {
            vec bv[S];
            CONVIT_UNROLL
            for (int s = 0; s < S; ++s) bv[s] = load(b + s * row + g * group + k);
            CONVIT_UNROLL
            for (int r = 0; r < R; ++r) {
                const vec av = load(a + r * row + g * group + k);
                CONVIT_UNROLL
                for (int s = 0; s < S; ++s) acc[r][s] += av * bv[s];
            }
        }
    CONVIT_UNROLL
    for (int r = 0; r < R; ++r)
        CONVIT_UNROLL
        for (int s = 0; s < S; ++s) c[r * ldc + s] = lane_sum(acc[r][s]);
}

template <int R>
CONVIT_INLINE void dot_rows(i64 cols, const float* a, const float* b, i64 row, i64 groups, i64 group, i64 depth, float* c) {
    i64 s = 0;
    for (; s + 2 <= cols; s += 2) dot_tile<R, 2>(a, b + s * row, row, groups, group, depth, c + s, cols);
    if (s < cols) dot_tile<R, 1>(a, b + s * row, row, groups, group, depth, c + s, cols);
}

static void multiply_transposed(i64 size, const float* a, const float* b, i64 row, i64 groups, i64 group, i64 depth, float* c) {
    i64 r = 0;
    for (; r + 4 <= size; r += 4) dot_rows<4>(size, a + r * row, b, row, groups, group, depth, c + r * size);
    for (; r + 2 <= size; r += 2) dot_rows<2>(size, a + r * row, b, row, groups, group, depth, c + r * size);
    for (; r < size; ++r) dot_rows<1>(size, a + r * row, b, row, groups, group, depth, c + r * size);
}

// ------------------------------------------------------------------------------------------------------ position tables

// softmax over z of linear * (z - x) + square * (z - x)^2, for each x < size. Logits in float64: with a locality strength of 1e4 the
// differences that matter are far below the logits' own size. `row` holds size floats, rounded up to whole vectors.
static void table(float linear, float square, i64 size, float* to, float* row) {
    for (i64 x = 0; x < size; ++x) {
        double top = -1.7976931348623157e+308;
        for (i64 z = 0; z < size; ++z) {
            const double d = double(z - x), logit = double(linear) * d + double(square) * d * d;
            top = logit > top ? logit : top;
        }
        for (i64 z = 0; z < size; ++z) {
            const double d = double(z - x), logit = double(linear) * d + double(square) * d * d;
            row[z] = float((logit - top) * 1.4426950408889634);
        }
        for (i64 z = size; z < round_up(size, W); ++z) row[z] = lowest;
        vec sum{};
        for (i64 z = 0; z < size; z += W) {
            const vec p = exp2(load(row + z));
            store(row + z, p);
            sum += p;
        }
        const float inverse = float(1.0 / sum_lanes(sum));
        for (i64 z = 0; z < size; ++z) to[x * size + z] = row[z] * inverse;
    }
}

static void tables(const float* w, i64 gh, i64 gw, float* px, float* py, float* row) {
    table(w[0], w[2], gw, px, row);
    table(w[1], w[2], gh, py, row);
}

// ------------------------------------------------------------------------------------------------------------- forward

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

// (Py (x) Px) v for the grid rows [y0, y1): to[(y - y0) * gw + x][padded]
static void position_product(const Shape& s, const float* px, const float* py, i64 y0, i64 y1, const float* v, i64 padded, float* along_x,
                             float* to) {
    const i64 gh = s.grid_h, gw = s.grid_w, line = gw * padded;
    for (i64 y = 0; y < gh; ++y) multiply<true>(gw, padded, gw, px, gw, v + y * line, padded, Store{along_x + y * line, padded});
    multiply<true>(y1 - y0, line, gh, py + y0 * gh, gh, along_x, line, Store{to, line});
}

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

// ------------------------------------------------------------------------------------------------------------ backward

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

// Through one table's softmax to its two weights: adds to the linear and the square weight's gradient, returns sum(table * grad).
static double table_gradient(const float* table, const float* grad, i64 size, double& linear, double& square) {
    double total = 0;
    for (i64 x = 0; x < size; ++x) {
        const float *p = table + x * size, *g = grad + x * size;
        double mean = 0;
        for (i64 z = 0; z < size; ++z) mean += double(p[z]) * g[z];
        for (i64 z = 0; z < size; ++z) {
            const double d = double(z - x), ds = p[z] * (g[z] - mean);
            linear += ds * d;
            square += ds * d * d;
        }
        total += mean;
    }
    return total;
}

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
