"""The attention modules of ConViT: GPSA and MHSA, with timm's signatures and state dicts."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from convit import ops
from convit.kernels.eager import bare, intercepted, know, placed_like, plain
from convit.kernels.gpsa import reference
from convit.pytorch.grid import Grid, ImageGrid, Ways, is_square, square_grid, takes_grid


def local_offsets(num_heads: int) -> list[tuple[float, float]]:
    """Where each head looks after ``GPSA.local_init``: one (dx, dy) per head, in patches.

    As in the paper, the first k * k heads (k = floor(sqrt(H))) stand on a k x k square centred on the query, column by column. Where
    H is no square, the paper leaves the further heads at random; here they take the free points of the same lattice nearest to
    the query, ties row by row, so that every head starts as a convolution.
    """
    k = math.isqrt(num_heads)
    centre = (k - 1) / 2
    square = [(h2 - centre, h1 - centre) for h2 in range(k) for h1 in range(k)]
    around = [(x - centre, y - centre) for y in range(-1, k + 1) for x in range(-1, k + 1)]
    around = sorted((o for o in around if o not in square), key=lambda o: (o[0] ** 2 + o[1] ** 2, o[1], o[0]))
    return square + around[: num_heads - k * k]


class GPSA(nn.Module):
    """Gated positional self-attention (d'Ascoli et al. 2021, section 3), in place of timm's module of the same name.

    Args:
        dim: Channels C of the input, a multiple of ``num_heads``.
        num_heads: Heads H.
        qkv_bias: Whether the query, key and value projections have biases.
        attn_drop: Dropout on the gated mix of the softmaxes. Above 0 it is slow while training: only the reference has it.
        proj_drop: Dropout after the output projection.
        locality_strength: Sharpness of the local initialisation, alpha in the paper.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    image_grid: ImageGrid | None = None  # set by a model, or ``accelerate``, for calls that give no grid
    scripted_grid = (0, 0)  # what it says when TorchScript compiles the module, which cannot ask; (0, 0) for the square
    __jit_ignored_attributes__ = ["image_grid"]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        locality_strength: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        if not math.isfinite(locality_strength):
            raise ValueError(f"locality_strength must be finite, got {locality_strength}")
        self.dim = dim
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.locality_strength = locality_strength
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qk = nn.Linear(dim, dim * 2, bias=qkv_bias, **where)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, **where)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **where)
        self.pos_proj = nn.Linear(3, num_heads, **where)
        self.proj_drop = nn.Dropout(proj_drop)
        self.gating_param = nn.Parameter(torch.ones(num_heads, **where))

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Attend over the patches of an image.

        Args:
            x: [B, N, C], patches in row-major order, no class token.
            grid: (gh, gw) with gh * gw == N; default square.

        Returns:
            [B, N, C].

        Raises:
            ValueError: N does not fit the grid, or is no square and no grid is given.
        """
        if torch.jit.is_scripting():
            return self._scripted(x, grid)
        else:
            return self._forward(x, grid)

    def _forward(self, x: Tensor, grid: Grid | None) -> Tensor:
        batch, tokens, dim = _sizes(x)
        dropout_p = _dropout(self.attn_drop)
        if _own(self, GPSA, "get_attention"):
            args, named = told(self, takes_grid(self.get_attention), x, grid)
            out = self.get_attention(*args, **named) @ self._value(x)
        elif dropout_p is None or not self._position_is_bare(tokens):
            out = self.get_attention(x, grid) @ self._value(x)
        else:
            q, k = self._query_key(x)
            v = self._value(x)  # after them, as in timm: who draws numbers inside the layers draws the same
            grid = self._grid(tokens, grid)
            out = ops.gpsa(q, k, v, self._position_weight(), self._gate(), grid, scale=self.scale, dropout_p=dropout_p)
        return _project(self, out, batch, tokens, dim)

    def _scripted(self, x: Tensor, grid: Grid | None) -> Tensor:
        """The formula in what TorchScript compiles, for a square grid where none is given."""
        batch, tokens, dim = x.shape
        qk = self.qk(x).view(batch, tokens, 2, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        v = self.v(x).view(batch, tokens, self.num_heads, dim // self.num_heads).transpose(1, 2)
        content = ((qk[0] @ qk[1].transpose(-2, -1)) * self.scale).softmax(dim=-1)
        side = int(tokens**0.5)
        gh, gw = grid if grid is not None else (side, side)
        if grid is None and self.scripted_grid[0] * self.scripted_grid[1] == tokens:
            gh, gw = self.scripted_grid
        assert gh * gw == tokens, "the patches form no such grid: pass grid=(gh, gw)"
        index = torch.arange(tokens, device=x.device)
        dx = (index % gw)[None, :] - (index % gw)[:, None]
        dy = (index // gw)[None, :] - (index // gw)[:, None]
        rel = torch.stack([dx, dy, dx**2 + dy**2], dim=-1)[None].to(self.gating_param.dtype)
        position = self.pos_proj(rel).permute(0, 3, 1, 2).softmax(dim=-1)
        gate = torch.sigmoid(self.gating_param).view(1, -1, 1, 1)
        attn = self.attn_drop((1.0 - gate) * content + gate * position)
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(batch, tokens, dim)))

    def get_attention(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """The gated mix of the two softmaxes, [B, H, N, N], after attention dropout; formed in full, for looking at."""
        q, k = self._query_key(x)
        tokens, gate = x.shape[1], self._gate()
        if self._position_is_bare(tokens):
            attn = reference.attention_map(q, k, self._position_weight(), gate, self._grid(tokens, grid), self.scale)
        else:  # somebody's own: asked for its output, as in timm
            rel = self._own_indices(tokens)
            if rel is None:
                rel = placed_like(gate, self._indices(self._grid(tokens, grid)))
            position = self.pos_proj(rel.expand(x.shape[0], -1, -1, -1)).permute(0, 3, 1, 2).softmax(dim=-1)
            attn = reference.gated_mix(q, k, position, gate, self.scale)
        return cast(Tensor, self.attn_drop(attn.to(q.dtype)))

    def get_rel_indices(self, num_patches: int) -> Tensor:
        """(dx, dy, dx^2 + dy^2) of each pair of patches, [1, N, N, 3]; as in timm, replacing it or setting ``rel_indices`` sets others."""
        return self._indices(self._grid(num_patches, None))[None]

    def get_attention_map(self, x: Tensor, return_map: bool = False, grid: Grid | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Mean attention distance in patches per head, [H]; with ``return_map`` also the map averaged over the batch, [H, N, N]."""
        attn = self.get_attention(x, grid).mean(0)
        distance = _mean_distance(attn, self._grid(x.shape[1], grid))
        return (distance, attn) if return_map else distance

    @torch.no_grad()
    def local_init(self) -> None:
        """Initialise as a convolution: each head attends to one offset (``local_offsets``), values are the identity."""
        nn.init.eye_(self.v.weight)
        offsets = self.pos_proj.weight.new_tensor(local_offsets(self.num_heads))
        self.pos_proj.weight[:, :2] = 2 * self.locality_strength * offsets
        self.pos_proj.weight[:, 2] = -self.locality_strength

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"

    def _query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, dim = x.shape
        q, k = ops.linear(self.qk, x).view(batch, tokens, 2, self.num_heads, dim // self.num_heads).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2)

    def _value(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        return ops.linear(self.v, x).view(batch, tokens, self.num_heads, dim // self.num_heads).transpose(1, 2)

    def _gate(self) -> Tensor:
        gate, heads = self.gating_param, self.num_heads  # of any shape that holds H, or one, as in timm
        return gate if gate.ndim == 1 and gate.shape[0] == heads else gate.reshape(-1).expand(heads)

    def _indices(self, grid: Grid) -> Tensor:
        gate = self.gating_param
        return reference.relative_positions(grid, gate.device).to(gate.dtype)

    def _own_indices(self, tokens: int) -> Tensor | None:
        """Relative positions that somebody has put in the place of the grid's, where timm's module looks for them."""
        kept = self._buffers.get("rel_indices", self.__dict__.get("rel_indices"))
        if kept is not None and kept.shape[1] == tokens > 1:
            return cast(Tensor, kept)
        return self.get_rel_indices(tokens) if _own(self, GPSA, "get_rel_indices") else None

    def _position_is_bare(self, tokens: int) -> bool:
        if intercepted() or not bare(self.pos_proj, nn.Linear) or not plain(self.pos_proj.weight, self.pos_proj.bias):
            return False
        return self._own_indices(tokens) is None

    def _position_weight(self) -> Tensor:
        weight, bias = self.pos_proj.weight, self.pos_proj.bias
        if bias is not None and torch.is_grad_enabled() and bias.requires_grad and not torch.jit.is_tracing():
            # the softmax cancels the bias; zero times it gives the optimiser and DDP its gradient, exactly zero
            weight = weight[:] + 0.0 * bias[:, None]  # views are held against their storage: that of freed memory raises
        return weight

    def _grid(self, tokens: int, grid: Grid | None) -> Grid:
        if grid is not None:
            return grid
        return square_grid(tokens) if self.image_grid is None else self.image_grid.of(tokens)

    def __prepare_scriptable__(self) -> "GPSA":
        size = None if self.image_grid is None else self.image_grid.size()
        if size is not None:
            self.scripted_grid = self._grid(size[0] * size[1], None)
        return self


class MHSA(nn.Module):
    """Plain multi-head self-attention, in place of timm's module of the same name.

    Args:
        dim: Channels C of the input, a multiple of ``num_heads``.
        num_heads: Heads H.
        qkv_bias: Whether the query, key and value projections have biases.
        attn_drop: Attention dropout.
        proj_drop: Dropout after the output projection.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **where)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **where)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, first: int | None = None) -> Tensor:
        """Attend over all tokens: [B, N, C] -> [B, N, C], or only from the ``first`` ones: [B, first, C]."""
        if torch.jit.is_scripting():
            return self._scripted(x, first)
        else:
            return self._forward(x, first)

    def _scripted(self, x: Tensor, first: int | None) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop(((qkv[0] @ qkv[1].transpose(-2, -1)) * self.scale).softmax(dim=-1))
        out = self.proj_drop(self.proj((attn @ qkv[2]).transpose(1, 2).reshape(batch, tokens, dim)))
        return out[:, :first]

    def _forward(self, x: Tensor, first: int | None) -> Tensor:
        if not isinstance(x, Tensor):  # what torch.fx puts in a tensor's place
            return self._scripted(x, first)
        batch, _, dim = _sizes(x)
        q, k, v = self._query_key_value(x)
        q = q[:, :, :first]
        dropout_p = _dropout(self.attn_drop)
        if dropout_p is None:
            out = self.attn_drop(((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)) @ v
        else:
            out = ops.attention(q, k, v, scale=self.scale, dropout_p=dropout_p)
        return _project(self, out, batch, q.shape[2], dim)

    def get_attention_map(self, x: Tensor, return_map: bool = False, grid: Grid | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Mean attention distance in patches per head, [H]; with ``return_map`` also the map averaged over the batch, [H, N, N].

        Tokens before the last gh * gw (class token, registers) have no place on the grid: the distance is taken over the attention
        among patches, scaled to rows of one. Without ``grid``, N or N - 1 must be a square.
        """
        q, k, _ = self._query_key_value(x)
        attn = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1).mean(0)
        tokens = x.shape[1]
        if grid is None:
            grid = square_grid(tokens if is_square(tokens) else tokens - 1)
        prefix = tokens - grid[0] * grid[1]
        patches = attn[:, prefix:, prefix:]
        distance = _mean_distance(patches / patches.sum(dim=-1, keepdim=True), grid)
        return (distance, attn) if return_map else distance

    def extra_repr(self) -> str:
        return f"dim={self.qkv.in_features}, num_heads={self.num_heads}"

    def _query_key_value(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, tokens, dim = x.shape
        return ops.linear(self.qkv, x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)


know(GPSA, MHSA)


def _dropout(module: nn.Module) -> float | None:
    """The probability at which a bare dropout module drops now; None if it has to be called to know what it does."""
    if not isinstance(module, (nn.Dropout, nn.Identity)) or not bare(module, nn.Dropout, nn.Identity):
        return None
    p = module.p if isinstance(module, nn.Dropout) and module.training else 0.0
    return p if p < 1 else None


def _project(module: GPSA | MHSA, out: Tensor, batch: int, tokens: int, dim: int) -> Tensor:
    """Heads [B, H, N, D] joined, [B, N, C], and projected."""
    out = out.transpose(1, 2).reshape(batch, tokens, dim)
    if not bare(module.proj, nn.Linear):
        out = out.clone()  # in memory of its own for who may write to it
    return cast(Tensor, module.proj_drop(ops.linear(module.proj, out)))


def told(module: nn.Module, ways: Ways, x: Tensor, grid: Grid | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, positional and named, of what takes a grid in these ``ways`` (``takes_grid``).

    Raises:
        ValueError: It takes x alone, and a GPSA in ``module``, left to itself, would lay the patches otherwise.
    """
    if grid is None:
        return (x,), {}
    if "keyword" in ways:  # the first choice: a hook that gives a new x, as it would for timm's, does not lose the grid
        return (x,), {"grid": grid}
    if "position" in ways:
        return (x, grid), {}
    for each in module.modules():
        if isinstance(each, GPSA) and (other := each._grid(x.shape[1], None)) != grid:
            raise ValueError(
                f"{type(module).__name__} takes x alone, so the attention in it would lay the patches on {other[0]} x {other[1]}, where "
                f"the image has {grid[0]} x {grid[1]}: give it an argument `grid` and hand that on, or call set_input_size first"
            )
    return (x,), {}


def _own(module: nn.Module, cls: type[nn.Module], name: str) -> bool:
    """Whether ``module`` has a method ``name`` other than that of ``cls``: of a subclass, or of the instance."""
    return getattr(type(module), name) is not getattr(cls, name) or name in module.__dict__


def _sizes(x: Tensor) -> tuple[int, int, int]:
    if x.ndim != 3:
        raise ValueError(f"x must be [B, N, C], got {list(x.shape)}")
    batch, tokens, dim = x.shape
    return batch, tokens, dim


def _check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")


def _mean_distance(attn: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sum over keys of attention times distance, averaged over queries: [H, N, N] -> [H]."""
    if attn.shape[-1] != grid[0] * grid[1]:
        raise ValueError(f"grid must have gh * gw == N = {attn.shape[-1]}, got {grid[0]} x {grid[1]}")
    distance = reference.relative_positions(grid, attn.device)[..., 2].to(attn.dtype).sqrt()
    return torch.einsum("nm,hnm->h", distance, attn) / attn.shape[-1]
