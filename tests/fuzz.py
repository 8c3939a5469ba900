"""Coverage-guided fuzzing of everything that reads what strangers write: ``make fuzz`` (``SECONDS=600`` a target, ``TARGET=name`` for one).

A target takes bytes and may raise ``ValueError`` (its message is checked) and nothing else; a crash, 2 seconds of work or 2 GB is a
finding, and libFuzzer leaves its input in ``build/fuzz``. Inputs that once failed live in ``tests/data/fuzz/<target>`` and run in the test
suite. Needs atheris; without it hypothesis draws the bytes, unguided.
"""

import argparse
import contextlib
import functools
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "data" / "fuzz"
SMALL = Path(__file__).parent / "data" / "mindcv_crc.ckpt"
OUTPUT = Path(__file__).parents[1] / "build" / "fuzz"
WORK = Path(tempfile.gettempdir()) / f"convit-fuzz-{os.getpid()}"


def refused(act: Callable[[], object], name: str | None = None) -> None:
    """Run ``act``; it may refuse with a ``ValueError`` of reasonable length that has ``name`` in it."""
    try:
        act()
    except ValueError as error:
        assert len(str(error)) < 2000 and (name is None or name in str(error)), str(error)[:3000]


def checkpoint(data: bytes) -> None:
    from convit.weights.load import read

    WORK.write_bytes(data)
    refused(lambda: read(WORK), str(WORK))


def safetensors(data: bytes) -> None:
    checkpoint(len(data).to_bytes(8, "little") + b"{" + data + bytes(64))


def pickle(data: bytes) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/data.pkl", data)
        file.writestr("a/data/0", bytes(64))
    checkpoint(archive.getvalue())


def recipe(data: bytes) -> None:
    from convit.engine.recipe import load_recipe

    path = WORK.with_suffix(".yaml")
    path.write_bytes(data)
    refused(lambda: load_recipe(path), None)


def shard(data: bytes) -> None:
    from convit.engine.sources import TarSource

    path = WORK.with_suffix(".tar")
    path.write_bytes(data)

    def read() -> None:
        source = TarSource([path])
        for index in range(min(len(source.samples), 10)):
            source.open(index)

    refused(read, str(path))


def log(data: bytes) -> None:
    from convit.engine.folder import Log, Progress, last_epoch
    from convit.figures import read_log

    path = WORK.with_suffix(".jsonl")
    path.write_bytes(data)
    refused(lambda: last_epoch(path))
    refused(lambda: Log(path, Progress(epoch=1, updates=10)).close())
    refused(lambda: read_log(path), str(path))


def operator(data: bytes) -> None:
    """The registered operators, past every check of ``convit.gpsa``: an answer or an exception, never a crash."""
    import torch

    import convit.kernels.gpsa.cpu_cpp  # noqa: F401

    taken = iter(data)

    def draw(*choices: Any) -> Any:
        return choices[next(taken, 0) % len(choices)]

    def tensor(*sizes: int, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float32, torch.bfloat16)) -> torch.Tensor:
        sizes = tuple(draw(size, size, size, size, size, size, 0, 1, size + 1) for size in sizes)[: draw(9, 9, 9, 9, 9, 9, 1, 3)]
        made = torch.full(sizes, draw(0.5, 1e30, float("nan"), -3.0)).to(draw(*dtypes * 3, torch.float64, torch.int32))
        strange = (made[..., :1].expand(sizes), made.flip(0), made.transpose(0, -1)) if made.dim() else (made,)
        return draw(made, made, made, made, *strange)

    batch, heads, gh, gw, width = (draw(1, 2, 3) for _ in range(5))
    q, k, v, grad, out = (tensor(batch, heads, gh * gw, draw(8 * width, 3)) for _ in range(5))
    float32 = (torch.float32,)
    weight, gating, lse = (tensor(*sizes, dtypes=float32) for sizes in ((heads, 3), (heads,), (batch, heads, gh * gw)))
    last = draw(gh, gh, gh, 0, -1, 1 << 40), draw(gw, gw, gw, 0, -7, 1 << 40), draw(0.3, 0.0, -1.0, float("inf"), float("nan"))
    for call in (
        lambda: torch.ops.convit.gpsa(q, k, v, weight, gating, *last),
        lambda: torch.ops.convit.gpsa_backward(grad, q, k, v, weight, gating, out, lse, *last),
    ):
        with contextlib.suppress(RuntimeError, ValueError, TypeError, IndexError, OverflowError):
            call()


