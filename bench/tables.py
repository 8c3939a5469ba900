"""The tables of a run, as Markdown that also reads in a terminal."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from results import LARGE, YARDSTICK, Entry, Run, competitions, core_groups, exponent, find, leader, least_seconds, series


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _where(problem: dict) -> str:
    return str(problem["threads"]) if problem["device"] == "cpu" else problem["dtype"]


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _versus(run: Run, groups: list[list[Entry]], case: Callable, own: Callable, head: tuple[str, ...]) -> str:
    """One row per group: ours in absolute terms, each other competitor's time over ours."""
    if not groups:
        return ""
    device = groups[0][0].problem["device"]
    first = [mine.peer for g in groups if (mine := leader(g))]
    peers = list(dict.fromkeys(e.peer for g in groups for e in g))
    others = [p for p in peers if p not in first]
    rows = []
    for entries in groups:
        mine = leader(entries)
        if mine is None:
            continue
        cells = ["–" if (e := find(entries, peer)) is None else _times(e.over(mine)) + "×" for peer in others]
        rows.append([case(mine), _where(mine.problem), *own(mine), *cells])
    if not rows:
        return ""
    leaders = " / ".join(dict.fromkeys(first))
    notes = {e.peer: f" ({e.info['note']})" for g in groups for e in g if "note" in e.info}
    others = [peer + notes.get(peer, "") for peer in others]
    return _table([head[0], "threads" if device == "cpu" else "type", *(h.format(mine=leaders) for h in head[1:]), *others], rows)


SNAPSHOTS = ("convit.optimize", "convit.optimize as it comes")


def _snapshots_for(entries: list[Entry], e: Entry) -> list[Entry]:
    """Ours for inference that a runtime or timm's model is held against: both as they come, or both in float32; timm's against both."""
    if e.peer == "timm convit eager":
        names: tuple[str, ...] = SNAPSHOTS
    elif e.peer.startswith(("OpenVINO", "ONNX Runtime")):
        names = SNAPSHOTS[1:] if e.peer.endswith("as it comes") else SNAPSHOTS[:1]
    else:
        names = ()
    return [found for name in names if (found := find(entries, name))]


def runtime_table(run: Run) -> str:
    """The time of each runtime, and of timm's model, over that of ``convit.optimize``; what is ahead of ours is set in bold."""
    rows = []
    for entries in run.kind("model"):
        for e in entries:
            for ours in _snapshots_for(entries, e):
                types = [x.info.get("note", x.problem["dtype"]) for x in (ours, e)]
                ratio = _times(e.over(ours)) + "×"
                cells = [
                    _case(e),
                    _where(e.problem),
                    e.peer,
                    *types,
                    _milliseconds(ours.median),
                    ratio if e.over(ours) >= 1 else f"**{ratio}**",
                ]
                rows.append(cells)
    header = ["inference through convit.optimize", "threads", "against", "ours computes in", "theirs in", "ours, ms", "theirs over ours"]
    return _table(header, rows) if rows else ""


def _absent(run: Run, kinds: tuple[str, ...]) -> str:
    """Which peers have no figure, and why."""
    reasons: dict[tuple[str, str], int] = {}
    for item in run.record["missing"]:
        if item["kind"] in kinds:
            reasons[item["peer"], item["reason"]] = reasons.get((item["peer"], item["reason"]), 0) + 1
    lines = [f"- {peer}: {reason} ({count} case{'s' * (count > 1)})" for (peer, reason), count in reasons.items()]
    return "\nWithout a figure:\n\n" + "\n".join(lines) + "\n" if lines else ""


def core_table(run: Run) -> str:
    def case(e: Entry) -> str:
        return f"{'fwd+bwd' if e.problem['backward'] else 'fwd'} {e.shape}"

    def own(e: Entry) -> list[str]:
        least = least_seconds(e, run.record["rooflines"])
        return [_milliseconds(e.median), f"{100 * least / e.median:.0f} %" if least else "–"]

    head = ("attention core (B, N, H, D)", "{mine}, ms", "of the roofline")
    return _versus(run, core_groups(run), case, own, head)


