"""The Triton kernels in Triton's interpreter, on CPU tensors, against float64. Run by test_triton.py with TRITON_INTERPRET=1, which
must be set before Triton is imported and changes the whole process. Integers that overflow are triton_memory.py's, which checks every
address: here the interpreter does not look for them."""

import dataclasses
import os

assert os.environ.get("TRITON_INTERPRET") == "1"
# ruff: noqa: E402

import numpy as np
import pytest
import torch
from gpsa_cases import Case, check, make_inputs, reference64, relative_error, run
from test_gpsa_numerics import check_gates, check_levels
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime import interpreter
from triton_quickly import once_a_launch

import convit
from convit.dispatch import Problem
from convit.kernels.gpsa import gpu_triton
from convit.kernels.gpsa.gpu_triton import configs, launch
from convit.kernels.gpsa.gpu_triton.common import reduce_kernel
from convit.kernels.gpsa.gpu_triton.configs import Config, Content, Row

once_a_launch()


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


# Half precision: whole rows in one tile up to 256 padded slots, beyond them, or with a line of more than 64, the loop over blocks of 64
# keys. float32: the loop over blocks of 32. Grids that pad badly, one row, one column, one patch, D that fills no tile, blocks that N
# does not fill.
FEW = [Case(1, 2, 16, (4, 5)), Case(1, 1, 7, (1, 1)), Case(1, 1, 33, (3, 16))]
TILE = [*FEW, Case(2, 2, 20, (7, 11)), Case(1, 1, 48, (14, 14))]
HALF_LOOP = Case(1, 1, 16, (2, 65))
LOOP = [Case(2, 1, 20, (1, 40)), Case(1, 1, 24, (40, 1)), Case(1, 1, 16, (3, 34))]


def triton(*args):
    return convit.gpsa(*args, backend="triton")


@pytest.mark.parametrize("case", FEW + LOOP, ids=str)
def test_float32(case):
    inputs, grad = make_inputs(case)
    check(run(triton, inputs, grad, case.grid), inputs, grad, case.grid)


@pytest.mark.parametrize(
    "case", [*TILE, HALF_LOOP, Case(1, 1, 130, (3, 4))], ids=str
)  # heads past 128 channels take the loops; the tile kernels are for half precision
def test_float16(case):
    inputs, grad = make_inputs(case, dtype=torch.float16)
    check(run(triton, inputs, grad, case.grid), inputs, grad, case.grid)


@pytest.fixture
def bfloat16(monkeypatch):
    """The interpreter multiplies bfloat16's bit patterns and truncates on the way there: widen before products, round to nearest even."""
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot
    tl = interpreter.tl

    def widen(data):
        return (data.astype(np.uint32) << 16).view(np.float32)

    def narrow(data):
        bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)

    def cast_impl(self, source, target):
        here, there = source.dtype.scalar, target.scalar
        if here == tl.bfloat16 and there == tl.float32:
            return interpreter.TensorHandle(widen(source.data), there)
        if here == tl.float32 and there == tl.bfloat16:
            return interpreter.TensorHandle(narrow(source.data), there)
        return cast(self, source, target)

    def create_dot(self, a, b, *rest):
        a, b = (interpreter.TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(builder, "create_dot", create_dot)


@pytest.mark.parametrize("case", [Case(2, 2, 20, (3, 7)), Case(1, 1, 16, (1, 65))], ids=str)
def test_bfloat16(case, bfloat16):
    inputs, grad = make_inputs(case, dtype=torch.bfloat16)
    ours = run(torch_operator, inputs, grad, case.grid)
    check(ours, inputs, grad, case.grid)


def torch_operator(q, k, v, pos_weight, gating, grid):
    """Past why_not, which rightly refuses bfloat16 in the interpreter as it is."""
    return gpu_triton.gpsa(q, k, v, pos_weight, gating, grid, q.shape[-1] ** -0.5, 0.0)


SMALL = Case(1, 2, 16, (3, 5))  # float16 takes the tile kernels, float32 the loops
KINDS = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["tile", "loop"])


