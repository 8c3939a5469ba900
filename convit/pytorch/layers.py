"""The layers of ConViT beside the attention: patch embedding, MLP, drop path and block, with timm's names."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convit import ops
from convit.architecture import bicubic
from convit.dispatch import nearest
from convit.kernels.eager import exporting, know
from convit.pytorch.gpsa import GPSA, MHSA, told
from convit.pytorch.grid import WAYS, Grid, Ways, takes_grid

Size = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    """A height and width, as given or the same for both."""
    try:
        height, width = (size, size) if isinstance(size, int) else size
        return operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise ValueError(f"a size must be an integer or a pair (height, width), got {size!r}") from None


def resample_position_embedding(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample a position embedding [1, gh * gw, C] from grid ``old`` to grid ``new``: bicubic with antialiasing, as timm does."""
    same = old == new if torch.jit.is_scripting() else _same(old, new)
    if same:
        return pos_embed
    if not torch.jit.is_scripting():  # noqa: SIM102 -- by itself, or TorchScript looks into what it is not to run
        if torch.compiler.is_compiling() and not exporting():  # torch 2.6 would write the ratio of the traced size into the program
            return _resampled_by_products(pos_embed, old, new)
    image = pos_embed.float().reshape(1, old[0], old[1], -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=[new[0], new[1]], mode="bicubic", antialias=True)
    return image.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).to(pos_embed.dtype)


