"""Names of a ConViT's weights: between timm (FAIR's are the same) and MindCV, and without what training loops put before or beside them."""

import re
from collections.abc import Mapping

import numpy as np

from convit.weights.files import Tensors

# wrappers of training loops put these before every name
_PREFIXES = ("model.", "network.", "ema.", "ema_model.")
# and DataParallel, AveragedModel, torch.compile, activation checkpointing and FSDP before the names of what they wrap, wherever it stands
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_COUNTERS = ("n_averaged",)  # AveragedModel's own
_MODEL = re.compile(r"(cls_token|reg_token|pos_embed|patch_embed\.|blocks\.\d+\.|norm\.|head\.|classifier\.)")
_SCHEDULE = re.compile(r"learning_rate(\..*)?")  # a schedule is a vector
_NORM = re.compile(r"((?:.*\.)?norm\d*)\.(weight|bias|gamma|beta)")
_ATTENTION = re.compile(r"(blocks\.\d+\.attn)\.(qkv|qk|q|k|v)\.(weight|bias)")


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


def strip(tensors: Tensors) -> Tensors:
    """The tensors without what wrappers put before their names, and without what those wrappers count.

    Raises:
        ValueError: Two names become one.
    """
    tensors = _out_of_optimiser(tensors)
    plain = {_WRAPPERS.sub("", name): array for name, array in tensors.items()}
    if len(plain) < len(tensors):
        known: set[str] = set()
        for name in tensors:
            if (short := _WRAPPERS.sub("", name)) in known:
                raise ValueError(f"holds {short} twice, as {name} too")
            known.add(short)
    if len(plain) > 1:
        plain = {name: array for name, array in plain.items() if name not in _COUNTERS}
    while True:
        prefix = next((p for p in _PREFIXES if plain and all(name.startswith(p) for name in plain)), None)
        if prefix is None:
            return plain
        plain = {name[len(prefix) :]: array for name, array in plain.items()}


def without_training_state(tensors: Tensors, average: str | None = None) -> Tensors:
    """The weights among what a training loop of MindSpore stores in one file.

    What is left out: any ``<prefix>.<name of a weight>`` (an optimiser's moments, summed gradients, a moving average), schedules, and
    scalars that are no weight of a ConViT (steps, loss scales).

    Args:
        tensors: Everything in the file.
        average: A prefix, such as "ema", whose tensors are taken in place of the weights of the same names.

    Raises:
        ValueError: No tensor has the prefix.
    """
    tensors = _out_of_optimiser(tensors)
    weights = {name: array for name, array in tensors.items() if _MODEL.match(name)}
    if average is not None:
        averaged = {name: tensors[f"{average}.{name}"] for name in weights if f"{average}.{name}" in tensors}
        if not averaged:
            prefixes = sorted({name.split(".")[0] for name in tensors if name not in weights})
            raise ValueError(f"has no moving average {average}.*; beside the weights there is {', '.join(prefixes)[:200] or 'nothing'}")
        return weights | averaged
    rest = {name: array for name, array in tensors.items() if name not in weights}
    state = [name for name, array in rest.items() if array.size <= 1 or _SCHEDULE.fullmatch(name) or _behind_prefix(name) in weights]
    return {name: array for name, array in tensors.items() if name not in state}


def _out_of_optimiser(tensors: Tensors) -> Tensors:
    """The tensors without the ``optimizer.`` that MindCV's gradient accumulation puts before the names of weights and moments."""
    plain = {name.removeprefix("optimizer."): array for name, array in tensors.items()}
    held = any(name.startswith("optimizer.") and _MODEL.match(name[len("optimizer.") :]) for name in tensors)
    return plain if held and len(plain) == len(tensors) and not any(_MODEL.match(name) for name in tensors) else tensors


def _behind_prefix(name: str) -> str:
    """``adam_m.blocks.0.norm1.gamma`` to ``blocks.0.norm1.gamma``; the prefix may have dots."""
    parts = name.split(".")
    return next((short for i in range(1, min(len(parts), 8)) if _MODEL.match(short := ".".join(parts[i:]))), "")