@KINDS
def test_extreme_input_with_a_finite_answer(dtype):
    """A head each: large scores, locality of 1e4, gates that are closed and open; one head does not spoil another."""
    scales, strengths = torch.ones(6), torch.ones(6)
    scales[0], strengths[1] = 1e3, 1e4
    case = Case(1, 6, 16, SMALL.grid)
    inputs, grad = make_inputs(case, dtype=dtype)
    inputs = inputs._replace(
        q=inputs.q * scales.to(dtype)[:, None, None],
        pos_weight=inputs.pos_weight.sign() * strengths[:, None],
        gating=torch.tensor([0.0, 0.0, 100.0, -100.0, float("inf"), -float("inf")]),
    )
    ours = run(triton, inputs, grad, case.grid)
    assert all(value.isfinite().all() for value in ours.values())
    truth = convit.gpsa(*inputs.cast(torch.float64), case.grid, backend="reference")
    for head in range(case.heads):
        assert relative_error(ours["out"][:, head], truth[:, head]) <= (1e-4 if dtype == torch.float32 else 2e-3), head


def with_scale(inputs, grad, grid, scale):
    """Ours, and the truth in float64."""

    def of(backend):
        return lambda *args: convit.gpsa(*args, scale=scale, backend=backend)

    return run(of("triton"), inputs, grad, grid), run(of("reference"), inputs.cast(torch.float64), grad.double(), grid)


@KINDS
@pytest.mark.parametrize("scale", [-0.25, 0.0, -3.0])
def test_zero_and_negative_scales(dtype, scale):
    """With position weights of either sign: a positive one looks at the far ends of the grid, without it at one of them."""
    inputs, grad = make_inputs(SMALL, dtype=dtype)
    inputs.pos_weight[:, 2] = torch.tensor([0.3, 0.0])
    ours, truth = with_scale(inputs, grad, SMALL.grid, scale)
    for name in ours:
        if truth[name].norm() == 0:
            assert ours[name].norm() == 0, name
        else:
            assert relative_error(ours[name], truth[name]) <= (1e-5 if dtype == torch.float32 else 5e-3), name


def test_gates_from_closed_to_open(bfloat16):
    check_gates(triton, torch.float32, SMALL.grid, step=10)  # the loops
    check_gates(torch_operator, torch.bfloat16, SMALL.grid, step=10)  # the tiles


FROM_SDPA = [Content("", dtype, 256, 1, "sdpa") for dtype in ("half", "float32")]  # any number of patches, for the interpreter's sake


@pytest.mark.parametrize(
    "case, dtype",
    [(case, torch.float32) for case in (*FEW[:2], Case(1, 1, 20, (2, 34)))]
    + [(case, torch.float16) for case in (Case(1, 1, 20, (65, 1)), Case(1, 2, 130, (2, 3)))],
    ids=str,
)
def test_content_from_the_framework(case, dtype):
    inputs, grad = make_inputs(case, dtype=dtype)
    with launch.trial(content=FROM_SDPA):
        ours = run(triton, inputs, grad, case.grid)
    check(ours, inputs, grad, case.grid)
    assert all(ours[name].transpose(1, 2).is_contiguous() for name in ("out", "dq", "dk", "dv"))  # as the compiler was told


@pytest.mark.parametrize("scale", [3.0, 0.0, -0.25])  # the last two take the loops
def test_scales_with_content_from_the_framework(scale):
    inputs, grad = make_inputs(SMALL)
    with launch.trial(content=FROM_SDPA):
        ours, truth = with_scale(inputs, grad, SMALL.grid, scale)
    for name in ours:
        assert relative_error(ours[name], truth[name]) <= 1e-5 or truth[name].norm() == ours[name].norm() == 0, name


