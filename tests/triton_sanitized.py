"""Every access of the Triton kernels, solved for by triton-viz's sanitizer: whether any address that a mask lets through is outside of
its tensor. ``make triton-sanitize`` installs it and runs this file.

What it does not see: reads of what nothing wrote, and the second pass of dq over rows of large scores, since it follows no branch on
data. Both are triton_memory.py's.
"""

import os

assert os.environ.get("TRITON_INTERPRET") == "1"
# ruff: noqa: E402

import pytest
import torch
import triton_viz
from gpsa_cases import Case, make_inputs
from triton_viz.clients.sanitizer.sanitizer import SymbolicSanitizer
from triton_viz.clients.symbolic_engine import SymbolicExpr
from z3 import And

from convit.kernels.gpsa.gpu_triton import launch
from convit.kernels.gpsa.gpu_triton.configs import DEVICES, Config, Content, Row
from convit.kernels.gpsa.gpu_triton.loop import moments_kernel


class EachProgram(SymbolicSanitizer):
    """The tool runs one program for all of them, and would take every branch on the program's number for all of them too: here each
    program is run, its number known. Of a pointer that is selected of two tensors' the tool sees the first alone: there any tensor's
    addresses are right."""

    def __init__(self, selects: bool):
        super().__init__(abort_on_error=False)
        self.selects = selects
        self.programs = 0

    def grid_idx_callback(self, grid_idx):
        super().grid_idx_callback(grid_idx)
        self.programs += 1
        self.need_full_grid = True
        self.access_check_cache.clear()
        numbers = zip((SymbolicExpr.PID0, SymbolicExpr.PID1, SymbolicExpr.PID2), grid_idx, strict=True)
        self.pid_ok = And(*(name == number for name, number in numbers))
        self.solver.reset()
        self.solver.add(self._addr_ok_premise(), self.pid_ok)

    def _resolve_tensor(self, expr):
        return None if self.selects else super()._resolve_tensor(expr)


def found(case: Case, dtype: torch.dtype, scale: float = 0.25, tokens_of_k: int | None = None, **tables) -> dict[str, set[str]]:
    """Kernel -> arguments with an access outside of them, of a forward and a backward pass; k as if it had so few tokens."""
    inputs, grad = make_inputs(case, dtype=dtype)
    outside: dict[str, set[str]] = {}

    def through(call, *tensors):
        sanitizer = EachProgram(call.kernel is moments_kernel)
        told = [x[:, :, :tokens_of_k] if x.data_ptr() == inputs.k.data_ptr() else x for x in tensors]
        constants = {name: False if name == "LARGE_SCORES" else value for name, value in call.constants.items()}
        triton_viz.trace(sanitizer)(call.kernel)[(call.programs,)](*told, *call.numbers, **constants)
        assert sanitizer.programs == call.programs
        outside.setdefault(call.kernel.__name__, set()).update(str(record.tensor_name) for record in sanitizer.records)

    with launch.trial(through=through, **tables):
        out, lse = launch.forward(*inputs, *case.grid, scale)
        launch.backward(grad, *inputs, out, lse, *case.grid, scale)
    return outside


HALF, SINGLE = torch.float16, torch.float32
TILE, LOOP = {"fwd_tile", "dq_tile", "dkdv_tile", "reduce"}, {"mix", "fwd_loop", "dq_loop", "moments", "dkdv_loop", "reduce"}
FROM_SDPA = [Content("", "float32", 64, 1, "sdpa")]
FEW_CORES = {"cpu": DEVICES["cpu"]._replace(cores=lambda index: 1)}
PERSISTENT = {"rows": {"fwd_tile": [Row("", "half", 64, Config(32, 256, 4, 2, 0))]}, "devices": FEW_CORES}
CASES = {
    "tile": (Case(1, 2, 16, (3, 5)), HALF, TILE, {}),
    "tile, several blocks in a program": (Case(1, 1, 20, (7, 11)), HALF, TILE, {"scale": -0.5, "many": True}),
    "tile, persistent": (Case(3, 1, 16, (3, 15)), HALF, TILE, PERSISTENT),
    "loop": (Case(1, 2, 16, (3, 5)), SINGLE, LOOP, {"scale": -0.5}),
    "loop, several lines in a program": (Case(1, 1, 20, (2, 40)), SINGLE, LOOP, {"many": True}),
    "loop, one column": (Case(1, 1, 16, (5, 1)), SINGLE, LOOP, {}),
    "loop, half": (Case(1, 1, 16, (2, 65)), HALF, LOOP, {}),
    "content from the framework": (Case(2, 1, 20, (3, 7)), SINGLE, {"mix", "delta", "moments", "reduce"}, {"content": FROM_SDPA}),
}


@pytest.mark.parametrize("case, dtype, kernels, options", CASES.values(), ids=CASES)
def test_no_access_is_outside_of_its_tensor(case, dtype, kernels, options, monkeypatch):
    if options.get("many"):
        monkeypatch.setattr(launch, "MANY", 1)
    tables = {name: value for name, value in options.items() if name != "many"}
    assert found(case, dtype, **tables) == {f"{kernel}_kernel": set() for kernel in kernels}


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=["tile", "loop"])
def test_a_tensor_one_row_too_short_is_noticed(dtype):
    """The planted fault: the kernels are told one token more than k has."""
    outside = found(Case(1, 2, 16, (3, 5)), dtype, tokens_of_k=14)
    for kernel, arguments in outside.items():
        assert arguments == ({"k_ptr"} if kernel.startswith(("fwd", "dq", "dkdv")) else set()), kernel
