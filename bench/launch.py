"""The host's time for one small call of the Triton backend, measured without a GPU: ``python bench/launch.py``.

Triton is given a driver that compiles for sm90 and launches nothing, and the operator CPU tensors. What is measured: argument checks,
the choice of a backend, autograd, the allocation of outputs, the launchers and Triton's own Python. What is left out: Triton's launcher
in C and the CUDA driver (a few microseconds for each kernel), the allocator of the device in place of the CPU's, and the thread that
autograd runs the backward of a CUDA tensor in. ``bench/gpu.sh`` measures all of it on a machine with a GPU ("host").
"""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from gpsa_cases import Case, make_inputs

import convit
from convit.dispatch import ORDER
from convit.kernels.gpsa.gpu_triton import launch
from convit.kernels.gpsa.gpu_triton.configs import TRITON, Device


class _Driver:
    """What Triton asks of a driver; ``launched`` sees every launch: (x, y, z, stream, function, ..., *arguments)."""

    stream = 0

    class utils:
        _functions = itertools.count(1)
        load_binary = classmethod(lambda cls, *args: (1, next(cls._functions), 32, 0, 1024)[: 4 if TRITON < (3, 4) else 5])
        unload_module = staticmethod(lambda module: None)
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})

    def __init__(self, launched: Callable):
        self.launcher_cls = lambda source, metadata: launched

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = classmethod(lambda cls, device: cls.stream)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


@contextlib.contextmanager
def pretend(launched: Callable = lambda *args: None) -> Iterator[None]:
    """Let the Triton backend take CPU tensors; ``launched`` is called in place of each launch. To be entered once in a process."""
    sys.modules["convit._C"] = None  # type: ignore[assignment]  # or the CPU kernel would take the CPU tensors
    driver.set_active(_Driver(launched))
    ORDER["torch", "cpu"] = ("triton",)
    with launch.trial(devices={"cpu": Device("CPU", lambda index: "sm90", lambda: None, direct=True, cores=lambda index: 132)}):
        launch.register("cpu")
        yield


def microseconds(call: Callable[[], object], count: int = 200) -> float:
    """Time of one call: the best of twenty batches."""
    call()
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, time.perf_counter() - start)
    return best / count * 1e6


class _Nothing(torch.autograd.Function):
    """What autograd alone takes for a function of five tensors that saves seven."""

    @staticmethod
    def forward(ctx, gradients: tuple[Tensor, ...], out: Tensor, *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*inputs, *gradients[:2])
        return out.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return None, None, *(ctx.gradients if ctx.saved_tensors else ())


def _calls(grid: tuple[int, int]) -> dict[str, Callable[[], object]]:
    inputs, grad = make_inputs(Case(1, 4, 16, grid), dtype=torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in inputs]
    rest = (*grid, 0.25)
    out, lse = launch.forward(*inputs, *rest)
    gradients = launch.backward(grad, *inputs, out, lse, *rest)
    return {
        "launcher, forward": lambda: launch.forward(*inputs, *rest),
        "launcher, backward": lambda: launch.backward(grad, *inputs, out, lse, *rest),
        "operator, forward": lambda: torch.ops.convit.gpsa(*inputs, *rest),
        "convit.gpsa, no gradient": lambda: convit.gpsa(*inputs, grid),
        "convit.gpsa, forward": lambda: convit.gpsa(*leaves, grid),
        "convit.gpsa, forward + backward": lambda: torch.autograd.grad(convit.gpsa(*leaves, grid), leaves, grad),
        "autograd alone, forward + backward": lambda: torch.autograd.grad(_Nothing.apply(gradients, out, *leaves), leaves, grad),
    }


def main() -> None:
    with pretend():
        _report()


def _report() -> None:
    print("microseconds of the host for one call, B=1, H=4, D=16, bfloat16; nothing is computed")
    for grid in ((14, 14), (17, 17)):  # one kernel forward and three backward; three and seven
        for name, call in _calls(grid).items():
            print(f"{grid[0]}x{grid[1]}  {name:<36} {microseconds(call):6.1f}", flush=True)


if __name__ == "__main__":
    main()