def test_gates_with_content_from_the_framework(bfloat16, monkeypatch):
    monkeypatch.setattr(configs, "padded_grid", lambda grid: None)  # no tiles
    with launch.trial(content=FROM_SDPA):
        check_gates(triton, torch.float32, SMALL.grid, step=10)
        check_gates(torch_operator, torch.bfloat16, SMALL.grid, step=40)
        inputs, grad = make_inputs(SMALL)
        inputs = inputs._replace(gating=torch.tensor([float("inf"), -100.0]))
        check(run(triton, inputs, grad, SMALL.grid), inputs, grad, SMALL.grid)


def test_derivatives_with_content_from_the_framework():
    """Under transforms, autocast and a graph of the gradient."""
    grid = 2, 3
    inputs, grad = make_inputs(Case(2, 1, 16, grid))

    def found(function):
        def one(q, k, v):
            return (function(q[None], k[None], v[None], *inputs[3:], grid) * grad[0]).sum()

        yield from torch.func.vmap(torch.func.grad(one, argnums=(0, 1, 2)))(*inputs[:3])
        yield torch.func.jvp(lambda q: function(q, *inputs[1:], grid), (inputs.q,), (grad,))[1]
        q = inputs.q.detach().requires_grad_()
        first = torch.autograd.grad(function(q, *inputs[1:], grid).square().sum(), q, create_graph=True)[0]
        yield torch.autograd.grad(first.square().sum(), q)[0]

    with launch.trial(content=FROM_SDPA):
        ours = list(found(triton))
        with torch.autocast("cpu", torch.float16):  # what the operator is given in float32 stays so
            ours += run(torch_operator, inputs, grad, grid).values()
    expected = [*found(lambda *args: convit.gpsa(*args, backend="reference")), *reference64(inputs, grad, grid).values()]
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == torch.float32 and relative_error(mine, theirs) <= 3e-6


def test_gradients_of_the_frameworks_content_under_hooks_and_modes():
    """Inside hooks on saved tensors, in a mode, and where a call is compiled ahead in inference mode."""
    case = Case(1, 1, 16, (2, 3))
    inputs, grad = make_inputs(case)
    with launch.trial(content=FROM_SDPA):
        expected = run(triton, inputs, grad, case.grid)
        for context in (torch.autograd.graph.save_on_cpu(), FlopCounterMode(display=False)):
            with context:
                ours = run(triton, inputs, grad, case.grid)
            assert all(torch.equal(ours[name], expected[name]) for name in ours)
        with torch.inference_mode():
            assert gpu_triton.compile_ahead(Problem("torch", "cpu", "float32", 1, 1, 6, 16, case.grid)) > 0


@pytest.mark.parametrize(
    "dtype, table",
    [(torch.float16, {}), (torch.float32, {}), (torch.float32, {"content": FROM_SDPA})],
    ids=["tile", "loop", "framework"],
)
def test_a_gate_that_is_not_a_number_stays_in_its_head(dtype, table):
    inputs, grad = make_inputs(SMALL, dtype=dtype)
    with launch.trial(**table):
        expected = run(triton, inputs, grad, SMALL.grid)
        ours = run(triton, inputs._replace(gating=torch.tensor([float("nan"), inputs.gating[1]])), grad, SMALL.grid)
    for name in ours:
        heads = 1 if ours[name].dim() > 2 else 0
        assert ours[name].select(heads, 0).isnan().all(), name
        assert torch.equal(ours[name].select(heads, 1), expected[name].select(heads, 1)), name


