"""The ConViT model and its six variants, with timm's state dict and the interface of timm's VisionTransformer."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import convit
from convit.architecture import IMAGENET_MEAN, IMAGENET_STD, VARIANTS
from convit.dispatch import forced_backend, nearest, use_backend
from convit.kernels.eager import bare, eager
from convit.pytorch.gpsa import GPSA, MHSA
from convit.pytorch.grid import Grid, ImageGrid, grid_of, is_square, square_grid
from convit.pytorch.layers import Block, DropPath, Mlp, PatchEmbed, Size, arguments, named_layer, pair, resample_position_embedding


class ConViT(nn.Module):
    """ConViT (d'Ascoli et al. 2021): GPSA blocks over the patches, then the class token joins and MHSA blocks follow.

    Args:
        img_size: Image height and width, any multiple of ``patch_size``.
        patch_size: Patch height and width.
        in_chans: Image channels.
        num_classes: Outputs of the head; 0 for none.
        global_pool: "token" (class token), "avg" (mean over patches) or "" (all tokens to the head). Where no block reads the class token
            (``local_up_to_layer = depth``), "avg" is still the mean over all patches; timm's leaves out the first.
        embed_dim: Total width C (timm's ConVit takes the width per head).
        depth: Blocks.
        num_heads: Heads H, a divisor of ``embed_dim``.
        mlp_ratio: Hidden width of the MLPs over C.
        qkv_bias: Whether query, key and value projections have biases.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: Dropout before the head, after the position embedding, after the
            projections and on the attention.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        norm_layer, act_layer: Constructors of the norm (called with a width) and of the activation, or timm's names for them.
        local_up_to_layer: Number of GPSA blocks, 0 to ``depth``; the class token joins after them.
        locality_strength: Of the local initialisation.
        use_pos_embed: Whether a learned position embedding is added to the patches.
        reg_tokens: Register tokens that join with the class token (Darcet et al. 2024).
        dynamic_img_size: Take images of any multiple of the patch size; the position embedding is resampled for each.
        dynamic_img_pad: Take images of any size, padded with zeros to the next multiple.

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
        norm_layer: str | Callable[..., nn.Module] = partial(nn.LayerNorm, eps=1e-6),  # noqa: B008
        act_layer: str | Callable[[], nn.Module] = nn.GELU,
        local_up_to_layer: int = 10,
        locality_strength: float = 1.0,
        use_pos_embed: bool = True,
        reg_tokens: int = 0,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_least(in_chans=(in_chans, 1), embed_dim=(embed_dim, 1), num_classes=(num_classes, 0), reg_tokens=(reg_tokens, 0))
        if not 1 <= embed_dim * mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio must give the MLPs a width of at least 1, got {mlp_ratio}")
        rates = (drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate)
        if not (all(0 <= rate <= 1 for rate in rates) and 0 <= drop_path_rate < 1):
            raise ValueError(f"dropout rates must be in [0, 1], that of paths below 1, got {(*rates, drop_path_rate)}")
        if not 0 <= local_up_to_layer <= depth:
            raise ValueError(f"local_up_to_layer must be in 0..depth = 0..{depth}, got {local_up_to_layer}")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        norm_layer, act_layer = named_layer("norm", norm_layer), named_layer("act", act_layer)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.local_up_to_layer = local_up_to_layer
        self.global_pool = _check_pool(global_pool, local_up_to_layer == depth)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens = 1 + reg_tokens
        self.grad_checkpointing = False
        self.every_token = False  # True: compute tokens that nobody reads too, so that a traced graph gives the same bits
        self.pretrained_cfg: dict[str, Any] = {}
        self.default_cfg = self.pretrained_cfg  # timm's other name for it

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, dynamic_img_size, dynamic_img_pad, **where)
        self.cls_token: nn.Parameter | None = nn.Parameter(torch.zeros(1, 1, embed_dim, **where))
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim, **where)) if reg_tokens else None
        patches = self.patch_embed.num_patches
        self.use_pos_embed = use_pos_embed
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, embed_dim, **where)) if use_pos_embed else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        blocks = []
        for i in range(depth):
            options: dict[str, Any] = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate, **where}
            if i < local_up_to_layer:
                attn: GPSA | MHSA = GPSA(embed_dim, num_heads, locality_strength=locality_strength, **options)
                attn.image_grid = ImageGrid(self, "either")
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
        self._init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter: the framework's for norms and patch embedding, the paper's for the rest.

        That is truncated normals of 0.02, gates of sigmoid(1), then the local initialisation of every GPSA.
        """
        for module in self.modules():
            if isinstance(module, GPSA):
                nn.init.ones_(module.gating_param)
            elif not isinstance(module, nn.Linear) and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        self._init_weights()

    def _init_weights(self) -> None:
        for token in (self.cls_token, self.reg_token, self.pos_embed):
            if token is not None:
                _draw(token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _draw(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, GPSA):
                module.local_init()

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes]."""
        if torch.jit.is_scripting():
            return self.forward_head(self.forward_features(x))
        else:
            return self.forward_head(self._features(x, 1) if self._only_class_token_matters(x) else self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to normalised tokens: [B, prefix + N, C], class and register tokens first."""
        if torch.jit.is_scripting():
            x, grid = self._embed(x)
            for i, block in enumerate(self.blocks):
                if i == self.local_up_to_layer:
                    x = self._join_prefix(x)
                x = block(x, grid)
            if self.local_up_to_layer >= len(self.blocks):
                x = self._join_prefix(x)
            return self.norm(x)
        else:
            return self._features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to logits; with ``pre_logits`` to the pooled features [B, C]."""
        if not torch.jit.is_scripting():
            _check_pool(self.global_pool, self.local_up_to_layer >= len(self.blocks))  # blocks may have been taken away
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
                prefix = 0 if i < self.local_up_to_layer or self.cls_token is None else self.num_prefix_tokens
                patches, tokens = y[:, prefix:], y[:, :prefix]
                if output_fmt == "NCHW":
                    patches = patches.reshape(x.shape[0], *grid, x.shape[-1]).permute(0, 3, 1, 2).contiguous()
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

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop the blocks after the last of ``indices`` (as in ``forward_intermediates``) and, if asked, the norm and the head.

        Where no MHSA block is left, the class token goes too, and with it a head that reads it.

        Returns:
            The indices, counted from the start.
        """
        take = self._indices(indices)
        self.blocks = self.blocks[: max(take) + 1]
        if max(take) < self.local_up_to_layer:
            self.cls_token = self.reg_token = None
            self.num_prefix_tokens = self.num_reg_tokens = 0
            prune_head = prune_head or self.global_pool == "token"
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return sorted(take)

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Take images of ``img_size`` from now on, any multiple of the patch size, cut into patches of ``patch_size``.

        The position embedding is resampled to the new grid, the patch embedding's kernel to the new size (FlexiViT, with timm).
        """
        old = self.patch_embed.grid_size
        if patch_size is not None and pair(patch_size) != self.patch_embed.patch_size:
            self.patch_embed.set_patch_size(pair(patch_size))
            reduction = max(self.patch_embed.patch_size)
            self.feature_info = [info | {"reduction": reduction} for info in self.feature_info]
        self.patch_embed.set_input_size(self.patch_embed.img_size if img_size is None else img_size)
        if self.pos_embed is not None and self.patch_embed.grid_size != old:
            resampled = resample_position_embedding(self.pos_embed.detach(), old, self.patch_embed.grid_size)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a fresh head for ``num_classes`` (0 for none), and optionally another pooling."""
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool, self.local_up_to_layer >= len(self.blocks))
        self.num_classes = num_classes
        parameter = next(self.parameters())
        where: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
        self.head = nn.Linear(self.embed_dim, num_classes, **where) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)
        if isinstance(self.head, nn.Linear):
            _draw(self.head.weight)
            nn.init.zeros_(self.head.bias)

    @classmethod
    def from_pretrained(cls, place: str | PathLike[str], **options: Any) -> "ConViT":
        """``convit.from_pretrained``: from the Hub, a run's folder, or any checkpoint."""
        model: ConViT = convit.from_pretrained(Path(place) if isinstance(place, PathLike) else place, **options)
        return model

    def save_pretrained(self, folder: str | PathLike[str], **options: Any) -> str | None:
        """``convit.save_pretrained``: ``config.json``, ``model.safetensors`` and a model card."""
        return convit.save_pretrained(self, Path(folder), **options)

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
        if self.local_up_to_layer >= len(self.blocks):
            x = self._join_prefix(x)
        return self.norm(x)

    def _only_class_token_matters(self, x: Tensor) -> bool:
        """Whether the head reads the class token alone, and nobody could tell that the last block leaves out the others.

        Known are our own classes and the framework's that act on each token by itself; bare, so that no hook would see fewer tokens.
        """
        if (
            not eager(x)  # first: what follows is not for a compiler to trace
            or self.every_token
            or self.global_pool != "token"
            or self.training
            or torch.is_grad_enabled()
            or self.local_up_to_layer >= len(self.blocks)
        ):
            return False
        if type(self) is not ConViT or not _METHODS.keys().isdisjoint(self.__dict__):
            return False
        if any(getattr(ConViT, name) is not method for name, method in _METHODS.items()):
            return False
        block: Any = self.blocks[-1]
        if not (bare(block, Block) and bare(block.attn, MHSA) and bare(block.mlp, Mlp) and "_query_key_value" not in block.attn.__dict__):
            return False
        attn, mlp, norms = block.attn, block.mlp, (block.norm1, block.norm2, self.norm)
        return (
            all(bare(module, nn.Linear) for module in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
            and all(
                isinstance(module, nn.LayerNorm) and bare(module, nn.LayerNorm) and len(module.normalized_shape) == 1 for module in norms
            )
            and all(bare(module, nn.Dropout, nn.Identity) for module in (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2))
            and bare(mlp.norm, nn.Identity)
            and bare(block.drop_path, DropPath, nn.Identity)
            and bare(mlp.act, nn.GELU, nn.ReLU, nn.SiLU)
        )

    def _embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        x = self.patch_embed(images)
        if torch.jit.is_scripting():
            grid = self.patch_embed.grid(images)
            if self.pos_embed is not None and self.use_pos_embed:
                x = x + resample_position_embedding(self.pos_embed, self.patch_embed.grid_size, grid)
        else:
            embed = _inside(self.patch_embed)
            grid = _grid(self.patch_embed, images, x) if embed is None else embed.grid(images)
            if self.pos_embed is not None and self.use_pos_embed:
                position: Tensor = self.pos_embed
                if embed is not None and embed.dynamic:
                    position = resample_position_embedding(position, embed.grid_size, grid)
                x = x + position
        return self.pos_drop(x), grid

    def _block(self, i: int, block: nn.Module, x: Tensor, grid: Grid, first: int | None = None) -> Tensor:
        if i == self.local_up_to_layer:
            x = self._join_prefix(x)
        args, named = arguments(block, x, grid)
        if self.grad_checkpointing and torch.is_grad_enabled():
            forced = forced_backend(None, torch.compiler.is_compiling())
            if forced is None:
                return checkpoint(block, *args, use_reentrant=False, **named)
            # what ``use_backend`` says now holds for the second run too, wherever that happens
            return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), use_backend(forced)), **named)
        return block(*args, **named) if first is None else block(x, grid, first)

    def _join_prefix(self, x: Tensor) -> Tensor:
        tokens = [x]
        if self.reg_token is not None:
            tokens.insert(0, self.reg_token.expand(x.shape[0], -1, -1))
        if self.cls_token is not None:
            tokens.insert(0, self.cls_token.expand(x.shape[0], -1, -1))
        return torch.cat(tokens, dim=1)

    def _indices(self, indices: int | Sequence[int] | None) -> set[int]:
        depth = len(self.blocks)
        if indices is None:
            return set(range(depth))
        wanted = range(depth - indices, depth) if isinstance(indices, int) else [i + depth if i < 0 else i for i in indices]
        if not wanted or min(wanted) < 0 or max(wanted) >= depth:
            raise ValueError(f"indices must choose among {depth} blocks, got {indices}")
        return set(wanted)