def model_table(run: Run) -> str:
    def own(e: Entry) -> list[str]:
        return [f"{e.problem['batch'] / e.median:.1f}"]

    return _versus(run, run.kind("model"), _case, own, ("whole model", "{mine}, images/s"))


def _case(e: Entry) -> str:
    if e.info["kind"] == "model":
        return f"{e.problem['name']}, batch {e.problem['batch']}{', training step' if e.problem.get('train') else ''}"
    return f"attention, {'fwd+bwd' if e.problem['backward'] else 'fwd'} {e.shape}"


def headline_table(run: Run) -> str:
    """The widest thread count only: ours, timm, the same without position, and our own layers without it."""
    rows = []
    for entries in competitions(run):
        mine = leader(entries)
        if mine is None or mine.problem["threads"] != run.threads:
            continue
        eager = next((e for e in entries if e.peer in ("timm eager", "timm convit eager")), None)
        plain, bare = find(entries, YARDSTICK[mine.info["kind"]]), find(entries, "convit without GPSA")
        own = f"{mine.problem['batch'] / mine.median:.1f} images/s" if mine.info["kind"] == "model" else f"{_milliseconds(mine.median)} ms"
        case = _case(mine) if run.on_cpu else f"{_case(mine)}, {mine.problem['dtype']}"
        rows.append([case, own, *("–" if e is None else _times(e.over(mine)) + "×" for e in (eager, plain, bare))])
    where = f", {run.threads} threads" if run.on_cpu else ""
    header = [run.record["device"] + where, "ours", "timm eager", "without position: plain SDPA, timm ViT", "our layers without GPSA"]
    return _table(header, rows) if rows else ""


def faster_list(run: Run) -> str:
    """Where somebody else's GPSA or ConViT, or attention without position, takes less time than ours."""
    cases: dict[str, list[str]] = {}
    for entries in competitions(run):
        mine = leader(entries)
        for e in entries if mine else ():
            ours = mine if e.peer.startswith("timm") else next(iter(_snapshots_for(entries, e)), mine)
            if not e.info["ours"] and e.over(ours) < 1:
                cases.setdefault(e.peer, []).append(f"{_case(e)}, {_where(e.problem)} ({_times(e.over(ours))}×)")
    if not competitions(run):
        return ""
    if not cases:
        return "No competitor is faster than ours in any case of this run.\n"
    threads = "; the number after each case is the thread count" if run.on_cpu else ""
    lines = [f"- {peer}: {'; '.join(found)}" for peer, found in cases.items()]
    return f"Faster than ours{threads}:\n\n" + "\n".join(lines) + "\n"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f}" if size < 1e8 else f"{size / 1e6:.0f}"


def memory_table(run: Run) -> str:
    measured = [g for g in run.kind("core") if any("peak" in e.info for e in g)]
    measured.sort(key=lambda g: (g[0].problem["backward"], g[0].tokens))
    peers = list(dict.fromkeys(e.peer for g in measured for e in g if "peak" in e.info))
    rows = []
    for entries in measured:
        cells = []
        for peer in peers:
            e = find(entries, peer)
            if e is None or "peak" not in e.info:
                cells.append("–")
            else:
                held = f" + {_megabytes(e.info['held'])}" if e.info["held"] > 1e6 else ""
                cells.append(_megabytes(e.info["peak"]) + held)
        rows.append([f"{'fwd+bwd' if entries[0].problem['backward'] else 'fwd'} {entries[0].shape}", *cells])
    return _table(["peak MB of one call + held between calls", *peers], rows) if rows else ""


