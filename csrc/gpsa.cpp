// The division of a call into heads and blocks of queries, the gates and tables of the heads, and the sums over the batch.
#include "gates.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace convit {
namespace {

using i64 = std::int64_t;

i64 lines(i64 floats) { return (floats + 15) / 16 * 16; }

float sigmoid(float x) { return float(1.0 / (1.0 + std::exp(-double(x)))); }

// How a forward pass is divided: heads, each in chunks of queries.
struct Division {
    i64 chunks, per_chunk, per_worker;
    int workers;

    Division(const Kernels& kern, const Shape& s, int threads) {
        // Enough parts to keep every thread busy to the end, but each part packs its head's keys and values anew.
        const i64 n = s.tokens(), heads = s.batch * s.heads, blocks = (n + kern.query_block - 1) / kern.query_block;
        chunks = 1;
        if (heads % threads != 0) chunks = std::min((4 * threads + heads - 1) / heads, std::max<i64>(blocks / 3, 1));
        per_chunk = (blocks + chunks - 1) / chunks * kern.query_block;
        chunks = (n + per_chunk - 1) / per_chunk;
        per_worker = lines(kern.forward_scratch(s));
        workers = int(std::min<i64>(threads, heads * chunks));
    }
};

// Images and heads counted as one, image by image.
struct Head {
    i64 index, b, h;
    Head(const Shape& s, i64 index) : index(index), b(index / s.heads), h(index % s.heads) {}
};

bool nothing(const Shape& s) { return s.batch * s.heads == 0 || s.tokens() == 0 || s.dim == 0; }

}  // namespace

Buffer allocate(i64 count) {
    const std::size_t bytes = (std::size_t(std::max<i64>(count, 1)) * sizeof(float) + 63) / 64 * 64;
    void* p = nullptr;
#if defined(_WIN32)
    p = std::malloc(bytes);
#else
    if (posix_memalign(&p, 64, bytes) != 0) p = nullptr;
#endif
    if (p == nullptr) throw std::bad_alloc();
    return Buffer(static_cast<float*>(p));
}

Gates::Gates(const Shape& s, const float* pos_weight, const float* gating, bool gated)
    : size_x_(s.grid_w * s.grid_w), size_y_(s.grid_h * s.grid_h), tables_size_(lines(size_x_ + size_y_)), px_(std::size_t(s.heads)) {
    const Kernels& kern = kernels();
    if (pos_weight == nullptr) gating = nullptr;
    const i64 n = s.tokens(), size = tables_size_;
    i64 open = 0;
    for (i64 h = 0; h < s.heads; ++h) {
        shares_.push_back(gating == nullptr ? 0.f : sigmoid(gating[h]));
        shares_.push_back(gating == nullptr ? 1.f : sigmoid(-gating[h]));
        open += position(h) != 0.f;  // also of NaN
    }
    if (open == 0) return;
    if (n <= fold_tokens) folded_stride_ = lines(n);
    folded_size_ = (s.grid_h + 1 + s.grid_w) * folded_stride_;
    memory_ = allocate(open * (size + folded_size_) + std::max(s.grid_h, s.grid_w) + 16);
    float* row = memory_.get() + open * (size + folded_size_);
    float* px = memory_.get();
    for (i64 h = 0; h < s.heads; ++h) {
        const float gate = position(h);
        if (gate == 0.f) continue;
        kern.tables(pos_weight + 3 * h, s.grid_h, s.grid_w, px, px + size_x_, row);
        if (folded_size_ > 0) fold(s, px, px + size_x_, gated ? gate : 1.f, px + size);
        for (i64 i = size_x_; gated && i < size_x_ + size_y_; ++i) px[i] *= gate;
        px_[std::size_t(h)] = px;
        px += size + folded_size_;
    }
}

// Both tables with the queries along the rows, as the lanes of the kernels have them; py times `gate`.
void Gates::fold(const Shape& s, const float* px, const float* py, float gate, float* to) const {
    std::fill(to, to + folded_size_, 0.f);
    for (i64 z = 0; z < s.grid_w; ++z, to += folded_stride_)
        for (i64 y = 0; y < s.grid_h; ++y)
            for (i64 x = 0; x < s.grid_w; ++x) to[y * s.grid_w + x] = px[x * s.grid_w + z];
    for (i64 t = 0; t < s.grid_h; ++t, to += folded_stride_)
        for (i64 y = 0; y < s.grid_h; ++y) std::fill(to + y * s.grid_w, to + (y + 1) * s.grid_w, gate * py[y * s.grid_h + t]);
}

i64 forward_memory(const Shape& s, int threads) {
    if (nothing(s)) return 0;
    const Division parts(kernels(), s, threads);
    return parts.per_worker * parts.workers;
}

void gpsa_forward(const Shape& s, Heads q, Heads k, Heads v, const Gates& gates, MutableHeads out, float* lse, float* memory, int threads) {
    if (nothing(s)) return;
    const Kernels& kern = kernels();
    const Division parts(kern, s, threads);
    const i64 n = s.tokens(), count = s.batch * s.heads * parts.chunks;
    for_parts(count, parts.workers, [&](i64 part, int worker) {
        const Head head(s, part / parts.chunks), next(s, std::min(part + parts.workers, count - 1) / parts.chunks);
        const i64 begin = part % parts.chunks * parts.per_chunk, h = head.h;
        kern.forward({&s, q, k, v, out, lse == nullptr ? nullptr : lse + head.index * n, gates.px(h), gates.py(h), gates.folded_x(h),
                      gates.folded_y(h, s.grid_w), gates.folded_stride(), gates.content(h), head.b, h, next.b, next.h, begin,
                      std::min(n, begin + parts.per_chunk), memory + worker * parts.per_worker});
    });
}

