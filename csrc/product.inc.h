// Matrix products, the result in registers until an epilogue stores it. A factor's elements are float32, or pairs of bfloat16 that are
// neighbours along the depth: both are units of 32 bits, and nothing but the step of the inner loop tells them apart.

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

// The last tile of keys: to[r] = (acc + before[r] * factor[r]) * weight[r] + position[r]; `before` is null if this tile is also the
// first, `position` without position.
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
                sum *= weight[row + r];
                if (position != nullptr) sum += load(position + at);
                store(to + (row + r) * ld_to + col + n * W, sum);
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

// Store p = exp2(factor * acc - shift[col]) and add it to sums[col].
struct StoreExp2 {
    float* c;
    i64 ld;
    float factor;
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
                const vec p = exp2(factor * acc[r][n] - m);
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

struct Floats {
    static constexpr i64 per_unit = 1;
    static __attribute__((always_inline)) inline vec broadcast(const float* a) { return splat(*a); }
    static __attribute__((always_inline)) inline vec step(vec sum, vec a, vec b) { return sum + a * b; }
};

#if CONVIT_PAIRS
struct Pairs {
    static constexpr i64 per_unit = 2;
    static __attribute__((always_inline)) inline vec broadcast(const float* a) {  // as an integer: the bits of a pair may be those of a signalling NaN
        std::int32_t bits;
        __builtin_memcpy(&bits, a, 4);
        return _mm512_castsi512_ps(_mm512_set1_epi32(bits));
    }
    static __attribute__((always_inline)) inline vec step(vec sum, vec a, vec b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

// A is [rows][K] with unit stride along K (by_rows) or along the rows; `lda` is the other stride.
template <class Unit, bool by_rows, int R, int NV, class Epilogue>
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
            const vec av = Unit::broadcast(by_rows ? pa + r * lda : pa + r);
            CONVIT_UNROLL
            for (int n = 0; n < NV; ++n) acc[r][n] = Unit::step(acc[r][n], av, bv[n]);
        }
        pa += by_rows ? 1 : lda;
        pb += ldb;
    }
    epilogue(row, col, acc);
}

template <class Unit, bool by_rows, int R, int NV, class Epilogue>
CONVIT_INLINE void row_tiles(i64 row, i64 rows, i64 col, i64 depth, const float* a, i64 lda, const float* b, i64 ldb, const Epilogue& epilogue) {
    for (; row + R <= rows; row += R) tile<Unit, by_rows, R, NV>(row, col, depth, a, lda, b, ldb, epilogue);
    constexpr int next = R > 8 ? 8 : R > 4 ? 4 : R > 2 ? 2 : 1;
    if constexpr (R > 1)
        if (row < rows) row_tiles<Unit, by_rows, next, NV>(row, rows, col, depth, a, lda, b, ldb, epilogue);
}

// epilogue(A B), A [rows][depth], B [depth][cols], cols a multiple of W; depth counts units.
template <class Unit, bool by_rows, class Epilogue>
static void multiply(i64 rows, i64 cols, i64 depth, const float* a, i64 lda, const float* b, i64 ldb, const Epilogue& epilogue) {
    i64 col = 0;
    while (col < cols) {
        const i64 left = (cols - col) / W;
        if (left == 3 || left >= 5) {
            row_tiles<Unit, by_rows, many_registers ? 8 : 4, 3>(0, rows, col, depth, a, lda, b, ldb, epilogue);
            col += 3 * W;
        } else if (left >= 2) {
            row_tiles<Unit, by_rows, many_registers ? 12 : 6, 2>(0, rows, col, depth, a, lda, b, ldb, epilogue);
            col += 2 * W;
        } else {
            row_tiles<Unit, by_rows, 8, 1>(0, rows, col, depth, a, lda, b, ldb, epilogue);
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
