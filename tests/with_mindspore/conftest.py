"""MindSpore's tests have a virtual environment of their own (numpy < 2, no torch): without MindSpore none is collected."""

import atexit
import importlib.util
import os
import sys

import pytest

# one thread each, or the test workers and MindSpore's own threads wait for one another
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOG_v", "4")  # the errors that are provoked here also go to stderr otherwise

if importlib.util.find_spec("mindspore") is None:
    collect_ignore_glob = ["*.py"]


@atexit.register
def let_cells_end_in_peace():
    """MindSpore's cells that live to the end of Python count themselves out, in a module that is gone by then."""
    if nn := sys.modules.get("mindspore.nn"):
        del nn.Cell.__del__


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """In place of the fixture for torch."""
    monkeypatch.delenv("CONVIT_BACKEND", raising=False)


@pytest.fixture(params=["graph", "pynative"])
def mode(request):
    """Each test in both of MindSpore's modes; the working directory is where MindSpore leaves its dumps of failed graphs."""
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE if request.param == "graph" else ms.PYNATIVE_MODE, device_target="CPU")
    if request.param == "pynative":
        ms.runtime.launch_blocking()
    return request.param


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
