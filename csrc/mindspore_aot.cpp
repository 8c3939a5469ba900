// The C ABI that mindspore.ops.Custom(func_type="aot") calls: arrays of addresses, shapes and names of types, inputs before outputs;
// 0 on success. Everything is contiguous. The Python side, kernels/gpsa/cpu_aot.py and kernels/linear/cpu_aot.py, has checked the
// arguments; what is checked here is that the two sides agree.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

#include "gpsa.h"
#include "layers.h"

#if defined(_WIN32)
#define CONVIT_EXPORT extern "C" __declspec(dllexport)
#else
#define CONVIT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

using i64 = std::int64_t;

// MindSpore hands no thread count to a custom operator: OMP_NUM_THREADS, else the processors that this process may use.
int threads() {
    static const int count = [] {
        const char* wanted = std::getenv("OMP_NUM_THREADS");
        if (wanted != nullptr && std::atoi(wanted) > 0) return std::atoi(wanted);
#if defined(__linux__)
        cpu_set_t set;
        if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(CPU_COUNT(&set), 1);
#endif
        return std::max(int(std::thread::hardware_concurrency()), 1);
    }();
    return count;
}

struct Arguments {
    int count;
    void** data;
    int* ranks;
    i64** shapes;
    const char** dtypes;

    float* floats(int i) const {
        if (std::strcmp(dtypes[i], "float32") != 0)
            throw std::invalid_argument("argument " + std::to_string(i) + " must be float32, got " + dtypes[i]);
        return static_cast<float*>(data[i]);
    }
    i64 size(int i) const {
        i64 size = 1;
        for (int d = 0; d < ranks[i]; ++d) size *= shapes[i][d];
        return size;
    }
    i64 last(int i) const { return ranks[i] > 0 ? shapes[i][ranks[i] - 1] : 1; }
};

template <class Run>
int guarded(const char* name, const Arguments& arguments, int expected, const Run& run) {
    try {
        if (arguments.count != expected)
            throw std::invalid_argument("expected " + std::to_string(expected) + " arguments, got " + std::to_string(arguments.count));
        run(arguments);
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "convit %s: %s\n", name, error.what());
        return 1;
    }
}

// settings: [grid_h, grid_w, scale]
convit::Shape gpsa_shape(const Arguments& a, int q, int settings, i64 batch, i64 heads, i64 tokens, i64 dim) {
    if (a.size(settings) != 3) throw std::invalid_argument("expected three settings");
    const float* set = a.floats(settings);
    const bool bfloat16 = std::strcmp(a.dtypes[q], "bfloat16") == 0;
    if (!bfloat16) a.floats(q);
    const convit::DType dtype = bfloat16 ? convit::DType::bfloat16 : convit::DType::float32;
    const convit::Shape shape{batch, heads, i64(set[0]), i64(set[1]), dim, set[2], dtype};
    if (shape.tokens() != tokens) throw std::invalid_argument("the grid does not have N patches");
    return shape;
}

void check_rank(const Arguments& a, int i, int rank) {
    if (a.ranks[i] != rank) throw std::invalid_argument("expected " + std::to_string(rank) + " dimensions, got " + std::to_string(a.ranks[i]));
}

// [B, H, N, D]
template <class View>
View heads(const Arguments& a, int i, const convit::Shape& s) {
    const i64 n = s.tokens();
    if (a.size(i) != s.batch * s.heads * n * s.dim) throw std::invalid_argument("q, k, v differ in shape");
    return View{a.data[i], s.heads * n * s.dim, n * s.dim, s.dim};
}

// one of `parts` [H, D] beside each other in [B, N, parts, H, D]
template <class View>
View packed(const Arguments& a, int i, const convit::Shape& s, i64 part, i64 parts) {
    const i64 row = s.heads * s.dim, bytes = s.dtype == convit::DType::bfloat16 ? 2 : 4;
    if (a.size(i) != s.batch * s.tokens() * parts * row) throw std::invalid_argument("the packed q, k and v differ in shape from the output");
    return View{static_cast<char*>(a.data[i]) + part * row * bytes, s.tokens() * parts * row, s.dim, parts * row};
}

// x -> y
int gelu_forward(const Arguments& arguments, bool tanh_form) {
    return guarded("gelu forward", arguments, 2,
                   [&](const Arguments& a) { convit::gelu_forward(a.floats(0), a.size(0), tanh_form, a.floats(1), threads()); });
}

// grad, x -> dx
int gelu_backward(const Arguments& arguments, bool tanh_form) {
    return guarded("gelu backward", arguments, 3, [&](const Arguments& a) {
        convit::gelu_backward(a.floats(0), a.floats(1), a.size(0), tanh_form, a.floats(2), threads());
    });
}

}  // namespace

#define CONVIT_AOT_PARAMETERS int count, void **data, int *ranks, i64 **shapes, const char **dtypes, void *, void *
#define CONVIT_AOT_ARGUMENTS Arguments{count, data, ranks, shapes, dtypes}

using convit::Heads;
using convit::MutableHeads;