def plain_table(run: Run) -> str:
    """Plain attention's time over ours, a column a shape, a row a type, direction and thread count."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for entries in run.kind("core"):
        mine, plain = leader(entries), find(entries, YARDSTICK["core"])
        if mine and plain:
            key = mine.problem["dtype"], "fwd+bwd" if mine.problem["backward"] else "fwd", _where(mine.problem)
            rows.setdefault(key, {})[mine.shape] = _times(plain.over(mine)) + "×"
    shapes = list(dict.fromkeys(g[0].shape for g in [*core_groups(run), *run.kind("core")]))
    shapes = [shape for shape in shapes if sum(shape in row for row in rows.values()) > 1]
    header = [f"plain SDPA over ours, {run.record['device']}", "", "threads", *shapes]
    found = sorted(rows.items(), key=lambda item: (item[0][0] != "float32", item[0]))
    return _table(header, [[*key, *(row.get(shape, "–") for shape in shapes)] for key, row in found]) if run.on_cpu and shapes else ""


def scaling_table(run: Run) -> str:
    rows = []
    for peer, entries in series(run, "tokens").items():
        large = [e for e in entries if e.tokens >= LARGE]
        if len(large) < 2:
            continue
        span = f"N = {large[0].tokens} to {large[-1].tokens}"
        rows.append([f"time of {peer}, {span}", f"N^{exponent((e.tokens, e.median) for e in large):.2f}"])
        sized = [e for e in large if e.info.get("peak")]
        if len(sized) > 1:
            rows.append([f"peak memory of {peer}, {span}", f"N^{exponent((e.tokens, e.info['peak']) for e in sized):.2f}"])
    ours = next(iter(series(run, "tokens").items()), None)
    if ours:
        for e in ours[1]:
            plain = find(run.groups[e.group], "plain SDPA")
            if plain:
                rows.append([f"{e.peer} over plain SDPA at N = {e.tokens}", _times(e.over(plain))])
    for peer, entries in series(run, "batch").items():
        span = f"{entries[0].problem['batch']} to {entries[-1].problem['batch']}"
        rows.append([f"time of {peer}, batch {span}", f"B^{exponent((e.problem['batch'], e.median) for e in entries):.2f}"])
    for peer, entries in series(run, "threads").items():
        one, most = entries[0], entries[-1]
        rows.append([f"speed-up of {peer}, {most.problem['threads']} threads, N = {one.tokens}", _times(one.median / most.median)])
    return _table([f"how it scales, forward, {run.record['device']}", "measured"], rows) if rows else ""


def machine_table(run: Run) -> str:
    r = run.record
    rows = [["device", r["device"]], ["date, commit", f"{r.get('date', 'now')}, {r.get('commit', 'working tree')[:12]}"]]
    rows.append(["versions", ", ".join(f"{k} {v}" for k, v in r["versions"].items())])
    for key, peaks in r["rooflines"].items():
        device, dtype, threads = key.split()
        on = f"{threads} threads, " if device == "cpu" else ""
        rows.append([f"measured peak, {on}{dtype}", f"{peaks['flops'] / 1e9:.0f} GFLOP/s, {peaks['bytes'] / 1e9:.1f} GB/s copied"])
    spreads = [e.spread for g in run.groups.values() for e in g if len(e.wall) > 1]
    if spreads:
        rows.append(["spread of the samples (interquartile range / median)", f"{100 * median(spreads):.0f} % in the median case"])
    rows.append(["length of the run, load before it", f"{r['seconds']:.0f} s, {r['load'] if r['load'] is None else round(r['load'], 1)}"])
    return _table(["run", ""], rows)


RANGE_CASES = (
    "attention, fwd (8, 196, 4, 48)",
    "attention, fwd+bwd (2, 784, 9, 48)",
    "convit_tiny, batch 1",
    "convit_small, batch 8",
    "convit_tiny, batch 8, training step",
)
RANGE_PEERS = {
    "timm eager": "timm's ConViT",
    "timm convit eager": "timm's ConViT",
    "plain SDPA": "attention or ViT without position",
    "timm ViT with SDPA": "attention or ViT without position",
    "convit without GPSA": "our ViT without GPSA",
}

TABLES: dict[str, Callable[[Run], str]] = {
    "headline": headline_table,
    "core": core_table,
    "models": model_table,
    "runtimes": runtime_table,
    "faster": faster_list,
    "plain": plain_table,
    "memory": memory_table,
    "scaling": scaling_table,
    "machine": machine_table,
    "missing": lambda run: _absent(run, ("core", "model")),
}


def summary(run: Run) -> str:
    """Every table of a run but the headline, which repeats them, as Markdown that also reads in a terminal."""
    return "\n".join(_aligned(text) for name, make in TABLES.items() if name != "headline" and (text := make(run)))


def _aligned(text: str) -> str:
    """Pad the columns of the Markdown table in ``text`` to equal widths."""
    lines = text.splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    if not cells:
        return text
    widths = [max(len(c) for i, c in enumerate(column) if i != 1) for column in zip(*cells, strict=True)]
    cells[1] = ["-" * w for w in widths]
    padded = iter(
        "| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) + " |"
        for row in cells
    )
    return "\n".join(next(padded) if line.startswith("|") else line for line in lines) + "\n"


def range_table(runs: Mapping[str, Run]) -> str:
    """Five cases over all processors: each other competitor's time over ours, at all cores, as the range over the kept runs."""
    cells: dict[str, dict[str, list[float]]] = {}
    for run in runs.values():
        for entries in competitions(run):
            mine = leader(entries)
            if mine is None or mine.problem["threads"] != run.threads or _case(mine) not in RANGE_CASES:
                continue
            for peer, column in RANGE_PEERS.items():
                if e := find(entries, peer):
                    cells.setdefault(_case(mine), {}).setdefault(column, []).append(e.over(mine))
    columns = list(dict.fromkeys(RANGE_PEERS.values()))

    def cell(values: list[float]) -> str:
        low, high = (_times(limit(values)) for limit in (min, max))
        return f"{low}×" if low == high else f"{low} to {high}×"

    rows = []
    for case in filter(cells.get, RANGE_CASES):
        rows.append([case, *(cell(cells[case][column]) if column in cells[case] else "–" for column in columns)])
    devices = " and ".join(dict.fromkeys(run.record["device"] for run in runs.values()))
    return _table([f"time over ours, {devices}", *columns], rows)


