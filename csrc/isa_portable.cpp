#include "kernels.h"

#define CONVIT_LANES 4
#define CONVIT_REGISTERS 16
#define CONVIT_PAIRS 0
#define CONVIT_QUERY_VECTORS 2

namespace convit {
namespace {
#include "kernels.inc.h"
}  // namespace

constexpr Kernels kernels_portable = all_kernels("portable");

}  // namespace convit
