"""The ConViT model and its six variants for MindSpore, with MindCV's arguments, defaults and parameter names."""

from os import PathLike
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import TruncatedNormal, initializer

import convit
from convit.architecture import VARIANTS, resample
from convit.dispatch import nearest
from convit.mindspore.attention import GPSA, MHSA
from convit.mindspore.layers import Dense, DropPath, LayerNorm, Mlp, PatchEmbed, Size


class Block(nn.Cell):
    """Pre-norm transformer block whose attention is GPSA (``use_gpsa``) or MHSA."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        use_gpsa: bool = True,
        norm_eps: float = 1e-7,
        approximate_gelu: bool = True,
    ) -> None:
        super().__init__()
        self.use_gpsa = use_gpsa
        self.norm1 = LayerNorm(dim, norm_eps)
        attention = GPSA if use_gpsa else MHSA
        self.attn = attention(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop, approximate_gelu)

    def construct(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        y = self.norm1(x)
        y = self.attn(y, grid) if self.use_gpsa else self.attn(y)
        x = x + self.drop_path(y, 0)
        return x + self.drop_path(self.mlp(self.norm2(x)), 1)


class ConViT(nn.Cell):
    """ConViT (d'Ascoli et al. 2021): GPSA blocks over the patches, then the class token joins and MHSA blocks follow.

    The arguments up to ``locality_strength`` are MindCV's, with its defaults. The last two are how the weights were trained: MindCV's
    with the tanh GELU and an epsilon of 1e-7, timm's and FAIR's with the exact one and 1e-6; ``load_checkpoint`` sets them.

    Args:
        in_channels: Image channels.
        num_classes: Outputs of the classifier; 0 for none.
        image_size: Image height and width, any multiples of ``patch_size``.
        patch_size: Patch height and width.
        embed_dim: Total width C.
        num_heads: Heads H, a divisor of ``embed_dim``.
        drop_rate: Dropout after the position embedding and after the projections.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        depth: Blocks.
        mlp_ratio: Hidden width of the perceptrons over C.
        qkv_bias: Whether query, key and value projections have biases.
        attn_drop_rate: Attention dropout.
        local_up_to_layer: Number of GPSA blocks; the class token joins after them. From ``depth`` on there is none, and the first
            patch is classified, as in MindCV.
        use_pos_embed: Whether a learned position embedding is added to the patches.
        locality_strength: Of the local initialisation.
        norm_eps: Epsilon of the layer norms.
        approximate_gelu: tanh GELU if true, else exact.

    Raises:
        ValueError: Sizes do not divide.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1000,
        image_size: Size = 224,
        patch_size: Size = 16,
        embed_dim: int = 48,
        num_heads: int = 12,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        attn_drop_rate: float = 0.0,
        local_up_to_layer: int = 10,
        use_pos_embed: bool = True,
        locality_strength: float = 1.0,
        norm_eps: float = 1e-7,
        approximate_gelu: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.local_up_to_layer = local_up_to_layer
        self.use_pos_embed = use_pos_embed
        self.locality_strength = locality_strength

        self.patch_embed = PatchEmbed(image_size, patch_size, in_channels, embed_dim)
        self.grid, self.num_patches = self.patch_embed.grid, self.patch_embed.num_patches
        self.cls_token = Parameter(initializer(TruncatedNormal(0.02), (1, 1, embed_dim), ms.float32))
        if use_pos_embed:
            self.pos_embed = Parameter(initializer(TruncatedNormal(0.02), (1, self.num_patches, embed_dim), ms.float32))
        self.pos_drop = nn.Dropout(p=drop_rate)
        blocks = []
        for i in range(depth):
            drop_path = drop_path_rate * i / max(depth - 1, 1)
            use_gpsa = i < local_up_to_layer
            blocks.append(
                Block(embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate, drop_path, use_gpsa, norm_eps, approximate_gelu)
            )
        self.blocks = nn.CellList(blocks)
        self.norm = LayerNorm(embed_dim, norm_eps)
        self.classifier = Dense(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as MindCV: truncated normals of 0.02 for the dense layers, then the local initialisation of every GPSA."""
        for _, cell in self.cells_and_names():
            if isinstance(cell, nn.Dense):
                cell.weight.set_data(initializer(TruncatedNormal(0.02), cell.weight.shape))
                if cell.has_bias:
                    cell.bias.set_data(initializer("zeros", cell.bias.shape))
        for block in self.blocks:
            if block.use_gpsa:
                block.attn.local_init(self.locality_strength)

    def set_input_size(self, image_size: Size) -> None:
        """Take images of ``image_size`` from now on, any multiple of the patch size; the position embedding is resampled to their grid.

        An optimiser or moving average that was made before holds the old embedding: make it anew.

        Raises:
            ValueError: The patches do not divide it.
        """
        old = self.grid
        self.patch_embed.set_input_size(image_size)
        self.grid, self.num_patches = self.patch_embed.grid, self.patch_embed.num_patches
        if self.use_pos_embed and self.grid != old:
            before = self.pos_embed
            table = resample(before.asnumpy().astype(np.float32), old, self.grid)
            self.pos_embed = Parameter(Tensor(table, before.dtype), name=before.name, requires_grad=before.requires_grad)
        self.compile_cache.clear()  # graphs that were compiled before have the old size

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for the layer decay of MindCV's ``create_optimizer``; without them it has no effect there."""
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] to the normalised class token [B, C]."""
        x = self.patch_embed(x)
        if self.use_pos_embed:
            x = x + self.pos_embed
        x = self.pos_drop(x)
        for i, block in enumerate(self.blocks):
            if i == self.local_up_to_layer:
                x = ops.concat((ops.cast(ops.tile(self.cls_token, (x.shape[0], 1, 1)), x.dtype), x), 1)
            x = block(x, self.grid)
        return self.norm(x[:, 0])

    def forward_head(self, x: Tensor) -> Tensor:
        """Features [B, C] to logits."""
        return self.classifier(x)

    def construct(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def load_checkpoint(model: ConViT, path: str | PathLike[str], *, strict_head: bool = True) -> ConViT:
    """Load a file into a model: its weights, and the GELU and LayerNorm epsilon that they were trained with.

    The position embedding is resampled where the model has another grid. Everything is checked before anything is set: on an
    error the model is as it was. (``mindspore.load_checkpoint`` with ``load_param_into_net`` also serves for MindCV's files.)

    Args:
        model: The model.
        path: A MindCV ``.ckpt``, a timm or FAIR ``.safetensors``, or a ``.pth`` (this one needs torch).
        strict_head: False keeps the model's own classifier where the file's has another shape or is missing.

    Returns:
        The model.

    Raises:
        OSError: The file cannot be opened.
        ValueError: The file cannot be read or does not fit the model; the first differing names and shapes are listed.
    """
    loaded: ConViT = convit.load_checkpoint(model, path, strict_head=strict_head)
    return loaded


def list_models() -> list[str]:
    """Names that ``create_model`` takes."""
    return list(VARIANTS)


def create_model(name: str, pretrained: bool | str | PathLike[str] = False, **kwargs: Any) -> ConViT:
    """Build one of the six variants of ConViT.

    Args:
        name: One of ``list_models()``.
        pretrained: True fetches published ImageNet-1K weights; a path loads that checkpoint (MindCV, timm, FAIR or ours).
        **kwargs: Arguments of ``ConViT`` that differ from the variant's, such as ``image_size`` or ``num_classes``.

    Raises:
        ValueError: The name is unknown, or the weights do not fit.
        TypeError: An argument is unknown.
        OSError: The weights cannot be read or fetched.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown model {name!r}{nearest(name, VARIANTS)} (known: {', '.join(VARIANTS)})")
    model = ConViT(**{**VARIANTS[name], **kwargs})
    if pretrained is not False:
        convit.load_pretrained(model, name if pretrained is True else pretrained, strict_head=False)
    return model
