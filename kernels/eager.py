"""Whether a call with torch tensors is plain eager execution, which may take short cuts past torch's dispatcher."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)


def eager(*tensors: Tensor) -> bool:
    """Whether nothing but autograd and the profiler would see the call: no compiler, mode, transform, subclass or lazy view."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and all(type(x) in _PLAIN and not x.is_neg() for x in tensors)
    )
