// A vector of CONVIT_LANES floats, 2^x, and rows of either storage type: loaded, stored, transposed.

typedef float vec __attribute__((vector_size(CONVIT_LANES * 4)));
typedef std::int32_t ivec __attribute__((vector_size(CONVIT_LANES * 4)));
typedef float vec_u __attribute__((vector_size(CONVIT_LANES * 4), aligned(4), may_alias));
typedef std::int64_t i64;

constexpr i64 W = CONVIT_LANES;
constexpr bool many_registers = CONVIT_REGISTERS >= 32;
constexpr i64 query_vectors = CONVIT_QUERY_VECTORS;
constexpr i64 query_block = query_vectors * W;
constexpr i64 backward_block = 2 * query_block;
constexpr i64 key_tile = fold_tokens;
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

// 2^x for x <= 126, relative error 1e-7, exactly 1 at 0 and exactly 0 from -127 down. NaN stays NaN.
CONVIT_INLINE vec exp2(vec x) {
#if CONVIT_LANES == 16
    const vec f = _mm512_reduce_ps(x, 0);  // x less the nearest integer, in [-0.5, 0.5]
#else
    constexpr float shift = 12583039.f;  // 1.5 * 2^23 + 127: the sum's last bits are the biased exponent
    const vec floor = splat(-127.f);
    x = x < floor ? floor : x;
    const vec t = x + shift;
    const vec f = x - (t - shift);
#endif
    vec p = splat(1.534581243e-4f);  // minimax of 2^f, relative error 2e-9
    p = p * f + 1.3399930904e-3f;
    p = p * f + 9.6184890717e-3f;
    p = p * f + 5.55032864213e-2f;
    p = p * f + 0.240226462483f;
    p = p * f + 0.693147182465f;
    p = p * f + 1.f;
#if CONVIT_LANES == 16
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(-127.f), _CMP_NLE_UQ), p, x - f);
#else
    return p * reinterpret_cast<vec>(reinterpret_cast<ivec>(t) << 23);
#endif
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

typedef std::uint16_t u16_alias __attribute__((may_alias));
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

CONVIT_INLINE float from_bits(std::uint32_t bits) {
    float y;
    __builtin_memcpy(&y, &bits, 4);
    return y;
}

CONVIT_INLINE std::uint32_t to_bits(float x) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

CONVIT_INLINE float from_fp16(std::uint16_t x) {
    const std::uint32_t size = x & 0x7fffu, bits = size << 13;
    const std::uint32_t finite = to_bits(from_bits(bits) * 0x1p112f);  // also of denormal numbers
    return from_bits((size >= 0x7c00u ? bits | 0x7f800000u : finite) | (x & 0x8000u) << 16);
}

CONVIT_INLINE std::uint16_t to_fp16(float x) {  // to nearest, ties to even; infinity from 65520 on; NaN stays NaN
    const std::uint32_t sign = to_bits(x) >> 16 & 0x8000u, size = to_bits(x) & 0x7fffffffu;
    const std::uint32_t denormal = to_bits(from_bits(size) + 0.5f) - 0x3f000000u;  // the sum's last bit is 2^-24
    const std::uint32_t normal = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
    std::uint32_t y = size < 0x38800000u ? denormal : normal;
    y = size >= 0x477ff000u ? 0x7c00u : y;
    return std::uint16_t(sign | (size > 0x7f800000u ? 0x7e00u : y));
}

CONVIT_INLINE bool pairs_of(DType dtype) { return CONVIT_PAIRS != 0 && dtype == DType::bfloat16; }  // multiplied as they are stored
CONVIT_INLINE i64 bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

#if CONVIT_PAIRS
CONVIT_INLINE void to_bf16(vec x, u16_alias* to) {
    const __m256bh y = _mm512_cvtneps_pbh(x);
    __builtin_memcpy(to, &y, sizeof y);
}
#endif