# what ``forward`` runs between the images and the logits
_METHODS = {name: getattr(ConViT, name) for name in ("forward_features", "forward_head", "_embed", "_block", "_join_prefix")}


@torch.no_grad()
def _draw(weight: Tensor) -> None:
    """A truncated normal distribution of 0.02, drawn in float32 at least: torch 2.6 draws some of 2 in bfloat16."""
    wide = weight if weight.dtype.itemsize >= 4 else torch.empty_like(weight, dtype=torch.float32)
    nn.init.trunc_normal_(wide, std=0.02)
    if wide is not weight:
        weight.copy_(wide)


def _inside(embed: nn.Module) -> PatchEmbed | None:
    """The patch embedding of ours that ``embed`` is, or wraps."""
    if isinstance(embed, PatchEmbed):
        return embed
    ours = [each for each in embed.modules() if isinstance(each, PatchEmbed)]
    return ours[0] if len(ours) == 1 else None


def _grid(embed: nn.Module, images: Tensor, x: Tensor) -> Grid:
    """How the patches lie that somebody's own patch embedding has made."""
    (height, width), tokens, grid = images.shape[-2:], x.shape[1], grid_of(embed)
    if grid is not None and grid[0] * grid[1] == tokens:
        return grid
    if height == width and is_square(tokens):
        return square_grid(tokens)
    raise ValueError(
        f"{type(embed).__name__}, in the place of patch_embed, gives N = {tokens} patches of images of {height} x {width}, and has no "
        "grid_size that says how they lie: set that to (gh, gw)"
    )


def _check_pool(global_pool: str, no_class_token: bool) -> str:
    if global_pool not in ("token", "avg", ""):
        raise ValueError(f"global_pool must be 'token', 'avg' or '', got {global_pool!r}")
    if global_pool == "token" and no_class_token:
        raise ValueError(
            "global_pool='token' needs a block after the class token joins: with local_up_to_layer = depth nothing of the image would "
            "reach it. Choose global_pool='avg', or a smaller local_up_to_layer"
        )
    return global_pool


def _check_least(**arguments: tuple[int, int]) -> None:
    for name, (value, least) in arguments.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def list_models() -> list[str]:
    """Names that ``create_model`` takes."""
    return list(VARIANTS)


def create_model(name: str, pretrained: bool | str | PathLike[str] = False, **kwargs: Any) -> ConViT:
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
    model.default_cfg = model.pretrained_cfg = {
        "architecture": name,
        "input_size": (model.in_chans, *model.patch_embed.img_size),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    if pretrained is not False:
        convit.load_pretrained(model, name if pretrained is True else pretrained, strict_head="num_classes" not in kwargs)
    return model
