"""The Triton kernels without a GPU: numerics in the interpreter, machine code by ahead-of-time compilation, and the refusals."""

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize(
    ("file", "part", "of"), [*(("triton_interpreted.py", part, 3) for part in range(3)), ("triton_memory.py", 0, 1)], ids=str
)
def test_in_the_interpreter(file, part, of):
    """Every kernel and every gradient against float64, and every address; in processes of their own, see the files."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _PART, str(part), str(of), "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", str(HERE / file)]
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
