"""Names of a ConViT's weights: between timm (FAIR's are the same) and MindCV, and without what training loops put before or beside them."""

import re
from collections.abc import Mapping

import numpy as np

from convit.weights.files import Tensors

# wrappers of training loops put these before every name
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "ema.")
# what a training loop of MindSpore stores beside the weights
TRAINING_STATE = re.compile(
    r"(moments?[12v]?|exp_avg(_sq)?|accum|accu_grads|grad_sum|ema|stat|mean_grad|mean_square)\..*"
    r"|global_step|epoch_num|step_num|learning_rate|beta[12]_power|scale_sense|current_iterator_step|last_overflow_iterator_step"
)
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
    while True:
        prefix = next((p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            return tensors
        tensors = {name[len(prefix) :]: array for name, array in tensors.items()}
