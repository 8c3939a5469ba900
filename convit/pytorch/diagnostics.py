"""What the paper looks at while a ConViT trains: the gates, and how far each head looks, on each layer's own input.

    gate        g = sigmoid(gating), per GPSA layer and head: 1 looks by position only, 0 by content only
    distance    D = 1/N sum_ij A_ij |p_i - p_j| in patches, per layer and head, averaged over the images (d'Ascoli et al. 2021, eq. 9)
    nonlocality the mean of D over the heads of a layer

No N x N matrix is stored. Of GPSA's mix, the positional half comes from the factored tables: with the sums of their diagonals Qx[dx]
and Qy[dy] it is 1/N sum_dx,dy Qx Qy sqrt(dx^2 + dy^2). The content half is formed for one row of patches at a time.
In MHSA layers class and register tokens have no place: rows are taken over the patches and scaled to one, as the module's
``get_attention_map`` does.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convit.kernels.gpsa.reference import position_tables
from convit.pytorch.grid import square_grid

Grid = tuple[int, int]


def gates(model: nn.Module) -> list[list[float]]:
    """sigmoid(gating) of every GPSA layer: [layer][head]. For our model, timm's and FAIR's."""
    found = (getattr(module, "gating_param", None) for module in model.modules())
    return [gate.detach().float().sigmoid().tolist() for gate in found if isinstance(gate, nn.Parameter)]


def attentions(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of every attention layer, GPSA and MHSA, in order."""
    found = [(name, module) for name, module in model.named_modules() if hasattr(module, "gating_param") or hasattr(module, "qkv")]
    if not found:
        raise ValueError(f"model must be a ConViT, got {type(model).__name__} without GPSA or MHSA layers")
    return found


@torch.no_grad()
def layer_inputs(model: Any, images: Tensor) -> dict[str, tuple[Tensor, Grid]]:
    """The input [B, N, C] of each attention layer for ``images`` [B, C, H, W], and the patch grid, by the layer's name.

    The model runs once in evaluation mode and is left in the mode it was in.
    """
    found: dict[str, tuple[Tensor, Grid]] = {}
    patch = model.patch_embed.proj.kernel_size
    grid = (images.shape[-2] // patch[0], images.shape[-1] // patch[1])

    def keep(name: str) -> Any:
        return lambda module, arguments: found.__setitem__(name, (arguments[0].detach(), grid))

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in attentions(model)]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return found


class LayerRows(NamedTuple):
    """Where the heads of one layer look from one patch: [H, gh, gw], and their gates if it is a GPSA layer."""

    maps: Tensor
    gates: list[float] | None


class AttentionRows(NamedTuple):
    """``attention_rows`` of an image: the grid of patches, the patch that looks, and every layer."""

    grid: Grid
    query: tuple[int, int]
    layers: list[LayerRows]


