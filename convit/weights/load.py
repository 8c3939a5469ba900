"""Everyone's ConViT weights: read, convert, load.

timm, FAIR and MindCV describe one network under two sets of names, and differ in two settings that change the logits:

                    timm, FAIR                     MindCV
    GPSA            attn.qk [2d, d], attn.v        attn.q, attn.k, attn.v
    MHSA            attn.qkv [3d, d]               attn.q, attn.k, attn.v
    norms           *.weight, *.bias               *.gamma, *.beta
    classifier      head                           classifier
    GELU            exact                          tanh
    LayerNorm eps   1e-6                           1e-7

The names are a bijection, so a conversion loses nothing; the settings are recorded in the converted file and set on the model that
loads it. Nothing here needs MindSpore, and only ``.pth`` files and models of PyTorch need torch.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convit.weights.files import BFLOAT16, Settings, Tensors, from_torch, read_file, to_torch, write_file
from convit.weights.published import fetch, variants

__all__ = [
    "Checkpoint",
    "fetch",
    "fit",
    "from_mindcv",
    "load_checkpoint",
    "load_pretrained",
    "read",
    "resample",
    "save_checkpoint",
    "settings_of",
    "to_float32",
    "to_mindcv",
    "write",
]

# how each family computes where no setting is recorded
_FAMILY = {"timm": ("gelu", 1e-6), "mindcv": ("gelu_tanh", 1e-7)}
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
# wrappers of training loops put these before every name
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "ema.")
# what a training loop of MindSpore stores beside the weights
_TRAINING_STATE = re.compile(
    r"(moments?[12v]?|exp_avg(_sq)?|accum|accu_grads|grad_sum|ema|stat|mean_grad|mean_square)\..*"
    r"|global_step|epoch_num|step_num|learning_rate|beta[12]_power|scale_sense|current_iterator_step|last_overflow_iterator_step"
)
_NORM = re.compile(r"((?:.*\.)?norm\d*)\.(weight|bias|gamma|beta)")
_ATTENTION = re.compile(r"(blocks\.\d+\.attn)\.(qkv|qk|q|k|v)\.(weight|bias)")
_HEADS = ("head.", "classifier.")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a ConViT and the settings they were trained with.

    Attributes:
        tensors: Arrays by timm's names; bfloat16 as ``convit.weights.files.BFLOAT16``.
        act: "gelu" (exact) or "gelu_tanh".
        norm_eps: The epsilon of every LayerNorm.
        source: Whose names the file used, "timm" (FAIR's are the same) or "mindcv".
        grid: (gh, gw) of the position embedding; None where the file does not record it, which means a square.
    """

    tensors: Tensors
    act: str = "gelu"
    norm_eps: float = 1e-6
    source: str = "timm"
    grid: tuple[int, int] | None = None

    def settings(self) -> Settings:
        """The settings as a JSON object: what ``write`` records."""
        settings: Settings = {"act": self.act, "norm_eps": self.norm_eps}
        return settings | ({"grid": list(self.grid)} if self.grid else {})


def read(path: str | os.PathLike[str], *, key: str | None = None) -> Checkpoint:
    """Read a timm or FAIR ``.pth``, a ``.safetensors`` or a MindCV ``.ckpt``; the content decides, not the suffix.

    Args:
        path: The file.
        key: For a ``.pth`` with several dictionaries of weights, the one to read; default: the first of ``state_dict_ema``,
            ``model_ema``, ``state_dict``, ``model``, else the file itself.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is no checkpoint of a ConViT, or is truncated, damaged, encrypted, or would run code when unpickled.
    """
    tensors, settings = read_file(path, key)
    tensors = _strip(tensors)
    if not any(name.startswith("blocks.0.attn.") for name in tensors) or "patch_embed.proj.weight" not in tensors:
        raise ValueError(f"{path} holds no ConViT: expected blocks.0.attn.* and patch_embed.proj.weight, got {_some(list(tensors))}")
    mindcv = any(name.endswith(".gamma") or re.fullmatch(r"blocks\.\d+\.attn\.q\.weight", name) for name in tensors)
    source = "mindcv" if mindcv else "timm"
    if mindcv:
        tensors = from_mindcv({name: array for name, array in tensors.items() if not _TRAINING_STATE.fullmatch(name)})
    act, norm_eps, grid = *_FAMILY[source], None
    if settings is not None:
        act, norm_eps, grid = settings.get("act", act), settings.get("norm_eps", norm_eps), settings.get("grid")
        square = isinstance(grid, list) and len(grid) == 2 and all(isinstance(size, int) and size > 0 for size in grid)
        if act not in _APPROXIMATE or not isinstance(norm_eps, float) or not 0 < norm_eps < 1 or not (grid is None or square):
            raise ValueError(f"{path}: its recorded settings must be act gelu or gelu_tanh, norm_eps and a grid, got {settings}")
    return Checkpoint(tensors, act, norm_eps, source, tuple(grid) if grid else None)


