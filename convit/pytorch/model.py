"""The ConViT model and its six variants, with timm's state dict and the interface of timm's VisionTransformer."""

from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import convit
from convit import ops
from convit.architecture import VARIANTS
from convit.dispatch import nearest
from convit.pytorch.gpsa import GPSA, MHSA

Size = int | tuple[int, int]


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def resample_position_embedding(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample a position embedding [1, gh * gw, C] from grid ``old`` to grid ``new``: bicubic with antialiasing, as timm does."""
    if old == new:
        return pos_embed
    image = pos_embed.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bicubic", antialias=True)
    return image.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).to(pos_embed.dtype)


class PatchEmbed(nn.Module):
    """Images to patch tokens by one convolution: [B, in_chans, H, W] -> [B, gh * gw, C] and the grid."""

    def __init__(self, img_size: Size, patch_size: Size, in_chans: int, embed_dim: int, dynamic: bool, **where: Any) -> None:
        super().__init__()
        self.patch_size = _pair(patch_size)
        self.dynamic = dynamic
        self.set_input_size(img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, **where)

    def set_input_size(self, img_size: Size) -> None:
        self.img_size = _pair(img_size)
        self.grid_size = self._grid(*self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        height, width = x.shape[-2:]
        if self.dynamic:
            grid = self._grid(height, width)
        elif (height, width) == self.img_size:
            grid = self.grid_size
        else:
            raise ValueError(
                f"this model takes images of {self.img_size[0]} x {self.img_size[1]}, got {height} x {width}: "
                "call set_input_size, or build it with dynamic_img_size=True"
            )
        # contiguous tokens: else the residual stream inherits the convolution's layout, and every norm and addition pays for it
        return self.proj(x).flatten(2).transpose(1, 2).contiguous(), grid

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        (ph, pw) = self.patch_size
        if height % ph or width % pw or height < ph or width < pw:
            raise ValueError(f"the image size must be a multiple of the patch size {ph} x {pw}, got {height} x {width}")
        return height // ph, width // pw


class Mlp(nn.Module):
    """The two-layer perceptron of a block."""

    def __init__(self, dim: int, hidden: int, act_layer: Callable[[], nn.Module], drop: float, **where: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **where)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim, **where)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(ops.linear(self.fc2, self.drop1(ops.linear(self.fc1, x, self.act))))


class DropPath(nn.Module):
    """Stochastic depth: drop the whole residual branch of a sample with probability ``drop_prob`` while training."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class Block(nn.Module):
    """Pre-norm transformer block; its attention is GPSA (``use_gpsa``) or MHSA."""

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

    def forward(self, x: Tensor, grid: tuple[int, int], first: int | None = None) -> Tensor:
        """[B, N, C] to the same, or in an MHSA block to the ``first`` tokens of it."""
        y = self.norm1(x)
        x = x[:, :first] + self.drop_path(self.attn(y, grid) if self.use_gpsa else self.attn(y, first))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConViT(nn.Module):
    """ConViT (d'Ascoli et al. 2021): GPSA blocks over the patches, then the class token joins and MHSA blocks follow.

    Args:
        img_size: Image height and width, any multiple of ``patch_size``.
        patch_size: Patch height and width.
        in_chans: Image channels.
        num_classes: Outputs of the head; 0 for none.
        global_pool: "token" (class token), "avg" (mean over patches) or "" (all tokens to the head).
        embed_dim: Total width C (timm's ConVit takes the width per head).
        depth: Blocks.
        num_heads: Heads H, a divisor of ``embed_dim``.
        mlp_ratio: Hidden width of the perceptrons over C.
        qkv_bias: Whether query, key and value projections have biases.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: Dropout before the head, after the position embedding, after the
            projections and on the attention.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        norm_layer, act_layer: Constructors of the norm (called with a width) and of the activation.
        local_up_to_layer: Number of GPSA blocks, 0 to ``depth``; the class token joins after them.
        locality_strength: Of the local initialisation.
        use_pos_embed: Whether a learned position embedding is added to the patches.
        reg_tokens: Register tokens that join with the class token (Darcet et al. 2024).
        dynamic_img_size: Take images of any size; the position embedding is resampled for each.

    Raises:
        ValueError: An argument is out of range, or sizes do not divide.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = partial(nn.LayerNorm, eps=1e-6),  # noqa: B008
        act_layer: Callable[[], nn.Module] = nn.GELU,
        local_up_to_layer: int = 10,
        locality_strength: float = 1.0,
        use_pos_embed: bool = True,
        reg_tokens: int = 0,
        dynamic_img_size: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= local_up_to_layer <= depth:
            raise ValueError(f"local_up_to_layer must be in 0..depth = 0..{depth}, got {local_up_to_layer}")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = _check_pool(global_pool)
        self.local_up_to_layer = local_up_to_layer
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens = 1 + reg_tokens
        self.grad_checkpointing = False
        self.pretrained_cfg: dict[str, Any] = {}

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, dynamic_img_size, **where)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **where))
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim, **where)) if reg_tokens else None
        patches = self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, embed_dim, **where)) if use_pos_embed else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        blocks = []
        for i in range(depth):
            options: dict[str, Any] = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate, **where}
            if i < local_up_to_layer:
                attn: GPSA | MHSA = GPSA(embed_dim, num_heads, locality_strength=locality_strength, **options)
            else:
                attn = MHSA(embed_dim, num_heads, **options)
            drop_path = drop_path_rate * i / max(depth - 1, 1)
            blocks.append(Block(attn, embed_dim, mlp_ratio, proj_drop_rate, drop_path, norm_layer, act_layer, **where))
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm_layer(embed_dim, **where)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **where) if num_classes > 0 else nn.Identity()
        reduction = max(self.patch_embed.patch_size)
        self.feature_info = [{"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)]
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as the paper: truncated normals of 0.02, then the local initialisation of every GPSA."""
        for token in (self.cls_token, self.reg_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, GPSA):
                module.local_init()

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes]."""
        return self.forward_head(self._features(x, 1) if self._only_class_token_matters() else self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to normalised tokens: [B, prefix + N, C], class and register tokens first."""
        return self._features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to logits; with ``pre_logits`` to the pooled features [B, C]."""
        if self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        elif self.global_pool == "token":
            x = x[:, 0]
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Final tokens and the outputs of chosen blocks, as timm's VisionTransformer gives them.

        Args:
            x: Images.
            indices: Blocks to take: the last n if an integer, these if a sequence (negative counts from the end), all if None.
            return_prefix_tokens: Give (patches, prefix) pairs; the prefix of a GPSA block is empty, [B, 0, C].
            norm: Apply the final norm to each.
            stop_early: Stop after the last block taken.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: Return only the list.

        Raises:
            ValueError: An index or the format is wrong.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take = self._indices(indices)
        x, grid = self._embed(x)
        outputs: list[Any] = []
        for i, block in enumerate(self.blocks):
            x = self._block(i, block, x, grid)
            if i in take:
                y = self.norm(x) if norm else x
                prefix = 0 if i < self.local_up_to_layer else self.num_prefix_tokens
                patches, tokens = y[:, prefix:], y[:, :prefix]
                if output_fmt == "NCHW":
                    patches = patches.reshape(x.shape[0], *grid, -1).permute(0, 3, 1, 2).contiguous()
                outputs.append((patches, tokens) if return_prefix_tokens else patches)
            if stop_early and i == max(take):
                break
        else:
            if self.local_up_to_layer == len(self.blocks):
                x = self._join_prefix(x)
        return outputs if intermediates_only else (self.norm(x), outputs)

    def get_intermediate_layers(
        self, x: Tensor, n: int | Sequence[int] = 1, reshape: bool = False, return_prefix_tokens: bool = False, norm: bool = False
    ) -> list[Any]:
        """Outputs of the last ``n`` blocks, or of the blocks in ``n`` (the interface of DINO)."""
        output_fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(x, n, return_prefix_tokens, norm, output_fmt=output_fmt, intermediates_only=True)

    def set_input_size(self, img_size: Size) -> None:
        """Take images of ``img_size`` from now on: any multiple of the patch size, square or not."""
        old = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        if self.pos_embed is not None and self.patch_embed.grid_size != old:
            resampled = resample_position_embedding(self.pos_embed.detach(), old, self.patch_embed.grid_size)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a fresh head for ``num_classes`` (0 for none), and optionally another pooling."""
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool)
        self.num_classes = num_classes
        where: dict[str, Any] = {"device": self.cls_token.device, "dtype": self.cls_token.dtype}
        self.head = nn.Linear(self.embed_dim, num_classes, **where) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @classmethod
    def from_pretrained(cls, place: str | PathLike[str], **options: Any) -> "ConViT":
        """``convit.from_pretrained``: from the Hub, a run's folder, or any checkpoint."""
        model: ConViT = convit.from_pretrained(place, **options)
        return model

    def save_pretrained(self, folder: str | PathLike[str], **options: Any) -> str | None:
        """``convit.save_pretrained``: ``config.json``, ``model.safetensors`` and a model card."""
        return convit.save_pretrained(self, folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """``convit.push_to_hub``: the same, uploaded."""
        return convit.push_to_hub(self, repo_id, **options)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "reg_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for timm's layer decay."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def _features(self, x: Tensor, first: int | None = None) -> Tensor:
        """``forward_features``, or the ``first`` of its tokens, where the last block is MHSA."""
        x, grid = self._embed(x)
        for i, block in enumerate(self.blocks):
            x = self._block(i, block, x, grid, first if i == len(self.blocks) - 1 else None)
        if self.local_up_to_layer == len(self.blocks):
            x = self._join_prefix(x)
        return self.norm(x)

    def _only_class_token_matters(self) -> bool:
        """Whether nobody would see that the last block leaves out the tokens that the head does not read."""
        if self.global_pool != "token" or self.training or torch.is_grad_enabled() or self.local_up_to_layer == len(self.blocks):
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(self).forward_features is not ConViT.forward_features:
            return False
        return "forward_features" not in self.__dict__ and all(ops.bare(module) for module in [*self.blocks[-1].modules(), self.norm])

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x, grid = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + resample_position_embedding(self.pos_embed, self.patch_embed.grid_size, grid)
        return self.pos_drop(x), grid

    def _block(self, i: int, block: nn.Module, x: Tensor, grid: tuple[int, int], first: int | None = None) -> Tensor:
        if i == self.local_up_to_layer:
            x = self._join_prefix(x)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, grid, use_reentrant=False)
        return block(x, grid) if first is None else block(x, grid, first)

    def _join_prefix(self, x: Tensor) -> Tensor:
        prefix = [self.cls_token] if self.reg_token is None else [self.cls_token, self.reg_token]
        return torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)

    def _indices(self, indices: int | Sequence[int] | None) -> set[int]:
        depth = len(self.blocks)
        if indices is None:
            return set(range(depth))
        wanted = range(depth - indices, depth) if isinstance(indices, int) else [i + depth if i < 0 else i for i in indices]
        if not wanted or min(wanted) < 0 or max(wanted) >= depth:
            raise ValueError(f"indices must choose among {depth} blocks, got {indices}")
        return set(wanted)


