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

import logging
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convit.architecture import resample
from convit.weights import mindspore_file, torch_file
from convit.weights.files import (
    BFLOAT16,
    SUFFIXES,
    BadFile,
    Settings,
    Tensors,
    from_torch,
    mapped,
    read_safetensors,
    replacing,
    shown,
    to_torch,
    write_safetensors,
)
from convit.weights.names import from_mindcv, strip, to_mindcv, without_training_state
from convit.weights.published import fetch, variants

logger = logging.getLogger("convit")

__all__ = [
    "Checkpoint",
    "fetch",
    "fit",
    "from_mindcv",
    "load_checkpoint",
    "load_pretrained",
    "read",
    "read_file",
    "save_checkpoint",
    "settings_of",
    "to_float32",
    "to_mindcv",
    "write",
    "write_file",
]

# how each family computes where no setting is recorded
_FAMILY = {"timm": ("gelu", 1e-6), "mindcv": ("gelu_tanh", 1e-7)}
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
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


def read_file(path: str | os.PathLike[str], key: str | None = None) -> tuple[Tensors, Settings | None]:
    """Read any of the formats: the tensors under the names they have in the file, and the recorded settings if there are any.

    Args:
        path: The file.
        key: In a ``.pth`` that holds several dictionaries of weights, the one to read; default: the first of ``WEIGHT_KEYS``. In other
            files the prefix of a moving average to take in place of the weights, such as "ema".

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is no checkpoint, is truncated or damaged, is encrypted, or would run code when unpickled.
    """
    path = Path(path)
    data = mapped(path)
    head = bytes(data[:16])
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return torch_file.read(path, data, key)
    if head[:4] in mindspore_file.ENCRYPTED:
        raise BadFile(
            path,
            "is encrypted by MindSpore; decrypt it first: "
            "mindspore.save_checkpoint([{'name': n, 'data': p} for n, p in mindspore.load_checkpoint(file, dec_key=...).items()], out)",
        )
    if head[8:9] == b"{":
        tensors, settings = read_safetensors(path, data)
    elif head[:1] == b"\x0a":
        tensors, settings = mindspore_file.read(path, data)
    else:
        raise BadFile(path, f"is no checkpoint: expected a PyTorch, safetensors or MindSpore file, got {_looks_like(head)}")
    try:
        return (tensors if key is None else without_training_state(tensors, key)), settings
    except ValueError as error:
        raise BadFile(path, str(error)) from None


