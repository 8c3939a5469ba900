#include "kernels.h"

#if defined(__aarch64__)
#define CONVIT_LANES 4
#define CONVIT_REGISTERS 32
#define CONVIT_PAIRS 0
#define CONVIT_QUERY_VECTORS 4

namespace convit {
namespace {
#include "kernels.inc.h"
}  // namespace

constexpr Kernels kernels_neon = all_kernels("neon");

}  // namespace convit
#endif
