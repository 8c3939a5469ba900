"""MindIR files: the deployed form of ``convit.export.deploy`` as a MindSpore cell, exported and checked in graph mode.

The positional tables are constants, so no N x N softmax for position and no custom operator is left: the file runs wherever MindSpore
does. The batch is dynamic, the image size fixed.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from convit.engine.mindspore.trained import trained_model
from convit.engine.preparation import Preparation
from convit.engine.trained import class_names
from convit.export.check import Infer, Report, check_images, check_request, facts_of, write_checked
from convit.kernels.gpsa.definition import sigmoid, softmax
from convit.mindspore.model import ConViT, create_model


def _table(size: int, linear: np.ndarray, square: np.ndarray) -> np.ndarray:
    """One axis of the position softmax, [H, size, size] float64, from the weights of d and d^2 [H]."""
    d = np.arange(size)[None, :] - np.arange(size)[:, None]
    logits = linear[:, None, None] * d + square[:, None, None] * d**2
    return softmax(logits)


class _Linear(nn.Cell):
    """A dense layer in MindSpore's own operators: the model's may use ours, which a MindIR file must not depend on."""

    def __init__(self, dense: Any, prefix: str) -> None:
        super().__init__()
        weight = dense.weight.asnumpy().astype(np.float32)
        self.weight = Parameter(Tensor(np.ascontiguousarray(weight.reshape(weight.shape[0], -1).T)), name=f"{prefix}.weight")
        self.bias = Parameter(Tensor(dense.bias.asnumpy().astype(np.float32)), name=f"{prefix}.bias")

    def construct(self, x: Tensor) -> Tensor:
        return ops.matmul(x, self.weight) + self.bias


class _Norm(nn.Cell):
    """``ops.LayerNorm`` over the last axis, for the reason of ``_Linear``."""

    def __init__(self, norm: Any, prefix: str) -> None:
        super().__init__()
        self.gamma = Parameter(Tensor(norm.gamma.asnumpy().astype(np.float32)), name=f"{prefix}.gamma")
        self.beta = Parameter(Tensor(norm.beta.asnumpy().astype(np.float32)), name=f"{prefix}.beta")
        self.normalise = ops.LayerNorm(-1, -1, float(norm.epsilon))

    def construct(self, x: Tensor) -> Tensor:
        return self.normalise(x, self.gamma, self.beta)[0]


class _Attention(nn.Cell):
    """One GPSA or MHSA layer on constants. ``class_only`` computes the class token's row only."""

    def __init__(self, attn: Any, grid: tuple[int, int], class_only: bool, prefix: str) -> None:
        super().__init__()
        self.heads, self.class_only = attn.num_heads, class_only
        self.tokens = grid[0] * grid[1] + (0 if hasattr(attn, "gating_param") else 1)
        self.local = hasattr(attn, "gating_param")
        weights = [attn.q.weight.asnumpy().astype(np.float64), attn.k.weight.asnumpy(), attn.v.weight.asnumpy()]
        dim = weights[0].shape[0]
        self.dim, self.head = dim, dim // attn.num_heads
        scale = self.head**-0.5
        weights[0] = weights[0] * scale
        self.weight = Parameter(Tensor(np.concatenate(weights).T.astype(np.float32)), name=f"{prefix}.weight")
        self.biased = bool(attn.q.has_bias)
        biases = [attn.q.bias.asnumpy() * scale, attn.k.bias.asnumpy(), attn.v.bias.asnumpy()] if self.biased else [np.zeros(1)]
        self.bias = Parameter(Tensor(np.concatenate(biases).astype(np.float32)), name=f"{prefix}.bias")
        self.proj = _Linear(attn.proj, f"{prefix}.proj")
        self.gh, self.gw = grid
        if self.local:
            gate = sigmoid(attn.gating_param.asnumpy().astype(np.float64))[:, None, None]
            w0, w1, w2 = attn.pos_proj.weight.asnumpy().astype(np.float64).T
            self.content_gate = Parameter(Tensor((1 - gate).astype(np.float32)), name=f"{prefix}.content_gate")
            self.py = Parameter(Tensor((gate * _table(self.gh, w1, w2)).astype(np.float32)), name=f"{prefix}.py")
            self.px = Parameter(Tensor(_table(self.gw, w0, w2)[:, None].astype(np.float32)), name=f"{prefix}.px")

    def construct(self, x: Tensor) -> Tensor:
        tokens = self.tokens
        qkv = ops.matmul(x, self.weight)
        if self.biased:
            qkv = qkv + self.bias
        qkv = qkv.reshape(-1, tokens, 3, self.heads, self.head).transpose(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if self.class_only:
            q, tokens = q[:, :, :1], 1
        out = ops.matmul(ops.softmax(ops.matmul(q, k.swapaxes(-2, -1)), -1), v)
        if self.local:
            rows = ops.matmul(self.py, v.reshape(-1, self.heads, self.gh, self.gw * self.head))
            position = ops.matmul(self.px, rows.reshape(-1, self.heads, self.gh, self.gw, self.head))
            out = out * self.content_gate + position.reshape(-1, self.heads, tokens, self.head)
        return self.proj(out.transpose(0, 2, 1, 3).reshape(-1, tokens, self.dim))


class _Block(nn.Cell):
    """A block of the model; ``class_only`` keeps the class token's row."""

    def __init__(self, block: Any, grid: tuple[int, int], class_only: bool, prefix: str) -> None:
        super().__init__()
        self.class_only = class_only
        self.norm1, self.norm2 = _Norm(block.norm1, f"{prefix}.norm1"), _Norm(block.norm2, f"{prefix}.norm2")
        self.attn = _Attention(block.attn, grid, class_only, f"{prefix}.attn")
        self.fc1, self.fc2 = _Linear(block.mlp.fc1, f"{prefix}.fc1"), _Linear(block.mlp.fc2, f"{prefix}.fc2")
        self.gelu = "tanh" if block.mlp.act.approximate else "none"

    def construct(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm1(x))
        if self.class_only:
            x = x[:, :1]
        x = x + y
        return x + self.fc2(ops.gelu(self.fc1(self.norm2(x)), self.gelu))


class Deployed(nn.Cell):
    """Images [B, in_channels, H, W] to logits [B, num_classes], with everything that does not depend on the image folded."""

    def __init__(self, model: ConViT) -> None:
        super().__init__()
        depth = len(model.blocks)
        self.local, self.depth = model.local_up_to_layer, depth
        (self.gh, self.gw), (self.ph, self.pw) = model.grid, model.patch_embed.patch_size
        self.channels = model.in_channels
        self.proj = _Linear(model.patch_embed.proj, "deployed.proj")
        position = model.pos_embed.asnumpy() if model.use_pos_embed else np.zeros((1, 1, model.embed_dim), np.float32)
        self.pos_embed = Parameter(Tensor(position), name="deployed.pos_embed")
        self.cls_token = Parameter(Tensor(model.cls_token.asnumpy()), name="deployed.cls_token")
        last = depth - 1 if self.local < depth else depth
        self.blocks = nn.CellList([_Block(b, model.grid, i == last, f"deployed.{i}") for i, b in enumerate(model.blocks)])
        self.norm = _Norm(model.norm, "deployed.norm")
        self.head = _Linear(model.classifier, "deployed.head")

    def construct(self, images: Tensor) -> Tensor:
        x = images.reshape(-1, self.channels, self.gh, self.ph, self.gw, self.pw).transpose(0, 2, 4, 1, 3, 5)
        x = self.proj(x.reshape(-1, self.gh * self.gw, self.channels * self.ph * self.pw)) + self.pos_embed
        for i in range(self.depth):
            if i == self.local:
                x = ops.concat((ops.zeros_like(x[:, :1]) + self.cls_token, x), 1)
            x = self.blocks[i](x)
        return self.head(self.norm(x[:, 0]))


def export_mindir(
    model: str | Path | ConViT,
    path: str | os.PathLike[str],
    *,
    pretrained: bool = False,
    images: Sequence[str | os.PathLike[str]] | None = None,
    img_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    preparation: Preparation | None = None,
) -> Report:
    """Export a ConViT to a MindIR file and check it in MindSpore's graph mode on real images.

    The file carries what a server needs as ``convit.mean``, ``convit.classes`` and so on in its ``user_info``.

    Args:
        model: A variant, the path of a run folder or any checkpoint, or a MindSpore ConViT; exported in evaluation mode, left as it is.
        path: The file, ending in ``.mindir``; an existing one is replaced.
        pretrained: For a variant: the published weights, else the initial ones.
        images: Image files to check with; default the photographs in scikit-learn.
        img_size: (height, width) to export for; default the checkpoint's, of a variant 224 x 224.
        num_classes: Classes of a variant.
        classes: Names of the outputs; default those of the run, ImageNet's for 1000, else numbers.
        preparation: How an image becomes the model's input; default the run's, else ImageNet's normalisation and a crop of 0.875.

    Raises:
        ValueError: The suffix is wrong, the classes are another number than the outputs, an image cannot be read, or the file's logits
            differ from the eager model's.
    """
    path, recorded = Path(path), list[str]()
    check_request("mindir", path)
    if isinstance(model, Path):
        model, found = trained_model(model)
        if img_size is not None:
            model.set_input_size(img_size)
        recorded, preparation = found.classes, preparation or found.preparation
    elif isinstance(model, str):
        given: dict[str, Any] = {} if img_size is None else {"image_size": img_size}
        given |= {} if num_classes is None else {"num_classes": num_classes}
        model = create_model(model, pretrained=pretrained, **given)
    if model.num_classes == 0:
        raise ValueError("model must have a classifier, got num_classes = 0")
    if classes is not None and len(classes) != model.num_classes:
        raise ValueError(f"classes must name the {model.num_classes} outputs of the model, got {len(classes)}")
    size = model.patch_embed.image_size
    asked = Preparation.of_config({}, size, model.in_channels) if preparation is None else preparation._replace(size=size)
    batch = check_images(images, asked)
    facts = facts_of(asked, class_names(list(classes or recorded), model.num_classes))

    def record(program: Any) -> None:
        for key, value in facts.items():
            program.user_info[f"convit.{key}"] = value

    def write(made: Path) -> Infer:
        deployed = Deployed(model).set_train(False)
        shape = Tensor(shape=[None, model.in_channels, *size], dtype=ms.float32)
        ms.export(deployed, shape, file_name=str(made), file_format="MINDIR", custom_func=record)
        made.chmod(0o644)  # MindSpore writes it read-only
        loaded = nn.GraphCell(ms.load(str(made)))
        return lambda images: loaded(Tensor(images)).asnumpy()

    training = model.training
    model.set_train(False)
    try:
        return write_checked(path, "mindir", write, lambda images: model(Tensor(images)).asnumpy(), [batch])
    finally:
        model.set_train(training)
