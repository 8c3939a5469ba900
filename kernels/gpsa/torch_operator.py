"""The torch operator ``convit::gpsa`` that the compiled kernels implement: one schema, one kernel per device.

    out [B, H, N, D], lse [B, H, N] = convit::gpsa(q, k, v, pos_weight [H, 3], gating [H], grid_h, grid_w, scale)
    dq, dk, dv, dpos_weight, dgating = convit::gpsa_backward(grad_out, q, k, v, pos_weight, gating, out, lse, grid_h, grid_w, scale)

q, k, v: one dtype, any strides with unit last stride. pos_weight, gating: contiguous float32; on CPU [0, 3] and [0] mean plain attention,
without position. ``lse`` is the float32 log-sum-exp (natural logarithm) of the scaled content scores. ``out``, and each gradient of q, k
and v, is a [B, H, N, D] view of memory laid out [B, N, H, D], so that joining the heads copies nothing.

``cpu_cpp`` and ``gpu_triton`` register themselves with ``register``; this file owns the schema, the shapes the compiler sees and
autograd. An eager call that nothing but autograd would look at takes the short way past the dispatcher: the operator costs a small
call tens of microseconds.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from convit.kernels.eager import eager

_library = torch.library.Library("convit", "DEF")
_library.define(
    "gpsa(Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gating, SymInt grid_h, SymInt grid_w, float scale) -> (Tensor, Tensor)"
)
_library.define(
    "gpsa_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gating, Tensor out, Tensor lse,"
    " SymInt grid_h, SymInt grid_w, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


_kernels: dict[str, tuple[Callable, Callable]] = {}  # device type -> forward, backward


def register(dispatch_key: str, forward: Callable, backward: Callable, device: str | None = None) -> None:
    """Make ``forward`` and ``backward`` the operator's kernels for ``dispatch_key`` ("CPU", "CUDA", "PrivateUse1"), whose tensors are
    on devices of type ``device``: the key in lower case where nothing is said."""
    _library.impl("gpsa", forward, dispatch_key)
    _library.impl("gpsa_backward", backward, dispatch_key)
    _kernels[device or dispatch_key.lower()] = forward, backward


def empty_heads(like: Tensor) -> Tensor:
    """An uninitialised [B, H, N, D] view of [B, N, H, D] memory, with the dtype and device of ``like`` [B, H, N, D]."""
    batch, heads, tokens, dim = like.shape
    return like.new_empty_strided((batch, heads, tokens, dim), (tokens * heads * dim, dim, heads * dim, 1))


@torch.library.register_fake("convit::gpsa")
def _fake_forward(q, k, v, pos_weight, gating, grid_h, grid_w, scale):
    return empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@register_flop_formula([torch.ops.convit.gpsa, torch.ops.convit.gpsa_backward])
def _flops(*shapes: Any, **options: Any) -> int:
    """For ``torch.utils.flop_counter``: q k^T, the product with v and the two contractions; backward two and a half times as much."""
    backward = len(shapes) == 11
    batch, heads, tokens, dim = shapes[0]
    grid_h, grid_w = shapes[-3:-1]
    forward = 2 * batch * heads * tokens * dim * (2 * tokens + grid_h + grid_w)
    return forward * 5 // 2 if backward else forward


@torch.library.register_fake("convit::gpsa_backward")
def _fake_backward(grad_out, q, k, v, pos_weight, gating, out, lse, grid_h, grid_w, scale):
    return empty_heads(q), empty_heads(k), empty_heads(v), torch.empty_like(pos_weight), torch.empty_like(gating)


def _short(*tensors: Tensor) -> bool:
    """Whether a call may go past the dispatcher: where a profiler runs, it is to see the operator."""
    return eager(*tensors) and not torch._C._autograd._profiler_enabled()


def _save(ctx, inputs, output):
    q, k, v, pos_weight, gating, ctx.grid_h, ctx.grid_w, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, pos_weight, gating, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, _grad_lse=None):
    if grad_out is None:
        return (None,) * 8
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    tensors = grad_out, *ctx.saved_tensors
    # where a graph is made of the gradient, the operator has to say that it has none; gradients come in batches (is_grads_batched)
    # in a kind of tensor of their own
    short = not torch.is_grad_enabled() and not torch._C._functorch.is_legacy_batchedtensor(grad_out) and _short(*tensors)
    backward = _kernels[grad_out.device.type][1] if short else torch.ops.convit.gpsa_backward
    return *backward(*tensors, ctx.grid_h, ctx.grid_w, ctx.scale), None, None, None


class _Eager(torch.autograd.Function):
    """The operator's autograd without the operator."""

    @staticmethod
    def forward(ctx, *inputs):
        out, lse = output = _kernels[inputs[0].device.type][0](*inputs)
        _save(ctx, inputs, output)
        return out

    backward = staticmethod(_backward)


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError(
        "convit.gpsa: the fused kernels have no second derivative; use backend='reference' (or convit.use_backend) for double backward"
    )


torch.library.register_autograd("convit::gpsa", _backward, setup_context=_save)
torch.library.register_autograd("convit::gpsa_backward", _no_second_derivative)


def gpsa(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float, dropout_p: float
) -> Tensor:
    """Run the operator on arguments that ``convit.gpsa`` checked and a ``why_not`` accepted. Returns [B, H, N, D]."""
    inputs = q, k, v, pos_weight.float().contiguous(), gating.float().contiguous()
    if not _short(*inputs):
        return torch.ops.convit.gpsa(*inputs, *grid, scale)[0]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _Eager.apply(*inputs, *grid, scale)
    return _kernels[q.device.type][0](*inputs, *grid, scale)[0]
