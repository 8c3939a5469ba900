"""The layers around the attention: MindSpore's own cells and parameter names, computed from the operators that are fast everywhere.

On CPU ``nn.Conv2d`` takes most of the time of a ViT (the patches of a 224 image: half a second for a batch of 8) and ``nn.Dense``
twice that of its matrix product: both become one ``MatMul`` here. LayerNorm and GELU run the C++ library's kernels where that is built.
The results differ by rounding alone.
"""

from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import TruncatedNormal

from convit.kernels.linear import cpu_aot

Size = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., C] times weight [D, C] transposed, plus bias [D], as one matrix product over all other axes: [..., D]."""
    shape = x.shape
    y = ops.MatMul(transpose_b=True)(ops.reshape(x, (-1, shape[-1])), weight.astype(x.dtype))  # mixed precision narrows x alone
    if bias is not None:
        y = ops.BiasAdd()(y, bias.astype(x.dtype))
    return ops.reshape(y, shape[:-1] + (weight.shape[0],))


class Dense(nn.Dense):
    """``nn.Dense``, computed by ``dense``."""

    def __init__(self, in_channels: int, out_channels: int, has_bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, has_bias=has_bias)

    def construct(self, x: Tensor) -> Tensor:
        return dense(x, self.weight, self.bias if self.has_bias else None)


class PatchProjection(nn.Conv2d):
    """The convolution whose stride is its kernel: a matrix product over the pixels of each patch. [B, C, H, W] -> [B, gh * gw, D]."""

    def __init__(self, in_channels: int, embed_dim: int, patch_size: tuple[int, int]) -> None:
        super().__init__(in_channels, embed_dim, patch_size, patch_size, pad_mode="pad", has_bias=True, weight_init=TruncatedNormal())

    def construct(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        ph, pw = self.kernel_size
        gh, gw = height // ph, width // pw
        x = ops.transpose(ops.reshape(x, (batch, channels, gh, ph, gw, pw)), (0, 2, 4, 1, 3, 5))
        weight = ops.reshape(self.weight, (self.out_channels, -1))
        return dense(ops.reshape(x, (batch, gh * gw, channels * ph * pw)), weight, self.bias)


class PatchEmbed(nn.Cell):
    """Images to patch tokens: [B, in_chans, H, W] -> [B, gh * gw, C].

    Raises:
        ValueError: The image is not of the model's size, or the patches do not divide it.
    """

    def __init__(self, image_size: Size, patch_size: Size, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = pair(patch_size)
        self.set_input_size(image_size)
        self.proj = PatchProjection(in_chans, embed_dim, self.patch_size)

    def set_input_size(self, image_size: Size) -> None:
        (height, width), (ph, pw) = pair(image_size), self.patch_size
        if height < ph or width < pw or height % ph or width % pw:
            raise ValueError(f"image_size must be a multiple of patch_size = {self.patch_size}, got {pair(image_size)}")
        self.image_size = (height, width)
        self.grid = (height // ph, width // pw)
        self.num_patches = self.grid[0] * self.grid[1]

    def construct(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[2:] != self.image_size:
            raise ValueError(
                f"x must be [B, C, H, W] with (H, W) = {self.image_size}, got shape {x.shape}: model.set_input_size((H, W)) takes others"
            )
        return self.proj(x)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last axis."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__((dim,), epsilon=eps)

    def set_epsilon(self, eps: float) -> None:
        self.epsilon = eps
        self.layer_norm = ops.LayerNorm(self.begin_norm_axis, self.begin_params_axis, eps)

    def construct(self, x: Tensor) -> Tensor:
        if cpu_aot.can_run(x.shape, x.dtype) and self.gamma.dtype == x.dtype:
            return cpu_aot.layer_norm(x, self.gamma, self.beta, self.epsilon)
        return self.layer_norm(x, self.gamma.astype(x.dtype), self.beta.astype(x.dtype))[0]


class GELU(nn.Cell):
    """``tanh`` of MindCV's checkpoints or ``erf`` of timm's and FAIR's."""

    def __init__(self, approximate: bool) -> None:
        super().__init__()
        self.approximate = approximate
        self.tanh_gelu = ops.GeLU()

    def construct(self, x: Tensor) -> Tensor:
        if cpu_aot.can_run(x.shape, x.dtype):
            return cpu_aot.gelu(x, self.approximate)
        if self.approximate:
            return self.tanh_gelu(x)
        return 0.5 * x * (1.0 + ops.erf(x * 0.7071067811865476))


class Mlp(nn.Cell):
    """Dense, GELU, Dense with dropout after each."""

    def __init__(self, dim: int, hidden_dim: int, drop: float, approximate_gelu: bool) -> None:
        super().__init__()
        self.fc1 = Dense(dim, hidden_dim)
        self.act = GELU(approximate_gelu)
        self.fc2 = Dense(hidden_dim, dim)
        self.drop = nn.Dropout(p=drop)

    def construct(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Cell):
    """Stochastic depth: while training, drop a sample's residual branch with probability ``p`` and scale the kept ones by 1 / (1 - p).

    A block has two ``branch``es. MindSpore draws, from a generator whose state cannot be saved; after ``take_draws`` whoever trains draws.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.dropout = nn.Dropout(p=p)
        self.drawn: Any = None

    def take_draws(self, batch: int, name: str) -> None:
        """From now on, what is kept of up to ``batch`` samples is as ``draw`` says; ``name`` is that of the parameter that holds it."""
        self.drawn = Parameter(Tensor(np.ones((2, batch), np.float32)), name=name, requires_grad=False)

    def draw(self, random: np.random.Generator) -> None:
        """Draw for the next batch."""
        kept = (random.random(self.drawn.shape) >= self.p).astype(np.float32)
        ops.assign(self.drawn, Tensor(kept / np.float32(1 - self.p)))

    def construct(self, x: Tensor, branch: int) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        if self.drawn is None:
            return x * self.dropout(ops.ones(shape, x.dtype))
        return x * ops.reshape(self.drawn[branch, : x.shape[0]], shape).astype(x.dtype)