def _resampled_by_products(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The same for the compiler, which fails at the gradient of an antialiased ``interpolate`` where the sizes are dynamic."""
    kind: dict[str, Any] = {"device": pos_embed.device, "dtype": torch.float32}
    rows, columns = (
        bicubic((torch.arange(n, **kind) + 0.5) * (o / n), torch.arange(o, **kind) + 0.5, torch.sym_max(o / n, 1.0))
        for o, n in zip(old, new, strict=True)
    )
    table = torch.einsum("ya,xb,abd->yxd", rows, columns, pos_embed.float().reshape(old[0], old[1], -1))
    return table.reshape(1, new[0] * new[1], -1).to(pos_embed.dtype)


def _same(old: tuple[int, int], new: tuple[int, int]) -> bool:
    return not exporting() and old == new  # an exported program takes other sizes than the one it is traced at


class PatchEmbed(nn.Module):
    """Images to patch tokens by one convolution: [B, in_chans, H, W] -> [B, gh * gw, C]; ``grid`` says how they lie.

    A dynamic one takes images of any multiple of the patch size; with ``pad`` of any size, with zeros to the right and below.
    """

    def __init__(
        self, img_size: Size, patch_size: Size, in_chans: int, embed_dim: int, dynamic: bool, pad: bool = False, **where: Any
    ) -> None:
        super().__init__()
        self.patch_size = pair(patch_size)
        if min(self.patch_size) < 1:
            raise ValueError(f"patch_size must be positive, got {patch_size}")
        self.dynamic = dynamic or pad
        self.pad = pad
        self.set_input_size(img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, **where)
        self.norm = nn.Identity()  # as in timm, a place for one

    def set_input_size(self, img_size: Size) -> None:
        self.img_size = pair(img_size)
        self.grid_size = self._grid(self.img_size[0], self.img_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def set_patch_size(self, patch_size: tuple[int, int]) -> None:
        """Resample the kernel to patches of ``patch_size`` as FlexiViT does; the caller sets the input size afterwards."""
        try:
            from timm.layers import resample_patch_embed
        except ImportError as error:
            raise ImportError(
                "another patch size needs timm, which resamples the kernel: pip install '.[train]' in the source folder"
            ) from error
        old = self.proj
        kernel = resample_patch_embed(old.weight.detach(), list(patch_size))
        where: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
        self.proj = nn.Conv2d(old.in_channels, old.out_channels, patch_size, patch_size, bias=old.bias is not None, **where)
        self.proj.weight = nn.Parameter(kernel, requires_grad=old.weight.requires_grad)
        self.proj.bias = old.bias
        self.proj.train(old.training)
        self.patch_size = patch_size

    def grid(self, images: Tensor) -> Grid:
        """(gh, gw) of the patches of these images: those of any size have one of their own, if the layer is dynamic."""
        return self._grid(images.shape[-2], images.shape[-1]) if self.dynamic else self.grid_size

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"images must be [B, C, H, W], got {list(x.shape)}")
        height, width = x.shape[-2], x.shape[-1]
        if not self.dynamic and (height != self.img_size[0] or width != self.img_size[1]):
            raise ValueError(
                f"this model takes images of {self.img_size[0]} x {self.img_size[1]}, got {height} x {width}: "
                "call set_input_size, or build it with dynamic_img_size=True"
            )
        gh, gw = self.grid(x)
        if self.pad:
            x = F.pad(x, [0, gw * self.patch_size[1] - width, 0, gh * self.patch_size[0] - height])
        # contiguous tokens: else the residual stream inherits the convolution's layout, and every norm and addition pays for it
        x = self.norm(self.proj(x).flatten(2).transpose(1, 2).contiguous())
        return x

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        ph, pw = self.patch_size
        if self.pad:
            return (height + ph - 1) // ph, (width + pw - 1) // pw
        if height % ph or width % pw or height < ph or width < pw:
            raise ValueError(f"the image size must be a multiple of the patch size {ph} x {pw}, got {height} x {width}")
        return height // ph, width // pw


class Mlp(nn.Module):
    """The MLP of a block: two linear layers, dropout after each, and as in timm a place for a norm between them."""

    def __init__(self, dim: int, hidden: int, act_layer: Callable[[], nn.Module], drop: float, **where: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **where)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, dim, **where)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))
        else:
            x = self.norm(self.drop1(ops.linear(self.fc1, x, self.act)))
            return cast(Tensor, self.drop2(ops.linear(self.fc2, x)))


class DropPath(nn.Module):
    """Stochastic depth: drop the whole residual branch of a sample with probability ``drop_prob`` while training."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty([x.shape[0]] + [1] * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class Block(nn.Module):
    """Pre-norm transformer block; its attention is GPSA (``use_gpsa``) or MHSA."""

    use_gpsa: Final[bool]

    def __init__(
        self,
        attn: GPSA | MHSA,
        dim: int,
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        norm_layer: Callable[..., nn.Module],
        act_layer: Callable[[], nn.Module],
        **where: Any,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim, **where)
        self.attn = attn
        self.use_gpsa = isinstance(attn, GPSA)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim, **where)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer, proj_drop, **where)

    def forward(self, x: Tensor, grid: Grid | None = None, first: int | None = None) -> Tensor:
        """[B, N, C] to the same, or in an MHSA block to the ``first`` tokens of it; ``grid`` as for ``GPSA``."""
        y = self.norm1(x)
        if torch.jit.is_scripting():
            if self.use_gpsa:  # noqa: SIM108 (TorchScript compiles one branch of a statement, both of an expression)
                y = self.attn(y, grid)
            else:
                y = self.attn(y, first)
        elif self.use_gpsa:
            y = _call(self.attn, y, grid)
        else:
            y = self.attn(y) if first is None else self.attn(y, first)
        x = x[:, :first] + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def arguments(module: nn.Module, x: Tensor, grid: Grid | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a block, an attention or what somebody has put in its place is called: with the grid if it takes one, else with x alone.

    What is called with x alone, as in timm, finds its way to a GPSA that asks the model's ``patch_embed``.
    """
    if type(module).forward in _TAKE_GRID and "forward" not in module.__dict__:
        return (x,), {"grid": grid}
    return told(module, _ways(module), x, grid)


def _ways(module: nn.Module) -> Ways:
    return takes_grid(module.forward, lambda: _inner_ways(module))


def _inner_ways(module: nn.Module) -> Ways:
    """How what stands inside ``module`` takes a grid."""
    if isinstance(module, (Block, GPSA)):  # whose own forward stands behind what is in its place
        return WAYS
    children = list(module.children())
    holding = [child for child in children if any(isinstance(each, (Block, GPSA)) for each in child.modules())]
    found = [_ways(child) for child in holding or children]
    return tuple(way for way in WAYS if all(way in each for each in found))


def _call(module: nn.Module, x: Tensor, grid: Grid | None) -> Tensor:
    args, named = arguments(module, x, grid)
    return cast(Tensor, module(*args, **named))


# timm's names for the layers that need no timm
_LAYERS: dict[str, dict[str, Callable[..., nn.Module]]] = {
    "norm": {"layernorm": partial(nn.LayerNorm, eps=1e-6), "rmsnorm": partial(nn.RMSNorm, eps=1e-6)},
    "act": {"gelu": nn.GELU, "gelu_tanh": partial(nn.GELU, "tanh"), "relu": nn.ReLU, "silu": nn.SiLU, "swish": nn.SiLU},
}


def named_layer(kind: str, given: str | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The constructor that ``given`` is, or names: here, or in timm where it is installed."""
    if not isinstance(given, str):
        return given
    known = _LAYERS[kind]
    if given in known:
        return known[given]
    try:
        from timm.layers import get_act_layer, get_norm_layer

        found: Callable[..., nn.Module] | None = get_norm_layer(given) if kind == "norm" else get_act_layer(given)
    except (ImportError, KeyError, AssertionError):
        found = None
    if found is None:
        raise ValueError(
            f"unknown {kind}_layer {given!r}{nearest(given, known)} (known: {', '.join(known)}, and timm's where it is installed)"
        )
    return found


know(Mlp, DropPath, Block)
_TAKE_GRID = (Block.forward, GPSA.forward)
