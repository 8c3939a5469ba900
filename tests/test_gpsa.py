"""convit.gpsa on every backend that can run here: values, gradients, arguments, choice."""

import importlib
import logging
import math
import sys
import threading

import pytest
import torch
from gpsa_cases import CASES, Case, check, make_inputs, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FLOOR
from torch.utils.flop_counter import FlopCounterMode

import convit
from convit import ops
from convit.dispatch import MODULES, Problem, forced_backend, order
from convit.kernels.gpsa import any_sdpa, reference

TORCH_BACKENDS = ("reference", "sdpa", "cpp", "triton")


def problem(case: Case, dtype: torch.dtype, **changes) -> Problem:
    tokens = case.grid[0] * case.grid[1]
    return Problem("torch", "cpu", str(dtype)[6:], case.batch, case.heads, tokens, case.head_dim, case.grid)._replace(**changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", TORCH_BACKENDS)
def test_values_and_gradients(backend, case, dtype):
    reason = convit.why_not(backend, problem(case, dtype))
    if reason:
        pytest.skip(reason)
    inputs, grad = make_inputs(case, dtype=dtype)
    ours = run(lambda *args: convit.gpsa(*args, backend=backend), inputs, grad, case.grid)
    assert ours["out"].dtype == dtype and ours["out"].shape == inputs.q.shape
    check(ours, inputs, grad, case.grid, definition=backend == "reference")


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (14, 14), (1, 9), (6, 1)], ids=str)
def test_tables_are_the_factors_of_the_position_softmax(grid):
    weight = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    px, py = reference.position_tables(weight, grid)
    n = grid[0] * grid[1]
    product = torch.einsum("hab,hcd->hacbd", py, px).reshape(5, n, n)
    torch.testing.assert_close(product, reference.position_attention(weight, grid), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", TORCH_BACKENDS)
@pytest.mark.parametrize(
    "scale, strength, gate", [(1e3, 1.0, 0.0), (1.0, 1e4, 0.0), (1.0, 1.0, 100.0), (1.0, 1.0, -100.0), (30.0, 50.0, 90.0)]
)
def test_extreme_but_finite_input_gives_finite_output(backend, scale, strength, gate):
    case = Case(1, 4, 24, (5, 7))
    reason = convit.why_not(backend, problem(case, torch.float32))
    if reason:
        pytest.skip(reason)
    inputs, grad = make_inputs(case)
    inputs = inputs._replace(
        q=inputs.q * scale, pos_weight=inputs.pos_weight.sign() * strength, gating=torch.tensor([gate, -gate, gate / 2, 0.0])
    )
    ours = run(lambda *args: convit.gpsa(*args, backend=backend), inputs, grad, case.grid)
    for name, value in ours.items():
        assert value.isfinite().all(), name
    truth = convit.gpsa(*inputs.cast(torch.float64), case.grid, backend="reference")
    assert (ours["out"] - truth).norm() <= 1e-4 * truth.norm()


@pytest.mark.parametrize("backend", TORCH_BACKENDS)
@pytest.mark.parametrize("gates", [(0.5, -200.0), (-math.inf, -math.inf)])
def test_closed_gates_leave_plain_attention(backend, gates):
    case = Case(2, 2, 24, (5, 7))
    reason = convit.why_not(backend, problem(case, torch.float32))
    if reason:
        pytest.skip(reason)
    inputs, grad = make_inputs(case)
    inputs = inputs._replace(gating=torch.tensor(gates))
    ours = run(lambda *args: convit.gpsa(*args, backend=backend), inputs, grad, case.grid)
    check(ours, inputs, grad, case.grid, definition=backend == "reference")
    assert not ours["dpos_weight"][1].any() and not ours["dgating"][1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 197, 48), (1, 1, 1, 5), (1, 2, 1500, 16)], ids=str)
def test_plain_attention(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, *shape, generator=generator).to(dtype).transpose(-2, -1).contiguous().transpose(-2, -1)

    def results(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*inputs, scale=0.3)
        return out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))

    sdpa = torch.nn.functional.scaled_dot_product_attention
    exact, theirs, ours = results(sdpa, torch.float64), results(sdpa, dtype), results(ops.attention, dtype)
    for truth, other, actual in zip(exact, theirs, ours, strict=True):
        errors = [((x - truth).norm() / truth.norm().clamp_min(1e-30)).item() for x in (other, actual)]
        assert errors[1] <= max(2 * errors[0], FLOOR[dtype])


