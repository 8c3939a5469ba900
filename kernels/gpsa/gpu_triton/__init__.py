"""GPSA in Triton on NVIDIA (sm_80 and later), AMD (gfx942) and Ascend (Atlas A2, A3): the kernels of the operator in ``torch_operator``.

    out_i = sum_j ((1 - g) Pc + g P)_ij v_j,    Pc = softmax(scale q k^T),    P = Py (x) Px,    g = sigmoid(gating)

q, k, v [B, H, N, D]; patches i = yi * gw + xi. Weights of P are computed where they are used, from ``pos_weight``: a row of Px or
Py is exp((j - j*) (w + w2 (j + j* - 2i))) with j* the key of the largest logit, exact at any locality strength; no table is stored.

1. float16 and bfloat16 on a padded grid of at most 256 slots (``tile``): a program holds BM query rows against all keys, laid on a
   grid padded to powers of two, so that its tile of P is the outer product of a row of Py and one of Px. The gate is folded into
   the row of Py; one product with v remains. Backward: dq with the gate and weight gradients; dk and dv; a reduction.
   Or, where a row of ``configs.CONFIGS`` has 0 steps, as many programs as run at once, which load the next head's q, k, v meanwhile.
2. Otherwise (``loop``): P v by one small product along each axis, then a plain online softmax that adds it in the epilogue.
   Backward: P^T dO by the same products, the weight gradient from moments of one axis at a time, then dq; dk and dv.
   Or, where the table ``configs.CONTENT`` says so, content and its gradients are torch's, and the last product adds position to them.

Nothing N x N leaves the chip, nothing is added atomically: the same input gives the same bits. Deviations from ``reference.py``:
no attention dropout; no float64; past 2^24 the exponent of a score is scaled down instead of overflowing (``common.cap``).

``configs`` says where and in what sizes; ``common``, ``tile`` and ``loop`` are the device's side; ``launch`` is the host's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from convit.kernels.gpsa import torch_operator
from convit.kernels.gpsa.gpu_triton import launch  # registers the operator's kernels
from convit.kernels.gpsa.gpu_triton.configs import DEVICES, INTERPRET, LARGEST_D, TILE_D, most_programs

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
    device = DEVICES[problem.device]
    largest = min(device.largest_d, TILE_D if problem.dtype == "float32" else LARGEST_D)
    if problem.head_dim > largest:
        return f"head dimension {problem.head_dim} is larger than {largest} in {problem.dtype}: 'sdpa' serves it"
    assert problem.batch is not None, "torch always knows it"
    programs = most_programs(problem.batch, problem.heads, problem.grid, problem.dtype != "float32")
    if programs > device.programs:
        return f"{programs} programs in a launch, and {problem.device} takes {device.programs}: use smaller batches"
    return device.why_not()


gpsa = torch_operator.gpsa


@torch.inference_mode(False)  # in which no gradient is to be had
def compile_ahead(problem: Problem, training: bool = True) -> float:
    """Compile what a call of ``problem`` will launch, on the current device, by one call on zeros in the layout of ``convit.GPSA``.

    Otherwise the first call with each new grid waits for it. The compiled kernels also stay in Triton's cache on disk, for the
    processes that come after.

    Args:
        problem: As ``convit.why_not`` takes it; batch and heads count, since many of them change how much a program does.
        training: Also what the backward pass launches.

    Returns:
        The seconds it took.

    Raises:
        ValueError: The kernels do not run this problem, or it has no batch.
    """
    if problem.batch is None:
        raise ValueError(f"compile_ahead needs the batch, which changes how much a program does: {problem}._replace(batch=...)")
    if reason := why_not(problem):
        raise ValueError(f"convit: backend 'triton' cannot run {problem}: {reason}")
    began = time.perf_counter()
    batch, heads, tokens, dim = problem.batch, problem.heads, problem.tokens, problem.head_dim
    dtype = getattr(torch, problem.dtype)
    q, k = torch.zeros((batch, tokens, 2, heads, dim), dtype=dtype, device=problem.device).permute(2, 0, 3, 1, 4).unbind(0)
    v, grad_out = torch.zeros((2, batch, tokens, heads, dim), dtype=dtype, device=problem.device).transpose(2, 3).unbind(0)
    parameters = torch.zeros((heads, 3), device=problem.device), torch.zeros(heads, device=problem.device)
    rest = *problem.grid, dim**-0.5
    out, lse = launch.forward(q, k, v, *parameters, *rest)
    if training:
        launch.backward(grad_out, q, k, v, *parameters, out, lse, *rest)
    torch.get_device_module(problem.device).synchronize()
    return time.perf_counter() - began
