"""``convit.gpsa`` for torch tensors: check the arguments, choose a backend, call it. Beside it, the plain attention and linear layers.

Importing this module registers the operator ``convit::gpsa``: do so before loading a program that was saved by ``torch.export`` or
``torch.jit``.
"""

from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from convit.dispatch import Problem, choose, forced_backend, load, runnable
from convit.kernels.eager import autocast_dtype, bare, eager, exporting_to_onnx, traced
from convit.kernels.gpsa import any_sdpa, reference
from convit.kernels.linear import cpu_onednn

Grid: TypeAlias = tuple[int, int]

load("reference", "sdpa", "cpp")  # with them comes the operator that saved programs ask for


def gpsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gating: Tensor,
    grid: Grid,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Gated positional self-attention (d'Ascoli et al. 2021, equations 7 and 8).

    Per head, the output is ``((1 - g) Pc + g P) v`` with the content softmax ``Pc = softmax(scale * q k^T)``, the position softmax
    ``P = softmax(w0 dx + w1 dy + w2 (dx^2 + dy^2))`` over the patches of the grid and ``g = sigmoid(gating)``.

    Args:
        q, k, v: [B, H, N, D], one floating dtype and device, any strides; a unit last stride avoids a copy.
        pos_weight: [H, 3], the weights (w0, w1, w2) of (dx, dy, dx^2 + dy^2).
        gating: [H], before the sigmoid.
        grid: (gh, gw) with gh * gw == N; patches are in row-major order.
        scale: Of the content scores; default D ** -0.5.
        dropout_p: Attention dropout on the mix of the softmaxes, in [0, 1).
        backend: Force one of ``convit.backends()``; default: context, environment, automatic.

    Returns:
        [B, H, N, D] in the dtype of ``v``.

    Raises:
        ValueError: A shape, grid, device, probability or backend name is wrong.
        TypeError: An argument is no tensor, or the dtypes differ or are not floating.
        RuntimeError: The forced backend cannot run this, or none can; each one's reason is listed.
    """
    _check(q, k, v, pos_weight, gating, grid, dropout_p)
    batch, heads, tokens, head_dim = q.shape
    device = q.device.type
    dtype = autocast_dtype(device)
    if dtype is not None and q.dtype != torch.float64:  # which autocast leaves alone
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    gh, gw = grid
    problem = Problem("torch", device, str(q.dtype)[6:], batch, heads, tokens, head_dim, (gh, gw), dropout_p)
    compiling = torch.compiler.is_compiling()
    forced = forced_backend(backend, compiling)
    if forced is None and not dropout_p and traced() and exporting_to_onnx():
        forced = "sdpa"
    kernel = choose(problem, forced, quiet=compiling)
    scale = head_dim**-0.5 if scale is None else float(scale)
    out: Tensor = kernel.gpsa(q, k, v, pos_weight, gating, (gh, gw), scale, dropout_p)
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float = 0.0) -> Tensor:
    """Plain softmax attention, as ``scaled_dot_product_attention``; on CPU, N queries to N keys, through the faster ``cpp`` kernel.

    PyTorch's own runs where ``cpp`` cannot or is slower, and where autocast would cast, a tracer, a mode or a function transform is at
    work; the definition, where backend ``reference`` is forced.
    """
    forced = forced_backend(None, torch.compiler.is_compiling())
    if forced == "reference":
        return reference.plain_attention(q, k, v, scale, dropout_p)
    if forced not in (None, "cpp") or q.device.type != "cpu" or k.shape != q.shape or autocast_dtype("cpu") not in (None, q.dtype):
        return any_sdpa.fused_attention(q, k, v, scale, dropout_p)
    if exporting_to_onnx() if torch.compiler.is_compiling() else not eager(q, k, v):
        return any_sdpa.fused_attention(q, k, v, scale, dropout_p)
    batch, heads, tokens, head_dim = q.shape
    problem = Problem("torch", "cpu", str(q.dtype)[6:], batch, heads, tokens, head_dim, (1, tokens), dropout_p)
    kernel = runnable("cpp", problem)
    if isinstance(kernel, str) or kernel.slower_than_torch(problem.dtype):
        return any_sdpa.fused_attention(q, k, v, scale, dropout_p)
    out: Tensor = kernel.attention(q, k, v, scale)
    return out


def linear(layer: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """``layer(x)``, then ``act``: for a bare ``nn.Linear`` on CPU the same numbers from a faster product.

    Whatever else the layer is, it is called, and so is every layer where a backend other than ``cpp`` is forced: those run PyTorch's own
    operators.
    """
    if type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling() and bare(layer, nn.Linear):
        held = layer._parameters
        weight, bias = held.get("weight"), held.get("bias")
        # a weight or bias that is no parameter (a buffer, somebody's tensor) is the layer's to find
        if weight is not None and "bias" in held and cpu_onednn.why_not(x, weight, bias) is None and forced_backend(None) in (None, "cpp"):
            gelu = act.approximate if isinstance(act, nn.GELU) and bare(act, nn.GELU) else None
            y = cpu_onednn.linear(x, weight, bias, gelu)
            return y if act is None or gelu else cast(Tensor, act(y))
    y = layer(x)
    return y if act is None else cast(Tensor, act(y))


def _check(q: Any, k: Any, v: Any, pos_weight: Any, gating: Any, grid: Any, dropout_p: float) -> None:
    tensors = {"q": q, "k": k, "v": v, "pos_weight": pos_weight, "gating": gating}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    if q.ndim != 4:
        raise ValueError(f"q must be [B, H, N, D], got shape {list(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} must have the shape of q, {list(q.shape)}, got {list(x.shape)}")
    _, heads, tokens, head_dim = q.shape
    if head_dim == 0:
        raise ValueError("q must have at least one channel per head, got D = 0")
    if pos_weight.shape != (heads, 3):
        raise ValueError(f"pos_weight must be [H, 3] = [{heads}, 3], got {list(pos_weight.shape)}")
    if gating.shape != (heads,):
        raise ValueError(f"gating must be [H] = [{heads}], got {list(gating.shape)}")
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"grid must be a pair (gh, gw), got {grid!r}")
    gh, gw = grid
    if isinstance(gh, float) or isinstance(gw, float):
        raise TypeError(f"grid must be a pair of integers (gh, gw), got {grid!r}")
    if gh < 0 or gw < 0 or gh * gw != tokens:
        raise ValueError(f"grid must have gh * gw == N = {tokens}, got {gh} x {gw}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