TARGETS = {target.__name__: target for target in (checkpoint, safetensors, pickle, recipe, shard, log, operator)}

LONGEST = 2.0  # seconds of the processor for one input


def timed(name: str, data: bytes) -> None:
    """One input; the processor's time is judged, since the clock goes on while other programs run."""
    began = time.process_time()
    TARGETS[name](data)
    took = time.process_time() - began
    assert took < LONGEST, f"{took:.1f} s for {len(data)} bytes"


def seeds() -> dict[str, list[bytes]]:
    """What each target starts from: something valid, so that chance does not have to find the first bytes."""
    import torch

    small = {"blocks.0.attn.qk.weight": torch.ones(2, 1), "patch_embed.proj.weight": torch.ones(1, 1)}
    zipped, old = io.BytesIO(), io.BytesIO()
    torch.save({"model": small, "convit": {"act": "gelu", "norm_eps": 1e-6}}, zipped)
    torch.save(small, old, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(zipped) as archive:
        inner = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    entry = b'"blocks.0.attn.qk.weight":{"dtype":"F32","shape":[2,8],"data_offsets":[0,64]},"__metadata__":{"format":"pt"}}'
    whole = len(entry + b"{").to_bytes(8, "little") + b"{" + entry + bytes(64)
    return {
        "checkpoint": [zipped.getvalue(), old.getvalue(), SMALL.read_bytes()[:2000], whole],
        "safetensors": [entry],
        "pickle": [inner],
        "recipe": [path.read_bytes() for path in (Path(__file__).parents[1] / "convit" / "engine" / "recipes").glob("*.yaml")],
        "shard": [_tar(("a.jpg", b"image"), ("a.cls", b"3"), ("b/c.png", b"image"), ("b/c.cls", b"0"))],
        "log": [b'{"kind": "step", "epoch": 0, "update": 1, "loss": 1.0}\n{"kind": "epoch", "epoch": 0, "top1": 1.0}\n{"ki'],
        "operator": [bytes(64), bytes(range(64))],
    }


def _tar(*members: tuple[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def _guided(name: str, seconds: int) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["convit.weights", "convit.engine"]):
        import convit.engine.folder
        import convit.engine.recipe
        import convit.engine.sources
        import convit.weights.load  # noqa: F401
    corpus = Path(tempfile.mkdtemp(prefix=f"convit-{name}-"))
    for number, seed in enumerate(seeds()[name]):
        TARGETS[name](seed)  # what is imported late is imported now
        (corpus / f"seed{number}").write_bytes(seed)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", "-timeout=3600", "-rss_limit_mb=2048", "-max_len=12000", f"-artifact_prefix={OUTPUT}/{name}-"]
    atheris.Setup(
        [sys.argv[0], *options, "-print_final_stats=1", str(corpus), *map(str, CORPUS.glob(name))], functools.partial(timed, name)
    )
    atheris.Fuzz()


def _unguided(name: str, seconds: int) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    valid = seeds()[name]

    @settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.sampled_from(valid), st.lists(st.tuples(st.integers(0, 8191), st.binary(max_size=4)), max_size=8))
    def mutated(seed: bytes, changes: list[tuple[int, bytes]]) -> None:
        data = bytearray(seed)
        for at, new in changes:
            data[at % (len(data) + 1) : at % (len(data) + 1) + len(new)] = new
        timed(name, bytes(data))

    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        mutated()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", choices=[*TARGETS, ""], default="", help="one target; default: each in a process of its own")
    parser.add_argument("--seconds", type=int, default=60, help="for a target")
    args = parser.parse_args()
    if args.target:
        (_guided if find_spec("atheris") else _unguided)(args.target, args.seconds)
        return 0
    failed = []
    for name in TARGETS:
        told = subprocess.run([sys.executable, __file__, name, "--seconds", str(args.seconds)], capture_output=True, text=True)
        runs = re.search(r"number_of_executed_units: (\d+)", told.stdout + told.stderr)
        print(f"{name:<12} {runs[1] if runs else '?':>9} inputs  {'finding' if told.returncode else 'clean'}", flush=True)
        if told.returncode:
            failed.append(name)
            print((told.stdout + told.stderr)[-4000:])
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
