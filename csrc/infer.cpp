// The order of work of infer.h: which rows go together, when the threads meet, and where everything lies in the workspace.
#include "infer.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "threads.h"

namespace convit {
namespace {

using i64 = std::int64_t;

i64 round_up(i64 a, i64 b) { return (a + b - 1) / b * b; }

// A power of two as the distance of rows would send them all to the same few lines of the first cache.
i64 row_stride(i64 elements) {
    const i64 whole = round_up(elements, 32);
    return whole % 128 == 0 ? whole + 32 : whole;
}

// Rows that a thread takes through all products at a time: they stay in the second cache, and every thread has some.
i64 block_rows(i64 rows, int threads) {
    constexpr i64 most = 112;
    const i64 blocks = round_up(std::max<i64>((rows + most - 1) / most, 1), threads);
    return std::min(most, round_up((rows + blocks - 1) / blocks, 4));
}

// Hands the rows to run(begin, end, worker) in blocks. Which thread takes which block does not show in the result.
template <class Run>
void for_blocks(i64 rows, i64 block, int threads, const Run& run) {
    struct Context {
        const Run& run;
        i64 rows, block;
        std::atomic<i64> next{0};
        std::atomic<int> workers{0};
    } context{run, rows, block};
    run_threads(
        int(std::min<i64>(threads, (rows + block - 1) / block)),
        [](void* p) {
            Context& c = *static_cast<Context*>(p);
            const int worker = c.workers.fetch_add(1);
            for (i64 begin; (begin = c.next.fetch_add(c.block)) < c.rows;) c.run(begin, std::min(c.rows, begin + c.block), worker);
        },
        &context);
}

// Coefficients of infer.inc.h's GELU: interpolation of Phi - 1/2 at the Chebyshev nodes of each interval, about its middle in units of
// its width.
struct Gelu {
    float table[2][6][16] = {};
    explicit Gelu(int degree) {
        const double pi = std::acos(-1.0), width = 5.5 / 16;
        for (int form = 0; form < 2; ++form)
            for (int i = 0; i < 16; ++i) {
                double node[6], difference[6], power[6] = {};
                for (int k = 0; k <= degree; ++k) {
                    node[k] = 0.5 * std::cos(pi * (k + 0.5) / (degree + 1));
                    const double x = (i + 0.5 + node[k]) * width;
                    const double u = std::sqrt(2 / pi) * (x + 0.044715 * x * x * x);
                    difference[k] = 0.5 * (form == 0 ? std::erf(x * std::sqrt(0.5)) : std::tanh(u));
                }
                for (int n = 1; n <= degree; ++n)
                    for (int k = degree; k >= n; --k) difference[k] = (difference[k] - difference[k - 1]) / (node[k] - node[k - n]);
                for (int n = degree; n >= 0; --n) {  // Newton's form to powers
                    for (int k = degree; k > 0; --k) power[k] = power[k - 1] - node[n] * power[k];
                    power[0] = difference[n] - node[n] * power[0];
                }
                for (int k = 0; k <= degree; ++k) table[form][k][i] = float(power[k]);
            }
    }
};

const float* gelu_table(DType dtype) {
    static const Gelu wide(5), narrow(3);
    return (dtype == DType::float32 ? wide : narrow).table[0][0];
}

Shape attention_of(const Network& net, i64 layer, i64 batch, i64 gh, i64 gw) {
    const i64 heads = net.layers[layer].heads;
    Shape shape{batch, heads, gh, gw, net.dim / heads, net.layers[layer].scale, net.dtype};
    if (layer >= net.local) {  // plain attention, over all tokens
        shape.grid_h = 1;
        shape.grid_w = gh * gw + net.prefix;
    }
    return shape;
}

struct Workspace {
    Memory memory{};
    Scratch scratch{};
    float* attention;
    i64 per_thread = 0, size = 0, block = 0;

    Workspace(const Network& net, i64 batch, i64 gh, i64 gw, int threads, void* base) {
        const i64 patches = gh * gw, tokens = patches + net.prefix, width = net.dtype == DType::float32 ? 4 : 2;
        const auto take = [&](i64 bytes) {
            char* p = static_cast<char*>(base) + size;
            size += round_up(bytes, 64) + 64;
            return p;
        };
        i64 hidden = net.dim, attends = 0;  // last_layer keeps its queries where the hidden columns are
        for (i64 i = 0; i < net.depth; ++i) {
            hidden = std::max(hidden, std::min(net.layers[i].hidden, hidden_most));
            attends = std::max(attends, forward_memory(attention_of(net, i, batch, gh, gw), threads));
        }
        block = std::max<i64>(block_rows(batch * tokens, threads), block_rows(batch * patches, threads));
        memory.net = &net;
        memory.batch = batch;
        memory.grid_h = gh;
        memory.grid_w = gw;
        memory.ldx = row_stride(net.dim);
        memory.ld_heads = row_stride(net.dim);
        memory.ld_qkv = row_stride(3 * net.dim);
        memory.x = reinterpret_cast<float*>(take(batch * tokens * memory.ldx * 4));
        memory.qkv = take(batch * tokens * memory.ld_qkv * width);
        memory.heads = take(batch * tokens * memory.ld_heads * width);
        memory.gelu = gelu_table(net.dtype);
        scratch.rows = block;
        scratch.ldy = row_stride(std::max(net.dim, net.patch.in));
        scratch.ldh = row_stride(hidden);
        const i64 begin = size;
        attention = reinterpret_cast<float*>(take(0));
        scratch.y = take(block * scratch.ldy * width);
        scratch.h = take(block * scratch.ldh * width);
        scratch.x = reinterpret_cast<float*>(take(block * memory.ldx * 4));
        scratch.scores = reinterpret_cast<float*>(take(round_up(tokens, 16) * 4));
        per_thread = size - begin;
        size = begin + std::max(per_thread * threads, attends * 4 + 64);  // rows and attention take turns
    }

