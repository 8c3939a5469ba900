#include "kernels.h"

#if defined(CONVIT_X86)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define CONVIT_LANES 16
#define CONVIT_REGISTERS 32
#define CONVIT_PAIRS 0
#define CONVIT_QUERY_VECTORS 2

namespace convit {
namespace {
#include "kernels.inc.h"
}  // namespace

constexpr Kernels kernels_avx512 = all_kernels("avx512");

}  // namespace convit

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
