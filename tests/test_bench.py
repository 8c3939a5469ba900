"""The benchmark measures what it says: a wrong kernel fails, times are interleaved, and reports hold the JSON's figures."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import report

    return report


def run_benchmark(folder: Path, *, select: str, plugin: str = "") -> tuple[subprocess.CompletedProcess, dict]:
    """Run a small part of the benchmark in its own process; returns it and its JSON."""
    (folder / "bench_plugin.py").write_text(plugin)
    out = folder / "run.json"
    command = [sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main())", str(BENCH / "bench_gpsa.py"), "--benchmark-only"]
    command += ["-p", "bench_plugin", "-p", "no:cacheprovider", "-k", select, f"--benchmark-json={out}"]
    command += ["--bench-threads=1", "--bench-rounds=4", "--bench-budget=0.2", "--bench-device=cpu"]
    ours = ("CONVIT_", "PYTEST_")  # PYTEST_XDIST_WORKER would switch the benchmark off
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    return done, json.loads(out.read_text()) if out.exists() else {}


SELECT = "test_core and fwd-8x196x4x48 and ({}) and not bwd"


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    done, data = run_benchmark(folder, select=SELECT.format("convit-sdpa or plain or FlexAttention"))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run.json", data, done.stdout


def test_run_records_samples_errors_and_what_is_missing(small_run):
    _, data, printed = small_run
    peers = {b["extra_info"]["peer"]: b for b in data["benchmarks"]}
    assert set(peers) == {"convit sdpa", "plain SDPA"}
    for b in peers.values():
        assert len(b["stats"]["data"]) == len(b["extra_info"]["rounds"]) >= 3
        assert 0 < b["extra_info"]["errors"]["out"] < 1e-6
    assert [item["peer"] for item in data["convit"]["missing"]] == ["FlexAttention x 2"]
    assert "FlexAttention x 2: compiles for half a minute" in printed
    assert "node" not in data["machine_info"]


def test_wrong_kernel_fails(tmp_path):
    plugin = """
