"""Exported models in ONNX Runtime and OpenVINO: ours against timm's, at dynamic batch, fp32, on one thread.

    python bench/export_speed.py [--variant convit_tiny] [--batches 1 8] [--seconds 20]

Rounds are interleaved; the ratio is the median of the ratio of process CPU times within a round, which other load on the machine
disturbs least. timm's model is exported as its users do, after a first call (before it, its index cache bloats the graph).
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import timing
import torch

import convit
from convit.export import export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="convit_tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=20, help="per batch size")
    parser.add_argument("--folder", type=Path, help="keep the exported files here, and use those that are there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files = {"timm": folder / f"timm_{args.variant}.onnx", "convit": folder / f"{args.variant}.onnx"}
        make(args.variant, files)
        for batch in args.batches:
            measure(files, batch, args.seconds)


def make(variant: str, files: dict[str, Path]) -> None:
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(variant).eval()
    ours = convit.create_model(variant)
    ours.load_state_dict(theirs.state_dict())
    if not files["timm"].exists():
        images = torch.randn(2, 3, 224, 224)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs(images)
            shapes = {"x": {0: torch.export.Dim("batch")}}
            torch.onnx.export(theirs, (images,), files["timm"], input_names=["images"], dynamic_shapes=shapes, external_data=False)
    if not files["convit"].exists():
        export(ours, files["convit"], "onnx")


def measure(files: dict[str, Path], batch: int, seconds: float) -> None:
    import onnxruntime
    import openvino

    images = np.random.default_rng(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    runs = {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    for name, file in files.items():
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        runs["onnxruntime", name] = lambda session=session: session.run(None, {"images": images})[0]
        compiled = core.compile_model(file, "CPU", settings)
        runs["openvino", name] = lambda compiled=compiled: compiled([images])[0]
    outputs = [run() for run in runs.values()]
    assert all(np.abs(out - outputs[0]).max() <= 2e-5 * np.abs(outputs[0]).max() for out in outputs), "the models differ"
    seconds_each = {}
    for key, run in runs.items():
        start = time.perf_counter()
        run()
        seconds_each[key] = time.perf_counter() - start
    samples = timing.interleave(runs, "cpu", rounds=200, budget=seconds, seconds=seconds_each)
    times = {key: mine.cpu for key, mine in samples.items()}
    for runtime in ("onnxruntime", "openvino"):
        base, ours = times[runtime, "timm"], times[runtime, "convit"]
        theirs = dict(zip(samples[runtime, "timm"].rounds, base, strict=True))
        ratio = statistics.median(theirs[r] / t for r, t in zip(samples[runtime, "convit"].rounds, ours, strict=True) if r in theirs)
        timm, convit_ = (batch / statistics.median(each) for each in (base, ours))
        print(f"{runtime:12} batch {batch}: timm {timm:.1f}, convit {convit_:.1f} images/s, ratio {ratio:.2f} ({len(ours)} rounds)")


if __name__ == "__main__":
    main()
