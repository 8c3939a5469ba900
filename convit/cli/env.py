"""``convit env``: versions, devices, and which backend can run what here. The first thing in a bug report."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import convit
from convit.dispatch import MODULES, Problem, forced_backend, order, why_not

OPENMP = {"libgomp": "GNU", "libiomp": "Intel", "libomp": "LLVM"}
PACKAGES = ("torch", "numpy", "timm", "triton", "mindspore", "onnxruntime", "openvino")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    report = collect()
    print(json.dumps(report, indent=2) if args.json else _text(report))


def collect() -> dict[str, Any]:
    """Everything that ``convit env`` prints."""
    return {
        "convit": convit.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "threads": _threads(),
        "extension": _extension(),
        "devices": [_device(*device) for device in _devices()],
        "forced": forced_backend(None),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _threads() -> dict[str, Any]:
    """Who runs PyTorch's threads on CPU, and how many; the C++ kernels take the same ones where they can."""
    if not _version("torch"):
        return {}
    import torch

    told = torch.__config__.parallel_info()
    backend = re.search(r"ATen parallel backend: (.*)", told)
    version = re.search(r"^OpenMP \d+.*", told, re.M)
    runtime = version[0] if version and backend and backend[1] == "OpenMP" else backend[1] if backend else "unknown"
    loaded = set()
    with suppress(OSError):  # Linux alone tells which libraries a process has
        names = re.findall(r"/(lib(?:gomp|iomp|omp)[^/\s]*)$", Path("/proc/self/maps").read_text(), re.M)
        loaded = {f"{vendor}'s {name}" for name in names for prefix, vendor in OPENMP.items() if name.startswith(prefix)}
    given = os.environ.get("OMP_NUM_THREADS")
    return {"torch": torch.get_num_threads(), "runtime": runtime, "libraries": sorted(loaded), "OMP_NUM_THREADS": given}


def _extension() -> dict[str, str]:
    """State of the compiled module ``convit._C``."""
    try:
        import convit._C as _C
    except ModuleNotFoundError:
        return {"state": "not built: install a C++17 compiler, then reinstall with CONVIT_BUILD_EXT=1 to see its errors"}
    except ImportError as error:
        return {"state": f"built, but it does not load here: {error}"}
    try:
        used = _C.instruction_set()
    except ValueError as error:
        used = str(error)
    return {"state": "built", "instruction set": used, "runnable": " ".join(_C.instruction_sets()), "threads": _C.thread_runtime()}


def _devices() -> list[tuple[str, str]]:
    devices = []
    if _version("torch"):
        import torch

        devices.append(("torch", "cpu"))
        try:
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        except (AttributeError, RuntimeError):  # of an old torch that has none
            accelerator = None
        if accelerator is not None:
            devices.append(("torch", accelerator.type))
    if _version("mindspore"):
        devices.append(("mindspore", os.environ.get("DEVICE_TARGET", "cpu").lower()))
    return devices


def _device(framework: str, device: str) -> dict[str, Any]:
    """Each backend's answer for a ConViT-Tiny layer in float32, and the automatic choice."""
    problem = Problem(framework, device, "float32", batch=8, heads=4, tokens=196, head_dim=48, grid=(14, 14))
    names = order(problem)
    reasons = {name: why_not(name, problem) for name in [*names, *(name for name in MODULES if name not in names)]}
    chosen = next((name for name in names if reasons[name] is None), None)
    return {"framework": framework, "device": device, "chosen": chosen, "order": names, "why_not": reasons}


def _text(report: dict[str, Any]) -> str:
    lines = [f"convit {report['convit']}, Python {report['python']} ({sys.executable}), {report['platform']}"]
    lines += [f"  {name:<12} {version or 'not installed'}" for name, version in report["packages"].items()]
    if threads := report["threads"]:
        runtime = ", ".join([threads["runtime"], *threads["libraries"]])
        lines.append(f"threads of PyTorch: {threads['torch']}, {runtime}; OMP_NUM_THREADS is {threads['OMP_NUM_THREADS'] or 'not set'}")
    lines.append("C++ extension: " + ", ".join(f"{k} {v}" if k != "state" else v for k, v in report["extension"].items()))
    for device in report["devices"]:
        lines.append(f"{device['framework']} on {device['device']}: automatic choice is {device['chosen']}")
        for name, reason in device["why_not"].items():
            lines.append(f"  {name:<12} {reason or 'can run'}")
    if report["forced"]:
        lines.append(f"CONVIT_BACKEND forces {report['forced']}")
    return "\n".join(lines)
