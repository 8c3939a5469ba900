"""GPSA on NPUs under PyTorch, without one: on stand-in devices, and the launches that ``make ascend-check`` lowers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import convit
from convit.dispatch import Problem, order

pytest.importorskip("triton")

import npu_launches

from convit.kernels.gpsa.gpu_triton import configs, launch

HERE = Path(__file__).resolve().parent


def test_on_two_stand_in_npus(tmp_path):
    """The automatic choice launches the plan on the tensors' own device, with the right numbers; see npu_simulated.py."""
    library, home = tmp_path / "libnpu.so", Path(torch.__file__).parent
    headers = [f"-I{home}/include", f"-I{home}/include/torch/csrc/api/include"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-w", "-shared", "-fPIC", abi, *headers, str(HERE / "csrc/npu.cpp")]
    subprocess.run([*command, f"-L{home}/lib", "-lc10", "-ltorch_cpu", "-o", str(library)], check=True, timeout=600)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "NPU_LIBRARY": str(library)}
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-q", "-x", "-p", "no:cacheprovider", str(HERE / "npu_simulated.py")]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_what_is_missing_is_named(monkeypatch):
    """From the first thing to install to the chip, each refusal once; the chip's is in npu_simulated.py."""
    problem = Problem("torch", "npu", "float16", 2, 3, 196, 48, (14, 14))
    assert order(problem) == ("triton", "sdpa", "reference")
    monkeypatch.delattr(torch, "npu", raising=False)

    def reason():
        configs._no_npu.cache_clear()
        return convit.why_not("triton", problem)

    assert reason() == "torch knows no npu: install torch_npu, and CANN, which it loads"
    npu = SimpleNamespace(is_available=lambda: False, get_device_name=lambda: "Ascend910B1")
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    assert reason() == "torch_npu finds no npu (torch.npu.is_available() is false)"
    npu.is_available = lambda: True
    assert reason().endswith("has no back end for npu: install triton-ascend in place of triton")
    monkeypatch.setitem(configs.backends, "ascend", None)
    assert reason() is None
    configs._no_npu.cache_clear()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("convit::gpsa", configs.NPU.key)


def test_the_plan_is_what_was_lowered():
    """Another plan for npu is to be lowered first: ``python tests/npu_launches.py``, then ``make ascend-check``."""
    assert npu_launches.FILE.read_text() == npu_launches.text()
    rows = [row for table in configs.CONFIGS.values() for row in table if row.family == "npu"]
    assert len(rows) == len(configs.CONFIGS) and all(row.largest == configs.NPU.largest_d for row in rows)


@pytest.mark.parametrize("grid", [(14, 14), (2, 2), (1, 16), (4, 64), (16, 16), (28, 28), (1, 700), (700, 1), (33, 33)], ids=str)
@pytest.mark.parametrize("batch, heads", [(1, 3), (200, 9)])
def test_no_launch_has_more_programs_than_was_said(grid, batch, heads):
    """``why_not`` refuses what CANN could not count: by a bound that holds for every launch and is far from none."""
    most = 0

    def through(call, *tensors):
        nonlocal most
        most = max(most, call.programs)

    for dtype in (torch.float16, torch.float32):
        most = 0
        q = torch.empty(batch, grid[0] * grid[1], heads, 16, dtype=dtype, device="meta").transpose(1, 2)
        inputs = q, q, q, torch.empty(heads, 3, device="meta"), torch.empty(heads, device="meta")
        with launch.trial(through=through, devices={"meta": configs.NPU._replace(programs=2**31)}):
            launch.backward(q, *inputs, *launch.forward(*inputs, *grid, 0.25), *grid, 0.25)
        bound = configs.most_programs(batch, heads, grid, dtype == torch.float16)
        assert most <= bound <= 2 * most


def test_what_runs_first_on_a_real_machine_is_rehearsed(tmp_path):
    """The PyTorch half of bench/ascend.py, on CPU: every part it has there runs, and time that is over is told."""
    script, out = HERE.parent / "bench/ascend.py", tmp_path / "ascend.json"
    command = [sys.executable, str(script), "--half", "torch", "--device", "cpu", "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads(out.read_text())["torch"]
    assert [title.split()[0] for title in found["operators"]] == ["sdpa", "reference", "yardstick"]
    for part in found["operators"].values():
        assert max(part["relative error"].values()) < 1e-5 and part["same bits"] and part["forward and backward ms"] > 0
    assert [title.split()[1] for title in found["models"]] == ["sdpa", "reference", "timm"]
    assert all(part["training images/s"] > 0 for part in found["models"].values())
    done = subprocess.run([*command, "--minutes", "0"], capture_output=True, text=True, timeout=400)
    parts = json.loads(out.read_text())["torch"]["operators"].values()
    assert done.returncode == 0 and parts and all(part == {"not run": "0 minutes are over"} for part in parts)