    Scratch of(int worker) const {
        const i64 shift = worker * per_thread;
        const auto at = [&](void* p) { return static_cast<char*>(p) + shift; };
        const auto floats_at = [&](float* p) { return reinterpret_cast<float*>(at(p)); };
        return {scratch.rows, at(scratch.y), at(scratch.h), floats_at(scratch.x), floats_at(scratch.scores), scratch.ldy, scratch.ldh};
    }
};

}  // namespace

const char* infer_why_not(DType dtype) {
#if defined(__x86_64__)
    const std::string isa = instruction_set();
    if (isa != "avx512" && isa != "avx512_bf16") return "it needs AVX-512";
    if (dtype == DType::bfloat16 && isa != "avx512_bf16") return "this processor has no bfloat16 products (avx512_bf16)";
    return nullptr;
#else
    (void)dtype;
    return "it needs AVX-512";
#endif
}

std::vector<Gates> infer_gates(const Network& net, i64 gh, i64 gw) {
    std::vector<Gates> gates;
    for (i64 i = 0; i < net.depth; ++i) {
        const Layer& layer = net.layers[i];
        gates.emplace_back(attention_of(net, i, 1, gh, gw), layer.pos_weight, layer.gating, true);
    }
    return gates;
}

i64 infer_workspace(const Network& net, i64 batch, i64 gh, i64 gw, int threads) {
    return Workspace(net, batch, gh, gw, threads, nullptr).size;
}

#if defined(__x86_64__)

void infer(const Network& net, const std::vector<Gates>& gates, const float* images, const float* position, i64 batch, i64 gh, i64 gw,
           void* workspace, float* out, int threads) {
    const InferKernels& kern = net.dtype == DType::float32 ? infer_avx512 : infer_avx512_bf16;
    Workspace work(net, batch, gh, gw, threads, workspace);
    Memory& m = work.memory;
    m.images = images;
    m.position = position;
    m.out = out;
    const i64 patches = gh * gw, all = patches + net.prefix, width = net.dtype == DType::float32 ? 4 : 2, last = net.depth - 1;
    if (net.dim % 2)  // products of pairs read one element more, times zero
        std::memset(m.heads, 0, std::size_t(batch * all * m.ld_heads * width));
    i64 tokens = patches;

    const auto rows = [&](const auto& run) {
        for_blocks(batch * tokens, block_rows(batch * tokens, threads), threads,
                   [&](i64 begin, i64 end, int worker) { run(begin, end, work.of(worker)); });
    };
    const auto project = [&](i64 i, i64 begin, i64 end, const Scratch& s) {
        kern.query_key_value(m, net.layers[i], m.x, begin, end, i == last && net.only_class_token(), s);
    };
    const auto join = [&] {  // from the last row on, each moves towards the end
        for (i64 b = batch; b-- > 0;)
            for (i64 n = all; n-- > 0;) {
                float* to = m.x + (b * all + n) * m.ldx;
                if (n >= net.prefix) {
                    std::memmove(to, m.x + (b * patches + n - net.prefix) * m.ldx, std::size_t(m.ldx) * 4);
                } else {
                    std::memset(to, 0, std::size_t(m.ldx) * 4);
                    std::memcpy(to, net.prefix_tokens + n * net.dim, std::size_t(net.dim) * 4);
                }
            }
        tokens = all;
    };

    rows([&](i64 begin, i64 end, const Scratch& s) {
        kern.embed(m, begin, end, s);
        if (net.local > 0) project(0, begin, end, s);
    });
    for (i64 i = 0; i < net.depth; ++i) {
        const Layer& layer = net.layers[i];
        if (i == net.local) {
            join();
            rows([&](i64 begin, i64 end, const Scratch& s) { project(i, begin, end, s); });
        }
        if (i == last && net.only_class_token()) break;
        const auto part = [&](i64 which) {
            return Heads{static_cast<char*>(m.qkv) + which * net.dim * width, tokens * m.ld_qkv, net.dim / layer.heads, m.ld_qkv};
        };
        gpsa_forward(attention_of(net, i, batch, gh, gw), part(0), part(1), part(2), gates[std::size_t(i)],
                     {m.heads, tokens * m.ld_heads, net.dim / layer.heads, m.ld_heads}, nullptr, work.attention, threads);
        rows([&](i64 begin, i64 end, const Scratch& s) {
            kern.after_attention(m, layer, m.x, begin, end, s);
            if (i < last && i + 1 != net.local) project(i + 1, begin, end, s);
        });
    }
    if (net.local == net.depth) join();
    const i64 block = std::min<i64>(work.block, (batch + threads - 1) / threads);
    for_blocks(batch, std::max<i64>(block, 1), threads, [&](i64 begin, i64 end, int worker) {
        (net.only_class_token() ? kern.last_layer : kern.finish)(m, begin, end, work.of(worker));
    });
}

#else

void infer(const Network&, const std::vector<Gates>&, const float*, const float*, i64, i64, i64, void*, float*, int) {}

#endif

}  // namespace convit
