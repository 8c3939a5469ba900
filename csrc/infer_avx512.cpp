#include "infer.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define CONVIT_BF16 0

namespace convit {
namespace {
#include "infer.inc.h"
}  // namespace

const InferKernels infer_avx512 = {embed, query_key_value, after_attention, last_layer, finish};

}  // namespace convit

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
