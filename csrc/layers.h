// LayerNorm and GELU on CPU, for frameworks whose own are slow: rows of contiguous float32. See gpsa.h for what else is promised:
// the same bits at any number of threads, no framework headers.
#pragma once

#include <cstdint>

namespace convit {

// y[r] = (x[r] - mean) * rstd * gamma + beta over the `width` elements of each row; mean, rstd: [rows].
void layer_norm_forward(const float* x, const float* gamma, const float* beta, std::int64_t rows, std::int64_t width, float eps, float* y,
                        float* mean, float* rstd, int threads);

// Gradients of layer_norm_forward: dx [rows][width], dgamma and dbeta [width].
void layer_norm_backward(const float* grad, const float* x, const float* gamma, const float* mean, const float* rstd, std::int64_t rows,
                         std::int64_t width, float* dx, float* dgamma, float* dbeta, int threads);

// x Phi(x), or with tanh_form x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.
void gelu_forward(const float* x, std::int64_t size, bool tanh_form, float* y, int threads);
void gelu_backward(const float* grad, const float* x, std::int64_t size, bool tanh_form, float* dx, int threads);

}  // namespace convit
