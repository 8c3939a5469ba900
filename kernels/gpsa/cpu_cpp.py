"""Launchers of the C++ kernels (csrc/) for torch tensors on CPU: ``convit::gpsa`` and its gradient under the key "CPU".

    out = ((1 - g) Pc + g P) v,   lse = log sum_j exp(scale q k^T)          shapes in torch_operator.py, mathematics in README.md

Per head and block of queries: (1) scores with queries along the lanes, S^T = K Q^T, (2) online softmax over tiles of keys, (3) product
with v. Up to 256 tokens the positional softmax is added to the weights before (3); beyond, it contracts v with px along x and py along
y. The gradient recomputes the softmax from ``lse``, whole rows of one block of queries at a time; ``out`` is not needed.
Deviations from ``reference.py``: the halves are mixed after their softmaxes, so there is no attention dropout; exp is a polynomial
(relative error 1e-7); float32, bfloat16 and float16 only, arithmetic in float32, but products of bfloat16 where the instruction set
has them: then the weights and their gradients are rounded to bfloat16 as factors of the products that follow.
"""

import os
from operator import mul
from typing import Any

import torch
from torch import Tensor

from convit.kernels.gpsa import torch_operator
from convit.kernels.gpsa.torch_operator import empty_heads

try:
    import convit._C as _C

    _broken = None
except ModuleNotFoundError:
    _C, _broken = None, "the C++ extension was not built (install with CONVIT_BUILD_EXT=1 to see why)"
except ImportError as error:
    _C, _broken = None, f"the C++ extension does not load (built for another Python or machine?): {error}"

if _C is not None and os.environ.get("TRITON_INTERPRET") == "1":
    _C, _broken = None, "TRITON_INTERPRET=1 gives the CPU to the interpreted Triton kernels"

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # numbers of DType in csrc/gpsa.h
_AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
_NAMES = [str(dtype)[6:] for dtype in _DTYPES]


def _strided(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride()[:3])


def _unit(x: Tensor) -> Tensor:
    """``x`` with a unit last stride: itself, but for odd views (and D = 1, whose stride may be anything)."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _check(q: Tensor, pos_weight: Tensor, gating: Tensor, grid_h: int, grid_w: int, **others: Tensor) -> None:
    """What the kernels rely on to stay inside memory: the operator can also be called directly."""
    for name, x in {"q": q, "pos_weight": pos_weight, "gating": gating, **others}.items():
        strides, held = x.stride(), x.untyped_storage().nbytes()
        last = x.storage_offset() + sum(map(mul, x.shape, strides)) - sum(strides)
        if (last + 1) * x.element_size() > held and x.numel():
            raise RuntimeError(f"{name} reaches past the end of its storage, {held} bytes: was it resized or freed?")
    if q.dtype not in _DTYPES:
        raise TypeError(f"q must be one of {', '.join(_NAMES)}, got {q.dtype}")
    for name, x in others.items():
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be like q, {list(q.shape)} {q.dtype} on {q.device}, got {list(x.shape)} {x.dtype} on {x.device}")
    heads = q.shape[1] if pos_weight.numel() or gating.numel() else 0  # no heads here: no position
    for name, x, shape in (("pos_weight", pos_weight, (heads, 3)), ("gating", gating, (heads,))):
        if x.shape != shape or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous float32 {list(shape)}, got {x.dtype} {list(x.shape)}")
    if grid_h < 0 or grid_w < 0 or grid_h * grid_w != q.shape[2]:
        raise ValueError(f"grid must have gh * gw == N = {q.shape[2]}, got {grid_h} x {grid_w}")


def _forward(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid_h: int, grid_w: int, scale: float
) -> tuple[Tensor, Tensor]:
    _check(q, pos_weight, gating, grid_h, grid_w, k=k, v=v)
    q, k, v = _unit(q), _unit(k), _unit(v)
    out, lse = empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    _C.forward(
        (q.shape[0], q.shape[1], grid_h, grid_w, q.shape[3]),
        scale,
        _DTYPES[q.dtype],
        _strided(q),
        _strided(k),
        _strided(v),
        pos_weight.data_ptr(),
        gating.data_ptr(),
        _strided(out),
        lse.data_ptr(),
        torch.get_num_threads(),
    )
    return out, lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating: Tensor,
    out: Tensor,
    lse: Tensor,
    grid_h: int,
    grid_w: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(q, pos_weight, gating, grid_h, grid_w, k=k, v=v, grad_out=grad_out)
    if lse.shape != q.shape[:3] or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(f"lse must be contiguous float32 {list(q.shape[:3])}, got {lse.dtype} {list(lse.shape)}")
    grad_out, q, k, v = _unit(grad_out), _unit(q), _unit(k), _unit(v)
    dq, dk, dv = empty_heads(q), empty_heads(k), empty_heads(v)
    dpos_weight, dgating = torch.empty_like(pos_weight), torch.empty_like(gating)
    _C.backward(
        (q.shape[0], q.shape[1], grid_h, grid_w, q.shape[3]),
        scale,
        _DTYPES[q.dtype],
        _strided(grad_out),
        _strided(q),
        _strided(k),
        _strided(v),
        pos_weight.data_ptr(),
        gating.data_ptr(),
        lse.data_ptr(),
        _strided(dq),
        _strided(dk),
        _strided(dv),
        dpos_weight.data_ptr(),
        dgating.data_ptr(),
        torch.get_num_threads(),
    )
    return dq, dk, dv, dpos_weight, dgating


if _C is not None:
    torch_operator.register("CPU", _forward, _backward, reads_out=False)


def describe() -> dict[str, str]:
    """What ``convit env`` prints: the instruction set in use, those that this machine can run, the thread runtime; or why there is none."""
    if _C is None:
        return {"available": f"no: {_broken}"}
    try:
        used = _C.instruction_set()
    except ValueError as error:
        used = f"none: {error}"
    return {
        "available": "yes",
        "instruction set": used,
        "instruction sets": ", ".join(_C.instruction_sets()),
        "threads": f"{torch.get_num_threads()} ({_C.thread_runtime()})",
    }


def why_not(problem: Any) -> str | None:
    if _C is None:
        return _broken
    if problem.framework != "torch" or problem.device != "cpu":
        return f"the tensors are on {problem.device}" if problem.framework == "torch" else "the tensors are not torch tensors"
    if problem.dtype not in _NAMES:
        return f"{problem.dtype} is not supported ({', '.join(_NAMES)} only)"
    if problem.dropout_p > 0:
        return "attention dropout is not supported: one mask must cover both softmaxes"
    return None


gpsa = torch_operator.gpsa


def slower_than_torch(dtype: str) -> bool:
    """Whether PyTorch's own attention is expected to be faster: in bfloat16 on a matrix unit (AMX), which these kernels do not use."""
    return dtype == "bfloat16" and _AMX


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v, plain attention: the operator with the position weights and gates of no heads. Returns [B, H, N, D]."""
    none = q.new_empty(0, dtype=torch.float32)
    return torch_operator.gpsa(q, k, v, none.view(0, 3), none, (1, q.shape[2]), scale, 0.0)
