"""Linear layers of PyTorch on CPU with weights packed once by oneDNN, inference only, the GELU in the same pass.

    y [..., O] = x [..., I] weight^T [I, O] + bias [O];   y = gelu(y), exact or with the tanh        float32 or bfloat16

A packed copy does not follow its layer, so only who owns a snapshot of the weights may use it. Where PyTorch has no oneDNN or lacks
one of the names it is reached by, its own linear layer computes the same on the plain weight.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def _packs(dtype: torch.dtype) -> bool:
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    onednn = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and all(hasattr(onednn, name) for name in names)):
        return False
    return dtype == torch.float32 or bool(onednn._is_mkldnn_bf16_supported())


class Packed:
    """One linear layer in ``dtype``; ``rows`` is the number of rows that its calls will mostly have, for the choice of a layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: int):
        self.bias = None if bias is None else bias.to(dtype)
        weight = weight.to(dtype).contiguous()
        self.packed = _packs(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.packed else weight.clone()

    def __call__(self, x: Tensor, gelu: str | None = None) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu" if gelu else "none", [], gelu or "")
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y, approximate=gelu) if gelu else y

    def unpack(self) -> Tensor:
        """The plain weight [O, I], as rounded to the layer's type."""
        return self.weight.to_dense() if self.packed else self.weight
