// The kernels, written once for vectors of CONVIT_LANES floats. Each isa_*.cpp includes this file, and this file its parts, in a namespace
// of its own with its target in force. Everything has internal linkage and no function of the C++ library is called: an inline function that two
// instruction sets share would be linked once, in the wider one, and crash machines without it.
//
// One matrix product serves all: C[rows][cols] from A by broadcast and B by whole vectors, the result in registers until an "epilogue"
// stores it. With queries along the lanes, the scores of a block of queries are S^T = K Q^T [N][block], so that the softmax is free of
// shuffles and of special cases for the last keys, and S^T is at once the packed left factor of the product with V.
//
// forward, per head, per block of queries and tile of keys: S^T, running maximum (online softmax), exp2, product with V. Where all keys
// are one tile, the position is added to the weights before that product; otherwise V is contracted along x with px, then along y with py.
// backward, per head: the tables' gradients by contractions; per block of queries, whole rows: P^T = exp2(S^T - lse),
// dP^T = V dO^T, delta = sum_j P dP, dS^T = P^T (dP^T - delta), then dV += P^T dO, dK += dS^T Q, dQ = dS K. Whole rows, unlike the
// usual tiles, give delta and the row sum without the saved output: a nearly closed content gate costs no digits.

#include "vectors.inc.h"
#include "product.inc.h"
#include "position.inc.h"
#include "operands.inc.h"
#include "forward.inc.h"
#include "backward.inc.h"
#include "layers.inc.h"

static constexpr Kernels all_kernels(const char* name) {
    return {name,   query_block, backward_block,    forward_scratch,  backward_scratch, backward_sums,
            tables, forward,     backward_position, backward_queries, backward_keys,    gelu,
            gelu_gradient, norm_rows, norm_rows_gradient};
}
