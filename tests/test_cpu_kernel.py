"""The C++ kernels: every instruction set, threads, processes, memory, and their place in torch (compile, export, autocast)."""

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy
import pytest
import torch
from gpsa_cases import Case, Inputs, check, make_inputs, reference64, relative_error, run
from tolerances import allowed_error
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import convit
from convit.dispatch import Problem, choose, order
from convit.kernels.gpsa import cpu_cpp

_missing = cpu_cpp.why_not(Problem("torch", "cpu", "float32", 1, 1, 1, 1, (1, 1)))
pytestmark = pytest.mark.skipif(_missing is not None, reason=str(_missing))

# beyond the shared cases: more keys than one tile, a last block of one query, more heads than threads divide, long thin grids
TILES = [Case(1, 1, 40, (19, 31)), Case(1, 3, 8, (3, 11)), Case(1, 1, 5, (2, 300)), Case(2, 5, 24, (1, 65)), Case(1, 1, 100, (33, 16))]


def cpp(*args):
    return convit.gpsa(*args, backend="cpp")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run ``code`` in a fresh interpreter that also finds this folder's modules."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", TILES, ids=str)
def test_tiles_and_tails(case, dtype):
    inputs, grad = make_inputs(case, dtype=dtype)
    check(run(cpp, inputs, grad, case.grid), inputs, grad, case.grid)


