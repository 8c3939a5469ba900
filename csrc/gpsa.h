// GPSA (gated positional self-attention) on CPU: plain C++ on pointers, element strides and sizes. No Python or framework headers.
//
//     out_i = sum_j ((1 - g) Pc + g P)_ij v_j,   Pc = softmax_j(scale q_i . k_j),   g = sigmoid(gating[h]),
//     P     = softmax_j(w0 dx + w1 dy + w2 (dx^2 + dy^2)) = Py (x) Px  on the grid gh x gw, patches in row-major order
//
// Every function may be called from several threads at once. Storage is float32, bfloat16 or float16; arithmetic float32
// (where the instruction set multiplies bfloat16, so are the products' factors), sums float32, sums of sums float64. The same input gives the same bits at any number of threads. No buffer of N x N elements is formed; README.md in
// kernels/gpsa says what the scratch memory is. Failures (no memory, wrong CONVIT_CPU_ISA) are std::exception's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace convit {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// A [B, H, N, D] array with unit stride along D; strides count elements, may be any (also 0 or negative) and are 64 bits wide.
struct Heads {
    const void* data;
    std::int64_t stride_b, stride_h, stride_n;
};
struct MutableHeads {
    void* data;
    std::int64_t stride_b, stride_h, stride_n;
};

struct Shape {
    std::int64_t batch, heads, grid_h, grid_w, dim;  // B, H, gh, gw, D >= 0; N = gh * gw
    float scale;                                     // of the content scores
    DType dtype;                                     // of every Heads argument

    std::int64_t tokens() const { return grid_h * grid_w; }
};

// pos_weight [H, 3], gating [H] (before the sigmoid): contiguous. Both null: plain attention, without position or gate. Writes out
// [B, H, N, D] and, unless it is null, lse [B, H, N] (contiguous): the natural logarithm of sum_j exp(scale q_i . k_j). Outputs must
// overlap neither inputs nor each other. threads >= 1.
void gpsa_forward(const Shape& shape, Heads q, Heads k, Heads v, const float* pos_weight, const float* gating, MutableHeads out,
                  float* lse, int threads);

// Gradients of gpsa_forward: dq, dk, dv [B, H, N, D], dpos_weight [H, 3], dgating [H], all of them written whatever B and N. Without
// position dpos_weight and dgating are not touched and may be null.
void gpsa_backward(const Shape& shape, Heads grad_out, Heads q, Heads k, Heads v, const float* pos_weight, const float* gating,
                   const float* lse, MutableHeads dq, MutableHeads dk, MutableHeads dv, float* dpos_weight, float* dgating, int threads);

// Name of the instruction set that the kernels use: "avx512_bf16", "avx512", "avx2", "neon" or "portable"; the widest that this machine runs,
// or the one that the environment variable CONVIT_CPU_ISA names. It is read once, at the first call.
// Throws std::invalid_argument if that name is unknown or the machine cannot run it.
std::string instruction_set();

// Every instruction set of this binary that this machine can run, widest first.
std::vector<std::string> instruction_sets();

// Who runs the threads: "OpenMP" (the process's own runtime, found when first needed) or "std::thread".
std::string thread_runtime();

}  // namespace convit
