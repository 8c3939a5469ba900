"""What ``bench/aot.py`` and ``bench/gpu`` judge, count and choose, on figures that are known: no kernel is compiled or run."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpsa_cases import Case

import convit

pytest.importorskip("triton")
pytest.importorskip("timm")
pytest.importorskip("matplotlib")

from convit.kernels.gpsa.gpu_triton import configs, launch

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def stage(gpu, tmp_path):
    def made(name, rehearse=True, **sections):
        (tmp_path / "run.json").write_text(json.dumps(sections))
        return gpu("stage").Stage(name, tmp_path, 1000, rehearse)

    return made


# ---- kernels compiled ahead of time ----
ROW = {"triton": "3.8.0", "chip": "sm90", "case": "B*H=8 14x14 D=48 bfloat16", "kernel": "fwd_tile", "config": [64, 256, 4, 1, 4],
       "registers": 200, "stack": 0, "shared": 232448, "matrix": True, "mma": 8, "hazard": None, "issue_us": 26.0}  # fmt: skip
FLOAT32 = "B*H=8 14x14 D=48 float32"


@pytest.mark.parametrize(
    "change, verdict",
    [
        ({}, None),
        ({"stack": 4}, "4 bytes of stack"),
        ({"stack": 64, "case": FLOAT32}, None),
        ({"stack": 65, "case": FLOAT32}, "65 bytes of stack"),
        ({"shared": 232449}, "232449 bytes of shared memory, 232448 allowed"),
        ({"chip": "sm80", "shared": 101377}, "101377 bytes of shared memory, 101376 allowed"),  # of a GeForce
        ({"chip": "gfx942", "shared": 65536}, None),
        ({"chip": "gfx942", "shared": 65537}, "65537 bytes of shared memory, 65536 allowed"),
        ({"mma": 0}, "no matrix instruction"),
        ({"mma": 0, "matrix": False}, None),
        ({"hazard": "a race"}, "a race"),
        ({"error": "ptxas failed"}, "ptxas failed"),
    ],
)
def test_what_a_gate_objects_to_is_told_and_fails_the_run(change, verdict, gpu, monkeypatch, tmp_path):
    aot = gpu("aot")
    assert aot.problem(ROW | change) == verdict
    monkeypatch.setattr(aot, "rows", lambda *args: [ROW, ROW | change])
    monkeypatch.setattr(sys, "argv", ["aot.py", "--json", str(tmp_path / "rows.json")])
    assert bool(aot.main()) == (verdict is not None)


def test_the_report_sets_position_against_none_and_counts_what_passes(gpu):
    backward = ROW | {"kernel": "dq_tile", "issue_us": 50.0, "stack": 8}
    text = gpu("aot").report([ROW, ROW | {"kernel": "fwd_tile without position", "issue_us": 20.0}, backward])
    assert "| 200 / 0 / 26.0 (x 1.30) |" in text and "| 200 / 8 / 50.0: 8 bytes of stack |" in text
    assert "| 3.8.0 | B*H=8 14x14 D=48 bfloat16 | 26.0 (x 1.30) | 20.0 | 50.0 |" in text
    assert text.endswith("\n2 of 3 kernels pass every gate.\n")


def test_instructions_are_counted_as_often_as_their_loops_run(gpu):
    aot = gpu("aot")

    def lines(*operations):
        return [f"        /*{16 * i:04x}*/                   {operation} ;" for i, operation in enumerate(operations)]

    inner = [".L_x_1:", *lines(*["MUFU.EX2 R1, R2"] * 25, "@P0 BRA `(.L_x_1)")]
    text = lines("S2R R0, SR_X") + [
        ".L_x_0:",
        *lines(*["FADD R1, R2"] * 25),
        *inner,
        *lines("NOP", "@!P1 BRA `(.L_x_0)", "EXIT", "FMUL R3"),
    ]
    assert aot.instructions("\n".join(text), (3, 5)) == {"S2R": 1, "FADD": 75, "MUFU": 375, "BRA": 15 + 3, "EXIT": 1}
    for grid, expected in (
        ((56, 56), {"fwd_loop": (24, 1), "dq_loop": (49, 1), "dkdv_loop": (49, 1)}),
        ((14, 14), {"fwd_tile": (4, 1), "dq_tile": (4, 7), "dkdv_tile": (7, 1)}),  # 16 x 16 slots
    ):
        case = aot.Case(64, 16, grid, 64)
        found = {one.kernel.__name__.removesuffix("_kernel"): aot.trips(one, case) for one in aot.launches(case, "sm90")}
        assert {kernel: found[kernel] for kernel in expected} == expected


def test_products_in_tf32_are_compiled_as_such_and_the_setting_comes_back(gpu, monkeypatch):
    aot = gpu("aot")

    def broken(*args, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(aot.triton, "compile", broken)
    for tf32, precision in ((True, "tf32"), (False, "ieee")):
        case = aot.Case(1, 1, (2, 3), 16, "float32", tf32)
        one = next(x for x in aot.launches(case, "sm90") if "PRECISION" in x.constants)
        row = aot.compile_launch(one, case, "sm90")
        assert one.constants["PRECISION"] == precision and row["matrix"] == tf32 and row["error"] == "RuntimeError: no compiler"
        assert torch.backends.cuda.matmul.allow_tf32 is False


# ---- correctness ----
def reference(*args):
    return convit.gpsa(*args, backend="reference")


def test_a_wrong_or_unsteady_kernel_is_named(gpu, monkeypatch):
    correctness = gpu("correctness")
    case, calls = Case(1, 1, 16, (2, 3)), []

    def judged(kernel, kind="values", dtype="float32", tf32=False):
        monkeypatch.setattr(correctness, "gpsa_triton", kernel)
        try:
            return correctness._judge((kind, case, dtype, tf32, "cpu"))
        finally:
            torch.use_deterministic_algorithms(False)

    def unsteady(*args):
        calls.append(args)
        return reference(*args) * (1 + len(calls) * 1e-6)

    def watching(*args):
        poisoned = torch.utils.deterministic.fill_uninitialized_memory and torch.are_deterministic_algorithms_enabled()
        calls.append((torch.backends.cuda.matmul.allow_tf32, poisoned))
        return reference(*args)

    for tf32 in (False, True):
        del calls[:]
        assert judged(watching, tf32=tf32) == "" and set(calls) == {(tf32, True)}
        assert "relative error 0.01" in judged(lambda *args: reference(*args) * 1.01, tf32=tf32)
        assert torch.backends.cuda.matmul.allow_tf32 is False
    assert "out: two runs differ by up to" in judged(unsteady)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert judged(reference, "compile") == ""
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *args: function(*args) * 1.1)
    assert judged(reference, "compile").startswith("out differs; dq differs")


def test_checks_that_fail_fail_the_stage_and_what_a_spoiled_process_failed_is_tried_again(gpu, stage, monkeypatch):
    correctness = gpu("correctness")
    again = []

    def pooled(stage, work, jobs, workers, seconds, fresh=False):
        if fresh:
            again.extend(jobs)
            return ["", "out: two runs differ"]
        return ["", "CUDA error: launch failed", "dq: relative error 1", "an illegal address", *[""] * (len(jobs) - 4)]

    monkeypatch.setattr(correctness, "pooled", pooled)
    mine = stage("correctness")
    with pytest.raises(AssertionError) as caught:
        correctness.correctness(mine)
    found = mine.load()["correctness"]
    assert len(again) == 2 and found["passed"] == found["checks"] - 2
    assert list(found["wrong"].values()) == ["dq: relative error 1", "out: two runs differ"]
    assert str(caught.value).count("\n") == 1 and all(name in str(caught.value) for name in found["wrong"])


def test_what_a_sanitizer_finds_fails_the_stage(gpu, stage, monkeypatch):
    correctness = gpu("correctness")
    monkeypatch.setattr(correctness.shutil, "which", lambda name: "/bin/" + name)
    status = dict.fromkeys(correctness.SANITIZERS, 0)
    monkeypatch.setattr(correctness, "watched", lambda command, *args, **options: (status[command[2]], "mix_kernel: a race"))
    mine = stage("sanitizer", rehearse=False)
    correctness.sanitizer(mine)
    status["racecheck"] = 9
    with pytest.raises(AssertionError, match="^racecheck: mix_kernel: a race$"):
        correctness.sanitizer(mine)
    assert {tool: report["status"] for tool, report in mine.load()["sanitizer"]["tools"].items()} == status


# ---- the sweep ----
TABLE, SLOW, FAST, WRONG, BAD = ((16, 16, 4, stages, 1) for stages in range(1, 6))
SECONDS = {None: 2.0, SLOW: 4.0, FAST: 1.0}


@pytest.fixture
def sweep(gpu, monkeypatch):
    """With launches that take SECONDS; WRONG gives another result, and BAD is not to be run."""
    sweep = gpu("sweep")

    def captured(kernel, case, dtype, config, device):
        assert config != BAD
        return [torch.ones(1, 1, 2, 2) * (1.1 if config == WRONG else 1)], lambda: SimpleNamespace(n_regs=9, seconds=SECONDS[config])

    monkeypatch.setattr(sweep, "_captured", captured)
    monkeypatch.setattr(sweep, "device_seconds", lambda replay, device: replay().seconds)
    return sweep


def test_the_fastest_that_is_right_becomes_a_row(sweep, stage, monkeypatch):
    monkeypatch.setattr(sweep, "_candidates", lambda rehearse: {"dq_tile": [SLOW, WRONG, FAST, BAD], "mix": [SLOW]})
    monkeypatch.setattr(sweep, "pooled", lambda stage, work, jobs, *rest: ["8 bytes of stack" if job[3] == BAD else "" for job in jobs])
    monkeypatch.setattr(sweep, "_content", lambda *args: {"cases": {}})
    monkeypatch.setattr(configs, "most_stages", lambda family: 8)
    mine = stage("sweep")
    with launch.trial(devices={"cpu": configs.NPU._replace(family=lambda index: "sm80")}):
        sweep.sweep(mine)
    found = mine.load()["sweep"]
    assert [(row["config"], row["gain"]) for row in found["kernels"]["dq_tile float16"]["tried"]] == [([*FAST], 2.0), ([*SLOW], 0.5)]
    assert found["kernels"]["dq_tile float16"]["row"] == ["sm80", "half", 16, [*FAST]]
    assert all("row" not in found["kernels"][f"mix {dtype}"] for dtype in ("float16", "float32"))
    assert found["refused"][f"dq_tile float16 {BAD}"] == "8 bytes of stack"
    assert "differs from the table's row by 1.00e-01" in found["refused"][f"dq_tile float16 {WRONG}"]
    rows = (mine.out / "configs.txt").read_text().splitlines()[1:]
    assert rows == [f'    "dq_tile": ("sm80", "half", 16, Config{FAST}),  # 2.00 x as fast as (32, 32, 4, 1, 16)']


def test_the_sweep_times_only_what_passes_the_gates(gpu, monkeypatch):
    sweep, aot = gpu("sweep"), gpu("aot")
    monkeypatch.setattr(sweep, "_captured", lambda *args: ([], lambda: SimpleNamespace(asm={})))
    for stack, said in ((0, ""), (8, "8 bytes of stack")):
        monkeypatch.setattr(aot, "resources", lambda *args, stack=stack: {"chip": "sm90", "stack": stack, "shared": 0, "mma": 1})
        assert sweep._compile_one(("mix", None, "bfloat16", TABLE, "cuda", "sm90")) == said


@pytest.mark.parametrize(
    "large, small, wrong, tokens, timed",
    [(2.0, 2.0, 0, 257, 2), (2.0, 1.0, 0, 3136, 2), (1.0, 2.0, 0, None, 1), (2.0, 2.0, 56, None, 1), (2.0, 2.0, 28, None, 2)],
)
def test_content_is_the_frameworks_from_where_it_is_faster_on(gpu, monkeypatch, large, small, wrong, tokens, timed):
    sweep = gpu("sweep")
    monkeypatch.setattr(sweep, "_shapes", lambda *args: [Case(8, 9, 48, (28, 28)), Case(2, 9, 48, (56, 56))])

    def passed(kind, case, dtype, device, source, rows):
        gain = 1.0 if source == "loop" else large if case.grid == (56, 56) else small
        return [torch.ones(1, 1, 2, 2) * (1.1 if source == "sdpa" and case.grid[0] == wrong else 1.0)], {
            "fwd": 1 / gain,
            "fwd+bwd": 3 / gain,
        }

    monkeypatch.setattr(sweep, "_pass", passed)
    found = sweep._content("bfloat16", 48, 64, "sm90", "cpu", False, {})
    assert found.get("row") == (tokens and ("sm90", "half", 64, tokens, "sdpa")) and ("refused" in found) == bool(wrong)
    assert len(found["cases"]) == timed and "56x56" in next(iter(found["cases"]))


def test_rows_that_were_found_are_used(gpu, stage, monkeypatch):
    monkeypatch.setitem(gpu("convit.dispatch").ORDER, ("torch", "cuda"), ())
    kernels = {"dq_loop bfloat16": {"row": ["sm90", "half", 64, [*FAST]]}, "mix bfloat16": {}}
    content = {"bfloat16": {"row": ["sm90", "half", 64, 3136, "sdpa"]}, "float32": {}}
    mine = stage("core", rehearse=False, sweep={"kernels": kernels, "content": content})
    monkeypatch.setattr(configs, "most_stages", lambda family: 8)
    with launch.trial():
        assert len(gpu("sweep").prepare(mine)) == 2
        assert configs.choose("dq_loop", "sm90", "half", 64) == FAST
        assert [configs.content("sm90", True, 64, tokens) for tokens in (3135, 3136)] == ["loop", "sdpa"]


# ---- figures ----
def test_tools_that_hang_and_jobs_that_fail_are_told(gpu, stage, monkeypatch):
    module = gpu("stage")
    assert module.watched(["sh", "-c", "echo so far; exec sleep 60"], 0.3) == ("out of time", "so far\n")
    answers = module.pooled(stage("core"), int, ["1", "x"], 1, 60)
    assert answers[0] == 1 and answers[1].startswith("ValueError: invalid literal")

    class Event:
        def __init__(self, enable_timing):
            pass

        record = synchronize = lambda self: None
        elapsed_time = lambda self, other: 20.0  # noqa: E731  ms, of five calls

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert module.device_seconds(lambda: None, "cuda") == 4e-3


def test_what_is_predicted_of_a_kernel_is_the_sum_of_its_launches(gpu, stage, monkeypatch):
    predicted = gpu("predicted")
    rows = [{"case": "c", "kernel": kernel, "bytes": 100, "issue_us": 2.0} for kernel in ("mix X", "mix", "fwd_loop without position")]

    def run(command, **options):
        Path(command[command.index("--json") + 1]).write_text(json.dumps([*rows, {"case": "c", "kernel": "mix", "error": "x"}]))

    monkeypatch.setattr(predicted.subprocess, "run", run)
    assert predicted._predicted(stage("profile"), "sm90") == {"c": {"mix": {"launches": 2, "bytes": 200, "issue": 4.0}}}


def test_a_group_without_time_is_left_with_all_after_it_and_ours_must_be_there(gpu, stage, monkeypatch):
    measure = gpu("measure")
    absent: dict = {}

    def group(mine, session, problem, peers, with_memory):
        groups = mine.load().get("core", {}).get("groups", [])
        mine.save(groups=[*groups, {"name": problem, "entries": [], "absent": absent}])

    monkeypatch.setattr(measure, "_group", group)
    monkeypatch.setattr(measure, "_session", lambda *args: None)
    mine = stage("core")
    problems = [(name, lambda peer: True, False) for name in "abc"]
    assert measure._groups(mine, 1.0, problems, [], lambda problem, chosen: 1e9 if problem == "b" else 1) is True
    assert [g["name"] for g in mine.load()["core"]["groups"]] == ["a"] and mine.load()["core"]["out_of_time"] == ["b", "c"]
    absent["convit triton"] = "RuntimeError: broken"
    with pytest.raises(AssertionError, match="^b: RuntimeError: broken\nc: RuntimeError: broken$"):
        measure._groups(mine, 1.0, problems, [], lambda problem, chosen: 1)


def test_the_summary_says_how_long_ours_took_and_how_much_longer_the_others(gpu, stage, tmp_path, capsys):
    ours = {"peer": "convit triton", "ours": True, "host": 5e-6, "timed": "graph"}
    theirs, rounds = {"peer": "timm eager", "ours": False}, {"rounds": [0, 1, 2]}
    entries = [{"group": "core", "info": info | rounds, "wall": [t] * 3} for info, t in ((ours, 1e-3), (theirs, 2e-3))]
    wrong = {"values B1 float16": "dq: relative error 1"}
    groups = {"groups": [{"name": "core", "entries": entries, "absent": {}}]}
    stage("summary", core=groups, correctness={"checks": 4, "passed": 3, "wrong": wrong})
    assert gpu("summary").summary(tmp_path) == 0
    said = capsys.readouterr().out.splitlines()
    assert "core: 1000 us (host 5) | timm 2.00" in said
    assert said[said.index("correct: 3 of 4") + 1] == "  values B1 float16: dq: relative error 1"


def test_what_is_asked_for_again_is_forgotten(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"core": {"groups": [1]}, "stages": {"core": {"status": 0}, "models": {"status": 0}}}))
    command = ["bash", str(BENCH / "gpu.sh"), "--out", str(tmp_path), "--again", "core", "--plan"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "core (" in done.stdout and "models (" not in done.stdout
    assert json.loads((tmp_path / "run.json").read_text()) == {"stages": {"models": {"status": 0}}}
