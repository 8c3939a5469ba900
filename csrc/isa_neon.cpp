#include "kernels.h"

#if defined(__aarch64__)
#define CONVIT_LANES 4
#define CONVIT_REGISTERS 32
#define CONVIT_QUERY_VECTORS 4

namespace convit {
namespace {
#include "kernels.inc.h"
}  // namespace

const Kernels kernels_neon = {"neon", query_block, forward_scratch, backward_scratch, tables, forward, backward};

}  // namespace convit
#endif