def write(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint in the format of the suffix, whole or not at all; every bit of the tensors is kept.

    ``.pth`` and ``.safetensors`` get timm's names, ``.ckpt`` MindCV's. The settings are recorded unless they are what the reader of
    such names assumes anyway: then the file is the same as one that timm or MindCV wrote.

    Raises:
        ValueError: The suffix is none of ``.pth .pt .bin .safetensors .ckpt``, or the format cannot hold a tensor.
    """
    mindcv = Path(path).suffix.lower() == ".ckpt"
    family = "mindcv" if mindcv else "timm"
    usual = (checkpoint.act, checkpoint.norm_eps) == _FAMILY[family] and checkpoint.grid is None
    tensors = to_mindcv(checkpoint.tensors) if mindcv else checkpoint.tensors
    write_file(path, tensors, None if usual else checkpoint.settings())


def load_checkpoint(model: Any, path: str | os.PathLike[str], *, strict_head: bool = True, key: str | None = None) -> Any:
    """Load a file into a PyTorch ConViT (ours, timm's or FAIR's): its weights, GELU and LayerNorm eps.

    The position embedding is resampled where the model has another grid. Everything is checked before anything is set: on an
    error the model is as it was.

    Args:
        model: The model; it keeps its device and dtype.
        path: A timm or FAIR ``.pth``, a ``.safetensors`` or a MindCV ``.ckpt`` (MindSpore is not needed).
        strict_head: False keeps the model's own classifier where the file's has another shape or is missing.
        key: See ``read``.

    Returns:
        The model.

    Raises:
        OSError: The file cannot be opened.
        ValueError: The file cannot be read (see ``read``), or does not fit the model; the first differing names and shapes are listed.
    """
    return _load(model, read(path, key=key), path, strict_head)


def load_pretrained(model: Any, name_or_path: str | os.PathLike[str], *, strict_head: bool = True) -> Any:
    """Load published weights by a variant's name, or a file, into a PyTorch model; see ``fetch`` and ``load_checkpoint``.

    For published weights the patch embedding is adapted to the model's number of channels, as timm does; a file has to fit.

    Args:
        model: The model.
        name_or_path: A variant ("convit_tiny"), or a file.
        strict_head: False keeps the model's own classifier where the weights' has another shape.

    Raises:
        OSError: The weights cannot be downloaded; the message has the address and how to pass a file.
        ValueError: The download has the wrong checksum, or the weights do not fit the model.
    """
    if str(name_or_path) not in variants():
        return load_checkpoint(model, name_or_path, strict_head=strict_head)
    path = fetch(str(name_or_path))
    checkpoint = read(path)
    channels = _unwrap(model).patch_embed.proj.weight.shape[1]
    name = "patch_embed.proj.weight"
    adapted = checkpoint.tensors | {name: _adapt_channels(checkpoint.tensors[name], channels)}
    return _load(model, replace(checkpoint, tensors=adapted), path, strict_head)


def save_checkpoint(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a PyTorch ConViT's weights and settings; the suffix chooses the format. ``load_checkpoint`` restores both.

    Raises:
        ValueError: See ``write`` and ``settings_of``.
    """
    model = _unwrap(model)
    settings = settings_of(model)
    tensors = {name: from_torch(tensor) for name, tensor in model.state_dict().items()}
    grid = tuple(settings["grid"]) if "grid" in settings else None
    write(path, Checkpoint(tensors, settings["act"], settings["norm_eps"], grid=grid))


def settings_of(model: Any) -> Settings:
    """{"act", "norm_eps"} of a PyTorch model and, where its patch grid is no square, "grid".

    A training checkpoint that stores this under the key ``convit`` beside its weights is read back with the settings.

    Raises:
        ValueError: The model has no GELU or no LayerNorm, or several kinds.
    """
    from torch import nn

    model = _unwrap(model)
    acts = {module.approximate for module in model.modules() if isinstance(module, nn.GELU)}
    epsilons = {float(module.eps) for module in model.modules() if isinstance(module, nn.LayerNorm)}
    if len(acts) != 1 or len(epsilons) != 1:
        raise ValueError(f"model must have one kind of GELU and one LayerNorm eps, got {sorted(acts)} and {sorted(epsilons)}")
    settings: Settings = {"act": "gelu_tanh" if acts == {"tanh"} else "gelu", "norm_eps": epsilons.pop()}
    grid = _grid(model)
    return settings | ({"grid": list(grid)} if grid and grid[0] != grid[1] else {})


# names


def from_mindcv(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """MindCV's names to timm's. The inverse of ``to_mindcv``.

    Raises:
        ValueError: A projection of an attention module is missing, or its three parts differ in dtype.
    """
    out: Tensors = {}
    for name, array in tensors.items():
        attention = _ATTENTION.fullmatch(name)
        if attention is None:
            out[_rename(name, {"gamma": "weight", "beta": "bias"}, "classifier.", "head.")] = array
            continue
        module, part, kind = attention.groups()
        local = f"{module}.gating_param" in tensors
        if local and part == "v":
            out[name] = array
            continue
        joined = ("q", "k") if local else ("q", "k", "v")
        parts = [tensors.get(f"{module}.{each}.{kind}") for each in joined]
        if part not in joined or any(each is None for each in parts):
            missing = [f"{module}.{each}.{kind}" for each, tensor in zip(joined, parts, strict=True) if tensor is None]
            raise ValueError(f"{name} needs {', '.join(missing) or 'MindCV names beside it'}")
        if len({(each.dtype, each.shape[1:]) for each in parts}) != 1:  # type: ignore[union-attr]
            raise ValueError(f"{module}: q, k and v must have one dtype and width, got {[(e.dtype, e.shape) for e in parts]}")  # type: ignore[union-attr]
        if part == "q":
            out[f"{module}.{''.join(joined)}.{kind}"] = np.concatenate(parts)  # type: ignore[arg-type]
    return out


def to_mindcv(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """timm's names to MindCV's. The inverse of ``from_mindcv``.

    Raises:
        ValueError: A joined projection cannot be divided.
    """
    out: Tensors = {}
    for name, array in tensors.items():
        attention = _ATTENTION.fullmatch(name)
        if attention is None:
            out[_rename(name, {"weight": "gamma", "bias": "beta"}, "head.", "classifier.")] = array
            continue
        module, part, kind = attention.groups()
        if part in ("qk", "qkv"):
            if array.shape[0] % len(part):
                raise ValueError(f"{name} must have rows for {len(part)} projections, got {list(array.shape)}")
            out |= {f"{module}.{each}.{kind}": rows for each, rows in zip(part, np.split(array, len(part)), strict=True)}
        else:
            out[name] = array
    return out


def _rename(name: str, norms: dict[str, str], head: str, new_head: str) -> str:
    norm = _NORM.fullmatch(name)
    if norm:
        return f"{norm[1]}.{norms.get(norm[2], norm[2])}"
    return new_head + name[len(head) :] if name.startswith(head) else name


def _strip(tensors: Tensors) -> Tensors:
    while True:
        prefix = next((p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            return tensors
        tensors = {name[len(prefix) :]: array for name, array in tensors.items()}


# fitting a checkpoint to a model


def fit(
    tensors: Tensors,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    grid: tuple[int, int] | None = None,
    source_grid: tuple[int, int] | None = None,
    strict_head: bool = True,
    what: str = "the checkpoint",
) -> Tensors:
    """The tensors that a model with parameters of these ``shapes`` has to take; any framework, either family's names.

    Args:
        tensors: The checkpoint.
        shapes: Shape by name for every parameter of the model.
        grid: (gh, gw) of the model's patches; None: a square.
        source_grid: That of the checkpoint's position embedding; None: a square.
        strict_head: False leaves out a classifier that is missing on one side or has another shape.
        what: The file, for the message.

    Raises:
        ValueError: They do not fit; the first missing, unknown and differing names are listed with their shapes.
    """
    tensors = dict(tensors)
    if not strict_head:
        # weight and bias stay together: a head of half old and half new numbers is none
        heads = {name for name in {*tensors, *shapes} if name.startswith(_HEADS)}
        if any(name not in tensors or name not in shapes or tensors[name].shape != tuple(shapes[name]) for name in heads):
            tensors = {name: array for name, array in tensors.items() if name not in heads}
            shapes = {name: shape for name, shape in shapes.items() if name not in heads}
    position, name = tensors.get("pos_embed"), "pos_embed"
    if position is not None and name in shapes and position.ndim == 3 and position.shape[::2] == tuple(shapes[name])[::2]:
        old = source_grid or _square(position.shape[1])
        new = grid or _square(shapes[name][1])
        if old and new and old != new and math.prod(old) == position.shape[1] and math.prod(new) == shapes[name][1]:
            tensors[name] = resample(position, old, new)
    missing = [name for name in shapes if name not in tensors]
    unknown = [name for name in tensors if name not in shapes]
    differ = [
        f"{name} is {list(tensors[name].shape)} in the file, {list(shape)} in the model"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != tuple(shape)
    ]
    if not (missing or unknown or differ):
        return tensors
    lines = [f"{what} does not fit this model:"]
    lines += [f"  missing in the file: {_some(missing)}"] if missing else []
    lines += [f"  not in the model: {_some(unknown)}"] if unknown else []
    lines += [f"  other shapes: {_some(differ)}"] if differ else []
    if all(entry.startswith(_HEADS) for entry in (*missing, *unknown, *differ)):
        lines.append("  Only the classifier differs: load_checkpoint(model, path, strict_head=False) keeps the model's own.")
    raise ValueError("\n".join(lines))


def resample(pos_embed: np.ndarray, grid: tuple[int, int], new_grid: tuple[int, int]) -> np.ndarray:
    """Resample a position embedding [1, gh*gw, d] to another grid: bicubic, with antialiasing, as timm does.

    Returns:
        [1, new_gh*new_gw, d] float32.
    """
    gh, gw = grid
    rows, columns = (_bicubic(old, new) for old, new in zip(grid, new_grid, strict=True))
    table = to_float32(pos_embed).astype(np.float64).reshape(gh, gw, -1)
    table = np.einsum("ya,xb,abd->yxd", rows, columns, table, optimize=True)
    return np.ascontiguousarray(table.reshape(1, math.prod(new_grid), -1), np.float32)


def _bicubic(old: int, new: int) -> np.ndarray:
    """The weights [new, old] of one axis: Keys' cubic (a = -0.5), widened when it shrinks, cut at the borders and normalised."""
    scale = old / new
    width = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale
    x = np.abs(np.arange(old)[None, :] + 0.5 - centres[:, None]) / width
    cubic = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))
    return cubic / cubic.sum(axis=1, keepdims=True)


def to_float32(array: np.ndarray) -> np.ndarray:
    """Any floating array, bfloat16 too, as float32; exact for the narrower types."""
    if array.dtype == BFLOAT16:
        return (np.ascontiguousarray(array).view("<u2").astype("<u4") << 16).view("<f4").reshape(array.shape)
    return array.astype(np.float32, copy=False)


def _adapt_channels(weight: np.ndarray, channels: int) -> np.ndarray:
    """A patch embedding [d, 3, p, p] for ``channels``: summed to one, else repeated at the same overall gain, as timm does."""
    old = weight.shape[1]
    if channels == old:
        return weight
    weight = to_float32(weight)
    if channels == 1:
        return weight.sum(axis=1, keepdims=True)
    repeated = np.tile(weight, (1, math.ceil(channels / old), 1, 1))[:, :channels]
    return repeated * np.float32(old / channels)


def _square(tokens: int) -> tuple[int, int] | None:
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else None


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _unwrap(model: Any) -> Any:
    """The model inside ``torch.compile``, DataParallel or DistributedDataParallel."""
    while not hasattr(model, "patch_embed"):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            raise ValueError(f"model must be a ConViT, got {type(model).__name__} without a patch_embed")
        model = inner
    return model


def _grid(model: Any) -> tuple[int, int] | None:
    grid = getattr(model.patch_embed, "grid_size", None)
    return (int(grid[0]), int(grid[1])) if grid is not None else None


def _load(model: Any, checkpoint: Checkpoint, path: str | os.PathLike[str], strict_head: bool) -> Any:
    from torch import nn

    inner = _unwrap(model)
    own = inner.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    fitted = fit(checkpoint.tensors, shapes, grid=_grid(inner), source_grid=checkpoint.grid, strict_head=strict_head, what=str(path))
    acts = [module for module in inner.modules() if isinstance(module, nn.GELU)]
    if not acts and any(name.startswith("blocks.") for name in own):
        raise ValueError(f"{path} was trained with {checkpoint.act}, but the model has no torch.nn.GELU")
    inner.load_state_dict(own | {name: to_torch(array) for name, array in fitted.items()}, strict=True)
    for act in acts:
        act.approximate = _APPROXIMATE[checkpoint.act]
    for module in inner.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = checkpoint.norm_eps
    return model
