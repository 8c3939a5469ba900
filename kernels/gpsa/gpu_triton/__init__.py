"""GPSA on NVIDIA (sm_80 and later) and AMD (gfx942) GPUs in Triton: the kernels of the operator in ``torch_operator.py``.

    out_i = sum_j ((1 - g) Pc + g P)_ij v_j,    Pc = softmax(scale q k^T),    P = Py (x) Px,    g = sigmoid(gating)

q, k, v [B, H, N, D]; patches i = yi * gw + xi. Weights of P are computed where they are used, from ``pos_weight``: a row of Px or
Py is exp((j - j*) (w + w2 (j + j* - 2i))) with j* the key of the largest logit, exact at any locality strength; no table is stored.

1. float16 and bfloat16 on a padded grid of at most 256 slots (``tile``): a program holds BM query rows against all keys, laid on a
   grid padded to powers of two, so that its tile of P is the outer product of a row of Py and one of Px. The gate is folded into
   the row of Py; one product with v remains. Backward: dq with the gate and weight gradients; dk and dv; a reduction.
2. Otherwise (``loop``): P v by one small product along each axis, then a plain online softmax that adds it in the epilogue.
   Backward: P^T dO by the same products, the weight gradient from moments of one axis at a time, then dq; dk and dv.

Nothing N x N leaves the chip, nothing is added atomically: the same input gives the same bits. Deviations from ``reference.py``:
no attention dropout; no float64; past 2^24 the exponent of a score is scaled down instead of overflowing (``common.cap``).

``configs`` says where and in what sizes; ``common``, ``tile`` and ``loop`` are the device's side; ``launch`` is the host's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from convit.kernels.gpsa import torch_operator
from convit.kernels.gpsa.gpu_triton import launch  # registers the operator's kernels  # noqa: F401
from convit.kernels.gpsa.gpu_triton.configs import DEVICES, INTERPRET, LARGEST_D

if TYPE_CHECKING:
    from convit.dispatch import Problem


def why_not(problem: Problem) -> str | None:
    if problem.framework != "torch":
        return "the tensors are not torch tensors"
    if problem.device not in DEVICES:
        return f"tensor is on {problem.device}" + (", and TRITON_INTERPRET runs the kernels on cpu" if INTERPRET else "")
    if problem.dropout_p > 0:
        return "attention dropout is not supported"
    if problem.dtype not in ("float32", "float16", "bfloat16"):
        return f"{problem.dtype} is not supported (float32, float16 and bfloat16 are)"
    if INTERPRET and problem.dtype == "bfloat16":
        return "Triton's interpreter computes bfloat16 wrongly"
    if problem.head_dim > LARGEST_D:
        return f"head dimension {problem.head_dim} is larger than {LARGEST_D}"
    return DEVICES[problem.device].why_not()


gpsa = torch_operator.gpsa