CONVIT_INLINE const void* row_of(DType dtype, const Heads& x, i64 b, i64 h, i64 n) {
    const i64 offset = b * x.stride_b + h * x.stride_h + n * x.stride_n;
    return static_cast<const char*>(x.data) + offset * bytes_of(dtype);
}

// One row of `dim` elements, zero padded to `padded` floats.
CONVIT_INLINE void load_row(DType dtype, const void* from, i64 dim, i64 padded, float* to) {
    i64 d = 0;
    if (dtype == DType::float32) {
        const f32_alias* x = static_cast<const f32_alias*>(from);
        for (; d + W <= dim; d += W) store(to + d, *reinterpret_cast<const vec_u*>(x + d));
        for (; d < dim; ++d) to[d] = x[d];
    } else {
        const u16_alias* x = static_cast<const u16_alias*>(from);
        if (dtype == DType::bfloat16)
            for (; d < dim; ++d) to[d] = from_bf16(x[d]);
        else
            for (; d < dim; ++d) to[d] = from_fp16(x[d]);
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
        u16_alias* to = static_cast<u16_alias*>(x.data) + offset;
        i64 d = 0;
        if (dtype == DType::bfloat16) {
#if CONVIT_PAIRS
            for (; d + W <= dim; d += W) to_bf16(load(from + d), to + d);
#endif
            for (; d < dim; ++d) to[d] = to_bf16(from[d]);
        } else {
            for (; d < dim; ++d) to[d] = to_fp16(from[d]);
        }
    }
}

// The rows of a head lie far apart in the packed projections and no hardware prefetcher follows them.
CONVIT_INLINE void prefetch_row(DType dtype, const Heads& x, i64 b, i64 h, i64 n, i64 dim) {
    const char* row = static_cast<const char*>(row_of(dtype, x, b, h, n));
    for (i64 at = 0; at < dim * bytes_of(dtype); at += 64) __builtin_prefetch(row + at, 0, 2);
}

CONVIT_INLINE Heads read_only(const MutableHeads& x) { return {x.data, x.stride_b, x.stride_h, x.stride_n}; }

static void prefetch_rows(DType dtype, const Heads& x, i64 b, i64 h, i64 begin, i64 end, i64 dim) {
    for (i64 n = begin; n < end; ++n) prefetch_row(dtype, x, b, h, n, dim);
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

// to[c][r] = factor * from[r][c] for r < rows, c < cols; 0 for the other r < ld. Without `scaled` the elements are moved as bits. ld is a multiple of 4. Rows of `from` are `stride` apart
// and readable, as `to` is writable, up to cols rounded up to 4.
template <bool scaled = true>
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
            *reinterpret_cast<vec4_u*>(y) = scaled ? factor * CONVIT_SHUFFLE4(ab_lo, de_lo, 0, 1, 4, 5) : CONVIT_SHUFFLE4(ab_lo, de_lo, 0, 1, 4, 5);
            *reinterpret_cast<vec4_u*>(y + ld) = scaled ? factor * CONVIT_SHUFFLE4(ab_lo, de_lo, 2, 3, 6, 7) : CONVIT_SHUFFLE4(ab_lo, de_lo, 2, 3, 6, 7);
            *reinterpret_cast<vec4_u*>(y + 2 * ld) = scaled ? factor * CONVIT_SHUFFLE4(ab_hi, de_hi, 0, 1, 4, 5) : CONVIT_SHUFFLE4(ab_hi, de_hi, 0, 1, 4, 5);
            *reinterpret_cast<vec4_u*>(y + 3 * ld) = scaled ? factor * CONVIT_SHUFFLE4(ab_hi, de_hi, 2, 3, 6, 7) : CONVIT_SHUFFLE4(ab_hi, de_hi, 2, 3, 6, 7);
        }
    }
    for (; r < ld; ++r)
        for (i64 c = 0; c < cols; ++c) {
            const float x = r < rows ? from[r * stride + c] : 0.f;
            to[c * ld + r] = scaled ? factor * x : x;
        }
}
