"""A ConViT taken apart for inference: its shape, the products it makes, and its forward pass over them in PyTorch's operators.

``Shape`` is what is not a tensor. The tensors keep timm's names, which our, timm's and FAIR's models share. The products are named once,
query, key and value as one, so that whoever packs weights packs those.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from convit import ops
from convit.kernels.linear import cpu_onednn
from convit.pytorch.layers import resample_position_embedding

Grid = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """Everything about a model that is no tensor."""

    image: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    dim: int
    classes: int  # 0: no head
    local: int  # GPSA blocks; the prefix joins after them
    prefix: int  # class and register tokens
    pool: str  # "token", "avg" or ""
    dynamic: bool  # takes images of any multiple of the patch
    heads: tuple[int, ...]  # of each block, as what follows
    scales: tuple[float, ...]
    hidden: tuple[int, ...]
    gelus: tuple[str, ...]  # "none" (exact) or "tanh"
    eps: tuple[float, ...]  # of norm1 and norm2 of each block, then of the last norm

    @property
    def depth(self) -> int:
        return len(self.heads)

    @property
    def grid(self) -> Grid:
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def only_class_token(self) -> bool:
        """Whether the head reads one token alone, which then is all that the last block computes."""
        return self.pool == "token" and self.local < self.depth

    def grid_of(self, images: Tensor) -> Grid:
        """The grid of a batch of images; ``ValueError`` if the model does not take them."""
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images must be [B, {self.channels}, H, W], got {list(images.shape)}")
        height, width = images.shape[2:]
        (ph, pw) = self.patch
        if self.dynamic:
            if height % ph or width % pw or height < ph or width < pw:
                raise ValueError(f"the image size must be a multiple of the patch size {ph} x {pw}, got {height} x {width}")
        elif (height, width) != self.image:
            raise ValueError(
                f"this snapshot takes images of {self.image[0]} x {self.image[1]}, got {height} x {width}: call set_input_size on the "
                "model, or build it with dynamic_img_size=True, before convit.optimize"
            )
        return height // ph, width // pw

    def products(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each product by name, and the names of the layers that it joins."""
        yield "patch", ("patch_embed.proj",)
        for i in range(self.depth):
            layers = (f"blocks.{i}.attn.qk", f"blocks.{i}.attn.v") if i < self.local else (f"blocks.{i}.attn.qkv",)
            yield f"{i}.qkv", layers
            yield f"{i}.proj", (f"blocks.{i}.attn.proj",)
            yield f"{i}.fc1", (f"blocks.{i}.mlp.fc1",)
            yield f"{i}.fc2", (f"blocks.{i}.mlp.fc2",)
        if self.classes:
            yield "head", ("head",)


@dataclass
class Network:
    """A shape, its products as some engine holds them (key -> its own object), and all other tensors, float32, by name."""

    shape: Shape
    products: dict[str, Any]
    tensors: dict[str, Tensor]
    positions: dict[Grid, Tensor | None] = field(default_factory=dict)

    def prefix_tokens(self) -> Tensor:
        """[prefix, C]."""
        tokens = [self.tensors[name] for name in ("cls_token", "reg_token") if name in self.tensors]
        return torch.cat(tokens, dim=1)[0]

    def position(self, grid: Grid) -> Tensor | None:
        """The position embedding for ``grid``, [N, C]; made once for each of the last eight grids."""
        table = self.tensors.get("pos_embed")
        if table is None:
            return None
        found = self.positions.get(grid)
        if found is None:
            found = resample_position_embedding(table, self.shape.grid, grid)[0].contiguous()
            while len(self.positions) >= 8:
                self.positions.pop(next(iter(self.positions)), None)
            self.positions[grid] = found
        return found


class Plain:
    """A product by PyTorch's linear layer, through oneDNN as our model's, with the model's own weights as they are."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor]):
        self.weights, self.biases = [w.detach().flatten(1) for w in weights], [b.detach() for b in biases]

    def __call__(self, x: Tensor, gelu: str | None = None) -> Tensor:
        biases: list[Tensor] | list[None] = self.biases or [None] * len(self.weights)
        fused = gelu if len(self.weights) == 1 else None  # the products of the model itself: oneDNN keeps the code of each that it has made
        parts = [_linear(x, w.to(x.dtype), b if b is None else b.to(x.dtype), fused) for w, b in zip(self.weights, biases, strict=True)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return F.gelu(y, approximate=gelu) if gelu and not fused else y


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None) -> Tensor:
    if cpu_onednn.why_not(x, weight, bias) is None:
        return cpu_onednn.linear(x, weight, bias, gelu)
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate=gelu) if gelu else y


def forward(net: Network, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images [B, channels, H, W] to logits: products and attention in ``dtype``; norms, additions and the result at least float32."""
    shape, t = net.shape, net.tensors
    grid = shape.grid_of(images)
    (ph, pw), dim, batch = shape.patch, shape.dim, images.shape[0]
    wide = torch.promote_types(dtype, torch.float32)

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, (dim,), t[f"{name}.weight"].to(wide), t[f"{name}.bias"].to(wide), eps)

    def join(x: Tensor) -> Tensor:
        return torch.cat([net.prefix_tokens().to(x).expand(batch, -1, -1), x], dim=1)

    patches = images.to(dtype).reshape(batch, shape.channels, grid[0], ph, grid[1], pw).permute(0, 2, 4, 1, 3, 5)
    x = net.products["patch"](patches.reshape(batch, grid[0] * grid[1], shape.channels * ph * pw)).to(wide)
    position = net.position(grid)
    if position is not None:
        x = x + position.to(wide)
    for i in range(shape.depth):
        if i == shape.local:
            x = join(x)
        heads, scale, first = shape.heads[i], shape.scales[i], None
        y = net.products[f"{i}.qkv"](norm(x, f"blocks.{i}.norm1", shape.eps[2 * i]).to(dtype))
        q, k, v = y.unflatten(-1, (3, heads, dim // heads)).permute(2, 0, 3, 1, 4)
        if i < shape.local:
            weight, gating = t[f"blocks.{i}.attn.pos_proj.weight"], t[f"blocks.{i}.attn.gating_param"]
            y = ops.gpsa(q, k, v, weight.to(wide), gating.to(wide), grid, scale=scale)
        else:
            first = 1 if shape.only_class_token and i == shape.depth - 1 else None
            y = ops.attention(q[:, :, :first], k, v, scale=scale)
        y = y.transpose(1, 2).flatten(2)
        x = x[:, :first] + net.products[f"{i}.proj"](y).to(wide)
        y = net.products[f"{i}.fc1"](norm(x, f"blocks.{i}.norm2", shape.eps[2 * i + 1]).to(dtype), shape.gelus[i])
        x = x + net.products[f"{i}.fc2"](y).to(wide)
    if shape.local == shape.depth:
        x = join(x)
    x = norm(x, "norm", shape.eps[-1])
    if shape.pool == "avg":
        x = x[:, shape.prefix :].mean(dim=1)
    elif shape.pool == "token":
        x = x[:, 0]
    return net.products["head"](x.to(dtype)).to(wide) if shape.classes else x
