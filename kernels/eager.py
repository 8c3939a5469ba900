"""What a call with torch tensors or modules may skip. Every private name of torch that the PyTorch side reads is in this file.

Where a version of torch lacks such a name, the answer is the plain path: through torch's dispatcher, through the module's ``forward``.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

try:
    from torch.utils._device import DeviceContext as _DeviceContext
except ImportError:
    _DeviceContext = None  # type: ignore[assignment, misc]

_PLAIN = (Tensor, nn.Parameter)


def _named(path: str) -> Any:
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


_dispatch_modes = _named("_C._len_torch_dispatch_stack")
_function_modes = _named("_C._len_torch_function_stack")
_function_mode_stack = _named("overrides._get_current_function_mode_stack")
_functions = {name: _named(f"_C._nn.{name}") for name in ("linear", "gelu")}
_transforms = _named("_C._are_functorch_transforms_active")
_transform_stack = _named("_C._functorch.get_interpreter_stack")
_functionalize = _named("_C._functorch.TransformType.Functionalize")
_tracing_state = _named("_C._get_tracing_state")
_profiler = _named("_C._autograd._profiler_enabled")
_legacy_batched = _named("_C._functorch.is_legacy_batchedtensor")
_key_set = _named("_C.DispatchKeySet")
_with_keys = _named("_C._ForceDispatchKeyGuard")
_keys_in = _named("_C._dispatch_tls_local_include_set")
_keys_out = _named("_C._dispatch_tls_local_exclude_set")
_complete = None not in (_dispatch_modes, _function_modes, _transforms, _tracing_state, _profiler, _legacy_batched) and hasattr(
    forward_ad, "_current_level"
)


def eager(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd and the profiler would see the call: no compiler, mode, transform, subclass or lazy view."""
    if (
        torch.compiler.is_compiling()
        or not _complete
        or _dispatch_modes()
        or (_function_modes() and _watched())
        or _transforms()
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    for x in tensors:  # noqa: SIM110
        if x is not None and (type(x) not in _PLAIN or x.is_neg()):
            return False
    return True


def _watched() -> bool:
    """Whether one of the function modes at work is more than the default device's."""
    if _function_mode_stack is None or _DeviceContext is None:
        return True
    return any(type(mode) is not _DeviceContext for mode in _function_mode_stack())


def replaced_functions() -> bool:
    """Whether somebody has put a function of theirs in the place of one that the layers call, as profilers do."""
    return F.linear is not _functions["linear"] or F.gelu is not _functions["gelu"]


def intercepted() -> bool:
    """Whether somebody stands between the layers and torch's functions: a function mode, or a function in the place of one."""
    if torch.compiler.is_compiling():  # which looks through both
        return False
    return replaced_functions() or _function_modes is None or bool(_function_modes() and _watched())


# what a tracer puts in a tensor's place: it means what the tensor meant
_STAND_INS = (_named("_subclasses.fake_tensor.FakeTensor"), _named("_subclasses.functional_tensor.FunctionalTensor"))


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are tensors of torch's own class: one of a subclass (quantised, sharded) may mean more to the layer that holds it."""
    return all(x is None or type(x) in _PLAIN or type(x) in _STAND_INS for x in tensors)


def placed_like(like: Tensor, x: Tensor) -> Tensor:
    """``x``, whole on every device of the mesh of ``like`` where that is a DTensor, which takes no others beside it."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return x
    from torch.distributed.tensor import distribute_tensor

    placed: Tensor = distribute_tensor(x, mesh)
    return placed


def traced() -> bool:
    """Whether a compiler, or ``torch.jit.trace``, records the call."""
    return torch.compiler.is_compiling() or _tracing_state is None or _tracing_state() is not None


def profiled() -> bool:
    """Whether a profiler runs: to see operators."""
    return _profiler is None or bool(_profiler())


def _constant(function: Callable[..., bool]) -> Callable[..., bool]:
    """As ``torch.compiler.assume_constant_result``, without importing the compiler: one that traces calls the function."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _told() -> bool:
    return bool(getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)())