from convit.kernels.gpsa import any_sdpa
right = any_sdpa.gpsa
any_sdpa.gpsa = lambda q, k, v, pos_weight, *rest: right(q, k, v, 1.001 * pos_weight, *rest)
"""
    done, data = run_benchmark(tmp_path, select=SELECT.format("convit-sdpa or plain"), plugin=plugin)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WrongAnswer: convit sdpa" in done.stdout
    assert [b["extra_info"]["peer"] for b in data["benchmarks"]] == ["plain SDPA"]


def test_report_round_trip(small_run, report, tmp_path, monkeypatch):
    path, data, _ = small_run
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "bench" / "results")
    monkeypatch.setattr(report, "draw", lambda run, stem: None)
    name = report.Run.load(path).name
    begin, end = f"<!-- bench:begin {name} core -->", f"<!-- bench:end {name} core -->"
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{begin}\n{end}\nafter\n")
    assert report.main(["--add", str(path)]) == 0

    text = readme.read_text()
    ours = next(b for b in data["benchmarks"] if b["extra_info"]["ours"])
    assert text.startswith("before\n") and text.endswith("after\n")
    assert f"{ours['stats']['median'] * 1e3:.3g}" in text
    assert report.main(["--check"]) == 0
    readme.write_text(text.replace("fwd (8, 196, 4, 48)", "fwd (8, 196, 4, 64)"))
    assert report.main(["--check"]) == 1


def test_compare_flags_regressions_by_ratio(small_run, report, tmp_path):
    path, data, _ = small_run
    assert report.main(["--compare", str(path), str(path)]) == 0
    everything_slower = json.loads(json.dumps(data))
    for b in everything_slower["benchmarks"]:  # a slower machine is no regression
        b["stats"]["data"] = [1.5 * t for t in b["stats"]["data"]]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(everything_slower))
    assert report.main(["--compare", str(path), str(other)]) == 0
    for b in everything_slower["benchmarks"]:
        if b["extra_info"]["ours"]:
            b["stats"]["data"] = [1.2 * t for t in b["stats"]["data"]]
    other.write_text(json.dumps(everything_slower))
    assert report.main(["--compare", str(path), str(other)]) == 1
    assert report.main(["--compare", str(path), str(other), "--tolerance", "1.3"]) == 0


def test_markers_must_name_a_run_and_a_table(report):
    for text in ("<!-- bench:begin nowhere/default core -->\n<!-- bench:end nowhere/default core -->", "<!-- bench:begin a/b core -->\n"):
        with pytest.raises(ValueError, match="bench:"):
            report.filled(text, {})


def test_committed_figures_are_current(report):
    assert report.stale() == []


def test_scaling_series_alone_makes_a_report(report, small_run, tmp_path):
    _, data, _ = small_run
    alone = json.loads(json.dumps(data))
    alone["benchmarks"] = [b for b in alone["benchmarks"] if b["extra_info"]["kind"] == "core"]
    for b in alone["benchmarks"]:
        b["extra_info"]["series"] = "scaling"
    path = tmp_path / "scaling.json"
    path.write_text(json.dumps(alone))
    run = report.Run.load(path)
    import results
    import tables

    assert results.plots_of(run) == ["memory"] and tables.faster_list(run) == ""
    assert "-speed" not in report.report(run, "scaling")
    import plots

    plots.draw(run, tmp_path / "scaling")
    assert sorted(path.name for path in tmp_path.glob("scaling-*")) == ["scaling-memory.png", "scaling-memory.svg"]


def test_exponent_is_the_slope_of_a_power_law(report):
    import results

    assert results.exponent([(n, 3e-9 * n**2) for n in (196, 784, 3136)]) == pytest.approx(2.0)


def test_rounds_interleave_and_replay_exactly(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import timing

    monkeypatch.setattr(timing, "TURN", 0.0)
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in ("a", "b", "c")}
    samples = timing.interleave(calls, "cpu", rounds=6, budget=1.0, seconds={"a": 0.0, "b": 0.0, "c": 0.1})
    # a and b take part in every round; c, too slow for its third of the budget, in half of them, spread over all
    assert samples["a"].rounds == samples["b"].rounds == [0, 1, 2, 3, 4, 5]
    assert samples["c"].rounds == [1, 3, 5]
    # and every round starts with another competitor
    assert "".join(turns) == "ab" + "bca" + "ab" + "abc" + "ba" + "cab"

    timing.REPLAY.load(samples["a"].wall)
    replayed = [-timing.REPLAY() + timing.REPLAY() for _ in samples["a"].wall]
    assert replayed == samples["a"].wall


def test_a_call_shorter_than_a_turn_is_repeated_and_told_by_the_call(monkeypatch):
    """By a clock of our own: 4 ms a call on the wall, 1 ms of a processor, three times a turn."""
    monkeypatch.syspath_prepend(BENCH)
    import timing

    now = {"calls": 0}
    clock = {"perf_counter": lambda: 0.004 * now["calls"], "process_time": lambda: 0.001 * now["calls"], "sleep": lambda seconds: None}
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(**clock))
    samples = timing.interleave({"a": lambda: now.update(calls=now["calls"] + 1)}, "cpu", 3, 1.0, {"a": 0.004})["a"]
    assert samples.iterations == 3 and samples.wall == pytest.approx([0.004] * 3) and samples.cpu == pytest.approx([0.001] * 3)


def test_times_are_compared_within_the_rounds_that_both_took_part_in(report):
    """On a machine that is ten times as slow in every other round."""
    import results

    def entry(rounds, seconds):
        return results.Entry("g", {"rounds": rounds}, tuple(s * (10 if r % 2 else 1) for r, s in zip(rounds, seconds, strict=True)))

    ours, theirs = entry([0, 1, 2, 3, 4], [1.0] * 5), entry([1, 3, 5], [3.0, 3.0, 99.0])
    assert theirs.over(ours) == pytest.approx(3) and ours.over(theirs) == pytest.approx(1 / 3)
    assert math.isnan(entry([7], [1.0]).over(ours)) and entry([0, 2, 4], [1.0, 2.0, 60.0]).over(ours) == 2


def test_peaks_are_multiply_adds_counted_twice_and_bytes_read_and_written(monkeypatch):
    """As if each product and each copy took a second."""
    monkeypatch.syspath_prepend(BENCH)
    import roofline
    import torch

    monkeypatch.setattr(roofline, "_best", lambda call, device, seconds: 1.0)
    threads = torch.get_num_threads()
    found = roofline.measure()
    assert found.flops in (2.0 * 1536**3, max(2.0 * 1536**3, 4.0 * threads * 256**2 * 768))
    assert found.bytes == 2 * 2**27


def test_whole_models_are_checked(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import checks
    import models

    problem = models.Model("convit_tiny", models.CHECKED + 1)
    peer = next(p for p in models.model_peers("cpu") if p.name == "convit sdpa")
    (logits,) = peer.build(problem)()
    assert checks.check(problem, peer, (logits,))["out"] < 1e-5
    with pytest.raises(checks.WrongAnswer, match="convit sdpa on convit_tiny batch 3"):
        checks.check(problem, peer, (logits.roll(1, dims=-1),))


@pytest.mark.parametrize("grid", [(4, 5), (50, 83)], ids=str)
def test_every_output_is_checked(monkeypatch, grid):
    """Forward and, up to 4,096 patches, each gradient: wrong by a few parts in a thousand, missing, misshapen or not finite."""
    monkeypatch.syspath_prepend(BENCH)
    import checks
    import peers

    core = peers.Core(2, grid, 2, 8, backward=grid == (4, 5))
    if core.backward:
        monkeypatch.setattr(checks, "LARGEST", 20)
        with pytest.raises(ValueError, match="gradients are checked up to 20 tokens, got 21"):
            checks._expected(dataclasses.replace(core, grid=(3, 7)), "convit")
    peer = next(p for p in peers.core_peers("cpu") if p.name == "convit sdpa")
    outputs = [x.detach() for x in peer.build(core)()]
    names = checks.OUTPUTS[: len(outputs)]
    assert len(outputs) == (5 if core.backward else 1)
    assert list(checks.check(core, peer, tuple(outputs))) == list(names)
    for i, name in enumerate(names):
        wrongs = [1.003 * outputs[i], -outputs[i], outputs[i] * float("nan"), outputs[i][..., :-1], *[None] * core.backward]
        for wrong in wrongs:
            with pytest.raises(checks.WrongAnswer, match=f"convit sdpa on .*: {name} "):
                checks.check(core, peer, (*outputs[:i], wrong, *outputs[i + 1 :]))
    timms = next(p for p in peers.core_peers("cpu") if not p.ours and p.truth == peer.truth)
    assert checks._allowed(core, timms, 1e-6) > checks._allowed(core, peer, 1e-6)


def test_arithmetic_and_bytes_of_a_problem(monkeypatch):
    """Counted by hand: 2 images, 15 patches of 3 x 5, 2 heads of 4 channels."""
    monkeypatch.syspath_prepend(BENCH)
    import peers
    import results

    product = 2 * (2 * 2) * 15 * 15 * 4  # one N x N product of every head
    position = 2 * (2 * 2) * 15 * (3 + 5) * 4
    tensor = 2 * 15 * 2 * 4 * 4
    infer, train = peers.Core(2, (3, 5), 2, 4), peers.Core(2, (3, 5), 2, 4, backward=True)
    assert infer.flops == 2 * product + position and train.flops == 7 * product + 3 * position
    assert infer.bytes == 4 * tensor and train.bytes == 12 * tensor
    assert peers.Core(2, (3, 5), 2, 4, dtype="bfloat16").bytes == 2 * tensor
    problem, peaks = {"device": "cpu", "dtype": "float32", "threads": 2}, {"cpu float32 2": {"flops": 100.0, "bytes": 10.0}}
    for flops, moved, least in ((1000, 50, 10), (100, 50, 5)):
        assert results.least_seconds(results.Entry("g", {"problem": problem, "flops": flops, "bytes": moved}, (1.0,)), peaks) == least
    assert results.least_seconds(results.Entry("g", {"problem": problem | {"threads": 1}}, (1.0,)), peaks) is None


def test_ours_is_the_automatic_choice_in_whichever_order_it_was_measured(report):
    import results

    def entry(peer, ours=True):
        return results.Entry("g", {"peer": peer, "ours": ours}, (1.0,))

    found = [entry("plain SDPA", False), entry("convit reference"), entry("convit.optimize"), entry("convit cpp"), entry("convit sdpa")]
    assert results.leader(found).peer == results.leader(found[::-1]).peer == "convit cpp"
    assert results.leader(found[:1]) is None


def test_memory_that_grows_is_a_regression(report):
    import results

    problem = {"batch": 1, "grid": [14, 14], "heads": 4, "head_dim": 48, "threads": 1, "dtype": "float32", "device": "cpu"}

    def run(peak, ours=True):
        info = {"peer": "convit cpp", "kind": "core", "ours": ours, "problem": problem, "rounds": [0], "peak": peak}
        return results.Run.of([results.Entry("g", info, (1e-3,))], {})

    assert report.regressions(run(50e6), run(54e6), 1.1) == []
    assert report.regressions(run(50e6), run(60e6), 1.1) == ["g: convit cpp needs 1.20 times the memory"]
    assert report.regressions(run(1e5), run(1e6), 1.1) == []  # less than what the system's own accounts vary by
    assert report.regressions(run(50e6, False), run(60e6, False), 1.1) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_is_what_is_known_in_advance(monkeypatch):
    """At 784 patches a map of 4 heads takes 9.8 MB: the definition holds several of them, the factored path none."""
    monkeypatch.syspath_prepend(BENCH)
    import memory
    import peers

    core = peers.Core(1, (28, 28), 4, 48)
    one_map = 784 * 784 * 4 * 4
    assert 2 * one_map <= memory.peak("convit reference", core)[0] <= 7 * one_map
    assert 784 * 4 * 48 * 4 <= memory.peak("convit sdpa", core)[0] <= 0.7 * one_map


def test_inference_is_held_against_runtimes_of_its_own_type(report):
    """Like against like, both types named, timm's model against either snapshot, and what is ahead of ours in bold."""
    import results
    import tables

    problem = {"name": "convit_tiny", "batch": 1, "threads": 2, "dtype": "float32", "device": "cpu", "train": False}
    times = {
        "convit.optimize": (2.0, "float32"),
        "convit.optimize as it comes": (1.0, "bfloat16"),
        "OpenVINO": (1.8, "float32"),
        "OpenVINO as it comes": (1.5, "bfloat16"),
        "ONNX Runtime": (3.0, None),
        "timm convit eager": (4.0, None),
    }
    entries = [
        results.Entry(
            "g", {"peer": peer, "kind": "model", "problem": problem, "rounds": [0], **({"note": kind} if kind else {})}, (1e-3 * ms,)
        )
        for peer, (ms, kind) in times.items()
    ]
    rows = tables.runtime_table(type("Run", (), {"kind": lambda self, kind: [entries]})()).splitlines()[2:]
    assert [[cell.strip() for cell in row.strip("|").split("|")][2:] for row in rows] == [
        ["OpenVINO", "float32", "float32", "2", "**0.90×**"],
        ["OpenVINO as it comes", "bfloat16", "bfloat16", "1", "1.50×"],
        ["ONNX Runtime", "float32", "float32", "2", "1.50×"],
        ["timm convit eager", "float32", "float32", "2", "2.00×"],
        ["timm convit eager", "bfloat16", "float32", "1", "4.00×"],
    ]


def test_little_data_is_summed_up_over_the_seeds_that_both_models_have(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCH)
    import sample_efficiency

    accuracies = {("ConViT", 0.1): (80, 84, 82), ("ViT", 0.1): (60, 70), ("ConViT", 1.0): (95,)}
    records = [
        {"data": "digits", "share": share, "model": kind, "seed": seed, "images": int(1000 * share), "accuracy": accuracy}
        for (kind, share), found in accuracies.items()
        for seed, accuracy in enumerate(found)
    ]
    table = sample_efficiency.summarise(records, tmp_path)
    (row,) = json.loads((tmp_path / "little-data.json").read_text())  # a share that only one has is not compared
    assert row == {"data": "digits", "share": 0.1, "images": 100, "seeds": 2, "ConViT": [82.0, 1.63], "ViT": [65.0, 5.0]}
    assert "82.0" in table and "95" not in table