def _check_pool(global_pool: str) -> str:
    if global_pool not in ("token", "avg", ""):
        raise ValueError(f"global_pool must be 'token', 'avg' or '', got {global_pool!r}")
    return global_pool


def list_models() -> list[str]:
    """Names that ``create_model`` takes."""
    return list(VARIANTS)


def create_model(name: str, pretrained: bool | str | PathLike = False, **kwargs: Any) -> ConViT:
    """Build one of the six variants of ConViT.

    Args:
        name: One of ``list_models()``.
        pretrained: True fetches published ImageNet-1K weights; a path loads that checkpoint (timm, FAIR, MindCV or ours). If
            ``num_classes`` is given and is not the checkpoint's, the model keeps its own head.
        **kwargs: Arguments of ``ConViT`` that differ from the variant's, such as ``img_size`` or ``num_classes``.

    Returns:
        The model in training mode, as torch modules are built.

    Raises:
        ValueError: The name is unknown, or the weights do not fit.
        TypeError: An argument is unknown.
        OSError: The weights cannot be read or fetched.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown model {name!r}{nearest(name, VARIANTS)} (known: {', '.join(VARIANTS)})")
    model = ConViT(**{**VARIANTS[name], **kwargs})
    # what timm's resolve_data_config reads: how the published weights were evaluated
    model.pretrained_cfg = {
        "architecture": name,
        "input_size": (model.in_chans, *model.patch_embed.img_size),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    if pretrained is not False:
        convit.load_pretrained(model, name if pretrained is True else pretrained, strict_head="num_classes" not in kwargs)
    return model
