"""Validate and time ConViT's kernels on an Ascend machine in one go; writes one file to send back.

    source /usr/local/Ascend/ascend-toolkit/set_env.sh
    python bench/ascend.py [--out ascend.json] [--device Ascend|CPU] [--quick]

For each backend (flash, blocks, akg, tbe, reference): output and gradients against float64 computed in NumPy, then medians of forward
and of forward with backward; FlashAttentionScore plus the positional product as the yardstick; then whole models, ours by backend and
MindCV's. A part that fails is recorded with its error and the rest goes on. ``--device CPU --quick`` tries the script.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

import convit.mindspore
from convit.dispatch import use_backend
from convit.kernels.gpsa.definition import gpsa_with_gradients, relative_error, relative_positions
from convit.mindspore.ops import gpsa

GRIDS = ((14, 14), (16, 16), (7, 11), (24, 24))


class Attend(nn.Cell):
    def __init__(self, grid: tuple[int, int], backend: str) -> None:
        super().__init__()
        self.grid, self.backend = grid, backend

    def construct(self, q, k, v, pos_weight, gating):
        return gpsa(q, k, v, pos_weight, gating, self.grid, backend=self.backend)


class Flash(nn.Cell):
    """The framework's fused attention, and the position softmax times v as one more product: what one would write without us."""

    def __init__(self, grid: tuple[int, int], heads: int, dim: int) -> None:
        super().__init__()
        self.rel = Tensor(relative_positions(grid).reshape(-1, 3).T, ms.float32)
        self.heads, self.scale, self.tokens = heads, dim**-0.5, grid[0] * grid[1]

    def construct(self, q, k, v, pos_weight, gating):
        content = ops.flash_attention_score(q, k, v, self.heads, scalar_value=self.scale, input_layout="BNSD")
        logits = ops.reshape(ops.matmul(pos_weight, self.rel), (1, self.heads, self.tokens, self.tokens))
        position = ops.matmul(ops.cast(ops.softmax(logits, -1), v.dtype), v)
        gate = ops.cast(ops.reshape(ops.sigmoid(gating), (1, -1, 1, 1)), v.dtype)
        return content + gate * (position - content)


class Weighted(nn.Cell):
    def __init__(self, attend: nn.Cell) -> None:
        super().__init__()
        self.attend = attend

    def construct(self, q, k, v, pos_weight, gating, weights):
        return ops.cast(self.attend(q, k, v, pos_weight, gating) * weights, ms.float32).sum()


def problem(batch: int, heads: int, grid: tuple[int, int], dim: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (batch, heads, grid[0] * grid[1], dim)
    pos_weight = rng.standard_normal((heads, 3))
    pos_weight[:, 2] = -abs(pos_weight[:, 2])
    return [*(rng.standard_normal(shape) for _ in range(3)), pos_weight, rng.standard_normal(heads), rng.standard_normal(shape)]


def milliseconds(call: Callable[[], object], rounds: int) -> float:
    """Median time of ``call`` after three calls to warm up, the device idle before and after."""
    times = []
    for _ in range(3 + rounds):
        ms.runtime.synchronize()
        start = time.perf_counter()
        call()
        ms.runtime.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[3:])


def operator(backend: str, batch: int, heads: int, grid: tuple[int, int], dim: int, dtype: str, rounds: int) -> dict:
    arrays = [a.astype(dtype) for a in problem(batch, heads, grid, dim)]
    arrays[3:5] = [a.astype(np.float32) for a in arrays[3:5]]
    tensors = [Tensor(a) for a in arrays]
    attend = Flash(grid, heads, dim) if backend == "yardstick" else Attend(grid, backend)
    gradient = ms.grad(Weighted(attend), grad_position=(0, 1, 2, 3, 4))
    start = time.perf_counter()
    got = [attend(*tensors[:5]), *gradient(*tensors)]
    got = [x.asnumpy().astype(np.float64) for x in got]
    first = time.perf_counter() - start
    want = gpsa_with_gradients(*arrays[:5], grid, dim**-0.5, arrays[5])
    errors = {name: relative_error(a, b) for name, a, b in zip(want._fields, got, want, strict=True)}
    return {
        "relative error": errors,
        "first call s": first,
        "forward ms": milliseconds(lambda: attend(*tensors[:5]), rounds),
        "forward and backward ms": milliseconds(lambda: gradient(*tensors), rounds),
    }


