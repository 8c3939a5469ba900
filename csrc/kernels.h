// What an instruction set's translation unit offers to gpsa.cpp and layers.cpp. The sizes of a unit of work and of the scratch memory are decided there.
#pragma once

#include "gpsa.h"

namespace convit {

// Up to so many tokens the position is added to the weights themselves, from the folded tables; beyond, contracted with v.
constexpr std::int64_t fold_tokens = 256;

// One head's share of a call. Tables hold the position softmax: px[x][z] and py[s][t], rows sum to one.
struct ForwardJob {
    const Shape* shape;
    Heads q, k, v;
    MutableHeads out;
    float* lse;                // of this head, [N]; null if not wanted
    const float *px, *py;      // of this head, [gw][gw] and [gh][gh]; py is scaled by g. Null without position
    const float *folded_x, *folded_y;  // px and g py with the queries along the row: [gw][folded_stride], [gh + 1][folded_stride]; or null
    std::int64_t folded_stride;
    float content_gate;        // 1 - g
    std::int64_t b, h;
    std::int64_t next_b, next_h;  // the head that this thread most likely takes up next: its rows are fetched meanwhile
    std::int64_t begin, end;   // queries; begin is a multiple of query_block
    float* scratch;
};

struct BackwardJob {
    const Shape* shape;
    Heads grad_out, q, k, v;
    MutableHeads dq, dk, dv;
    const float* lse;
    const float *px, *py;      // py is not scaled. Null without position
    const float *folded_x, *folded_y;  // as forward, but py is not scaled
    std::int64_t folded_stride;
    float gate, content_gate;  // g, 1 - g
    std::int64_t b, h, next_b, next_h;
    std::int64_t begin, end;   // queries of backward_queries, begin a multiple of backward_block; keys of backward_keys
    double* partial;           // [4]: dpos_weight / g of this head and batch, then the sum of grad_out * P v
    double* content;           // [blocks]: the sum of grad_out * Pc v over each block of queries
    float* sums;               // dk (without the scale) and dv of this head, [2][N][Dp]
    float* blocks;             // null: backward_queries adds to `sums`; else each of its blocks is left here, [end - begin][2][N][Dp]
    float* table_sums;         // [gw + gh][folded_stride] and a table each: where the position is folded, see backward_tables
    float* scratch;
};

struct Kernels {
    const char* name;
    std::int64_t query_block, backward_block;
    std::int64_t (*forward_scratch)(const Shape&);                  // floats
    std::int64_t (*backward_scratch)(const Shape&, bool position);  // floats; without position if every head's tables are null
    std::int64_t (*backward_sums)(const Shape&);  // floats of BackwardJob::sums, and of one block
    void (*tables)(const float* pos_weight, std::int64_t gh, std::int64_t gw, float* px, float* py, float* row);
    void (*forward)(const ForwardJob&);
    // One head backward: the three in this order. How its queries and keys are divided among calls does not show in the bits.
    void (*backward_position)(const BackwardJob&);  // begins the sums; the positional half, where it is not folded
    void (*backward_queries)(const BackwardJob&);   // dq, and these queries' share of dk and dv
    // Adds `count` blocks to the sums; at last writes dk and dv, and with the first key `partial` where the position is folded.
    void (*backward_keys)(const BackwardJob&, std::int64_t count, bool last);
    void (*gelu)(const float* x, std::int64_t size, bool tanh_form, float* y);
    void (*gelu_gradient)(const float* grad, const float* x, std::int64_t size, bool tanh_form, float* dx);
    void (*norm_rows)(const float* x, const float* gamma, const float* beta, std::int64_t rows, std::int64_t width, float eps, float* y,
                      float* mean, float* rstd);
    void (*norm_rows_gradient)(const float* grad, const float* x, const float* gamma, const float* mean, const float* rstd, std::int64_t rows,
                               std::int64_t width, float* dx, float* sums);  // adds the rows' share of dgamma and dbeta to sums [2][width]
};

#if defined(__x86_64__) || defined(__i386__)
#define CONVIT_X86 1
extern const Kernels kernels_avx512_bf16, kernels_avx512, kernels_avx2;
#endif
#if defined(__aarch64__)
extern const Kernels kernels_neon;
#endif
extern const Kernels kernels_portable;

// The one in use. Throws std::invalid_argument, see instruction_set() in gpsa.h: call it before the threads start.
const Kernels& kernels();

}  // namespace convit
