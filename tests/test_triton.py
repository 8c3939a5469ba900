"""The Triton kernels without a GPU: numerics in the interpreter, machine code by ahead-of-time compilation, and the refusals."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import convit
from convit.dispatch import Problem

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent


# a part of the tests, so that workers share them
_PART = """
import sys, pytest
class Part:
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = items[int(sys.argv[1]) :: int(sys.argv[2])]
sys.exit(pytest.main(sys.argv[3:], plugins=[Part()]))
"""


@pytest.mark.parametrize("part", [0, 1])
def test_in_the_interpreter(part):
    """Every kernel and every gradient against float64, and every address; in processes of their own, see the files."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    files = [str(HERE / name) for name in ("triton_interpreted.py", "triton_memory.py")]
    command = [sys.executable, "-c", _PART, str(part), "2", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", *files]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"framework": "mindspore"}, "not torch tensors"),
        ({"device": "cpu"}, "tensor is on cpu"),
        ({"dropout_p": 0.1}, "attention dropout is not supported"),
        ({"dtype": "float64"}, "float64 is not supported"),
        ({"head_dim": 288}, "head dimension 288 is larger than 256 in float16: 'sdpa' serves it"),
        ({"head_dim": 160, "dtype": "float32"}, "head dimension 160 is larger than 128 in float32"),
    ],
)
def test_refusals_name_their_reason(change, reason):
    problem = Problem("torch", "cuda", "float16", 2, 3, 196, 48, (14, 14))._replace(**change)
    assert reason in convit.why_not("triton", problem)


def test_xpu_is_asked_for_what_it_needs(monkeypatch):
    """Its absence is told, then that of Triton's back end for it; with both the answer is the table's, and the key is registered."""
    from convit.kernels.gpsa.gpu_triton import configs

    problem = Problem("torch", "xpu", "float16", 2, 3, 196, 48, (14, 14))

    def reason():
        configs._no_xpu.cache_clear()
        return convit.why_not("triton", problem)

    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert reason() == "torch finds no xpu device"
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert "no back end for xpu: install triton-xpu" in reason()
    monkeypatch.setitem(configs.backends, "intel", None)
    assert reason() is None
    configs._no_xpu.cache_clear()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("convit::gpsa", configs.DEVICES["xpu"].key)
    assert configs.choose("fwd_loop", "xpu", "half", 64) and configs.choose("mix", "xpu", "ieee", 128)


def test_a_gpu_takes_the_rows_of_its_family_and_an_old_one_none(monkeypatch):
    from convit.kernels.gpsa.gpu_triton import configs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    family, refusal = configs._gpu_family.__wrapped__, configs._no_gpu.__wrapped__
    for capability, expected in (((8, 0), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((10, 3), "sm100")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0, capability=capability: capability)
        assert family(0) == expected and refusal() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (7, 5))
    assert "compute capability 7.5 is older than 8.0" in refusal()
    with pytest.raises(RuntimeError, match="cuda:1 has compute capability 7.5, and the Triton kernels need 8.0"):
        family(1)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-"))
    assert family(0) == "gfx942" and refusal() is None


def test_how_a_launch_reaches_a_device(monkeypatch):
    """Past Triton's own launch where nothing but alignment chooses the compiled kernel; always with fused multiply-add."""
    from convit.kernels.gpsa.gpu_triton import configs

    def direct(hip, version):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(configs.triton, "__version__", version)
        spec = importlib.util.spec_from_file_location("configs_of_another_machine", configs.__file__)
        fresh = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(fresh)
        return fresh.DEVICES["cuda"].direct

    assert direct(None, "3.3.0") and not direct("6.4", "3.8.0") and not direct(None, "3.2.0")
    for name in ("cuda", "xpu"):
        options = configs.DEVICES[name].options(configs.Config(64, 32, 8, 3))
        assert options == {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}


def test_a_launch_of_more_programs_than_a_device_counts_is_refused():
    from convit.kernels.gpsa.gpu_triton import configs, launch

    q, w, gating = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in ((3, 2, 15, 16), (2, 3), (2,)))
    for programs, match in ((6, None), (5, "6 programs in a launch, and meta takes 5: use smaller batches or backend='sdpa'")):
        refused = pytest.raises(RuntimeError, match=match) if match else contextlib.nullcontext()
        with launch.trial(through=lambda *launched: None, devices={"meta": configs.NPU._replace(programs=programs)}), refused:
            launch.forward(q, q, q, w, gating, 3, 5, 0.25)


def test_a_trial_leaves_nothing_behind():
    """Neither in the tables nor in what a call of the same shape launches afterwards."""
    from convit.kernels.gpsa.gpu_triton import configs, launch

    q = torch.empty(1, 2, 15, 16, dtype=torch.float16, device="meta")
    tried = configs.Row("", "half", 128, configs.Config(16, 16, 2, 3))

    def config():
        return launch._plan(q, 3, 5, 0.25, *3 * (q.stride(),)).fwd_tile.config

    def state():
        rows = {kernel: list(rows) for kernel, rows in configs.CONFIGS.items()}
        return rows, dict(configs.DEVICES), list(configs.CONTENT), launch._through

    with launch.trial(devices={"meta": configs.NPU}):
        before, usual = state(), config()
        others = {"devices": {"other": configs.NPU}, "content": [configs.Content("", "half", 64, 1, "sdpa")], "through": print}
        with pytest.raises(KeyError), launch.trial(rows={"fwd_tile": [tried]}, **others):
            assert config() == tried.config and not any(now == then for now, then in zip(state(), before, strict=True))
            raise KeyError
        assert state() == before and config() == usual


def test_every_device_finds_tiles_that_triton_compiles():
    """Whatever the device, the arithmetic and the head: rows and warps are powers of two, of 16 rows at least, as tl.dot takes them."""
    from convit.kernels.gpsa.gpu_triton import configs

    for kernel, rows in configs.CONFIGS.items():
        largest = {
            "half": configs.TILE_D if kernel.endswith("_tile") else configs.LARGEST_D,
            "tf32": configs.TILE_D,
            "ieee": configs.TILE_D,
        }
        for family in {row.family for row in rows} - {"npu"}:
            for arithmetic in ("half",) if kernel.endswith("_tile") else largest:
                for block_d in (d for d in (16, 32, 64, 128, 256) if d <= largest[arithmetic]):
                    config = configs.choose(kernel, family, arithmetic, block_d)
                    sizes = (config.rows, config.keys, config.warps)
                    assert all(size & (size - 1) == 0 for size in sizes), (kernel, family, arithmetic, block_d)
                    assert min(sizes[:2]) >= 16 and 1 <= config.warps <= 8 and config.stages >= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_no_driver_is_told():
    problem = Problem("torch", "cuda", "float16", 2, 3, 196, 48, (14, 14))
    assert convit.why_not("triton", problem)


def test_compiling_ahead_needs_a_batch_and_a_device_that_runs_it():
    from convit.kernels.gpsa.gpu_triton import compile_ahead

    problem = Problem("torch", "cuda", "float16", None, 3, 196, 48, (14, 14))
    with pytest.raises(ValueError, match="compile_ahead needs the batch"):
        compile_ahead(problem)
    with pytest.raises(ValueError, match="backend 'triton' cannot run .*tensor is on cpu"):
        compile_ahead(problem._replace(batch=2, device="cpu"))