@torch.no_grad()
def attention_rows(model: Any, images: Tensor, query: tuple[int, int] | None = None) -> AttentionRows:
    """Where every head looks from one patch of an image, each layer on its own input; class and register tokens are left out.

    Args:
        model: Our ConViT, or timm's or FAIR's; left as it was.
        images: [1, C, H, W], normalised, on the model's device.
        query: (row, column) of the patch; default the middle of the grid.

    Raises:
        ValueError: The query is outside the grid, or the model has no GPSA or MHSA layers.
    """
    inputs = layer_inputs(model, images)
    grid = gh, gw = next(iter(inputs.values()))[1]
    row, column = query if query is not None else (gh // 2, gw // 2)
    if not (0 <= row < gh and 0 <= column < gw):
        raise ValueError(f"query must be a patch of the {gh} x {gw} grid, got {row},{column}")
    layers = []
    for name, module in attentions(model):
        x, _ = inputs[name]
        prefix = x.shape[1] - gh * gw
        at = prefix + row * gw + column
        gates = None
        if hasattr(module, "gating_param"):
            q, k = _project(module.qk(x), 2, module.num_heads)
            px, py = position_tables(module.pos_proj.weight.float(), grid)
            gate = module.gating_param.float().sigmoid()[:, None]
            position = (py[:, row, :, None] * px[:, column, None, :]).flatten(1)
            gates = gate[:, 0].tolist()
        else:
            q, k, _ = _project(module.qkv(x), 3, module.num_heads)
        found = ((q[0, :, at : at + 1] @ k[0].transpose(-2, -1)) * module.scale).softmax(-1)[:, 0]  # [H, N]
        if gates is not None:
            found = (1 - gate) * found + gate * position
        layers.append(LayerRows(found[:, prefix:].reshape(-1, gh, gw).cpu(), gates))
    return AttentionRows(grid, (row, column), layers)


@torch.no_grad()
def diagnose(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Gates, attention distances and non-locality of a model on a batch, ready for a line of JSON.

    Args:
        model: Our ConViT, or timm's or FAIR's; left as it was.
        images: [B, C, H, W], normalised, on the model's device; some tens are enough.

    Returns:
        {"gate": [GPSA layer][head], "distance": [layer][head], "nonlocality": [layer]}; distances in patches.

    Raises:
        ValueError: The model has no GPSA or MHSA layers.
    """
    inputs = layer_inputs(model, images)
    distances = [attention_distance(module, *inputs[name]).tolist() for name, module in attentions(model)]
    return {"gate": gates(model), "distance": distances, "nonlocality": [sum(heads) / len(heads) for heads in distances]}


@torch.no_grad()
def attention_distance(module: Any, x: Tensor, grid: Grid | None = None) -> Tensor:
    """The mean attention distance of each head of a GPSA or MHSA layer on its input ``x`` [B, N, C], in patches: [H] float32."""
    if hasattr(module, "gating_param"):
        grid = grid or square_grid(x.shape[1])
        q, k = _project(module.qk(x), 2, module.num_heads)
        gate = module.gating_param.float().sigmoid()
        position = position_distance(module.pos_proj.weight.float(), grid)
        return (1 - gate) * _content_distance(q, k, module.scale, grid) + gate * position
    q, k, _ = _project(module.qkv(x), 3, module.num_heads)
    if grid is None:
        grid = square_grid(x.shape[1] - 1)
    prefix = x.shape[1] - grid[0] * grid[1]
    return _content_distance(q[:, :, prefix:], k[:, :, prefix:], module.scale, grid)


def position_distance(pos_weight: Tensor, grid: Grid) -> Tensor:
    """The mean distance under the position softmax alone, [H], from ``pos_weight`` [H, 3]."""
    px, py = position_tables(pos_weight, grid)
    gh, gw = grid
    sums_x = torch.stack([px.diagonal(d, -2, -1).sum(-1) for d in range(1 - gw, gw)], -1)
    sums_y = torch.stack([py.diagonal(d, -2, -1).sum(-1) for d in range(1 - gh, gh)], -1)
    dx = torch.arange(1 - gw, gw, device=pos_weight.device, dtype=pos_weight.dtype)
    dy = torch.arange(1 - gh, gh, device=pos_weight.device, dtype=pos_weight.dtype)
    return torch.einsum("hy,hx,yx->h", sums_y, sums_x, torch.hypot(dy[:, None], dx[None, :])) / (gh * gw)


def _project(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    batch, tokens, _ = x.shape
    return x.float().view(batch, tokens, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _content_distance(q: Tensor, k: Tensor, scale: float, grid: Grid) -> Tensor:
    """Mean over images and queries of sum_j softmax_j(scale q.k) |p_i - p_j|, [H]; one row of the grid of queries at a time."""
    gh, gw = grid
    batch, heads, _, _ = q.shape
    y, x = torch.meshgrid(torch.arange(gh, device=q.device), torch.arange(gw, device=q.device), indexing="ij")
    points = torch.stack([y.flatten(), x.flatten()], -1).float()
    total = q.new_zeros(heads)
    for row in range(gh):
        rows = slice(row * gw, (row + 1) * gw)
        content = ((q[:, :, rows] @ k.transpose(-2, -1)) * scale).softmax(dim=-1)  # [B, H, gw, N]
        total += torch.einsum("bhij,ij->h", content, torch.cdist(points[rows], points))
    return total / (batch * gh * gw)
