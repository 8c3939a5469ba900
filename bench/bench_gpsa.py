"""The attention core, from packed projections to the joined heads: ours against its peers, and how it scales.

pytest bench/bench_gpsa.py --benchmark-only                 # add -k "3136 and fwd+bwd" for a part of it
"""

import pytest
from peers import Core, core_peers
from timing import REPLAY

pytestmark = pytest.mark.benchmark(timer=REPLAY)

# batch, grid, heads, head dim: the layers of convit_tiny and convit_small at 224, of small at 448 and of tiny at 896 pixels
SHAPES = [(8, (14, 14), 4, 48), (8, (14, 14), 9, 48), (2, (28, 28), 9, 48), (1, (56, 56), 4, 48)]
FULL_SHAPES = [(8, (14, 14), 16, 48), (64, (14, 14), 4, 48), (4, (24, 24), 9, 48), (1, (96, 96), 4, 48), (2, (28, 28), 9, 64)]

# further ones against plain attention alone, on CPU in bfloat16 too
PLAIN_SHAPES = [(1, (14, 14), 4, 48), (8, (14, 14), 12, 64)]

# the axes of the scaling tests: tokens, batch, threads
SIDES = (14, 28, 42, 56)
FULL_SIDES = (14, 20, 28, 42, 56, 84, 112, 128)
BATCHES = (1, 4, 16)
FULL_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LARGEST_EAGER = 56  # the side up to which timm's N x N tensors are worth their wait


def core_cases(bench) -> list[Core]:
    dtypes = ["float32"] if bench.device == "cpu" else ["float32", "bfloat16"]
    shapes = SHAPES + (FULL_SHAPES if bench.full else [])
    cases = [
        Core(batch, grid, heads, dim, backward, threads, dtype, bench.device)
        for dtype in dtypes
        for batch, grid, heads, dim in shapes
        for backward in (False, True)
        for threads in bench.threads
    ]
    return [case for case in cases if not (case.backward and case.tokens > 4096)]


def scaling_cases(bench) -> list[Core]:
    most = max(bench.threads)
    tokens = [Core(1, (side, side), 4, 48, threads=most, device=bench.device) for side in (FULL_SIDES if bench.full else SIDES)]
    batches = [Core(batch, (14, 14), 4, 48, threads=most, device=bench.device) for batch in (FULL_BATCHES if bench.full else BATCHES)]
    return list(dict.fromkeys(tokens + batches))


def plain_cases(bench) -> list[Core]:
    if bench.device != "cpu":
        return []
    return [
        Core(batch, grid, heads, dim, backward, threads, dtype)
        for dtype in ("float32", "bfloat16")
        for batch, grid, heads, dim in SHAPES + PLAIN_SHAPES
        for backward in (False, True)
        for threads in bench.threads
    ]


def pytest_generate_tests(metafunc) -> None:
    bench = metafunc.config.bench
    peers = core_peers(bench.device)
    core = core_cases(bench)
    if metafunc.function is test_core:
        pairs = [(problem, peer) for problem in core for peer in peers]
    else:
        # the kernel that the automatic choice takes, attention without position, and for the scaling timm
        first = next(p for p in peers if p.ours and not p.missing(core[0]))
        plain, timm = (next(p for p in peers if p.name == name) for name in ("plain SDPA", "timm eager"))
        scaling = [case for case in scaling_cases(bench) if case not in core]
        if metafunc.function is test_scaling:
            few = {case: [first, plain, *([timm] if case.grid[0] <= LARGEST_EAGER else [])] for case in scaling}
        else:
            few = {case: [first, plain] for case in plain_cases(bench) if case not in core + scaling}
        pairs = [(problem, peer) for problem, chosen in few.items() for peer in chosen]
    metafunc.parametrize("problem, peer", pairs, ids=[name(problem, peer) for problem, peer in pairs])


def name(problem, peer) -> str:
    return f"{problem}-{peer.name}".replace(" ", "-")


def test_core(bench, problem, peer):
    bench(problem, peer, with_memory=problem.tokens > 1024 and problem.threads == max(bench.session.threads))


def test_scaling(bench, problem, peer):
    bench(problem, peer, with_memory=problem.batch == 1, series="scaling")


def test_plain(bench, problem, peer):
    bench(problem, peer, series="plain")