def write_file(path: str | os.PathLike[str], tensors: Tensors, settings: Settings | None) -> None:
    """Write ``tensors`` in the format of the suffix, whole or not at all.

    Args:
        path: ``.pth``, ``.pt`` or ``.bin`` (PyTorch), ``.safetensors`` or ``.ckpt`` (MindSpore); an existing file is replaced.
        tensors: Arrays by name; the order is kept.
        settings: A JSON object to travel with them, or None.

    Raises:
        ValueError: The suffix is unknown, or the format has no such dtype.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"the suffix of {path.name!r} must be one of {', '.join(SUFFIXES)}, got {suffix or 'none'!r}")
    with replacing(path) as file:
        if suffix == ".safetensors":
            write_safetensors(file, tensors, settings)
        elif suffix == ".ckpt":
            mindspore_file.write(file, tensors, settings)
        else:
            torch_file.write(file, tensors, settings)


def _looks_like(head: bytes) -> str:
    if not head:
        return "an empty file"
    if head.lstrip()[:1] == b"<":
        return "a web page (a failed download?)"
    if head.startswith(b"version https://"):
        return "a git-lfs pointer; fetch the file itself with `git lfs pull`"
    return f"a file that starts with {head[:8]!r}"


def read(path: str | os.PathLike[str], *, key: str | None = None) -> Checkpoint:
    """Read a timm or FAIR ``.pth``, a ``.safetensors`` or a MindCV ``.ckpt``; the content decides, not the suffix.

    Args:
        path: The file.
        key: In a ``.pth`` with several dictionaries of weights, the one to read; default: the first of ``state_dict_ema``,
            ``model_ema``, ``state_dict``, ``model``, else the file itself. In other files the prefix of a moving average to take in place
            of the weights, such as "ema". An optimiser's state is left out.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is no checkpoint of a ConViT, or is truncated, damaged, encrypted, or would run code when unpickled.
    """
    tensors, settings = read_file(path, key)
    try:
        tensors = strip(tensors)
        if not any(name.startswith("blocks.0.attn.") for name in tensors) or "patch_embed.proj.weight" not in tensors:
            got = _some([name[:60] for name in tensors])
            raise ValueError(f"holds no ConViT: expected blocks.0.attn.* and patch_embed.proj.weight, got {got}")
        mindcv = any(name.endswith(".gamma") or re.fullmatch(r"blocks\.\d+\.attn\.q\.weight", name) for name in tensors)
        source = "mindcv" if mindcv else "timm"
        if mindcv:
            tensors = from_mindcv(without_training_state(tensors))
        whole = [name for name, array in tensors.items() if array.dtype.kind != "f" and array.dtype != BFLOAT16]
        if whole:
            raise ValueError(f"must hold floating-point weights, got {tensors[whole[0]].dtype} at {_some(whole)}")
        empty = [name for name, array in tensors.items() if not array.size]
        if empty:  # a size that no bytes stand for
            raise ValueError(f"must hold weights, got the shape {list(tensors[empty[0]].shape)} at {_some(empty)}")
    except ValueError as error:
        raise BadFile(path, str(error)) from None
    act, norm_eps, grid = *_FAMILY[source], None
    if settings is not None:
        act, norm_eps, grid = settings.get("act", act), settings.get("norm_eps", norm_eps), settings.get("grid")
        square = isinstance(grid, list) and len(grid) == 2 and all(type(size) is int and 0 < size < 1 << 20 for size in grid)
        known = isinstance(act, str) and act in _APPROXIMATE and isinstance(norm_eps, float) and 0 < norm_eps < 1
        if not known or not (grid is None or square):
            found = ", ".join(f"{name} {shown(settings.get(name))}" for name in ("act", "norm_eps", "grid"))
            raise BadFile(path, f"must be act gelu or gelu_tanh, norm_eps and a grid, got {found}", "its recorded settings")
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
    """Load a file into a ConViT, of PyTorch (ours, timm's or FAIR's) or ours of MindSpore: its weights, GELU and LayerNorm eps.

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
    """Load published weights by a variant's name, or a file, into a model; see ``fetch`` and ``load_checkpoint``.

    A model of MindSpore gets MindCV's weights, one of PyTorch timm's where timm has the variant.

    The patch embedding is adapted to the model's number of channels, as timm does.

    Args:
        model: The model.
        name_or_path: A variant ("convit_tiny"), or a file.
        strict_head: False keeps the model's own classifier where the weights' has another shape.

    Raises:
        OSError: The weights cannot be downloaded; the message has the address and how to pass a file.
        ValueError: The download has the wrong checksum, or the weights do not fit the model.
    """
    published = str(name_or_path) in variants()
    path = fetch(str(name_or_path), "mindcv" if _is_cell(model) else None) if published else name_or_path
    checkpoint, name = read(path), "patch_embed.proj.weight"
    channels = (model if _is_cell(model) else _unwrap(model)).patch_embed.proj.weight.shape[1]
    kernel = checkpoint.tensors.get(name)
    adapted = checkpoint.tensors if kernel is None or kernel.ndim != 4 else checkpoint.tensors | {name: _adapt_channels(kernel, channels)}
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
            tensors[name] = resample(to_float32(position), old, new)
    missing = [name for name in shapes if name not in tensors]
    unknown = [name for name in tensors if name not in shapes]
    differ = [
        f"{name} is {list(tensors[name].shape)} in the file, {list(shape)} in the model"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != tuple(shape)
    ]
    if not (missing or unknown or differ):
        _warn_of_nan(tensors, what)
        return tensors
    lines = [f"{what} does not fit this model:"]
    lines += [f"  missing in the file: {_some(missing)}"] if missing else []
    lines += [f"  not in the model: {_some(unknown)}"] if unknown else []
    lines += [f"  other shapes: {_some(differ)}"] if differ else []
    if all(entry.startswith(_HEADS) for entry in (*missing, *unknown, *differ)):
        lines.append("  Only the classifier differs: load_checkpoint(model, path, strict_head=False) keeps the model's own.")
    if (
        differ
        and not (missing or unknown)
        and all(_other_channels(tensors[n].shape, s) for n, s in shapes.items() if tensors[n].shape != s)
    ):
        lines.append(f"  Only the channels of the images differ: create_model(..., pretrained={what!r}) adapts the weights to the model's.")
    raise ValueError("\n".join(lines))


