// Inference of a whole ConViT on one CPU: images in, logits out. Plain C++ on pointers and sizes, as gpsa.h; AVX-512 alone, with float32
// products, or bfloat16 ones where the processor has them (avx512_bf16). Norms, residuals and sums are float32 in both.
//
// Between two attentions every row of tokens is on its own, so a thread takes a block of rows through all that lies there: projection,
// residual, norm, perceptron, residual, and the next layer's norm and q, k, v, while the rows stay in its cache. A layer costs two
// meetings of the threads. Every row's arithmetic is fixed: the same bits at any number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "gates.h"

namespace convit {

// y [rows][out] = x [rows][in] weight + bias. The weight lies in panels of 48 columns (at the end 32 or 16: see panel_vectors), each
// [in][columns], bfloat16 with two successive rows side by side: [in / 2][columns][2]; rows and columns that are missing are 0.
struct Product {
    const void* weight;
    const float* bias;  // [out rounded up to 16], or null
    std::int64_t in, out;
    const void* next;  // the weight that is wanted after this one: it is fetched meanwhile
};

struct Norm {
    const float *weight, *bias;  // [dim rounded up to 16], zeros at the end
    float eps;
};

struct Layer {
    std::int64_t heads, hidden;
    float scale;
    bool tanh_form;  // of the GELU
    Norm norm1, norm2;
    Product qkv, proj, fc1, fc2;
    const float *pos_weight, *gating;  // null: plain attention
};

enum class Pool : int { token = 0, average = 1, none = 2 };

struct Network {
    DType dtype;
    std::int64_t dim, channels, patch_h, patch_w, prefix, local, classes, depth;
    Pool pool;
    Product patch, head;          // head.weight null: none
    const float* prefix_tokens;   // [prefix][dim]
    Norm norm;
    const Layer* layers;

    bool only_class_token() const { return pool == Pool::token && local < depth; }
};

// Why this machine cannot run it; null if it can.
const char* infer_why_not(DType dtype);

// Gates and position tables of the layers for one grid; any number of calls may share them.
std::vector<Gates> infer_gates(const Network& net, std::int64_t grid_h, std::int64_t grid_w);

// Size of the memory for one call, in bytes. One workspace serves one call at a time.
std::int64_t infer_workspace(const Network& net, std::int64_t batch, std::int64_t grid_h, std::int64_t grid_w, int threads);

// images [batch][channels][grid_h * patch_h][grid_w * patch_w], position [patches][dim] or null, both contiguous float32. out, float32:
// [batch][classes], or [batch][prefix + patches][classes] without pooling; dim in place of classes without a head. gates: those of the
// grid. Allocates nothing.
void infer(const Network& net, const std::vector<Gates>& gates, const float* images, const float* position, std::int64_t batch,
           std::int64_t grid_h, std::int64_t grid_w, void* workspace, float* out, int threads);

// ---- between infer.cpp and the files of the instruction sets

// Vectors of 16 columns in the next panel, of those that are left.
inline constexpr std::int64_t panel_vectors(std::int64_t left) { return left == 3 || left >= 5 ? 3 : left == 2 || left == 4 ? 2 : 1; }

struct Memory {  // of a call; strides count elements
    const Network* net;
    const float *images, *position;
    std::int64_t batch, grid_h, grid_w;
    float* x;  // [rows][ldx]: the residual stream
    std::int64_t ldx;
    void *qkv, *heads;  // [rows][ld_qkv], [rows][ldx]
    std::int64_t ld_qkv, ld_heads;
    float* out;
    const float* gelu;  // [2 forms][6 powers][16 intervals]
};

struct Scratch {  // of a thread, for a block of so many rows
    std::int64_t rows;
    void *y, *h;
    float *x, *scores;  // [tokens rounded up to 16]
    std::int64_t ldy, ldh;
};

// Columns of a perceptron's hidden layer that are made and used at a time: whole panels, and so many more if those are all that is left.
constexpr std::int64_t hidden_chunk = 768, hidden_most = hidden_chunk + 48;

struct InferKernels {
    void (*embed)(const Memory&, std::int64_t begin, std::int64_t end, const Scratch&);
    void (*query_key_value)(const Memory&, const Layer&, const float* x, std::int64_t begin, std::int64_t end, bool keys_only,
                            const Scratch&);
    void (*after_attention)(const Memory&, const Layer&, float* x, std::int64_t begin, std::int64_t end, const Scratch&);
    void (*last_layer)(const Memory&, std::int64_t begin, std::int64_t end, const Scratch&);  // images; of the class token alone
    void (*finish)(const Memory&, std::int64_t begin, std::int64_t end, const Scratch&);      // images
};

#if defined(__x86_64__)
extern const InferKernels infer_avx512, infer_avx512_bf16;
#endif

}  // namespace convit
