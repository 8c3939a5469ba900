// The C ABI that mindspore.ops.Custom(func_type="aot") calls: arrays of addresses, shapes and names of types, inputs before outputs;
// 0 on success. Everything is contiguous. The Python side, kernels/gpsa/cpu_aot.py and kernels/layers/cpu_aot.py, has checked the
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

// settings: [grid_h, grid_w, scale]; q is [B, N, H, D] or [B, H, N, D]
convit::Shape gpsa_shape(const Arguments& a, int q, int settings, bool heads_first) {
    if (a.ranks[q] != 4 || a.size(settings) != 3) throw std::invalid_argument("expected four dimensions and three settings");
    const i64* s = a.shapes[q];
    const float* set = a.floats(settings);
    const bool bfloat16 = std::strcmp(a.dtypes[q], "bfloat16") == 0;
    if (!bfloat16) a.floats(q);
    convit::Shape shape{s[0], heads_first ? s[1] : s[2], i64(set[0]), i64(set[1]), s[3], set[2],
                        bfloat16 ? convit::DType::bfloat16 : convit::DType::float32};
    if (shape.tokens() != (heads_first ? s[2] : s[1])) throw std::invalid_argument("the grid does not have N patches");
    return shape;
}

template <class View>
View heads(const Arguments& a, int i, const convit::Shape& s, bool heads_first) {
    if (a.size(i) != s.batch * s.heads * s.tokens() * s.dim) throw std::invalid_argument("q, k, v differ in shape");
    const i64 n = s.tokens();
    return heads_first ? View{a.data[i], s.heads * n * s.dim, n * s.dim, s.dim} : View{a.data[i], n * s.heads * s.dim, s.dim, s.heads * s.dim};
}

// q, k, v, pos_weight, gating, settings -> out, lse
int gpsa_forward(const Arguments& arguments, bool heads_first) {
    return guarded("gpsa forward", arguments, 8, [&](const Arguments& a) {
        const convit::Shape s = gpsa_shape(a, 0, 5, heads_first);
        auto in = [&](int i) { return heads<convit::Heads>(a, i, s, heads_first); };
        convit::gpsa_forward(s, in(0), in(1), in(2), a.floats(3), a.floats(4), heads<convit::MutableHeads>(a, 6, s, heads_first), a.floats(7),
                             threads());
    });
}

// grad_out, q, k, v, pos_weight, gating, settings, lse -> dq, dk, dv, dpos_weight, dgating
int gpsa_backward(const Arguments& arguments, bool heads_first) {
    return guarded("gpsa backward", arguments, 13, [&](const Arguments& a) {
        const convit::Shape s = gpsa_shape(a, 1, 6, heads_first);
        auto in = [&](int i) { return heads<convit::Heads>(a, i, s, heads_first); };
        auto out = [&](int i) { return heads<convit::MutableHeads>(a, i, s, heads_first); };
        convit::gpsa_backward(s, in(0), in(1), in(2), in(3), a.floats(4), a.floats(5), a.floats(7), out(8), out(9), out(10), a.floats(11),
                              a.floats(12), threads());
    });
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

CONVIT_EXPORT int convit_gpsa_forward_bhnd(CONVIT_AOT_PARAMETERS) { return gpsa_forward(CONVIT_AOT_ARGUMENTS, true); }
CONVIT_EXPORT int convit_gpsa_forward_bnhd(CONVIT_AOT_PARAMETERS) { return gpsa_forward(CONVIT_AOT_ARGUMENTS, false); }
CONVIT_EXPORT int convit_gpsa_backward_bhnd(CONVIT_AOT_PARAMETERS) { return gpsa_backward(CONVIT_AOT_ARGUMENTS, true); }
CONVIT_EXPORT int convit_gpsa_backward_bnhd(CONVIT_AOT_PARAMETERS) { return gpsa_backward(CONVIT_AOT_ARGUMENTS, false); }
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