def hard_inputs(dtype: torch.dtype) -> dict[str, tuple[Inputs, torch.Tensor, float | None]]:
    """Inputs on the 4 x 5 grid at which a shortcut of the arithmetic would show, with the scale."""
    inputs, grad = make_inputs(Case(2, 3, 16, (4, 5)), dtype=dtype)
    return {
        "nearly closed content": (inputs._replace(gating=torch.tensor([15.0, 17.5, 20.0])), grad, None),
        "logits of 1e11": (inputs._replace(q=(inputs.q * 1e11).to(dtype) if dtype != torch.float16 else inputs.q), grad, None),
        "negative scale": (inputs, grad, -0.7),
        "no scale": (inputs, grad, 0.0),
        "transposed parameters": (
            inputs._replace(pos_weight=inputs.pos_weight.T.contiguous().T, gating=inputs.gating.repeat_interleave(2)[::2]),
            grad,
            None,
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", hard_inputs(torch.float32))
def test_hard_inputs(name, dtype):
    inputs, grad, scale = hard_inputs(dtype)[name]
    check(run(lambda *args: convit.gpsa(*args, scale=scale, backend="cpp"), inputs, grad, (4, 5)), inputs, grad, (4, 5), scale=scale)


def test_every_logit_far_below_zero():
    inputs, grad = make_inputs(Case(2, 3, 16, (4, 5)))
    inputs = inputs._replace(q=torch.full_like(inputs.q, 20), k=(torch.arange(20) / 64 - 20)[:, None].expand_as(inputs.k))
    ours, truth = run(cpp, inputs, grad, (4, 5)), reference64(inputs, grad, (4, 5))
    for name in ours:  # the logits themselves, -1600, have a rounding of 1e-4
        assert (ours[name] - truth[name]).norm() <= 1e-3 * truth[name].norm() + 1e-4, name


_EVERY_CASE = """
import torch, convit
from gpsa_cases import CASES, check, make_inputs, run
from test_cpu_kernel import TILES, cpp, hard_inputs, test_every_logit_far_below_zero, test_hard_inputs
from test_gpsa_numerics import CONTRACTED, FOLDED, STEPS, check_bias, check_gates, check_levels
from convit.kernels.gpsa import cpu_cpp
torch.set_num_threads(1)
torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True, warn_only=True)
for case in CASES + TILES:
    for dtype in (torch.float32, torch.bfloat16):
        inputs, grad = make_inputs(case, dtype=dtype)
        check(run(cpp, inputs, grad, case.grid), inputs, grad, case.grid)
test_every_logit_far_below_zero()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for name in hard_inputs(dtype):
        test_hard_inputs(name, dtype)
for dtype in (torch.float32, torch.bfloat16):
    for grid in (FOLDED, CONTRACTED):
        check_gates(cpp, dtype, grid)
    for name in ("rise", "fall and rise"):
        check_levels(cpp, dtype, STEPS, name)
check_bias(cpp, torch.bfloat16, (17, 17))
"""
_WHICH = """
from convit.kernels.gpsa import cpu_cpp
print(cpu_cpp.describe()["instruction set"])
"""


@pytest.mark.parametrize("name", ["avx512_bf16", "avx512", "avx2", "neon", "portable"])
def test_each_instruction_set(name):
    """Of the one that is chosen unasked, which all other tests run in, only that it can be asked for."""
    about = cpu_cpp.describe()
    if name not in about["instruction sets"].split(", "):
        pytest.skip(f"this machine cannot run {name}")
    done = python(_WHICH if name == about["instruction set"] else _EVERY_CASE + _WHICH, CONVIT_CPU_ISA=name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == name


def test_unknown_instruction_set_is_an_error():
    code = "import torch, convit; x = torch.ones(1, 1, 4, 4); convit.gpsa(x, x, x, torch.ones(1, 3), torch.ones(1), (2, 2), backend='cpp')"
    done = python(code, CONVIT_CPU_ISA="avx3")
    assert done.returncode != 0
    assert "CONVIT_CPU_ISA must be one of those that this machine can run" in done.stderr and "got 'avx3'" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", [Case(1, 1, 48, (14, 14)), Case(1, 3, 16, (20, 21)), Case(2, 3, 8, (3, 5))], ids=str)
def test_same_bits_at_every_thread_count(case, dtype):
    """Forward and backward, heads divided among threads and not, in one wave of blocks of queries and in several."""
    inputs, grad = make_inputs(case, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(run(cpp, inputs, grad, case.grid))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_several_python_threads_at_once():
    case = Case(2, 3, 16, (9, 9))
    jobs = [make_inputs(case, seed=seed) for seed in range(4)]
    expected = [run(cpp, *job, case.grid) for job in jobs]
    failures = []

    def work(index: int) -> None:
        for _ in range(10):
            ours = run(cpp, *jobs[index], case.grid)
            failures.extend(name for name in ours if not torch.equal(ours[name], expected[index][name]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not failures


def _child(queue) -> None:
    case = Case(2, 3, 16, (9, 9))
    inputs, grad = make_inputs(case)
    out = convit.gpsa(*inputs, case.grid, backend="cpp")
    queue.put(out.numpy().tobytes())


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_in_a_child_process_of_one_that_has_computed(start):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"{start} does not exist here")
    case = Case(2, 3, 16, (9, 9))
    inputs, _ = make_inputs(case)
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # the parent's pool of threads exists, and does not in a forked child
    try:
        expected = cpp(*inputs, case.grid).numpy().tobytes()
        context = multiprocessing.get_context(start)
        queue = context.Queue()
        child = context.Process(target=_child, args=(queue,), daemon=True)
        child.start()
        got = queue.get(timeout=120)
        child.join(60)
    finally:
        torch.set_num_threads(before)
    assert child.exitcode == 0
    assert got == expected


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="only Linux tells whether a process was made by fork")
def test_first_use_in_a_forked_child():
    """The parent has used torch's threads and never this library: its child must not wait for threads that it does not have."""
    code = (
        "import os, signal, torch; torch.set_num_threads(2); torch.randn(2000000).exp()\n"
        "child = os.fork()\n"
        "if child == 0:\n    signal.alarm(60)\n    import convit\n    q = torch.empty(1, 2, 196, 16)\n"
        "    convit.gpsa(q, q, q, torch.empty(2, 3), torch.empty(2), (14, 14), backend='cpp')\n    os._exit(0)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_offsets_beyond_31_bits():
    case = Case(2, 1, 8, (3, 3))
    inputs, grad = make_inputs(case)
    far = 2**31 + 64  # elements between the two images; only their own pages are ever touched
    wide = [torch.from_numpy(numpy.zeros(far + 128, numpy.float32)).as_strided((2, 1, 9, 8), (far, 128, 8, 1)) for _ in range(3)]
    for to, x in zip(wide, inputs[:3], strict=True):
        to.copy_(x)
    expected = run(cpp, inputs, grad, case.grid)
    ours = run(cpp, inputs._replace(q=wide[0], k=wide[1], v=wide[2]), grad, case.grid)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_broadcast_views():
    case = Case(2, 3, 16, (4, 5))
    inputs, grad = make_inputs(case)
    shared = inputs._replace(k=inputs.k[:1, :1].expand(2, 3, -1, -1), v=inputs.v[:, :, :1].expand(-1, -1, 20, -1))
    ours = run(cpp, shared, grad[:, :, :1].expand(-1, -1, 20, -1), case.grid)
    copied = shared._replace(k=shared.k.contiguous(), v=shared.v.contiguous())
    expected = run(cpp, copied, grad[:, :, :1].expand(-1, -1, 20, -1).contiguous(), case.grid)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_output_is_laid_out_as_the_projection_reads_it():
    case = Case(2, 3, 16, (4, 5))
    inputs, _ = make_inputs(case)
    out = cpp(*inputs, case.grid)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_plain_attention(dtype):
    inputs, grad = make_inputs(Case(2, 3, 20, (5, 13)), dtype=dtype)

    def outputs(function, cast):
        leaves = [x.to(cast).requires_grad_() for x in inputs[:3]]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(cast))

    sdpa = torch.nn.functional.scaled_dot_product_attention
    truth = outputs(lambda *x: sdpa(*x, scale=0.3), torch.float64)
    peer = outputs(lambda *x: (x[0] @ x[1].mT * 0.3).softmax(-1) @ x[2], dtype)
    ours = outputs(lambda *x: cpu_cpp.attention(*x, 0.3), dtype)
    for mine, theirs, exact in zip(ours, peer, truth, strict=True):
        assert relative_error(mine, exact) <= allowed_error(dtype, 65, relative_error(theirs, exact))


def test_thread_counts_below_one_are_refused():
    x = torch.zeros(1, 1, 4, 4)
    arguments = [(1, 1, 2, 2, 4), 1.0, 0, *[cpu_cpp._strided(x)] * 3, 0, 0, cpu_cpp._strided(torch.zeros_like(x)), 0]
    for threads in (0, -2):
        with pytest.raises(ValueError, match=f"threads must be at least 1, got {threads}"):
            cpu_cpp._C.forward(*arguments, threads)


@pytest.mark.parametrize("dtype", [-1, 3])
def test_types_that_the_kernel_does_not_know_are_refused(dtype):
    x = torch.zeros(1, 1, 4, 4)
    arguments = [(1, 1, 2, 2, 4), 1.0, dtype, *[cpu_cpp._strided(x)] * 3, 0, 0, cpu_cpp._strided(torch.zeros_like(x)), 0]
    with pytest.raises(ValueError, match=rf"dtype must be 0 \(float32\), 1 \(bfloat16\) or 2 \(float16\), got {dtype}"):
        cpu_cpp._C.forward(*arguments, 1)


def test_tensors_without_their_memory_are_refused():
    leaves = _sample(False)
    leaves[0].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="q reaches past the end of its storage, 0 bytes"):
        cpp(*leaves, (4, 5))
    short = _sample(False)
    short[4].untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match="gating reaches past the end of its storage, 8 bytes"):
        cpp(*short, (4, 5))


_PEAK = """
import resource, torch, convit
torch.set_num_threads(2)
n = 3136
def run(n, train=False):
    x = [torch.randn(1, n, 4, 48).transpose(1, 2).requires_grad_(train) for _ in range(3)]
    g = int(n ** 0.5)
    out = convit.gpsa(*x, torch.randn(4, 3), torch.randn(4), (g, g), backend="cpp")
    if train:
        out.backward(torch.ones_like(out))
run(4, train=True)
torch.randn(1, n, 4, 48 * 3)  # the inputs themselves belong to the base
x = [torch.randn(1, n, 4, 48) for _ in range(4)]
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
del x
for train in (False, True):
    run(n, train)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024)
"""


def test_peak_memory_of_a_long_row():
    if sys.platform != "linux":
        pytest.skip("the peak is read in KiB, as Linux counts it")
    done = python(_PEAK)
    assert done.returncode == 0, done.stderr
    # one softmax of this size would take 4 heads x 39 MB
    forward, trained = map(float, done.stdout.split())
    assert forward <= 16 and trained <= 30


def test_long_rows_of_bfloat16_go_to_a_matrix_unit(monkeypatch):
    """A chip with AMX is stood in for by what the kernel was told of it."""

    def problem(dtype: str, side: int) -> Problem:
        return Problem("torch", "cpu", dtype, 1, 1, side * side, 16, (side, side))

    def chosen(dtype: str, side: int, forced: str | None = None) -> str:
        return choose(problem(dtype, side), forced).__name__.rpartition(".")[2]

    for present in (True, False):
        monkeypatch.setattr(cpu_cpp, "_AMX", present)
        assert chosen("bfloat16", 17) == ("any_sdpa" if present else "cpu_cpp")
        assert chosen("bfloat16", 16) == chosen("float32", 17) == chosen("bfloat16", 17, "cpp") == "cpu_cpp"
        assert order(problem("float32", 17)) == ("cpp", "sdpa", "reference")
        assert order(problem("bfloat16", 17)) == (("sdpa", "cpp", "reference") if present else ("cpp", "sdpa", "reference"))


# ---- the operator ----


def _sample(requires_grad: bool = True):
    case = Case(2, 3, 16, (4, 5))
    inputs, _ = make_inputs(case)
    return tuple(x.detach().clone().requires_grad_(requires_grad) for x in inputs)


def test_operator_passes_torchs_own_checks():
    torch.use_deterministic_algorithms(False)  # the checks write outputs of their own
    leaves = _sample()
    torch.library.opcheck(torch.ops.convit.gpsa.default, (*leaves, 4, 5, 0.25))
    plain = tuple(x.detach() for x in leaves)
    out, lse = torch.ops.convit.gpsa(*plain, 4, 5, 0.25)
    torch.library.opcheck(torch.ops.convit.gpsa_backward.default, (torch.ones_like(out), *plain, out, lse, 4, 5, 0.25))


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: torch.zeros(2, 3, 20, 16, dtype=torch.float64)}, "q must be one of float32, bfloat16, float16"),
        ({1: torch.zeros(2, 3, 19, 16)}, "k must be like q"),
        ({3: torch.zeros(3, 2)}, "pos_weight must be contiguous float32"),
        ({4: torch.zeros(3, dtype=torch.float64)}, "gating must be contiguous float32"),
        ({5: 7}, "grid must have gh \\* gw == N = 20, got 7 x 5"),
    ],
)
def test_operator_called_directly_checks_what_the_kernel_relies_on(change, message):
    arguments = [*_sample(False), 4, 5, 0.25]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises((TypeError, ValueError), match=message):
        torch.ops.convit.gpsa(*arguments)


