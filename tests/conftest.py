"""What every test runs under: poisoned memory, and no backend forced from outside."""

import importlib
import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import pytest
from forks import end_all_children, inherit_orphans

collect_ignore = []
if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_configure() -> None:
    inherit_orphans()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """After a failure, a hang, Ctrl-C or SIGTERM too."""
    end_all_children()


def pytest_report_header() -> str:
    """The versions that this run speaks for."""
    names = ("torch", "torchvision", "timm", "numpy", "mindspore", "onnx", "openvino")
    found = {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)}
    return ", ".join([f"versions: Python {platform.python_version()}", *(f"{name} {version}" for name, version in found.items())])


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill fresh memory with NaN, so that a kernel that leaves a hole in its output or reads its scratch too early is seen."""
    monkeypatch.delenv("CONVIT_BACKEND", raising=False)
    torch = pytest.importorskip("torch")
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu(monkeypatch):
    """The modules of bench and bench/gpu by name."""
    bench = Path(__file__).resolve().parent.parent / "bench"
    monkeypatch.syspath_prepend(bench)
    monkeypatch.syspath_prepend(bench / "gpu")
    return importlib.import_module


@pytest.fixture
def one_thread():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run that nothing interrupts, with everything on that could go astray: dropout, stochastic depth, mixing, a moving average."""
    import training

    return training.finished(tmp_path_factory.mktemp("whole") / "run", **training.WHOLE)


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """A run of one process that several together must repeat."""
    import training

    return training.finished(tmp_path_factory.mktemp("alone") / "run", **training.SHARED)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two classes that colour tells apart: 12 + 12 training JPEGs, 4 + 4 for validation, of uneven sizes."""
    import training

    return training.paint(tmp_path_factory.mktemp("images"))
