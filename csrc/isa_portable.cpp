#include "kernels.h"

#define CONVIT_LANES 4
#define CONVIT_REGISTERS 16
#define CONVIT_QUERY_VECTORS 2

namespace convit {
namespace {
#include "kernels.inc.h"
}  // namespace

const Kernels kernels_portable = {"portable", query_block, forward_scratch, backward_scratch, tables, forward, backward};

}  // namespace convit
