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

from convit.kernels.eager import batched_gradient, eager, functionalized, profiled, tangents, transformed
from convit.kernels.gpsa import reference

_library = torch.library.Library("convit", "DEF")
_library.define(
    "gpsa(Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gating, SymInt grid_h, SymInt grid_w, float scale) -> (Tensor, Tensor)"
)
_library.define(
    "gpsa_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gating, Tensor out, Tensor lse,"
    " SymInt grid_h, SymInt grid_w, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


_kernels: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}  # device type -> forward, backward
_leaves_out: set[str] = set()  # device types whose backward does not read ``out``: it is not saved, and may be written to


def register(
    dispatch_key: str, forward: Callable[..., Any], backward: Callable[..., Any], device: str | None = None, reads_out: bool = True
) -> None:
    """Make ``forward`` and ``backward`` the operator's kernels for ``dispatch_key`` ("CPU", "CUDA", "PrivateUse1"), whose tensors are
    on devices of type ``device``: the key in lower case where nothing is said."""
    device = device or dispatch_key.lower()
    (_leaves_out.discard if reads_out else _leaves_out.add)(device)
    _library.impl("gpsa", forward, dispatch_key)
    _library.impl("gpsa_backward", backward, dispatch_key)
    _kernels[device] = forward, backward


def empty_heads(like: Tensor) -> Tensor:
    """An uninitialised [B, H, N, D] view of [B, N, H, D] memory, with the dtype and device of ``like`` [B, H, N, D]."""
    batch, heads, tokens, dim = like.shape
    return like.new_empty_strided((batch, heads, tokens, dim), (tokens * heads * dim, dim, heads * dim, 1))


@torch.library.register_fake("convit::gpsa")
def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid_h: int, grid_w: int, scale: float
) -> tuple[Tensor, Tensor]:
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
def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return empty_heads(q), empty_heads(k), empty_heads(v), torch.empty_like(pos_weight), torch.empty_like(gating)


def _definition(q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float) -> Tensor:
    """What the operator computes, differentiable to any order and in any mode."""
    if len(gating) < q.shape[1]:
        return reference.plain_attention(q, k, v, scale)
    return reference.gpsa(q, k, v, pos_weight, gating, grid, scale, 0.0)


def _definition_gradients(grad_out: Tensor, *inputs: Tensor, grid: tuple[int, int], scale: float) -> tuple[Tensor, ...]:
    pull = torch.func.vjp(lambda *given: _definition(*given, grid=grid, scale=scale), *inputs)[1]  # type: ignore[misc]
    gradients: tuple[Tensor, ...] = pull(grad_out)
    return gradients


def _short(*tensors: Tensor) -> bool:
    """Whether a call may go past the dispatcher: where a profiler runs, it is to see the operator."""
    return eager(*tensors) and not profiled()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, pos_weight, gating, ctx.grid_h, ctx.grid_w, ctx.scale = inputs
    out, lse = output
    if q.device.type in _leaves_out:
        out = v  # which is saved anyway
    ctx.save_for_backward(q, k, v, pos_weight, gating, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 8
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    tensors = grad_out, *ctx.saved_tensors
    sizes = ctx.grid_h, ctx.grid_w, ctx.scale
    if torch.compiler.is_compiling():
        gradients = torch.ops.convit.gpsa_backward(*tensors, *sizes)
    elif tangents() or functionalized() or (torch.is_grad_enabled() and batched_gradient(grad_out)):
        gradients = _definition_gradients(*tensors[:6], grid=(ctx.grid_h, ctx.grid_w), scale=ctx.scale)
    elif torch.is_grad_enabled() or transformed():  # a graph is made of the gradient
        gradients = _Gradient.apply(*tensors, *sizes)
    elif not batched_gradient(grad_out) and _short(*tensors):
        gradients = _kernels[grad_out.device.type][1](*tensors, *sizes)
    else:
        gradients = torch.ops.convit.gpsa_backward(*tensors, *sizes)
    return *gradients, None, None, None


class _Eager(torch.autograd.Function):
    """The operator's autograd without the operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out, lse = output = _kernels[inputs[0].device.type][0](*inputs)
        _save(ctx, inputs, output)
        return out

    backward = staticmethod(_backward)


# In q, k, v, pos_weight, gating: the axis of the heads. What ``vmap`` maps becomes further heads, so that even the gradients of the
# parameters come apart.
_HEADS = (1, 1, 1, 0, 0)


def _more_heads(size: int, x: Tensor, dim: int | None, axis: int) -> Tensor:
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, axis).flatten(axis, axis + 1).contiguous()


class _Transformed(torch.autograd.Function):
    """The operator under ``torch.func``: reverse mode to any order, and ``vmap``."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        output: tuple[Tensor, Tensor] = torch.ops.convit.gpsa(*inputs)
        return output

    setup_context = staticmethod(_save)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        size = info.batch_size
        tensors = [_more_heads(size, *given) for given in zip(inputs[:5], in_dims[:5], _HEADS, strict=True)]
        output = _Transformed.apply(*tensors, *inputs[5:])
        return tuple(x.unflatten(1, (size, -1)) for x in output), (1, 1)


class _Gradient(torch.autograd.Function):
    """``convit::gpsa_backward`` where a graph is made of it: its own gradient is the definition's."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = torch.ops.convit.gpsa_backward(*inputs)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:6])  # the gradient of the output and the inputs
        ctx.grid, ctx.scale = inputs[8:10], inputs[10]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pull = torch.func.vjp(lambda *given: _definition_gradients(*given, grid=ctx.grid, scale=ctx.scale), *ctx.saved_tensors)[1]
        return *pull(grads), None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size
        tensors = [_more_heads(size, *given) for given in zip(inputs[:8], in_dims[:8], (1, *_HEADS, 1, 1), strict=True)]
        output = _Gradient.apply(*tensors, *inputs[8:])
        return tuple(x.unflatten(axis, (size, x.shape[axis] // size)) for x, axis in zip(output, _HEADS, strict=True)), _HEADS


torch.library.register_autograd("convit::gpsa", _backward, setup_context=_save)
torch.library.register_autograd("convit::gpsa_backward", _Gradient.backward, setup_context=_Gradient.setup_context)


def gpsa(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float, dropout_p: float
) -> Tensor:
    """Run the operator on arguments that ``convit.gpsa`` checked and a ``why_not`` accepted. Returns [B, H, N, D]."""
    inputs = q, k, v, pos_weight.float().contiguous(), gating.float().contiguous()
    out: Tensor
    compiling = torch.compiler.is_compiling()
    if tangents() or (compiling and transformed()) or functionalized():
        out = _definition(q, k, v, pos_weight, gating, grid, scale)
    elif not compiling and transformed():
        out = _Transformed.apply(*inputs, *grid, scale)[0]
    elif compiling or not _short(*inputs):
        out = torch.ops.convit.gpsa(*inputs, *grid, scale)[0]
    elif torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        out = _Eager.apply(*inputs, *grid, scale)
    else:
        out = _kernels[q.device.type][0](*inputs, *grid, scale)[0]
    return out
