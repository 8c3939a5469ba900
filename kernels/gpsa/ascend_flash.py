"""GPSA for MindSpore on Ascend from the framework's fused attention, never N x N in our hands.

    out = (1 - g) flash_attention_score(q, k, v) + g (Py (x) Px) v

The content half is ``ops.flash_attention_score`` (float16 and bfloat16; scores and softmax in float32 inside it), the positional half
and the mix are ``any_blocks.mixed``, in float32. Gradients are the framework's. With q, k and v packed as [B, N, 3, H, D] the
operator reads them as they lie ("BSND"), otherwise as [B, H, N, D] ("BNSD").
Deviation from ``any_mindspore.py``: no attention dropout, since one mask would have to cover both softmaxes.
"""

from typing import Any

from mindspore import Tensor, ops

from convit.kernels.gpsa.any_blocks import mixed

# What the operator's documentation gives as its range
_DTYPES = ("float16", "bfloat16")
_MOST_BATCH, _MOST_HEADS, _MOST_DIM = 2048, 256, 512


def chip() -> str:
    """The chip as MindSpore names it, "ascend910b" and the like; "" without a device or where MindSpore does not tell."""
    try:
        from mindspore._c_expression import MSContext

        return str(MSContext.get_instance().get_ascend_soc_version())
    except (ImportError, AttributeError, RuntimeError):
        return ""


def why_not(problem: Any) -> str | None:
    if problem.framework != "mindspore":
        return "the tensors are not MindSpore tensors"
    if problem.device != "ascend":
        return f"flash_attention_score runs on Ascend only and device_target is {problem.device}"
    if not hasattr(ops, "flash_attention_score"):
        return "this MindSpore has no flash_attention_score: 2.3 is the first that has it"
    if problem.dtype not in _DTYPES:
        return f"{problem.dtype} is not supported ({' and '.join(_DTYPES)} are: mindspore.amp.auto_mixed_precision casts a model)"
    if problem.dropout_p > 0:
        return "attention dropout is not supported: one mask must cover both softmaxes"
    if problem.head_dim % 16 or problem.head_dim > _MOST_DIM:
        return f"D = {problem.head_dim} is no multiple of 16 up to {_MOST_DIM}"
    batch = 1 if problem.batch is None else problem.batch  # not known when a graph is compiled for any
    if not (0 < batch <= _MOST_BATCH and problem.heads <= _MOST_HEADS and problem.tokens > 0):
        return f"B is to be 1 to {_MOST_BATCH} and H 1 to {_MOST_HEADS}, with at least one token"
    name = chip()
    if name in ("ascend910", "ascend910a") or name.startswith("ascend310"):
        return f"{name} has no flash_attention_score: Atlas A2 and later have"
    return None


def gpsa(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float, dropout_p: float
) -> Tensor:
    """Arguments as ``convit.mindspore.gpsa`` checked them, [B, H, N, D]. Returns [B, H, N, D]."""
    content = ops.flash_attention_score(q, k, v, q.shape[1], scalar_value=scale, input_layout="BNSD")
    return mixed(content, v, pos_weight, gating, grid)


def gpsa_packed(qkv: Tensor, pos_weight: Tensor, gating: Tensor, grid: tuple[int, int], scale: float, dropout_p: float) -> Tensor:
    """The same with q, k and v in one [B, N, 3, H, D]. Returns [B, N, H, D]."""
    content = ops.transpose(attention_packed(qkv, scale, dropout_p), (0, 2, 1, 3))
    v = ops.transpose(ops.unstack(qkv, 2)[2], (0, 2, 1, 3))
    return ops.transpose(mixed(content, v, pos_weight, gating, grid), (0, 2, 1, 3))


def attention_packed(qkv: Tensor, scale: float, dropout_p: float) -> Tensor:
    """Plain attention: qkv [B, N, 3, H, D] to [B, N, H, D]."""
    q, k, v = ops.unstack(qkv, 2)
    return ops.flash_attention_score(q, k, v, qkv.shape[3], scalar_value=scale, input_layout="BSND")
