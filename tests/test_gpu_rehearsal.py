"""``bench/gpu.sh`` without a GPU: every stage runs in Triton's interpreter, and none takes the others along when it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for module in ("triton", "timm", "matplotlib"):
    pytest.importorskip(module)

BENCH = Path(__file__).resolve().parent.parent / "bench"
STAGES = ["environment", "correctness", "roofline", "sweep", "core", "models", "profile", "plots"]


def rehearse(out: Path, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess, dict]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CONVIT_", "TRITON_"))}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    command = ["bash", str(BENCH / "gpu.sh"), "--rehearse", "--out", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    return done, json.loads((out / "run.json").read_text())


def test_every_stage_runs(tmp_path):
    done, data = rehearse(tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert {name: end["status"] for name, end in data["stages"].items()} == dict.fromkeys(STAGES, 0)

    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"run.json", "configs.txt", "log.txt", "profile.txt", "summary.txt", "speed.png", "roofline.png"}
    assert data["correctness"]["passed"] == data["correctness"]["checks"] > 0
    assert data["sweep"]["refused"] == {}
    assert all(kernel["tried"][0]["gain"] > 0 for kernel in data["sweep"]["kernels"].values())
    for stage in ("core", "models"):
        peers = [{entry["info"]["peer"] for entry in group["entries"]} for group in data[stage]["groups"]]
        assert len(peers) == 2 and all(len(names) >= 2 for names in peers)
        assert data[stage]["out_of_time"] == []
    assert "convit triton" in peers_of(data["core"]["groups"][0])

    summary = (tmp_path / "summary.txt").read_text()
    assert done.stdout.endswith(summary)  # it comes last
    assert 10 <= len(summary.splitlines()) <= 40
    assert all(f"{stage} ok" in summary for stage in STAGES)


def peers_of(group: dict) -> set[str]:
    return {entry["info"]["peer"] for entry in group["entries"]}


def test_a_failing_stage_stops_no_other(tmp_path):
    done, data = rehearse(tmp_path, "--only", "environment,roofline,plots", CONVIT_GPU_FAIL="environment")
    assert done.returncode == 1
    assert [data["stages"][name]["status"] for name in ("environment", "roofline", "plots")] == [1, 0, 1]
    assert data["roofline"]
    assert "environment FAILED(1)" in done.stdout and "CONVIT_GPU_FAIL names this stage" in done.stdout
    assert "nothing to plot" in done.stdout


def test_a_machine_without_tools_is_described(tmp_path):
    command = [sys.executable, str(BENCH / "gpu"), "environment", "--out", str(tmp_path), "--rehearse"]
    done = subprocess.run(command, env=os.environ | {"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run.json").read_text())["environment"]
    assert found["commit"] == "unknown" and found["versions"]["torch"] and not any(found["tools"].values())


def test_a_stage_out_of_time_or_killed_leaves_a_summary(tmp_path):
    group = {"entries": [], "absent": {"convit triton": "RuntimeError: broken"}}
    found = {"core": {"groups": [{"name": f"group {i}", **group} for i in range(60)]}}
    (tmp_path / "run.json").write_text(json.dumps(found))
    for arguments in (["record", "--ended", "core:124:120"], ["summary"]):
        subprocess.run([sys.executable, "-S", str(BENCH / "gpu"), *arguments, "--out", str(tmp_path)], check=True, timeout=60)
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert len(lines) <= 40
    assert any("core FAILED(124) 120s" in line for line in lines) and any("ours is missing: RuntimeError: broken" in line for line in lines)
