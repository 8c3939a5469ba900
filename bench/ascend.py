"""Validate and time ConViT's kernels on an Ascend machine in one go, in less than fifteen minutes; writes one file to send back.

    source /usr/local/Ascend/ascend-toolkit/set_env.sh
    python bench/ascend.py [--out ascend.json] [--device npu|cpu] [--quick]

A half for each framework that is installed (MindSpore: flash, blocks, akg, tbe, reference; torch_npu: triton, sdpa, reference), in a
process of its own. For each backend: output and gradients against float64 in NumPy, whether a second call gives the same bits, medians of
forward and of the gradients, and as the yardstick the framework's fused attention plus the positional product; then whole models, ours
by backend and MindCV's or timm's. A part that fails is recorded with its error and the rest goes on; what time does not allow is named.
In an environment with the other framework the script adds its half to the same file. ``--device cpu --quick`` tries the script.
"""

import argparse
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from convit.kernels.gpsa.definition import gpsa_with_gradients, relative_error

HALVES = ("mindspore", "torch")
SHAPES = [(b, 4, grid, 48) for grid in ((14, 14), (7, 11), (28, 28)) for b in (2, 64)]
MINUTES = 14


def problem(batch: int, heads: int, grid: tuple[int, int], dim: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (batch, heads, grid[0] * grid[1], dim)
    pos_weight = rng.standard_normal((heads, 3))
    pos_weight[:, 2] = -abs(pos_weight[:, 2])
    return [*(rng.standard_normal(shape) for _ in range(3)), pos_weight, rng.standard_normal(heads), rng.standard_normal(shape)]


def milliseconds(half: Any, call: Callable[[], object], rounds: int) -> float:
    """Median time of ``call`` after as many calls to warm up, three at most, the device idle before and after."""
    times, warm = [], min(3, rounds)
    for _ in range(warm + rounds):
        half.synchronize()
        start = time.perf_counter()
        call()
        half.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[warm:])


def operator(half: Any, backend: str, batch: int, heads: int, grid: tuple[int, int], dim: int, dtype: str, rounds: int) -> dict:
    arrays = [a.astype(dtype) for a in problem(batch, heads, grid, dim)]
    arrays[3:5] = [a.astype(np.float32) for a in arrays[3:5]]
    tensors = half.tensors(arrays)
    forward, gradients = half.operator(backend, grid)

    def both() -> list[np.ndarray]:
        return half.arrays([forward(*tensors[:5]), *gradients(*tensors)])

    start = time.perf_counter()
    got = both()
    first = time.perf_counter() - start
    same = all(np.array_equal(x, y) for x, y in zip(got, both(), strict=True))
    want = gpsa_with_gradients(*arrays[:5], grid, dim**-0.5, arrays[5])
    errors = {name: relative_error(a, b) for name, a, b in zip(want._fields, got, want, strict=True)}
    return {
        "relative error": errors,
        "same bits": same,
        "first call s": first,
        "forward ms": milliseconds(half, lambda: forward(*tensors[:5]), rounds),
        "forward and backward ms": milliseconds(half, lambda: gradients(*tensors), rounds),
    }


def model(half: Any, name: str, backend: str, batch: int, rounds: int) -> dict:
    forward, step = half.model(name, backend, batch)
    times = milliseconds(half, forward, rounds), milliseconds(half, step, rounds)
    return {"forward images/s": 1e3 * batch / times[0], "training images/s": 1e3 * batch / times[1]}


def release(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(half: Any) -> dict:
    found: dict[str, Any] = {"machine": platform.platform(), "python": sys.version.split()[0]}
    found |= {name: release(name) for name in (*half.PACKAGES, "numpy", "convit")}
    for name, command in {"npu-smi": ["npu-smi", "info"], "commit": ["git", "rev-parse", "HEAD"]}.items():
        try:
            found[name] = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
        except OSError as error:
            found[name] = str(error)
    return found


def run(name: str, options: argparse.Namespace) -> int:
    """One half, in this process: parts in the order of what they tell, each written down when it is done."""
    until = time.monotonic() + 60 * options.minutes
    half = importlib.import_module(f"ascend_{name}")
    half.start(options.device)
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    own = report[name] = {"device": options.device, "environment": environment(half), "operators": {}, "models": {}}
    failures = 0

    def attempt(kind: str, title: str, call: Callable[[], dict]) -> None:
        nonlocal failures
        try:
            own[kind][title] = call() if time.monotonic() < until else {"not run": f"{options.minutes:.0f} minutes are over"}
        except Exception as error:
            failures += 1
            own[kind][title] = {"failed": f"{type(error).__name__}: {error}"[:2000], "trace": traceback.format_exc()[-4000:]}
        print(name, title, json.dumps({k: v for k, v in own[kind][title].items() if k != "trace"})[:600], flush=True)
        options.out.write_text(json.dumps(report, indent=1))

    npu, rounds = options.device == "npu", 1 if options.quick else 30
    backends = half.backends(options.device)
    shapes = [(2, 4, (7, 11), 48)] if options.quick else SHAPES

    def operators(batch: int, heads: int, grid: tuple[int, int], dim: int) -> None:
        for dtype in ("float16", "float32") if npu else ("float32",):
            for backend in (*backends, "yardstick") if npu or name == "torch" else backends:
                if name == "mindspore" and backend in ("flash", "yardstick") and dtype == "float32":
                    continue  # the framework's attention is of half precision
                title = f"{backend} {dtype} B={batch} H={heads} grid={grid[0]}x{grid[1]} D={dim}"
                attempt("operators", title, lambda a=(backend, batch, heads, grid, dim, dtype, rounds): operator(half, *a))

    def models(variant: str, batch: int) -> None:
        for backend in (*backends, half.PEER):
            attempt("models", f"{variant} {backend} B={batch}", lambda a=(variant, backend, batch, rounds): model(half, *a))

    operators(*shapes[0])
    if not options.quick:
        models("convit_tiny", 64)
        for shape in shapes[1:]:
            operators(*shape)
        models("convit_small", 64)
    elif name == "torch":
        models("convit_tiny", 1)
    print(f"{name}: {failures} parts failed")
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("ascend.json"))
    parser.add_argument("--device", default="npu", choices=["npu", "cpu"])
    parser.add_argument("--quick", action="store_true", help="one small shape, few rounds")
    parser.add_argument("--half", choices=HALVES, help="this framework alone, in this process")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all halves together")
    options = parser.parse_args()
    if options.half:
        return run(options.half, options)
    halves = [name for name in HALVES if find_spec(name) is not None]
    if not halves:
        parser.error("neither mindspore nor torch is installed")
    status, share = 0, options.minutes / len(halves)
    for name in halves:
        command = [sys.executable, __file__, "--half", name, "--out", str(options.out), "--device", options.device]
        command += ["--minutes", str(share), *(["--quick"] if options.quick else [])]
        try:
            status |= subprocess.run(command, timeout=60 * share + 30).returncode
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped in the middle of a part; {options.out} has what came before it")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