def model(name: str, backend: str, batch: int, rounds: int) -> dict:
    if backend == "mindcv":
        from mindcv.models import create_model

        net = create_model(name)
    else:
        net = convit.mindspore.create_model(name)
    images = Tensor(np.random.default_rng(0).standard_normal((batch, 3, 224, 224)), ms.float32)
    labels = ops.zeros((batch,), ms.int32)
    ms.amp.auto_mixed_precision(net, "O2")
    with use_backend(None if backend == "mindcv" else backend):
        net.set_train(False)
        forward = milliseconds(lambda: net(images), rounds)
        loss = nn.WithLossCell(net, nn.CrossEntropyLoss())
        step = nn.TrainOneStepCell(loss, nn.SGD(net.trainable_params(), 1e-4))
        step.set_train()
        training = milliseconds(lambda: step(images, labels), rounds)
    return {"forward images/s": 1e3 * batch / forward, "training images/s": 1e3 * batch / training}


def release(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("ascend.json"))
    parser.add_argument("--device", default="Ascend", choices=["Ascend", "CPU"])
    parser.add_argument("--quick", action="store_true", help="one small shape, few rounds, no model")
    options = parser.parse_args()
    ms.set_device(options.device)
    ms.set_context(mode=ms.GRAPH_MODE)
    rounds = 3 if options.quick else 50
    found = {"machine": platform.platform(), "python": sys.version.split()[0], "device": options.device}
    found |= {name: release(name) for name in ("mindspore", "mindcv", "numpy", "convit", "te")}
    for name, command in {"npu-smi": ["npu-smi", "info"], "commit": ["git", "rev-parse", "HEAD"]}.items():
        try:
            found[name] = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
        except OSError as error:
            found[name] = str(error)
    report: dict = {"environment": found, "operators": {}, "models": {}}
    failures = 0

    def attempt(kind: str, title: str, call: Callable[[], dict]) -> None:
        nonlocal failures
        try:
            report[kind][title] = call()
        except Exception as error:
            failures += 1
            report[kind][title] = {"failed": f"{type(error).__name__}: {error}"[:2000], "trace": traceback.format_exc()[-4000:]}
        print(title, json.dumps({k: v for k, v in report[kind][title].items() if k != "trace"})[:600], flush=True)
        options.out.write_text(json.dumps(report, indent=1))

    ascend = options.device == "Ascend"
    backends = ("flash", "blocks", "akg", "tbe", "reference", "yardstick") if ascend else ("blocks", "akg", "reference")
    shapes = [(2, 4, (7, 11), 48)] if options.quick else [(b, h, g, 48) for g in GRIDS for b, h in ((2, 4), (64, 4))]
    for batch, heads, grid, dim in shapes:
        for dtype in ("float16", "float32") if ascend else ("float32",):
            for backend in backends:
                if backend in ("flash", "yardstick") and dtype == "float32":
                    continue
                title = f"{backend} {dtype} B={batch} H={heads} grid={grid[0]}x{grid[1]} D={dim}"
                attempt("operators", title, lambda a=(backend, batch, heads, grid, dim, dtype, rounds): operator(*a))
    if not options.quick:
        for name in ("convit_tiny", "convit_small"):
            for backend in (*(name for name in backends if name != "yardstick"), "mindcv"):
                attempt("models", f"{name} {backend} B=64", lambda a=(name, backend, 64, rounds): model(*a))
    print(f"{options.out}: {failures} parts failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