void gpsa_forward(const Shape& s, Heads q, Heads k, Heads v, const float* pos_weight, const float* gating, MutableHeads out, float* lse,
                  int threads) {
    kernels();  // throws, if it does, whatever the shape
    if (nothing(s)) return;
    const Gates gates(s, pos_weight, gating, true);
    const Buffer memory = allocate(forward_memory(s, threads));
    gpsa_forward(s, q, k, v, gates, out, lse, memory.get(), threads);
}

void gpsa_backward(const Shape& s, Heads grad_out, Heads q, Heads k, Heads v, const float* pos_weight, const float* gating,
                   const float* lse, MutableHeads dq, MutableHeads dk, MutableHeads dv, float* dpos_weight, float* dgating, int threads) {
    const Kernels& kern = kernels();
    const i64 n = s.tokens(), heads = s.batch * s.heads;
    if (pos_weight != nullptr) {
        std::fill(dpos_weight, dpos_weight + 3 * s.heads, 0.f);
        std::fill(dgating, dgating + s.heads, 0.f);
    }
    if (nothing(s)) return;
    const Gates gates(s, pos_weight, gating, false);
    const i64 folded = gates.folded_stride();
    const i64 tables = folded == 0 ? 0 : lines((s.grid_w + s.grid_h) * folded + s.grid_w * s.grid_w + s.grid_h * s.grid_h);
    const i64 per_worker = lines(kern.backward_scratch(s, gates.any())), per_share = kern.backward_sums(s), per_head = per_share + tables;
    const i64 block = kern.backward_block, blocks = (n + block - 1) / block;
    std::vector<double> partial(std::size_t(heads) * 4), content(std::size_t(heads * blocks));
    const auto job = [&](i64 index, i64 next_index, i64 begin, i64 end, float* sums, float* left, float* work) {
        const Head head(s, index), next(s, std::min(next_index, heads - 1));
        const i64 h = head.h;
        return BackwardJob{&s, grad_out, q, k, v, dq, dk, dv, lse + index * n, gates.px(h), gates.py(h), gates.folded_x(h),
                           gates.folded_y(h, s.grid_w), gates.folded_stride(), gates.position(h), gates.content(h), head.b, h, next.b, next.h,
                           begin, end, partial.data() + 4 * index, content.data() + index * blocks, sums, left, sums + per_share, work};
    };
    if (heads % threads == 0 || heads >= 4 * threads || blocks == 1) {
        const int workers = int(std::min<i64>(threads, heads));
        const Buffer memory = allocate((per_worker + per_head) * workers);
        for_parts(heads, workers, [&](i64 head, int worker) {
            float* sums = memory.get() + worker * (per_worker + per_head);
            const BackwardJob whole = job(head, head + workers, 0, n, sums, nullptr, sums + per_head);
            kern.backward_position(whole);
            kern.backward_queries(whole);
            kern.backward_keys(whole, 0, true);
        });
    } else {
        // Too few heads for the threads: some blocks of queries of every head at a time, whose shares are then added in the same order.
        const i64 runs = (2 * threads + heads - 1) / heads, wave = std::min(blocks, runs);
        const Buffer memory = allocate(per_worker * threads + heads * (per_head + wave * per_share));
        const auto sums = [&](i64 head) { return memory.get() + threads * per_worker + head * (per_head + wave * per_share); };
        for (i64 first = 0; first < blocks; first += wave) {
            const i64 count = std::min(wave, blocks - first), parts = count + (first == 0);
            for_parts(heads * parts, threads, [&](i64 part, int worker) {
                const i64 head = part / parts, at = part % parts, begin = std::min((first + at) * block, n);
                const BackwardJob some = job(head, head, begin, std::min(begin + block, n), sums(head), sums(head) + per_head + at * per_share,
                                             memory.get() + worker * per_worker);
                (at < count ? kern.backward_queries : kern.backward_position)(some);
            });
            for_parts(heads * runs, threads, [&](i64 part, int) {
                const i64 head = part / runs, run = part % runs;
                kern.backward_keys(job(head, head, run * n / runs, (run + 1) * n / runs, sums(head), sums(head) + per_head, nullptr), count,
                                   first + count == blocks);
            });
        }
    }
    for (i64 h = 0; pos_weight != nullptr && h < s.heads; ++h) {
        double sum[4] = {};
        for (i64 head = h; head < heads; head += s.heads) {
            for (int i = 0; i < 4; ++i) sum[i] += partial[std::size_t(4 * head + i)];
            for (i64 t = 0; t < blocks; ++t) sum[3] -= content[std::size_t(head * blocks + t)];
        }
        const double gate = 1.0 / (1.0 + std::exp(-double(gating[h]))), closed = 1.0 / (1.0 + std::exp(double(gating[h])));
        for (int i = 0; i < 3; ++i) dpos_weight[3 * h + i] = float(gate * sum[i]);
        dgating[h] = float(gate * closed * sum[3]);
    }
}

}  // namespace convit
