// The division of LayerNorm and GELU into parts; the arithmetic is in layers.inc.h.
#include "layers.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace convit {
namespace {

using i64 = std::int64_t;

constexpr i64 rows_per_part = 64;  // of LayerNorm; the sums over rows are taken part by part, whoever computes them
constexpr i64 part_size = 16384;   // of GELU
constexpr i64 worth_a_thread = 65536;

int worth(i64 size, int threads) { return int(std::min<i64>(threads, 1 + size / worth_a_thread)); }

i64 divide_up(i64 a, i64 b) { return (a + b - 1) / b; }

}  // namespace

void layer_norm_forward(const float* x, const float* gamma, const float* beta, i64 rows, i64 width, float eps, float* y, float* mean,
                        float* rstd, int threads) {
    const Kernels& kern = kernels();
    for_parts(divide_up(rows, rows_per_part), worth(rows * width, threads), [&](i64 part, int) {
        const i64 r = part * rows_per_part, count = std::min(rows_per_part, rows - r);
        kern.norm_rows(x + r * width, gamma, beta, count, width, eps, y + r * width, mean + r, rstd + r);
    });
}

void layer_norm_backward(const float* grad, const float* x, const float* gamma, const float* mean, const float* rstd, i64 rows, i64 width,
                         float* dx, float* dgamma, float* dbeta, int threads) {
    const Kernels& kern = kernels();
    const i64 parts = divide_up(rows, rows_per_part);
    std::vector<float> sums(std::size_t(parts * 2 * width));
    for_parts(parts, worth(rows * width, threads), [&](i64 part, int) {
        const i64 r = part * rows_per_part, count = std::min(rows_per_part, rows - r);
        kern.norm_rows_gradient(grad + r * width, x + r * width, gamma, mean + r, rstd + r, count, width, dx + r * width,
                                sums.data() + part * 2 * width);
    });
    for (i64 c = 0; c < width; ++c) {
        double of_gamma = 0, of_beta = 0;
        for (i64 part = 0; part < parts; ++part) {
            of_gamma += sums[std::size_t(part * 2 * width + c)];
            of_beta += sums[std::size_t((part * 2 + 1) * width + c)];
        }
        dgamma[c] = float(of_gamma);
        dbeta[c] = float(of_beta);
    }
}

void gelu_forward(const float* x, i64 size, bool tanh_form, float* y, int threads) {
    const Kernels& kern = kernels();
    for_parts(divide_up(size, part_size), worth(size, threads), [&](i64 part, int) {
        const i64 i = part * part_size;
        kern.gelu(x + i, std::min(part_size, size - i), tanh_form, y + i);
    });
}

void gelu_backward(const float* grad, const float* x, i64 size, bool tanh_form, float* dx, int threads) {
    const Kernels& kern = kernels();
    for_parts(divide_up(size, part_size), worth(size, threads), [&](i64 part, int) {
        const i64 i = part * part_size;
        kern.gelu_gradient(grad + i, x + i, std::min(part_size, size - i), tanh_form, dx + i);
    });
}

}  // namespace convit
