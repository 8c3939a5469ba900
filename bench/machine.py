"""What a result must say of the machine it was taken on. Needs no framework."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ["convit", "numpy", "torch", "timm", "onnx", "onnxruntime", "openvino", "triton", "mindspore", "mindcv"]


def cpu_name() -> str:
    """The processor as /proc/cpuinfo has it, with family and model: one name on the box can stand for different chips."""
    try:
        lines = [line.partition(":") for line in open("/proc/cpuinfo", encoding="utf-8")]  # noqa: SIM115
    except OSError:
        return platform.processor() or platform.machine()
    told = {}
    for key, _, value in lines:
        told.setdefault(key.strip(), value.strip())
    if "cpu family" in told:
        return f"{told['model name']} (family {told['cpu family']}, model {told['model']})"
    return told.get("model name") or told.get("CPU part") or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
