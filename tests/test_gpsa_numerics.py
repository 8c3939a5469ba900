"""GPSA where the arithmetic bends: scales of every kind, gates from closed to open, logits that rise and fall over the keys, and errors
that must not lean to one side. The checks are for any backend: the interpreted Triton kernels and each instruction set run them too."""

from collections.abc import Callable

import pytest
import torch
from gpsa_cases import Case, Inputs, make_inputs, reference64, relative_error, run
from torch import Tensor

import convit
from convit.dispatch import Problem
from convit.kernels.gpsa import definition

Function = Callable[..., Tensor]
BACKENDS = ("reference", "sdpa", "cpp")
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
FOLDED, CONTRACTED, STEPS = (3, 5), (5, 52), (19, 31)  # up to 256 keys, more, more than two tiles of them
SCALES = (1.0, 0.02, -0.5, 2.5)
LEVELS = {  # of the logits, from -1 to 1, at the first key (0) to the last (1)
    "rise": lambda t: 2 * t - 1,
    "fall": lambda t: 1 - 2 * t,
    "rise and fall": lambda t: 1 - 4 * (t - 0.5).abs(),
    "fall and rise": lambda t: 4 * (t - 0.5).abs() - 1,
    "zigzag": lambda t: torch.sin(25 * t),
}
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def of(backend: str, scale: float | None = None) -> Function:
    return lambda *args: convit.gpsa(*args, scale=scale, backend=backend)


def need(backend):
    reason = convit.why_not(backend, Problem("torch", "cpu", "float32", 1, 1, 4, 4, (2, 2)))
    if reason:
        pytest.skip(reason)


def compare(function: Function, inputs: Inputs, grad: Tensor, grid: tuple[int, int], scale: float | None = None) -> None:
    ours, truth = run(function, inputs, grad, grid), reference64(inputs, grad, grid, scale)
    for name, value in ours.items():
        assert relative_error(value, truth[name]) <= CLOSE[inputs.q.dtype], name


def check_gates(function: Function, dtype: torch.dtype, grid: tuple[int, int], step: float = 5.0) -> None:
    """Each head with its own gate: content and its gradients come with sigmoid(-gating), those of position with sigmoid(gating)."""
    gating = torch.arange(-40.0, 41.0, step)
    inputs, grad = make_inputs(Case(1, len(gating), 16, grid), dtype=dtype)
    content, position = (reference64(inputs._replace(gating=torch.full_like(gating, g)), grad, grid) for g in (-torch.inf, torch.inf))
    opened, closed = gating.double().sigmoid(), (-gating.double()).sigmoid()
    truth = {name: closed[:, None, None] * content[name] + opened[:, None, None] * position[name] for name in ("out", "dq", "dk", "dv")}
    truth["dpos_weight"] = opened[:, None] * position["dpos_weight"]
    truth["dgating"] = opened * closed * (grad.double() * (position["out"] - content["out"])).sum((0, 2, 3))
    ours = run(function, inputs._replace(gating=gating), grad, grid)
    for name, expected in truth.items():
        axis = 1 if expected.ndim == 4 else 0
        for head, (mine, exact) in enumerate(zip(ours[name].unbind(axis), expected.unbind(axis), strict=True)):
            size = exact.norm()
            if name == "dgating":  # one number, of terms that cancel
                size = opened[head] * closed[head] * grad[:, head].double().norm() * content["out"][:, head].norm()
            assert (mine - exact).norm() <= CLOSE[dtype] * size, f"{name} at gating {gating[head]}"


def check_levels(function: Function, dtype: torch.dtype, grid: tuple[int, int], name: str) -> None:
    """The largest logit may come first, last or in between."""
    tokens = grid[0] * grid[1]
    inputs, grad = make_inputs(Case(1, 2, 16, grid), dtype=dtype)
    level: Tensor = LEVELS[name](torch.linspace(0, 1, tokens))
    q, k = inputs.q.clone(), inputs.k.clone()
    q[..., 0], k[..., 0] = 4 * min(60, tokens), level.to(dtype)  # the scale is 1/4
    compare(function, inputs._replace(q=q, k=k), grad, grid)


def check_bias(function: Function, dtype: torch.dtype, grid: tuple[int, int]) -> None:
    """Roundings cancel: neither the outputs nor the gradients are smaller or larger than they should be."""
    inputs, grad = make_inputs(Case(1, 4, 48, grid), dtype=dtype)
    ours, truth = run(function, inputs, grad, grid), reference64(inputs, grad, grid)
    for name in ("out", "dq", "dk", "dv"):
        bias = ((ours[name] - truth[name]) * truth[name].sign()).sum() / truth[name].abs().sum()
        assert abs(bias) <= torch.finfo(dtype).eps / 40, f"{name} leans by {bias:.2g}"


@pytest.mark.parametrize("scale", [None, *SCALES])
def test_the_reference_is_the_definition(scale):
    """Of torch and of NumPy, written apart from each other: output and gradients on a grid that is no square."""
    case = Case(2, 3, 8, FOLDED)
    inputs, grad = make_inputs(case)
    found = reference64(inputs, grad, case.grid, scale)
    arrays = [x.double().numpy() for x in inputs]
    wanted = definition.gpsa_with_gradients(*arrays, case.grid, 8**-0.5 if scale is None else scale, grad.double().numpy())
    for name, expected in wanted._asdict().items():
        assert definition.relative_error(found[name].numpy(), expected) <= 1e-12, name
    alone = definition.gpsa(*arrays, case.grid, 8**-0.5 if scale is None else scale)
    assert definition.relative_error(alone, wanted.out) == 0


@FLOATS
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scales(backend, scale, dtype):
    need(backend)
    for grid in (FOLDED, CONTRACTED):
        inputs, grad = make_inputs(Case(1, 2, 16, grid), dtype=dtype)
        compare(of(backend, scale), inputs, grad, grid, scale)


@FLOATS
@pytest.mark.parametrize("grid", [FOLDED, CONTRACTED], ids=str)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_gates_from_closed_to_open(backend, grid, dtype):
    need(backend)
    check_gates(of(backend), dtype, grid)


@FLOATS
@pytest.mark.parametrize("name", LEVELS)
def test_logits_that_rise_and_fall(name, dtype):
    need("cpp")
    for grid in (FOLDED, STEPS):
        check_levels(of("cpp"), dtype, grid, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("grid", [(14, 14), (17, 17)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_errors_lean_to_no_side(backend, grid, dtype):
    need(backend)
    check_bias(of(backend), dtype, grid)


@FLOATS
@pytest.mark.parametrize("first", [1, 17, 33])
def test_every_head_dimension(first, dtype):
    """Whether or not it fills a vector, or a group of them."""
    need("cpp")
    for dim in range(first, first + 16):
        inputs, grad = make_inputs(Case(1, 2, dim, FOLDED), dtype=dtype)
        compare(of("cpp"), inputs, grad, FOLDED)
