"""``convit.gpsa`` for torch tensors: check the arguments, choose a backend, call it. Beside it, the plain attention and linear layers."""

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convit.dispatch import Problem, choose, forced_backend, why_not
from convit.kernels.eager import eager
from convit.kernels.linear import cpu_onednn

Grid: TypeAlias = tuple[int, int]


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
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    elif not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    gh, gw = grid
    problem = Problem("torch", device, str(q.dtype)[6:], batch, heads, tokens, head_dim, (gh, gw), dropout_p)
    kernel = choose(problem, forced_backend(backend))
    scale = head_dim**-0.5 if scale is None else float(scale)
    return kernel.gpsa(q, k, v, pos_weight, gating, (gh, gw), scale, dropout_p)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float = 0.0) -> Tensor:
    """Plain softmax attention, as ``scaled_dot_product_attention``; float32 on CPU, N queries to N keys, through the faster ``cpp`` kernel.

    PyTorch's own runs where another backend is forced, and where autocast, a tracer, a mode or a function transform is at work.
    """
    usual = q.device.type != "cpu" or q.dtype != torch.float32 or k.shape != q.shape or torch.is_autocast_enabled("cpu")
    if usual or forced_backend(None) not in (None, "cpp") or not (torch.compiler.is_compiling() or eager(q, k, v)):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    batch, heads, tokens, head_dim = q.shape
    problem = Problem("torch", "cpu", "float32", batch, heads, tokens, head_dim, (1, tokens), dropout_p)
    if why_not("cpp", problem):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    return choose(problem, "cpp").attention(q, k, v, scale)


def linear(layer: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """``layer(x)``, then ``act``: for a plain ``nn.Linear`` on CPU the same numbers from a faster product.

    Layers that somebody has replaced, subclassed or hooked are called as they are, and so is every layer where a backend other than
    ``cpp`` is forced: those run PyTorch's own operators.
    """
    if type(layer) is nn.Linear and bare(layer) and forced_backend(None) in (None, "cpp") and cpu_onednn.why_not(x, layer.weight) is None:
        gelu = act.approximate if type(act) is nn.GELU and bare(act) else None
        y = cpu_onednn.linear(x, layer.weight, layer.bias, gelu)
        return y if act is None or gelu else act(y)
    y = layer(x)
    return y if act is None else act(y)


def bare(module: nn.Module) -> bool:
    """Whether calling ``module`` runs the ``forward`` of its class and nothing else: no hook, no replacement on the instance."""
    own = nn.modules.module
    everywhere = own._global_forward_pre_hooks or own._global_forward_hooks or own._global_backward_pre_hooks or own._global_backward_hooks
    here = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return not (everywhere or here or "forward" in module.__dict__)


def _check(q, k, v, pos_weight, gating, grid, dropout_p) -> None:
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
