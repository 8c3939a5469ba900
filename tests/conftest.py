"""What every test runs under: poisoned memory, and no backend forced from outside."""

import importlib.util

import pytest

collect_ignore = []
if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill fresh memory with NaN, so that a kernel that leaves a hole in its output or reads its scratch too early is seen."""
    monkeypatch.delenv("CONVIT_BACKEND", raising=False)
    torch = pytest.importorskip("torch")
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