@pytest.mark.parametrize("backend", ["sdpa", "cpp"])
def test_scale_and_a_transposed_position_weight_are_heeded(backend):
    case = Case(2, 3, 8, (4, 5))
    inputs, _ = make_inputs(case)
    moved = inputs._replace(pos_weight=inputs.pos_weight.t().contiguous().t())
    plain = convit.gpsa(*inputs, case.grid, scale=0.9, backend="reference")
    torch.testing.assert_close(convit.gpsa(*moved, case.grid, scale=0.9, backend=backend), plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, convit.gpsa(*inputs, case.grid, backend="reference"), rtol=1e-2, atol=1e-2)


def test_flops_are_counted():
    case = Case(2, 3, 8, (4, 5))
    inputs, grad = make_inputs(case)
    forward = 2 * 2 * 3 * 20 * 8 * (2 * 20 + 4 + 5)
    for backward, expected in ((False, forward), (True, forward * 7 // 2)):
        with FlopCounterMode(display=False) as counter:
            out = convit.gpsa(*(x.requires_grad_(backward) for x in inputs), case.grid, backend="cpp")
            if backward:
                out.backward(grad)
        assert counter.get_total_flops() == expected


def test_plain_attention_leaves_the_rest_to_pytorch(monkeypatch):
    q = torch.randn(1, 2, 9, 8)
    ours = ops.attention(q, q, q, scale=0.3)
    seen = []
    monkeypatch.setattr(any_sdpa.F, "scaled_dot_product_attention", lambda *args, **kwargs: seen.append(kwargs) or args[0])
    assert ops.attention(q, q, q, scale=0.3).equal(ours) and not seen
    ops.attention(q, q, q, scale=0.3, dropout_p=0.5)
    ops.attention(q.double(), q.double(), q.double(), scale=0.3)
    with convit.use_backend("sdpa"):
        ops.attention(q, q, q, scale=0.3)
    with convit.use_backend("reference"):  # the definition: in full, differentiable to any order
        torch.testing.assert_close(ops.attention(q, q, q, scale=0.3), ours)
    assert len(seen) == 3 and seen[0]["dropout_p"] == 0.5


@pytest.mark.parametrize("backend", ["reference", "sdpa", "cpp"])
def test_autocast_says_the_type_of_the_input_and_nothing_of_what_follows(backend):
    case = Case(2, 2, 16, (3, 5))
    inputs, _ = make_inputs(case)
    narrow = [x.bfloat16() for x in inputs[:3]]
    expected = convit.gpsa(*narrow, *inputs[3:], case.grid, backend=backend)
    with convit.use_backend(backend):
        plain = ops.attention(*narrow, scale=0.3)
    with torch.autocast("cpu", torch.bfloat16), convit.use_backend(backend):
        assert torch.equal(convit.gpsa(*inputs, case.grid), expected)
        assert torch.equal(ops.attention(*narrow, scale=0.3), plain)
        if backend != "cpp":  # what has no autocast, torch.float64, is left as it is
            wide = [x.double() for x in inputs]
            assert convit.gpsa(*wide, case.grid).dtype == torch.float64


@pytest.mark.parametrize("backend", ["reference", "sdpa", None])
def test_dropout_of_plain_attention_acts_on_the_softmax(backend):
    """Values that are the identity show it: what is left of a row is doubled, the rest is nothing. Second derivatives keep the mask."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 64, 64, dtype=torch.float64).mul(0.1).unbind(0)
    v = torch.eye(64, dtype=torch.float64).expand_as(q)
    attn = (0.3 * q @ k.transpose(-2, -1)).softmax(-1)
    with convit.use_backend(backend):
        out = ops.attention(q, k, v, scale=0.3, dropout_p=0.5)
    left = out != 0
    assert 0.4 < left.double().mean() < 0.6
    torch.testing.assert_close(out[left], 2 * attn[left])
    second = []
    for attention in (ops.attention, torch.nn.functional.scaled_dot_product_attention):
        torch.manual_seed(1)
        x = q.clone().requires_grad_()
        with convit.use_backend(backend if attention is ops.attention else None):
            (first,) = torch.autograd.grad(attention(x, k, v, scale=0.3, dropout_p=0.5).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), x)[0])
    if backend != "reference":  # which draws other numbers
        torch.testing.assert_close(*second)


def test_second_derivatives_of_plain_attention_have_its_scale():
    torch.manual_seed(0)
    given = torch.randn(3, 1, 2, 9, 8).unbind(0)
    found = []
    for attention in (ops.attention, reference.plain_attention):
        x = [each.clone().requires_grad_() for each in given]
        first = torch.autograd.grad(attention(*x, scale=0.9).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in first), x))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", TORCH_BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_propagate_as_in_the_eager_path(backend, bad):
    case = Case(1, 2, 16, (4, 5))
    reason = convit.why_not(backend, problem(case, torch.float32))
    if reason:
        pytest.skip(reason)
    inputs, _ = make_inputs(case)
    inputs.q[0, 1, 3, 2] = bad
    out = convit.gpsa(*inputs, case.grid, backend=backend)
    assert out[0, 1, 3].isnan().all()
    clean = torch.ones(20, dtype=torch.bool)
    clean[3] = False
    assert out[0, 0].isfinite().all() and out[0, 1, clean].isfinite().all()


def test_dropout_acts_on_the_mix_and_runs_on_the_reference():
    case = Case(2, 2, 8, (6, 6))
    inputs, _ = make_inputs(case)
    torch.manual_seed(3)
    out = convit.gpsa(*inputs, case.grid, dropout_p=0.4)
    torch.manual_seed(3)
    attn = reference.attention_map(*inputs[:2], *inputs[3:], case.grid, case.head_dim**-0.5)
    expected = torch.nn.functional.dropout(attn, 0.4) @ inputs.v
    torch.testing.assert_close(out, expected)
    with pytest.raises(RuntimeError, match="attention dropout is not supported"):
        convit.gpsa(*inputs, case.grid, dropout_p=0.4, backend="sdpa")


@pytest.mark.parametrize("batch, grid", [(0, (3, 3)), (2, (0, 0)), (2, (0, 5))])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "cpp"])
def test_empty_batch_or_grid_gives_empty_output(backend, batch, grid):
    case = Case(batch, 2, 8, grid)
    reason = convit.why_not(backend, problem(case, torch.float32))
    if reason:
        pytest.skip(reason)
    inputs, grad = make_inputs(case)
    ours = run(lambda *args: convit.gpsa(*args, backend=backend), inputs, grad, grid)
    assert ours["out"].shape == inputs.q.shape
    assert not ours["dpos_weight"].any() and not ours["dgating"].any()


@pytest.mark.parametrize("backend", ["reference", "sdpa", "cpp"])
def test_any_strides(backend):
    case = Case(2, 3, 12, (4, 6))
    reason = convit.why_not(backend, problem(case, torch.float32))
    if reason:
        pytest.skip(reason)
    inputs, grad = make_inputs(case)
    expected = run(lambda *args: convit.gpsa(*args, backend="reference"), inputs, grad, case.grid)
    layouts = {
        "last dimension not contiguous": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        "every second channel of a wider tensor": lambda x: torch.stack([x, x + 1], -1).flatten(-2)[..., ::2],
        "expanded gradient": lambda x: x,
    }
    for name, layout in layouts.items():
        moved = inputs._replace(q=layout(inputs.q), k=layout(inputs.k), v=layout(inputs.v))
        moved = moved._replace(pos_weight=inputs.pos_weight.T.contiguous().T, gating=inputs.gating.repeat_interleave(2)[::2])
        ours = run(lambda *args: convit.gpsa(*args, backend=backend), moved, layout(grad), case.grid)
        for key, value in ours.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
    leaves = [x.detach().requires_grad_() for x in inputs]
    convit.gpsa(*leaves, case.grid, backend=backend).sum().backward()
    ones = run(lambda *args: convit.gpsa(*args, backend="reference"), inputs, torch.ones_like(grad), case.grid)
    torch.testing.assert_close(leaves[0].grad, ones["dq"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "cpp"])
def test_same_input_gives_the_same_bits(backend):
    case = Case(2, 4, 48, (14, 14))
    reason = convit.why_not(backend, problem(case, torch.float32))
    if reason:
        pytest.skip(reason)
    inputs, grad = make_inputs(case)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2) if backend == "cpp" else (1, 1):
            torch.set_num_threads(threads)
            results.append(run(lambda *args: convit.gpsa(*args, backend=backend), inputs, grad, case.grid))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def _valid():
    inputs, _ = make_inputs(Case(2, 3, 8, (4, 5)))
    return dict(zip(("q", "k", "v", "pos_weight", "gating"), inputs, strict=True), grid=(4, 5))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": None}, TypeError, "q must be a torch.Tensor, got NoneType"),
        ({"q": torch.zeros(2, 3, 20, 8, dtype=torch.int32)}, TypeError, "q must be floating point, got torch.int32"),
        ({"v": torch.zeros(2, 3, 20, 8, dtype=torch.float64)}, TypeError, "one dtype"),
        ({"q": torch.zeros(3, 20, 8)}, ValueError, r"q must be \[B, H, N, D\], got shape \[3, 20, 8\]"),
        ({"k": torch.zeros(2, 3, 19, 8)}, ValueError, "k must have the shape of q"),
        ({"gating": torch.zeros(4)}, ValueError, r"gating must be \[H\] = \[3\], got \[4\]"),
        ({"pos_weight": torch.zeros(3, 2)}, ValueError, r"pos_weight must be \[H, 3\] = \[3, 3\], got \[3, 2\]"),
        ({"v": torch.zeros(2, 3, 20, 8, device="meta")}, ValueError, "v must be on the device of q, cpu, got meta"),
        ({"grid": (4, 4)}, ValueError, "gh \\* gw == N = 20, got 4 x 4"),
        ({"grid": (-4, -5)}, ValueError, "gh \\* gw == N"),
        ({"grid": 20}, TypeError, "grid must be a pair"),
        ({"grid": (4.0, 5.0)}, TypeError, "grid must be a pair of integers"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\), got 1.5"),
        ({"backend": "cp"}, ValueError, "unknown backend 'cp'; did you mean 'cpp'"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        convit.gpsa(**{**_valid(), **change})


sizes = st.integers(1, 5)


@settings(max_examples=40, deadline=None)
@given(
    batch=sizes,
    heads=sizes,
    dim=st.integers(1, 20),
    gh=sizes,
    gw=sizes,
    wrong=st.sampled_from([None, "k", "v", "pos_weight", "gating", "grid"]),
)
def test_arguments_either_work_or_are_named(batch, heads, dim, gh, gw, wrong):
    case = Case(batch, heads, dim, (gh, gw))
    inputs, _ = make_inputs(case)
    arguments = dict(zip(("q", "k", "v", "pos_weight", "gating"), inputs, strict=True), grid=case.grid)
    if wrong is None:
        out = convit.gpsa(**arguments)
        expected = convit.gpsa(**arguments, backend="reference")
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    else:
        value = arguments[wrong]
        arguments[wrong] = (gh + 1, gw) if wrong == "grid" else torch.cat([value, value[:1]])
        with pytest.raises(ValueError, match=f"{wrong} must"):
            convit.gpsa(**arguments)


# ---- the choice of a backend ----


def test_precedence_argument_context_environment(monkeypatch):
    inputs, _ = make_inputs(Case(1, 1, 4, (2, 2)))
    called = []
    for name in ("reference", "sdpa"):
        module = importlib.import_module(MODULES[name])
        real = module.gpsa
        monkeypatch.setattr(module, "gpsa", lambda *a, _name=name, _real=real: called.append(_name) or _real(*a))
    monkeypatch.setenv("CONVIT_BACKEND", "reference")
    convit.gpsa(*inputs, (2, 2))
    with convit.use_backend("sdpa"):
        convit.gpsa(*inputs, (2, 2))
        convit.gpsa(*inputs, (2, 2), backend="reference")
        with convit.use_backend("reference"):
            convit.gpsa(*inputs, (2, 2))
    convit.gpsa(*inputs, (2, 2))
    assert called == ["reference", "sdpa", "reference", "reference", "reference"]


def test_no_backend_is_the_automatic_choice_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("CONVIT_BACKEND", "reference")
    with convit.use_backend("sdpa"):
        with convit.use_backend(None):
            assert forced_backend(None) is forced_backend(None, tracing=True) is None
        assert forced_backend(None) == forced_backend(None, tracing=True) == "sdpa"
    assert forced_backend(None) == "reference" and forced_backend("auto") is None
    monkeypatch.setenv("CONVIT_BACKEND", "auto")
    assert forced_backend(None) is None


def test_a_matrix_unit_is_preferred_beyond_256_tokens_and_for_bfloat16_alone(monkeypatch):
    monkeypatch.setattr("convit.kernels.gpsa.cpu_cpp.slower_than_torch", lambda dtype: True)
    first = [order(problem(CASES[0], dtype, tokens=n))[0] for dtype in (torch.bfloat16, torch.float32) for n in (196, 256, 257)]
    assert first == ["cpp", "cpp", "sdpa", "cpp", "cpp", "cpp"]


@pytest.mark.parametrize(
    ("framework", "device", "expected"),
    [
        ("torch", "cpu", ("cpp", "sdpa", "reference")),
        ("torch", "cuda", ("triton", "sdpa", "reference")),
        ("torch", "npu", ("triton", "sdpa", "reference")),
        ("torch", "mps", ("sdpa", "reference")),
        ("mindspore", "cpu", ("aot", "reference")),
        ("mindspore", "ascend", ("flash", "blocks", "reference")),
        ("mindspore", "gpu", ("reference",)),
    ],
)
def test_the_fastest_kernel_of_a_device_comes_first(framework, device, expected):
    assert order(problem(CASES[0], torch.float32, framework=framework, device=device)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d)[6:])
def test_what_a_cpu_runs(dtype):
    """No test above is skipped because a backend refuses what it can do."""
    refused = {name for name in ("reference", "sdpa", "cpp") for case in CASES if convit.why_not(name, problem(case, dtype))}
    assert refused == ({"cpp"} if dtype == torch.float64 else set())
    dropping = Problem("torch", "cpu", str(dtype)[6:], 2, 4, 196, 48, (14, 14), 0.1)
    assert [name for name in ("reference", "sdpa", "cpp") if not convit.why_not(name, dropping)] == ["reference"]


def test_environment_with_an_unknown_backend_is_an_error(monkeypatch):
    inputs, _ = make_inputs(Case(1, 1, 4, (2, 2)))
    monkeypatch.setenv("CONVIT_BACKEND", "sdap")
    with pytest.raises(ValueError, match="unknown backend 'sdap'; did you mean 'sdpa'"):
        convit.gpsa(*inputs, (2, 2))


def test_use_backend_is_local_to_its_thread():
    seen = []
    with convit.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(forced_backend(None)))
        thread.start()
        thread.join()
        seen.append(forced_backend(None))
    assert seen == [None, "reference"]


def test_forced_backend_that_cannot_run_lists_every_reason():
    inputs, _ = make_inputs(Case(1, 2, 8, (3, 3)))
    with pytest.raises(RuntimeError) as caught:
        convit.gpsa(*inputs, (3, 3), backend="akg")
    message = str(caught.value)
    assert message.startswith("convit: backend 'akg' cannot run gpsa(q=[1, 2, 9, 8] float32 on cpu")
    for name in ("akg", "cpp", "sdpa", "reference"):
        assert f"\n  {name}" in message


def test_automatic_choice_moves_on_and_says_why_once(caplog, monkeypatch):
    module = sys.modules["convit.dispatch"]
    monkeypatch.setattr(module, "_logged", set())
    monkeypatch.setitem(module._loaded, MODULES["cpp"], "built for another Python")
    inputs, _ = make_inputs(Case(1, 2, 8, (3, 3)))
    with caplog.at_level(logging.INFO, logger="convit"):
        for _ in range(3):
            convit.gpsa(*inputs, (3, 3))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "sdpa instead of cpp: built for another Python" in messages[0]


def test_absent_broken_and_foreign_backends_read_differently(monkeypatch, tmp_path):
    module = sys.modules["convit.dispatch"]
    (tmp_path / "broken_kernel.py").write_text("raise OSError('undefined symbol: _ZN3fooEv')")
    (tmp_path / "needs_missing.py").write_text("import surely_not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    reasons = {}
    for home in ("broken_kernel", "needs_missing", "no_such_kernel"):
        monkeypatch.setattr(module, "_loaded", {})
        monkeypatch.setitem(module.MODULES, "tbe", home)
        reasons[home] = convit.why_not("tbe", problem(CASES[0], torch.float32))
    assert reasons["broken_kernel"] == "failed to import: OSError: undefined symbol: _ZN3fooEv"
    assert reasons["needs_missing"] == "surely_not_installed is not installed"
    assert "does not contain it" in reasons["no_such_kernel"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    case = Case(2, 2, 8, (3, 4))
    inputs, _ = make_inputs(case)
    compiled = torch.compile(lambda *a: convit.gpsa(*a, case.grid), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), convit.gpsa(*inputs, case.grid), rtol=1e-5, atol=1e-5)
