// A head's rows as the operands of a product, in units of the arithmetic: float32, or pairs of bfloat16 straight from their storage.
// "Left" rows [n][left_stride] are broadcast along D, "right" rows [n / per_unit][padded] are read as vectors, "across" is [D][block].

template <class Unit>
CONVIT_INLINE i64 depth_of(i64 size) {
    return (size + Unit::per_unit - 1) / Unit::per_unit;
}

template <class Unit>
CONVIT_INLINE i64 left_stride(i64 dim) {
    return Unit::per_unit == 1 ? round_up(dim, W) : round_up(depth_of<Unit>(dim), 4);
}

#if CONVIT_PAIRS
// A row as pairs along D, each with the sign bits of `sign` flipped.
CONVIT_INLINE void pair_row(const void* from, i64 dim, i64 stride, std::uint16_t sign, float* to) {
    u16_alias* y = reinterpret_cast<u16_alias*>(to);
    const u16_alias* x = static_cast<const u16_alias*>(from);
    i64 d = 0;
    for (; d < dim; ++d) y[d] = x[d] ^ sign;
    for (; d < 2 * stride; ++d) y[d] = 0;
}

// Two rows as pairs across them; the second may be null, for zeros.
CONVIT_INLINE void interleave_rows(const void* first, const void* second, i64 dim, i64 padded, float* to) {
    typedef std::uint32_t u32_alias __attribute__((may_alias));
    u32_alias* y = reinterpret_cast<u32_alias*>(to);
    const u16_alias *a = static_cast<const u16_alias*>(first), *b = static_cast<const u16_alias*>(second);
    i64 d = 0;
    if (b != nullptr)
        for (; d < dim; ++d) y[d] = a[d] | std::uint32_t(b[d]) << 16;
    else
        for (; d < dim; ++d) y[d] = a[d];
    for (; d < padded; ++d) y[d] = 0;
}

// a and b rounded to bfloat16, as pairs (a, b).
CONVIT_INLINE vec pair(vec a, vec b) {
    alignas(64) static constexpr std::uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512bh rounded = _mm512_cvtne2ps_pbh(b, a);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)rounded));
}
#endif

template <class Unit>
static void left_rows(const Shape& s, const Heads& x, i64 b, i64 h, i64 begin, i64 end, float* to) {
    const i64 stride = left_stride<Unit>(s.dim);
    if constexpr (Unit::per_unit == 1) {
        load_rows(s.dtype, x, b, h, begin, end, s.dim, stride, to);
    } else {
#if CONVIT_PAIRS
        for (i64 n = begin; n < end; ++n) {
            prefetch_row(s.dtype, x, b, h, min(n + 12, end - 1), s.dim);
            pair_row(row_of(s.dtype, x, b, h, n), s.dim, stride, 0, to + (n - begin) * stride);
        }
#endif
    }
}

template <class Unit>
static void right_rows(const Shape& s, const Heads& x, i64 b, i64 h, i64 begin, i64 end, i64 padded, float* to) {
    if constexpr (Unit::per_unit == 1) {
        load_rows(s.dtype, x, b, h, begin, end, s.dim, padded, to);
    } else {
#if CONVIT_PAIRS
        for (i64 n = begin; n < end; n += 2, to += padded) {
            prefetch_row(s.dtype, x, b, h, min(n + 12, end - 1), s.dim);
            prefetch_row(s.dtype, x, b, h, min(n + 13, end - 1), s.dim);
            const void* second = n + 1 < end ? row_of(s.dtype, x, b, h, n + 1) : nullptr;
            interleave_rows(row_of(s.dtype, x, b, h, n), second, s.dim, padded, to);
        }
#endif
    }
}

// What the scores still have to be multiplied with: float32 rows carry the factor themselves, pairs its sign at most.
template <class Unit>
CONVIT_INLINE float score_factor(float factor) {
    return Unit::per_unit == 1 ? 1.f : __builtin_fabsf(factor);
}

// `count` rows from `begin` on, transposed: to[D / per_unit][cols], cols >= count, zeros beyond. `rows` is scratch.
template <class Unit>
static void across_rows(const Shape& s, const Heads& x, i64 b, i64 h, i64 begin, i64 count, float factor, float* rows, float* to, i64 cols) {
    [[maybe_unused]] const i64 depth = depth_of<Unit>(s.dim);
    const i64 stride = left_stride<Unit>(s.dim);
    const void* first = row_of(s.dtype, x, b, h, begin);
    // each row is read once: straight from where it is, if whole vectors of four units can be
    const bool whole = s.dim % (4 * Unit::per_unit) == 0 && x.stride_n % Unit::per_unit == 0 && reinterpret_cast<std::uintptr_t>(first) % 4 == 0;
    if constexpr (Unit::per_unit == 1) {
        if (s.dtype == DType::float32 && whole)
            return transpose(static_cast<const float*>(first), count, s.dim, x.stride_n, factor, to, cols);
        load_rows(s.dtype, x, b, h, begin, begin + count, s.dim, stride, rows);
        transpose(rows, count, s.dim, stride, factor, to, cols);
    } else {
#if CONVIT_PAIRS
        if (whole && factor >= 0.f) return transpose<false>(static_cast<const float*>(first), count, depth, x.stride_n / 2, 1.f, to, cols);
        for (i64 i = 0; i < count; ++i)
            pair_row(row_of(s.dtype, x, b, h, begin + i), s.dim, stride, factor < 0.f ? 0x8000 : 0, rows + i * stride);
        transpose<false>(rows, count, depth, stride, 1.f, to, cols);
#endif
    }
}

// p = exp2(factor (p - m)) in one column of vectors, in place; returns the sum.
template <class Unit>
CONVIT_INLINE vec exponentials(float* p, i64 rows, i64 cols, vec m, float factor) {
    vec part[4] = {};
    i64 j = 0;
    const auto one = [&](i64 row) __attribute__((always_inline)) {
        vec x = load(p + row * cols) - m;
        if (Unit::per_unit > 1) x *= factor;
        const vec e = exp2(x);
        store(p + row * cols, e);
        return e;
    };
    for (; j + 4 <= rows; j += 4) {
        CONVIT_UNROLL
        for (i64 u = 0; u < 4; ++u) part[u] += one(j + u);
    }
    for (; j < rows; ++j) part[0] += one(j);
    return (part[0] + part[1]) + (part[2] + part[3]);
}