// q, k, v [B, H, N, D], pos_weight, gating, settings -> out [B, H, N, D], lse
CONVIT_EXPORT int convit_gpsa_forward(CONVIT_AOT_PARAMETERS) {
    return guarded("gpsa forward", CONVIT_AOT_ARGUMENTS, 8, [](const Arguments& a) {
        check_rank(a, 0, 4);
        const i64* q = a.shapes[0];
        const convit::Shape s = gpsa_shape(a, 0, 5, q[0], q[1], q[2], q[3]);
        convit::gpsa_forward(s, heads<Heads>(a, 0, s), heads<Heads>(a, 1, s), heads<Heads>(a, 2, s), a.floats(3), a.floats(4),
                             heads<MutableHeads>(a, 6, s), a.floats(7), threads());
    });
}

// grad_out, q, k, v, pos_weight, gating, settings, lse -> dq, dk, dv, dpos_weight, dgating
CONVIT_EXPORT int convit_gpsa_backward(CONVIT_AOT_PARAMETERS) {
    return guarded("gpsa backward", CONVIT_AOT_ARGUMENTS, 13, [](const Arguments& a) {
        check_rank(a, 1, 4);
        const i64* q = a.shapes[1];
        const convit::Shape s = gpsa_shape(a, 1, 6, q[0], q[1], q[2], q[3]);
        convit::gpsa_backward(s, heads<Heads>(a, 0, s), heads<Heads>(a, 1, s), heads<Heads>(a, 2, s), heads<Heads>(a, 3, s), a.floats(4),
                              a.floats(5), a.floats(7), heads<MutableHeads>(a, 8, s), heads<MutableHeads>(a, 9, s),
                              heads<MutableHeads>(a, 10, s), a.floats(11), a.floats(12), threads());
    });
}

// qkv [B, N, 3, H, D], pos_weight, gating, settings -> out [B, N, H, D], lse
CONVIT_EXPORT int convit_gpsa_packed_forward(CONVIT_AOT_PARAMETERS) {
    return guarded("gpsa forward", CONVIT_AOT_ARGUMENTS, 6, [](const Arguments& a) {
        check_rank(a, 0, 5);
        const i64* qkv = a.shapes[0];
        const convit::Shape s = gpsa_shape(a, 0, 3, qkv[0], qkv[3], qkv[1], qkv[4]);
        auto in = [&](i64 part) { return packed<Heads>(a, 0, s, part, 3); };
        convit::gpsa_forward(s, in(0), in(1), in(2), a.floats(1), a.floats(2), packed<MutableHeads>(a, 4, s, 0, 1), a.floats(5), threads());
    });
}

// grad_out [B, N, H, D], qkv [B, N, 3, H, D], pos_weight, gating, settings, lse -> dqkv, dpos_weight, dgating
CONVIT_EXPORT int convit_gpsa_packed_backward(CONVIT_AOT_PARAMETERS) {
    return guarded("gpsa backward", CONVIT_AOT_ARGUMENTS, 9, [](const Arguments& a) {
        check_rank(a, 1, 5);
        const i64* qkv = a.shapes[1];
        const convit::Shape s = gpsa_shape(a, 1, 4, qkv[0], qkv[3], qkv[1], qkv[4]);
        auto in = [&](i64 part) { return packed<Heads>(a, 1, s, part, 3); };
        auto out = [&](i64 part) { return packed<MutableHeads>(a, 6, s, part, 3); };
        convit::gpsa_backward(s, packed<Heads>(a, 0, s, 0, 1), in(0), in(1), in(2), a.floats(2), a.floats(3), a.floats(5), out(0), out(1),
                              out(2), a.floats(7), a.floats(8), threads());
    });
}

CONVIT_EXPORT int convit_gelu_forward(CONVIT_AOT_PARAMETERS) { return gelu_forward(CONVIT_AOT_ARGUMENTS, false); }
CONVIT_EXPORT int convit_gelu_backward(CONVIT_AOT_PARAMETERS) { return gelu_backward(CONVIT_AOT_ARGUMENTS, false); }
CONVIT_EXPORT int convit_gelu_tanh_forward(CONVIT_AOT_PARAMETERS) { return gelu_forward(CONVIT_AOT_ARGUMENTS, true); }
CONVIT_EXPORT int convit_gelu_tanh_backward(CONVIT_AOT_PARAMETERS) { return gelu_backward(CONVIT_AOT_ARGUMENTS, true); }

// x [..., C], gamma, beta [C], eps [1] -> y, mean, rstd [rows]
CONVIT_EXPORT int convit_layer_norm_forward(CONVIT_AOT_PARAMETERS) {
    return guarded("layer norm forward", CONVIT_AOT_ARGUMENTS, 7, [&](const Arguments& a) {
        const i64 width = a.last(0);
        convit::layer_norm_forward(a.floats(0), a.floats(1), a.floats(2), a.size(0) / std::max<i64>(width, 1), width, a.floats(3)[0],
                                   a.floats(4), a.floats(5), a.floats(6), threads());
    });
}

// grad, x, gamma, mean, rstd -> dx, dgamma, dbeta
CONVIT_EXPORT int convit_layer_norm_backward(CONVIT_AOT_PARAMETERS) {
    return guarded("layer norm backward", CONVIT_AOT_ARGUMENTS, 8, [&](const Arguments& a) {
        const i64 width = a.last(1);
        convit::layer_norm_backward(a.floats(0), a.floats(1), a.floats(2), a.floats(3), a.floats(4), a.size(1) / std::max<i64>(width, 1), width,
                                    a.floats(5), a.floats(6), a.floats(7), threads());
    });
}
