// LayerNorm and GELU. The loops are plain, branch-free and of fixed width: the compiler turns them into this target's vectors.

constexpr i64 lanes = 16;  // partial sums of a row, the same for every instruction set

// e^x, relative error 1e-7; 0 below -87.3, and finite up to 88.
CONVIT_INLINE float exponential(float x) {
    constexpr float shift = 12582912.f + 127.f;  // 1.5 * 2^23 + 127: the sum's last bits are the biased exponent
    float t = x * 1.44269504088896341f;
    t = t < -127.f ? -127.f : t;
    t = t > 127.f ? 127.f : t;
    const float rounded = t + shift;
    // what is left of x * log2(e), with the product's own rounding error: it matters where |x| is large
    const float whole = rounded - shift;
    float f = x - whole * 0.693359375f;
    f = f + whole * 2.12194440e-4f;
    f = f < -0.35f ? -0.35f : f;
    f = f > 0.35f ? 0.35f : f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.f;
    std::int32_t bits;
    __builtin_memcpy(&bits, &rounded, 4);
    bits = std::int32_t(std::uint32_t(bits) << 23);
    float power;
    __builtin_memcpy(&power, &bits, 4);
    return x != x ? x : p * power;
}

// erf(x) to about one unit in the last place: a polynomial near zero, 1 - exp(polynomial) beyond.
CONVIT_INLINE float error_function(float x) {
    const float size = __builtin_fabsf(x), square = x * x;
    float near = -5.96761703e-4f;
    near = near * square + 4.99119423e-3f;
    near = near * square - 2.67681349e-2f;
    near = near * square + 1.12819925e-1f;
    near = near * square - 3.76125336e-1f;
    near = near * square + 1.28379166e-1f;
    near = near * x + x;
    const float t = size > 4.f ? 4.f : size;
    float far = -1.72853470e-5f * t + 3.83197126e-4f;
    far = far * t - 3.88396438e-3f;
    far = far * t + 2.42546219e-2f;
    far = far * t - 1.06777877e-1f;
    far = far * t - 6.34846687e-1f;
    far = far * t - 1.28717512e-1f;
    far = far * t - t;
    far = 1.f - exponential(far);
    far = x < 0.f ? -far : far;
    return size > 0.927734375f ? far : near;
}

constexpr float root_half = 0.707106781186547524f, density_at_0 = 0.398942280401432678f;
constexpr float slope = 1.59576912160573071f, cubic = 0.0713548162726009f;  // 2 sqrt(2 / pi), and times 0.044715

static void gelu_exact(const float* x, i64 size, float* y) {
    for (i64 i = 0; i < size; ++i) y[i] = 0.5f * x[i] * (1.f + error_function(x[i] * root_half));
}

constexpr float closed = -85.f;  // below, (1 + tanh(u / 2)) / 2 is taken as 0, so that no x is too large to be multiplied by it

static void gelu_tanh(const float* x, i64 size, float* y) {
    for (i64 i = 0; i < size; ++i) {
        const float u = x[i] * (slope + cubic * x[i] * x[i]);
        y[i] = x[i] * (u < closed ? 0.f : 1.f / (1.f + exponential(-u)));
    }
}

static void gelu_exact_gradient(const float* grad, const float* x, i64 size, float* dx) {
    for (i64 i = 0; i < size; ++i) {
        const float distribution = 0.5f * (1.f + error_function(x[i] * root_half));
        dx[i] = grad[i] * (distribution + x[i] * density_at_0 * exponential(-0.5f * x[i] * x[i]));
    }
}

static void gelu_tanh_gradient(const float* grad, const float* x, i64 size, float* dx) {
    for (i64 i = 0; i < size; ++i) {
        const float product = x[i] * x[i], square = product > 1e4f ? 1e4f : product;  // saturated there; an infinity would make NaN
        const float u = x[i] * (slope + cubic * square), e = exponential(-u);
        const float s = u < closed ? 0.f : 1.f / (1.f + e), rise = u < closed ? 0.f : e / (1.f + e) * s;  // s (1 - s) without a difference
        dx[i] = grad[i] * (s + x[i] * rise * (slope + 3.f * cubic * square));
    }
}

CONVIT_INLINE float total(const float* part) {
    double sum = 0;
    for (i64 l = 0; l < lanes; ++l) sum += part[l];
    return float(sum);
}

static void norm_rows(const float* x, const float* gamma, const float* beta, i64 rows, i64 width, float eps, float* y, float* mean,
                             float* rstd) {
    for (i64 r = 0; r < rows; ++r, x += width, y += width) {
        float part[lanes] = {};
        i64 c = 0;
        for (; c + lanes <= width; c += lanes)
            for (i64 l = 0; l < lanes; ++l) part[l] += x[c + l];
        for (i64 l = 0; c + l < width; ++l) part[l] += x[c + l];
        const float m = total(part) / float(width);
        for (i64 l = 0; l < lanes; ++l) part[l] = 0.f;
        for (c = 0; c + lanes <= width; c += lanes)
            for (i64 l = 0; l < lanes; ++l) part[l] += (x[c + l] - m) * (x[c + l] - m);
        for (i64 l = 0; c + l < width; ++l) part[l] += (x[c + l] - m) * (x[c + l] - m);
        const float scale = 1.f / __builtin_sqrtf(total(part) / float(width) + eps);
        for (c = 0; c < width; ++c) y[c] = (x[c] - m) * scale * gamma[c] + beta[c];
        mean[r] = m;
        rstd[r] = scale;
    }
}

// Adds the rows' share of dgamma and dbeta to sums [2][width].
static void norm_rows_gradient(const float* grad, const float* x, const float* gamma, const float* mean, const float* rstd, i64 rows,
                                      i64 width, float* __restrict dx, float* __restrict sums) {
    for (i64 r = 0; r < rows; ++r, grad += width, x += width, dx += width) {
        const float m = mean[r], scale = rstd[r];
        float part[lanes] = {}, part_x[lanes] = {};
        i64 c = 0;
        for (; c + lanes <= width; c += lanes)
            for (i64 l = 0; l < lanes; ++l) {
                const float g = grad[c + l] * gamma[c + l];
                part[l] += g;
                part_x[l] += g * (x[c + l] - m);
            }
        for (i64 l = 0; c + l < width; ++l) {
            const float g = grad[c + l] * gamma[c + l];
            part[l] += g;
            part_x[l] += g * (x[c + l] - m);
        }
        const float mean_g = total(part) / float(width), mean_gx = total(part_x) * scale / float(width);
        for (c = 0; c < width; ++c) {
            const float normal = (x[c] - m) * scale;
            dx[c] = (grad[c] * gamma[c] - mean_g - normal * mean_gx) * scale;
            sums[c] += grad[c] * normal;
            sums[width + c] += grad[c];
        }
    }
}

static void gelu(const float* x, i64 size, bool tanh_form, float* y) { (tanh_form ? gelu_tanh : gelu_exact)(x, size, y); }

static void gelu_gradient(const float* grad, const float* x, i64 size, bool tanh_form, float* dx) {
    (tanh_form ? gelu_tanh_gradient : gelu_exact_gradient)(grad, x, size, dx);
}