def test_the_table_says_where_content_comes_from():
    def names(case, dtype, *rows, scale=0.1):
        seen = []
        inputs, grad = make_inputs(case, dtype=dtype)
        with launch.trial(through=lambda call, *_: seen.append(call.kernel.__name__.removesuffix("_kernel")), content=rows):
            run(lambda *args: convit.gpsa(*args, scale=scale, backend="triton"), inputs, grad, case.grid)
        return seen

    loops = ["mix", "mix", "fwd_loop", "mix", "dq_loop", "mix", "moments", "mix", "dkdv_loop", "reduce"]
    ours = ["mix", "mix", "mix", "delta", "mix", "moments", "mix", "reduce"]
    case, row = Case(1, 1, 48, (17, 16)), Content("", "half", 64, 272, "sdpa")
    assert configs.CONTENT == [] and names(case, torch.float16) == loops  # until a GPU has timed both
    assert names(case, torch.float16, row) == ours
    assert names(case, torch.float16, row._replace(family="sm90")) == names(case, torch.float32, row) == loops
    assert names(case, torch.float16, row._replace(tokens=273)) == loops
    assert names(case, torch.float16, row, scale=0.0) == names(case, torch.float16, row, scale=-0.1) == loops
    assert names(case, torch.float16, row._replace(source="loop"), row) == loops  # the first that fits
    assert names(case._replace(head_dim=65), torch.float16, row) == names(case._replace(grid=(2, 128)), torch.float16, row) == loops
    assert "fwd_tile" in names(case._replace(grid=(16, 16)), torch.float16, row._replace(tokens=1))


@pytest.mark.parametrize("name", ["rise", "fall and rise"])
def test_logits_that_rise_and_fall(name):
    check_levels(triton, torch.float32, (4, 17), name)
    check_levels(triton, torch.float16, SMALL.grid, name)


