"""``bench/gpu.sh`` without a GPU: every stage runs in Triton's interpreter, and none takes the others along when it fails."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for module in ("triton", "timm", "matplotlib"):
    pytest.importorskip(module)

BENCH = Path(__file__).resolve().parent.parent / "bench"
STAGES = ["environment", "correctness", "roofline", "sanitizer", "profile", "sweep", "core", "models", "plots"]


def rehearse(out: Path, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess, dict]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CONVIT_", "TRITON_"))}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    command = ["bash", str(BENCH / "gpu.sh"), "--rehearse", "--out", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    return done, json.loads((out / "run.json").read_text())


def test_every_stage_runs_and_the_next_call_goes_on_where_one_stopped(tmp_path):
    done, data = rehearse(tmp_path, "--only", "core")
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()
    first, second = data["core"]["groups"]
    assert {name: end["status"] for name, end in data["stages"].items()} == {"core": 0}

    # as if time had run out after the first group, and another call had begun the sweep
    swept = {"config": [16, 16, 4, 1, 16], "gain": 0.5, "seconds": [1.0], "registers": None}
    data["core"]["groups"] = [first]
    data["sweep"] = {"kernels": {"fwd_tile float16": {"cases": [], "table": [1], "table_seconds": [0.5], "tried": [swept]}}}
    data["stages"] |= {"core": {"status": 75, "seconds": 1}, "sweep": {"status": 124, "seconds": 1}}
    (tmp_path / "run.json").write_text(json.dumps(data))
    again = tmp_path / "again"
    done, data = rehearse(again, "--from", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr + (again / "log.txt").read_text()
    assert {name: end["status"] for name, end in data["stages"].items()} == dict.fromkeys(STAGES, 0)
    assert data["core"]["groups"][0] == first and data["core"]["groups"][1]["name"] == second["name"] != first["name"]
    tried = data["sweep"]["kernels"]["fwd_tile float16"]["tried"]
    assert swept in tried and sorted(one["config"] for one in tried) == [
        [16, 16, 4, 1, 0],
        [16, 16, 4, 1, 16],
    ]  # it was left

    files = {path.name for path in again.iterdir()}
    assert files == {"run.json", "configs.txt", "log.txt", "kernels.md", "summary.txt", "speed.png", "roofline.png"}
    assert data["correctness"]["passed"] == data["correctness"]["checks"] > 0
    assert set(data["sanitizer"]["tools"]) == {"memcheck", "initcheck", "racecheck", "synccheck"}
    assert data["sweep"]["refused"] == {}
    assert all(kernel["tried"][0]["gain"] > 0 for kernel in data["sweep"]["kernels"].values())
    for content in data["sweep"]["content"].values():  # both ways gave the same, and were timed
        assert "refused" not in content and all(k["loop"]["fwd"] > 0 < k["sdpa"]["fwd+bwd"] for k in content["cases"].values())
    assert set(data["sweep"]["content"]) == {"float16", "float32"}
    assert "| reduce | 1 | 0.0 |" in (again / "kernels.md").read_text()  # compiled and counted
    for stage in ("core", "models"):
        peers = [peers_of(group) for group in data[stage]["groups"]]
        assert len(peers) == 2 and all(len(names) >= 2 for names in peers)
        assert data[stage]["out_of_time"] == []
    assert "convit triton" in peers_of(data["core"]["groups"][0])

    summary = (again / "summary.txt").read_text()
    assert all(f"content {dtype}, us by the loops / by SDPA" in summary for dtype in ("float16", "float32"))
    assert done.stdout.endswith(summary)  # it comes last
    assert 10 <= len(summary.splitlines()) <= 40 and summary.endswith("all is done\n")
    assert all(f"{stage} ok" in summary for stage in STAGES)


def test_calls_of_under_ten_minutes_in_order(gpu):
    """Each call's limits fit; what is unfinished is taken up, what failed is left until it is asked for again."""
    stage = gpu("stage")
    lines = stage.plan({}, 560)
    names = [name for line in lines for name in re.findall(r"(\w+) \(", line)]
    assert names == [*STAGES[:-1], "models", "plots"]  # the models need what is left of one call, and another
    for line in lines:
        assert sum(map(int, re.findall(r"\((\d+) s\)", line))) <= 560, line
    assert "too short for sweep" in stage.plan({}, 300)[0]

    done = {name: {"status": 0} for name in STAGES}
    assert stage.following(done, 560) is None and stage.plan(done, 560) == ["all is done"]
    for status, expected in ((75, ("core", 400)), (124, ("core", 400)), (137, ("core", 400)), (1, None)):
        assert stage.following(done | {"core": {"status": status}}, 560) == expected
    unfinished = done | {"core": {"status": 75}}
    assert stage.following(unfinished, 560, tried=",core") is None  # once in a call
    assert stage.following(unfinished, 30) is None  # too little to begin it
    assert stage.following(unfinished, 200) == ("core", 200)
    assert stage.following(unfinished, 560, only="models") is None


def test_some_stages_again(tmp_path, gpu):
    stage = gpu("stage").Stage("core", tmp_path, 10, True)
    (tmp_path / "run.json").write_text(json.dumps({"core": {"error": "x", "groups": [1]}, "sweep": {"error": "y"}, "stages": {"core": {}}}))
    stage.begin()
    assert stage.load()["core"] == {"groups": [1]}  # it goes on; the error is of the past
    stage.forget(["core"])
    assert stage.load() == {"sweep": {"error": "y"}, "stages": {}}


class _Stream:
    def wait_stream(self, other):
        pass


def test_the_device_is_timed_by_a_replayed_graph_and_the_host_beside_it(gpu, monkeypatch):
    torch, graphs = gpu("torch"), gpu("graphs")
    events = []

    class Graph:
        def replay(self):
            events.append("replay")

    @contextlib.contextmanager
    def capture(graph, **options):
        events.append("capture")
        yield
        if options["pool"] == "broken":
            raise RuntimeError("operation not permitted when stream is capturing")

    for name, value in {
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": contextlib.nullcontext,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    call, noted = graphs.timed(lambda: events.append("call"), "pool")
    assert noted["timed"] == "graph" and 0 <= noted["host"] < 1
    assert events[-3:] == ["capture", "call", "replay"]
    events.clear()
    call()
    assert events == ["replay"]
    call, noted = graphs.timed(lambda: events.append("call"), "broken")
    assert noted["timed"] == "eager" and "capturing" in noted["not_captured"]
    events.clear()
    call()
    assert events == ["call"]


def test_predicted_and_measured_are_set_against_each_other(gpu):
    rows = gpu("predicted").table("case", {"mix": {"launches": 2, "bytes": 3e6, "issue": 1.5}}, {"mix": 3.0, "copy": 1.0}, 1e12)
    assert "| mix | 2 | 1.5 | 3.0 | 3.0 | 1.00 |" in rows and "| copy | - | - | - | 1.0 | - |" in rows


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
