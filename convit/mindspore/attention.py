"""The attention cells of ConViT for MindSpore, GPSA and MHSA, with MindCV's arguments and parameter names."""

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from convit.kernels.gpsa.any_mindspore import attention_map
from convit.mindspore.layers import Dense, dense
from convit.mindspore.ops import attention_packed, gpsa_packed


@ms.constexpr
def square_grid(tokens: int) -> tuple[int, int]:
    """The square grid of ``tokens`` patches; ``ValueError`` if there is none."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"N = {tokens} patches form no square grid: pass grid=(gh, gw) with gh * gw == {tokens}")
    return side, side


def project(x: Tensor, q: Dense, k: Dense, v: Dense, num_heads: int) -> Tensor:
    """The three projections of x [B, N, C] in one matrix product: [B, N, 3, H, D]."""
    batch, tokens, dim = x.shape
    weight = ops.concat((q.weight, k.weight, v.weight), 0)
    bias = ops.concat((q.bias, k.bias, v.bias), 0) if q.has_bias else None
    return ops.reshape(dense(x, weight, bias), (batch, tokens, 3, num_heads, dim // num_heads))


class GPSA(nn.Cell):
    """Gated positional self-attention (d'Ascoli et al. 2021, section 3), in place of MindCV's cell of the same name.

    Args:
        dim: Channels C of the input, a multiple of ``num_heads``.
        num_heads: Heads H.
        qkv_bias: Whether the query, key and value projections have biases.
        attn_drop: Dropout on the gated mix of the softmaxes. Above 0 it is slow while training: only the reference has it.
        proj_drop: Dropout after the output projection.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.dim = dim
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.attn_drop_p = attn_drop
        self.q = Dense(dim, dim, has_bias=qkv_bias)
        self.k = Dense(dim, dim, has_bias=qkv_bias)
        self.v = Dense(dim, dim, has_bias=qkv_bias)
        self.proj = Dense(dim, dim)
        self.pos_proj = nn.Dense(3, num_heads)
        self.proj_drop = nn.Dropout(p=proj_drop)
        self.gating_param = Parameter(np.ones(num_heads, np.float32))

    def construct(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Attend over the patches of an image: [B, N, C] -> [B, N, C].

        Args:
            x: [B, N, C], patches in row-major order, no class token.
            grid: (gh, gw) with gh * gw == N; default square.
        """
        if grid is None:
            grid = square_grid(x.shape[1])
        dropout_p = self.attn_drop_p if self.training else 0.0
        qkv = project(x, self.q, self.k, self.v, self.num_heads)
        out = gpsa_packed(qkv, self._position_weight(), self.gating_param, grid, self.scale, dropout_p)
        return self.proj_drop(self.proj(ops.reshape(out, x.shape)))

    def get_attention(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The gated mix of the two softmaxes, [B, H, N, N], without dropout; formed in full, for looking at."""
        batch, tokens, _ = x.shape
        if grid is None:
            grid = square_grid(tokens)
        heads = (batch, tokens, self.num_heads, -1)
        q, k = (ops.transpose(ops.reshape(y, heads), (0, 2, 1, 3)) for y in (self.q(x), self.k(x)))
        return attention_map(q, k, self.pos_proj.weight, self.gating_param, grid, self.scale)

    def local_init(self, locality_strength: float = 1.0) -> None:
        """MindCV's local initialisation: heads look at the points of a square around the query, values are the identity."""
        self.v.weight.set_data(Tensor(np.eye(self.dim, dtype=np.float32)))
        side = math.isqrt(self.num_heads)
        centre = (side - 1) / 2
        weight = self.pos_proj.weight.asnumpy().copy()
        for h1 in range(side):
            for h2 in range(side):
                weight[h1 + side * h2] = 2 * (h2 - centre), 2 * (h1 - centre), -1
        self.pos_proj.weight.set_data(Tensor(weight * locality_strength))

    def _position_weight(self) -> Tensor:
        # the softmax cancels the bias; zero times it gives the optimiser its gradient, exactly zero
        if self.training:
            return self.pos_proj.weight + 0.0 * ops.reshape(self.pos_proj.bias, (-1, 1))
        return self.pos_proj.weight


class MHSA(nn.Cell):
    """Plain multi-head self-attention, in place of MindCV's cell of the same name.

    Args:
        dim: Channels C of the input, a multiple of ``num_heads``.
        num_heads: Heads H.
        qkv_bias: Whether the query, key and value projections have biases.
        attn_drop: Attention dropout.
        proj_drop: Dropout after the output projection.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.attn_drop_p = attn_drop
        self.q = Dense(dim, dim, has_bias=qkv_bias)
        self.k = Dense(dim, dim, has_bias=qkv_bias)
        self.v = Dense(dim, dim, has_bias=qkv_bias)
        self.proj = Dense(dim, dim)
        self.proj_drop = nn.Dropout(p=proj_drop)

    def construct(self, x: Tensor) -> Tensor:
        """Attend over all tokens: [B, N, C] -> [B, N, C]."""
        qkv = project(x, self.q, self.k, self.v, self.num_heads)
        out = attention_packed(qkv, self.scale, self.attn_drop_p if self.training else 0.0)
        return self.proj_drop(self.proj(ops.reshape(out, x.shape)))


def _check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")