def test_an_output_written_to_before_the_backward_pass():
    """The operator saves it: autograd refuses, as for torch's own; with the saved tensor on the user's side the gradients are right."""
    inputs, grad = make_inputs(SMALL)  # the loops read it
    leaves = [value.clone().requires_grad_() for value in inputs]
    for change in (
        lambda out: out.mul_(0),
        lambda out: out[..., 0].zero_(),
        lambda out: torch.nn.functional.dropout(out, 0.5, inplace=True),
    ):
        out = triton(*leaves, SMALL.grid)
        change(out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward(grad)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        out = triton(*leaves, SMALL.grid)
    (out.mul_(2) * 0.5).backward(grad)
    ours = {f"d{name}": leaf.grad for name, leaf in zip(inputs._fields, leaves, strict=True)}
    expected = run(triton, inputs, grad, SMALL.grid)
    assert all(torch.equal(found, expected[name]) for name, found in ours.items())


def test_an_input_written_to_before_the_backward_pass():
    """As a query, a key, a value or the gate: autograd refuses."""
    inputs, grad = make_inputs(SMALL)
    for i in range(len(inputs)):
        leaves = [value.clone().requires_grad_() for value in inputs]
        moved = [leaf * 1.0 for leaf in leaves]
        out = triton(*moved, SMALL.grid)
        moved[i].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward(grad)


@pytest.mark.parametrize(
    "case, dtype, logit",
    [(SMALL, dtype, logit) for logit in (1e6, 2e7, 1e9, 1e11) for dtype in (torch.float16, torch.float32)]
    + [(Case(1, 1, 16, (1, 65)), torch.float16, 1e9)],  # the loop in half precision does such rows again, which in float32 it need not
)
def test_gradients_of_huge_logits(case, dtype, logit):
    inputs, grad = make_inputs(case, dtype=torch.float32)
    largest = (inputs.q @ inputs.k.transpose(-1, -2)).abs().max()
    if dtype == torch.float16:  # as far as its numbers go: two factors of at most 65,504
        factor = min(logit / 4, 2e8) ** 0.5
        inputs = inputs._replace(q=inputs.q * factor, k=inputs.k * factor).cast(dtype)
    else:
        inputs = inputs._replace(q=inputs.q * (logit / largest))
    ours, truth = with_scale(inputs, grad.to(dtype), case.grid, 1.0)
    assert all(value.isfinite().all() for value in ours.values())
    for name in ("out", "dv", "dpos_weight", "dgating"):
        exact = 5e-3 if dtype == torch.float16 else 1e-5
        assert relative_error(ours[name], truth[name]) <= (exact if name == "out" else 0.05), name
    for name, other in (("dq", inputs.k), ("dk", inputs.q)):  # nothing but rounding: one key has all the weight
        assert ours[name].norm() <= (5e-2 if dtype == torch.float16 else 1e-4) * other.float().norm() * grad.norm(), name


PERSISTENT = {"fwd_tile": [Row("", "half", 128, Config(32, 256, 4, 2, 0))]}


@pytest.fixture
def few_cores(monkeypatch):
    """Fewer than there are heads, so that some programs have more of them than others."""
    with launch.trial(rows=PERSISTENT, devices={"cpu": configs.DEVICES["cpu"]._replace(cores=lambda index: 1)}):
        yield


@pytest.mark.parametrize("case", [*TILE, Case(3, 1, 16, (3, 15)), Case(5, 2, 100, (2, 8))], ids=str)
def test_persistent_programs(case, few_cores):
    inputs, grad = make_inputs(case, dtype=torch.float16)
    seen = []
    with launch.trial(through=lambda call, *tensors: (seen.append(call), launch.launch(call, *tensors))):
        ours = run(triton, inputs, grad, case.grid)
    check(ours, inputs, grad, case.grid)
    forward = seen[0]
    assert forward.constants["STEPS"] == 0
    blocks = -(-case.grid[0] // (forward.constants["BM"] // forward.constants["GWP"]))
    slots = forward.constants["GHP"] * forward.constants["GWP"]
    assert forward.programs == blocks * min(case.batch * case.heads, max(256 // slots // blocks, 1))


def test_persistent_programs_give_the_same_bits_for_any_input(few_cores, bfloat16):
    """As the present form, whose tests this leans on: scales, gates, large scores, strides, without position."""

    def outputs(inputs, case, scale, position=True):
        found = []

        def through(call, *tensors):
            call.constants["POSITION"] = position
            launch.launch(call, *tensors)

        for rows in ({}, {"fwd_tile": [PERSISTENT["fwd_tile"][0]._replace(config=Config(32, 256, 4, 1, 1))]}):
            with launch.trial(through=through, rows=rows):
                found.append(launch.forward(*inputs, *case.grid, scale))
        return found

    case = Case(1, 3, 20, (3, 15))  # two blocks, of two heads or one each program
    inputs, _ = make_inputs(case, dtype=torch.float16)
    apart = inputs._replace(q=inputs.q.contiguous(), k=inputs.k.transpose(-1, -2).contiguous().transpose(-1, -2))
    gates = inputs._replace(gating=torch.tensor([40.0, 0.0, -float("inf")]), q=inputs.q * 100)
    tries = [(apart, -3.0), (inputs, 0.0), (gates, 1.0), (inputs.cast(torch.bfloat16), 0.2)]
    for some, scale in tries:
        (out, lse), (expected, expected_lse) = outputs(some, case, scale)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse) and out.isfinite().all()
    (out, _), (expected, _) = outputs(inputs, case, 0.2, position=False)
    plain = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in inputs[:3]), scale=0.2)
    assert torch.equal(out, expected) and relative_error(out, plain) <= 1e-3


@KINDS
def test_several_blocks_of_queries_in_a_program(dtype, monkeypatch):
    """As with many images and heads: a program takes all query blocks of a head, and many lines of an axis."""
    monkeypatch.setattr(launch, "MANY", 1)
    case = Case(1, 1, 16, (7, 11) if dtype == torch.float16 else (2, 40))
    inputs, grad = make_inputs(case, dtype=dtype)
    with launch.trial():
        check(run(triton, inputs, grad, case.grid), inputs, grad, case.grid)


def test_a_reduction_of_more_parts_than_fit_into_one_step():
    heads, batch, parts = 2, 3, 150
    share = torch.randn(batch, heads, parts, 4, generator=torch.Generator().manual_seed(0))
    gating, dw, dgating = torch.randn(heads), torch.empty(heads, 3), torch.empty(heads)
    reduce_kernel[(heads,)](share, gating, dw, dgating, heads, batch, parts, BLOCK=256)
    total, gate = share.double().sum((0, 2)), torch.sigmoid(gating.double())
    assert relative_error(dw, total[:, 1:] * gate[:, None]) <= 1e-6
    assert relative_error(dgating, total[:, 0] * gate * (1 - gate)) <= 1e-6


@pytest.mark.parametrize("case, dtype", [(FEW[0], torch.float16), (Case(1, 2, 16, (3, 11)), torch.float32)], ids=["tile", "loop"])
def test_same_bits_and_any_strides(case, dtype):
    """Of the inputs; of what the backward pass is given, whoever made it: a compiler, or a hook that kept it elsewhere."""

    def mirrored(x):
        return x.mT.contiguous().mT

    inputs, grad = make_inputs(case, dtype=dtype)
    first = run(triton, inputs, grad, case.grid)
    apart = inputs._replace(q=inputs.q.repeat_interleave(2, -1)[..., ::2], k=mirrored(inputs.k), v=mirrored(inputs.v))
    apart = apart._replace(pos_weight=inputs.pos_weight.T.contiguous().T, gating=inputs.gating.repeat_interleave(2)[::2])
    moved = run(triton, apart, grad.contiguous(), case.grid)
    assert all(torch.equal(first[name], moved[name]) for name in first)
    rest = *case.grid, case.head_dim**-0.5
    out, lse = launch.forward(*inputs, *rest)
    again = launch.backward(mirrored(grad), *inputs, out.contiguous(), lse.repeat_interleave(2, -1)[..., ::2], *rest)
    assert all(torch.equal(first[f"d{name}"], mine) for name, mine in zip(inputs._fields, again, strict=True))


def test_empty_batch():
    inputs, grad = make_inputs(Case(0, 2, 16, (3, 3)))
    ours = run(triton, inputs, grad, (3, 3))
    assert ours["out"].shape == (0, 2, 9, 16) and not ours["dgating"].any() and not ours["dpos_weight"].any()


def test_compiles_without_a_graph_break():
    case = FEW[0]
    inputs, grad = make_inputs(case)
    compiled = torch.compile(lambda *args: triton(*args, case.grid), fullgraph=True, backend="aot_eager")
    for content in ([], FROM_SDPA):
        with launch.trial(content=content):
            ours = run(lambda *args: compiled(*args[:-1]), inputs, grad, case.grid)
            expected = run(triton, inputs, grad, case.grid)
        assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_a_tiny_convit_trains_as_with_the_reference():
    losses = {}
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([0, 1])
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        model = convit.ConViT(img_size=(16, 24), patch_size=8, num_classes=3, embed_dim=32, depth=2, num_heads=2, local_up_to_layer=1)
        optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
        losses[backend] = []
        with convit.use_backend(backend):
            for _ in range(3):
                optimiser.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(images), targets)
                loss.backward()
                optimiser.step()
                losses[backend].append(loss.item())
    assert losses["triton"][-1] < 0.9 * losses["triton"][0]
    assert np.allclose(losses["triton"], losses["reference"], rtol=0, atol=1e-4)


def test_the_interpreter_takes_the_cpu_from_the_cpp_kernel():
    problem = Problem("torch", "cpu", "float32", 1, 1, 4, 16, (2, 2))
    assert convit.why_not("triton", problem) is None
    assert "TRITON_INTERPRET" in convit.why_not("cpp", problem)
    assert "bfloat16" in convit.why_not("triton", problem._replace(dtype="bfloat16"))


@pytest.mark.parametrize("name", [n for n in ("allow_tf32", "fp32_precision") if hasattr(torch.backends.cuda.matmul, n)])
def test_float32_products_follow_torchs_setting_by_either_name(name):
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, name)
    try:
        for value in (True, False) if name == "allow_tf32" else ("tf32", "ieee"):
            setattr(matmul, name, value)
            assert configs.precision(torch.float32, "cpu") == ("tf32" if value in (True, "tf32") else "ieee")
            assert configs.precision(torch.bfloat16, "cpu") == "ieee"
    finally:
        setattr(matmul, name, before)