@pytest.mark.parametrize("scale", [0.25, -0.8, 0.0])
@pytest.mark.parametrize("grid", [(4, 5), (19, 31)], ids=str)
def test_log_sum_exp(grid, scale):
    (q, k, v, pos_weight, gating), _ = make_inputs(Case(2, 3, 16, grid))
    _, lse = torch.ops.convit.gpsa(q, k, v, pos_weight, gating, *grid, scale)
    expected = (q.double() @ k.double().transpose(-2, -1) * scale).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)


class _Seen(TorchDispatchMode):
    """Remembers the operators that went by."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_an_eager_call_goes_past_the_operator_with_the_same_result(monkeypatch):
    case = Case(2, 3, 16, (4, 5))
    inputs, grad = make_inputs(case)
    with _Seen() as seen:
        expected = run(cpp, inputs, grad, case.grid)
    assert {"convit.gpsa.default", "convit.gpsa_backward.default"} <= seen.names
    monkeypatch.setattr(torch.ops.convit, "gpsa", None)
    monkeypatch.setattr(torch.ops.convit, "gpsa_backward", None)
    ours = run(cpp, inputs, grad, case.grid)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    with torch.no_grad():
        assert torch.equal(cpp(*inputs, case.grid), expected["out"])


def test_what_watches_a_call_sees_the_operator():
    inputs, _ = make_inputs(Case(1, 3, 16, (4, 5)))
    with torch.profiler.profile() as record:
        out = cpp(*inputs, (4, 5))
    assert "convit::gpsa" in {event.key for event in record.key_averages()}
    graph = make_fx(lambda *args: cpp(*args, (4, 5)))(*inputs)
    assert any(node.target is torch.ops.convit.gpsa.default for node in graph.graph.nodes)
    mapped = torch.func.vmap(lambda q: cpp(q, *inputs[1:], (4, 5)))(torch.stack([inputs.q, inputs.q]))
    assert all(torch.equal(x, out) for x in mapped)


def test_lazy_negation_and_batches_of_gradients():
    leaves = _sample()
    complex_ = torch.complex(leaves[0].detach(), -leaves[0].detach()).conj()
    assert complex_.imag.is_neg()
    out = cpp(complex_.imag, *leaves[1:], (4, 5))
    assert torch.equal(out, cpp(*leaves, (4, 5)))
    with torch.no_grad():  # contiguous, so that nothing need copy it
        assert torch.equal(out, cpp(torch._neg_view(-leaves[0]), *leaves[1:], (4, 5)))
        assert torch.equal(out, cpp(leaves[0], leaves[1], torch._neg_view(-leaves[2]), *leaves[3:], (4, 5)))
    grads = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(0))
    (ours,) = torch.autograd.grad(out, leaves[2], grads, is_grads_batched=True, retain_graph=True)
    for mine, grad in zip(ours, grads, strict=True):
        torch.testing.assert_close(mine, torch.autograd.grad(out, leaves[2], grad, retain_graph=True)[0])


def test_gradient_of_a_part_and_of_frozen_parameters():
    leaves = _sample()
    frozen = [x if i in (0, 2) else x.detach() for i, x in enumerate(leaves)]
    out = cpp(*frozen, (4, 5))
    out.sum().backward()
    assert leaves[0].grad is not None and leaves[2].grad is not None and leaves[1].grad is None


def test_autocast_runs_in_its_dtype():
    leaves = _sample()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = cpp(*leaves, (4, 5))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves)


class _Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(48, 3 * 48)
        self.pos_weight = torch.nn.Parameter(torch.randn(3, 3) * 0.3)
        self.gating = torch.nn.Parameter(torch.randn(3))

    def forward(self, x):
        q, k, v = self.project(x).view(*x.shape[:2], 3, 3, 16).permute(2, 0, 3, 1, 4)
        return convit.gpsa(q, k, v, self.pos_weight, self.gating, (4, 5)).transpose(1, 2).flatten(2)


def test_compiles_with_its_gradient_in_one_graph():
    torch.manual_seed(0)
    model, x = _Attention(), torch.randn(2, 20, 48)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for ours, p in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, ours, rtol=1e-5, atol=1e-5)


def test_exports_with_a_dynamic_batch():
    torch.manual_seed(0)
    model = _Attention().eval()
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 20, 48),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert any(node.target is torch.ops.convit.gpsa.default for node in program.graph.nodes)
    x = torch.randn(5, 20, 48)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


def test_describe_names_what_is_in_use():
    about = cpu_cpp.describe()
    assert about["available"] == "yes"
    assert about["instruction set"] in about["instruction sets"].split(", ")
    assert about["instruction sets"].endswith("portable")


@pytest.mark.parametrize("grid", [(16, 16), (16, 17)])
@pytest.mark.parametrize("gate", [-95.0, -102.0])
def test_position_gradients_keep_their_digits_behind_a_gate_that_is_hardly_a_number(grid, gate):
    """A float32 gate is denormal there: it may not stand as a factor inside a sum."""
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 1, 1, grid[0] * grid[1], 16)
    weight, gating = torch.tensor([[0.1, 0.2, -0.01]]), torch.tensor([gate])

    def gradient(dtype, backend):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, 1e8 * v, weight, gating)]
        out = convit.gpsa(*inputs, grid, backend=backend)
        return torch.autograd.grad(out, inputs[3], 1e8 * grad.to(dtype))[0].double()

    truth = gradient(torch.float64, "reference")
    assert (gradient(torch.float32, "cpp") - truth).norm() <= 2e-6 * truth.norm()
