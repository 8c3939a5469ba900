"""Whole models at 224 x 224, inference and training steps: ours against timm, plain ViTs and the runtimes that timm's ConViT exports to.

pytest bench/bench_model.py --benchmark-only                # add -k tiny for a part of it
"""

import pytest
from models import Model, model_peers
from timing import REPLAY

pytestmark = pytest.mark.benchmark(timer=REPLAY)


def cases(bench) -> list[Model]:
    names = ["convit_tiny", "convit_small", "convit_base"]
    batches = (1, 8) if bench.device == "cpu" else (1, 64)
    dtypes = ["float32"] if bench.device == "cpu" else ["float32", "bfloat16"]
    trained = names[: 2 if bench.full else 1]
    return [
        Model(name, batch, threads, dtype, bench.device, train)
        for dtype in dtypes
        for train in (False, True)
        for name in (trained if train else names)
        for batch in (batches[1:] if train else batches)
        if bench.full or name != "convit_base" or (batch == 1 and not train)
        for threads in bench.threads
    ]


def pytest_generate_tests(metafunc) -> None:
    bench = metafunc.config.bench
    pairs = [(problem, peer) for problem in cases(bench) for peer in model_peers(bench.device)]
    metafunc.parametrize("problem, peer", pairs, ids=[f"{problem}-{peer.name}".replace(" ", "-") for problem, peer in pairs])


def test_model(bench, problem, peer):
    bench(problem, peer)