# Whether a program is being traced for ``torch.export``; up to torch 2.7, whose strict export sets no flag, or for ``torch.compile``.
# From 2.8 to 2.11 the compiler takes ``is_exporting()`` for true whatever it traces for, so it is told what the function says.
exporting = _constant(_told) if torch.__version__ >= "2.8" else _told


@_constant
def exporting_to_onnx() -> bool:
    """Whether ``torch.onnx.export`` traces, in either of its ways: ONNX knows torch's operators only."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and bool(onnx.is_in_onnx_export())


@_constant  # of the call being traced; the compiler guards on the transforms by itself
def transformed() -> bool:
    """Whether the call stands inside ``torch.func``: grad, vjp, jvp, vmap and what is made of them."""
    return bool(_transforms()) if _transforms is not None else False


@_constant
def functionalized() -> bool:
    """Whether one of those transforms is ``torch.func.functionalize``, which takes no ``autograd.Function``."""
    if not transformed():
        return False
    if _transform_stack is None or _functionalize is None:
        return True
    return any(each.key() == _functionalize for each in _transform_stack() or ())


@_constant
def tangents() -> bool:
    """Whether the call may carry tangents of forward-mode differentiation."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def batched_gradient(grad: Tensor) -> bool:
    """Whether ``grad`` stands for many gradients at once (``is_grads_batched``)."""
    return _legacy_batched is None or bool(_legacy_batched(grad))


def autocast_dtype(device: str) -> torch.dtype | None:
    """The type that autocast asks for on a device type; None where it is off, or where the device has none."""
    if device not in ("cpu", "cuda") and not torch.amp.autocast_mode.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@contextmanager
def recorded() -> Iterator[None]:
    """Autograd at work in an operator's kernel too, which torch runs below it. (``torch.func`` refuses there under hooks on saved tensors,
    and fails under a mode.)"""
    keys: AbstractContextManager[Any] = nullcontext()
    if None not in (_key_set, _with_keys, _keys_in, _keys_out):
        keys = _with_keys(_keys_in(), _keys_out() - _key_set(torch._C.DispatchKey.AutogradFunctionality))
    with keys, torch.enable_grad():
        yield


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context in which autocast is off."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


# class -> the ``forward`` that it had when it became known here
_forwards: dict[type[nn.Module], Callable[..., Any]] = {}


def know(*classes: type[nn.Module]) -> None:
    """Note the ``forward`` of these classes as the one that ``bare`` vouches for."""
    _forwards.update({cls: cls.forward for cls in classes})


know(nn.Linear, nn.Dropout, nn.Identity, nn.GELU, nn.ReLU, nn.SiLU, nn.LayerNorm)


def unhooked(module: nn.Module) -> bool:
    """Whether calling ``module`` runs the ``forward`` of its class and nothing else: no hook, no replacement on the instance."""
    try:
        own = nn.modules.module
        watched = (
            own._global_forward_pre_hooks
            or own._global_forward_hooks
            or own._global_backward_pre_hooks
            or own._global_backward_hooks
            or module._forward_pre_hooks
            or module._forward_hooks
            or module._backward_pre_hooks
            or module._backward_hooks
            or module._compiled_call_impl
            or (type(module).__call__ is not nn.Module._wrapped_call_impl and not torch.compiler.is_compiling())  # torch.export's own
        )
    except AttributeError:  # of another version of torch: nobody can tell
        return False
    return not (watched or "forward" in module.__dict__)


def bare(module: Any, *classes: type[nn.Module]) -> bool:
    """Whether calling ``module`` runs the ``forward`` of exactly one of ``classes``, as that was when it became known, and nothing else.

    Not so with a subclass (parametrised, quantised, sharded, adapted), a hook (pruned, offloaded, watched), a ``forward`` replaced on the
    instance or the class, or a compiled one.
    """
    cls = type(module)
    return cls in classes and cls.forward is _forwards.get(cls) and unhooked(module)
