// What each head of a GPSA layer takes of position and content, made once for a grid, and the forward pass on what is made already.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "gpsa.h"

namespace convit {

struct Free {
    void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

// Uninitialised, in whole cache lines, so that two threads' memory shares none. Throws std::bad_alloc.
Buffer allocate(std::int64_t count);

// A closed gate, sigmoid 0, leaves plain attention: that head has no tables and costs no position. So do all of them without pos_weight.
class Gates {
  public:
    // Of a shape only heads and grid are read. py is scaled by the gate if `gated`.
    Gates(const Shape& s, const float* pos_weight, const float* gating, bool gated);

    float position(std::int64_t h) const { return shares_[std::size_t(2 * h)]; }
    float content(std::int64_t h) const { return shares_[std::size_t(2 * h + 1)]; }
    const float* px(std::int64_t h) const { return px_[std::size_t(h)]; }
    const float* py(std::int64_t h) const { return px(h) == nullptr ? nullptr : px(h) + size_x_; }
    // [gw][stride], then [gh + 1][stride], the last row zero
    const float* folded_x(std::int64_t h) const { return folded_size_ == 0 || px(h) == nullptr ? nullptr : px(h) + tables_size_; }
    const float* folded_y(std::int64_t h, std::int64_t gw) const {
        return folded_x(h) == nullptr ? nullptr : folded_x(h) + gw * folded_stride_;
    }
    std::int64_t folded_stride() const { return folded_stride_; }
    bool any() const { return memory_ != nullptr; }

  private:
    void fold(const Shape& s, const float* px, const float* py, float gate, float* to) const;

    std::int64_t size_x_, size_y_, tables_size_, folded_stride_ = 0, folded_size_ = 0;
    std::vector<float> shares_;  // of position and of content, by head
    std::vector<const float*> px_;
    Buffer memory_;
};

// gpsa_forward on gates of its grid, in memory of so many floats; allocates nothing.
std::int64_t forward_memory(const Shape& s, int threads);
void gpsa_forward(const Shape& s, Heads q, Heads k, Heads v, const Gates& gates, MutableHeads out, float* lse, float* memory, int threads);

}  // namespace convit