def little_data_table(summary: list[dict[str, Any]]) -> str:
    """What ``bench/sample_efficiency.py`` found: test accuracies, mean ± standard deviation over the seeds."""
    rows = []
    for found in summary:
        (ours, spread), (theirs, their_spread) = found["ConViT"], found["ViT"]
        cells = [f"{ours:.1f} ± {spread:.1f}", f"{theirs:.1f} ± {their_spread:.1f}", f"{ours - theirs:+.1f}"]
        rows.append([found["data"], f"{found['share']:.0%}", str(found["images"]), *cells, str(found["seeds"])])
    return _table(["data", "share", "training images", "ConViT, %", "ViT, %", "difference", "seeds"], rows)


def mindspore_table(folder: Path) -> str:
    """Every kept run of ``bench/mindspore_models.py`` on one device."""
    rows = []
    for path in sorted(folder.glob("mindspore*.json")):
        run = json.loads(path.read_text())
        where = f"{run['model']}, batch {run['batch']}, {'launch_blocking, ' * run['launch_blocking']}{run['threads']} thread"
        for case in run["results"]:
            times = [f"{case[key]:.0f}" for key in ("ours_ms", "mindcv_ms")]
            rows.append([f"{case['case']}, {where}", *times, _times(case["ratio"]) + "×"])
    if not rows:
        raise ValueError(f"no run of MindSpore's models is kept in {folder}")
    return _table([f"MindSpore {run['mindspore']} on {run['processor']}", "ours, ms", "MindCV, ms", "MindCV over ours"], rows)