def _other_channels(old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether these are kernels of the patch embedding, of the same patches."""
    return len(old) == len(new) == 4 and old[0] == new[0] and old[2:] == new[2:]


def to_float32(array: np.ndarray) -> np.ndarray:
    """Any floating array, bfloat16 too, as float32; exact for the narrower types."""
    if array.dtype == BFLOAT16:
        array = (np.ascontiguousarray(array).view("<u2").astype("<u4") << 16).view("<f4").reshape(array.shape)
    return array.astype(np.float32, copy=False)


def _adapt_channels(weight: np.ndarray, channels: int) -> np.ndarray:
    """A patch embedding [d, 3, p, p] for ``channels``: summed to one, else repeated at the same overall gain, as timm does."""
    old = weight.shape[1]
    if channels == old:
        return weight
    weight = to_float32(weight)
    if channels == 1:
        summed: np.ndarray = weight.sum(axis=1, keepdims=True)
        return summed
    repeated: np.ndarray = np.tile(weight, (1, math.ceil(channels / old), 1, 1))[:, :channels] * np.float32(old / channels)
    return repeated


def _warn_of_nan(tensors: Tensors, what: str) -> None:
    broken = [name for name, array in tensors.items() if not np.isfinite(_wide(array)).all()]
    if broken:
        logger.warning("%s has NaN or infinite values in %d of %d tensors: %s", what, len(broken), len(tensors), _some(broken))


def _wide(array: np.ndarray) -> np.ndarray:
    """``to_float32`` of what float32 holds; float64 as it is."""
    return array if array.dtype == np.float64 else to_float32(array)


def _check_range(tensors: Tensors, largest: Callable[[str], float], what: str) -> None:
    """Refuse finite numbers that the model's own type would make infinite."""
    beyond = []
    for name, array in tensors.items():
        limit = largest(name)
        if array.dtype == np.float64 or limit < np.finfo(np.float32).max:
            top = float(np.abs(_wide(array)).max(initial=0.0, where=np.isfinite(_wide(array))))
            beyond += [f"{name} reaches {top:.3g}"] if top > limit else []
    if beyond:
        raise ValueError(
            f"{what} does not fit the model's type, in which it would be infinite: {_some(beyond)}. Make the model wider first"
        )


def _square(tokens: int) -> tuple[int, int] | None:
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else None


def _some(names: list[str], limit: int = 4) -> str:
    names = [name if name.isprintable() and len(name) < 300 else shown(name) for name in names[:limit]] + names[limit:]
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


def _is_cell(model: Any) -> bool:
    mindspore = sys.modules.get("mindspore")
    return mindspore is not None and isinstance(model, mindspore.nn.Cell)


def _load(model: Any, checkpoint: Checkpoint, path: str | os.PathLike[str], strict_head: bool) -> Any:
    if _is_cell(model):
        return _load_cell(model, checkpoint, path, strict_head)
    import torch
    from torch import nn

    inner = _unwrap(model)
    own = inner.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    fitted = fit(checkpoint.tensors, shapes, grid=_grid(inner), source_grid=checkpoint.grid, strict_head=strict_head, what=str(path))
    _check_range(fitted, lambda name: torch.finfo(own[name].dtype).max, str(path))
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


def _load_cell(model: Any, checkpoint: Checkpoint, path: str | os.PathLike[str], strict_head: bool) -> Any:
    from mindspore import Tensor

    from convit.mindspore.layers import GELU, LayerNorm

    own = model.parameters_dict()
    shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
    tensors = to_mindcv(checkpoint.tensors)
    fitted = fit(tensors, shapes, grid=model.grid, source_grid=checkpoint.grid, strict_head=strict_head, what=str(path))
    _check_range(fitted, lambda name: float(np.finfo("float16" if str(own[name].dtype) == "Float16" else "float32").max), str(path))
    for name, array in fitted.items():
        own[name].set_data(Tensor(to_float32(array), own[name].dtype))
    for _, cell in model.cells_and_names():
        if isinstance(cell, GELU):
            cell.approximate = checkpoint.act == "gelu_tanh"
        elif isinstance(cell, LayerNorm):
            cell.set_epsilon(checkpoint.norm_eps)
    model.compile_cache.clear()  # graphs that were compiled before have the old settings
    return model
