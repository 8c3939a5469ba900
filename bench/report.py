"""Tables and plots from the benchmark's JSON. Nobody types a figure by hand.

    python bench/report.py                      rewrite every device's REPORT.md and plots, and the README's tables, from bench/results/
    python bench/report.py --add run.json       keep a run (--benchmark-json) under bench/results/<device>/ first
    python bench/report.py --compare OLD NEW    exit 1 where NEW is slower or larger than OLD

A table stands in the README between ``<!-- bench:begin DEVICE/RUN TABLE -->`` and ``<!-- bench:end DEVICE/RUN TABLE -->``. What
``bench/mindspore_models.py`` wrote is kept by hand as ``bench/results/<device>/mindspore*.json``; its table is ``DEVICE/mindspore models``.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
MARKER = re.compile(r"<!-- bench:begin (\S+) (\S+) -->\n(.*?)<!-- bench:end \1 \2 -->", re.DOTALL)
YARDSTICK = {"core": "plain SDPA", "model": "timm ViT with SDPA"}  # attention, and a model, without position


@dataclass(frozen=True)
class Entry:
    """One competitor's samples in one group."""

    group: str
    info: dict
    wall: tuple[float, ...]

    @property
    def peer(self) -> str:
        return self.info["peer"]

    @property
    def problem(self) -> dict:
        return self.info["problem"]

    @property
    def median(self) -> float:
        return median(self.wall)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, _, high = quantiles(self.wall, n=4)
        return (high - low) / self.median

    @property
    def tokens(self) -> int:
        return math.prod(self.problem["grid"])

    @property
    def shape(self) -> str:
        p = self.problem
        return f"({p['batch']}, {self.tokens}, {p['heads']}, {p['head_dim']})"

    def over(self, base: "Entry") -> float:
        """Median, over the rounds both took part in, of this one's time over ``base``'s."""
        theirs = dict(zip(base.info["rounds"], base.wall, strict=True))
        mine = zip(self.info["rounds"], self.wall, strict=True)
        return median(t / theirs[r] for r, t in mine if r in theirs)


@dataclass(frozen=True)
class Run:
    """One run: its groups in order, and what was recorded beside them."""

    groups: dict[str, list[Entry]]
    record: dict

    @classmethod
    def of(cls, entries: Iterable[Entry], record: dict) -> "Run":
        groups: dict[str, list[Entry]] = {}
        for entry in entries:
            groups.setdefault(entry.group, []).append(entry)
        return cls(groups, record)

    @classmethod
    def from_session(cls, session) -> "Run":
        measured = [
            Entry(str(problem), mine.info, tuple(mine.samples.wall))
            for problem, group in session.groups.items()
            for mine in group.values()
            if mine.samples
        ]
        return cls.of(measured, session.record())

    @classmethod
    def load(cls, path: Path) -> "Run":
        data = json.loads(path.read_text())
        if "convit" not in data:
            raise ValueError(f"{path} was not written by this benchmark: it has no 'convit' entry")
        entries = (Entry(b["group"], b["extra_info"], tuple(b["stats"]["data"])) for b in data["benchmarks"])
        record = data["convit"] | {"commit": data["commit_info"].get("id", "unknown"), "date": data["datetime"][:10]}
        return cls.of(entries, record)

    def kind(self, kind: str) -> list[list[Entry]]:
        return [entries for entries in self.groups.values() if entries[0].info["kind"] == kind]

    @property
    def threads(self) -> int:
        return max((e.problem["threads"] for entries in self.groups.values() for e in entries), default=1)

    @property
    def on_cpu(self) -> bool:
        return all(e.problem["device"] == "cpu" for entries in self.groups.values() for e in entries)

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.record["device"].lower()).strip("-")

    @property
    def name(self) -> str:
        return f"{self.slug}/{'full' if self.record['full'] else 'default'}"


def leader(entries: list[Entry]) -> Entry | None:
    """Our entry that the automatic choice takes: the first of ours."""
    return next((e for e in entries if e.info["ours"]), None)


def _find(entries: list[Entry], peer: str) -> Entry | None:
    return next((e for e in entries if e.peer == peer), None)


# ---- tables -----------------------------------------------------------------------------------------------------------------


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
        cells = ["–" if (e := _find(entries, peer)) is None else _times(e.over(mine)) + "×" for peer in others]
        rows.append([case(mine), _where(mine.problem), *own(mine), *cells])
    if not rows:
        return ""
    leaders = " / ".join(dict.fromkeys(first))
    return _table([head[0], "threads" if device == "cpu" else "type", *(h.format(mine=leaders) for h in head[1:]), *others], rows)


def _absent(run: Run, kinds: tuple[str, ...]) -> str:
    """Which peers have no figure, and why."""
    reasons: dict[tuple[str, str], int] = {}
    for item in run.record["missing"]:
        if item["kind"] in kinds:
            reasons[item["peer"], item["reason"]] = reasons.get((item["peer"], item["reason"]), 0) + 1
    lines = [f"- {peer}: {reason} ({count} case{'s' * (count > 1)})" for (peer, reason), count in reasons.items()]
    return "\nWithout a figure:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _core_groups(run: Run) -> list[list[Entry]]:
    """The groups where the whole field competed, not those of the scaling series."""
    return [g for g in run.kind("core") if g[0].info.get("series") != "scaling"]


def competitions(run: Run) -> list[list[Entry]]:
    return [*_core_groups(run), *run.kind("model")]


def plots_of(run: Run) -> list[str]:
    """Names of the plots that the run has something to show in: the scaling series alone has no competitions."""
    return [name for name in PLOTS if name == "memory" or competitions(run)]


def core_table(run: Run) -> str:
    def case(e: Entry) -> str:
        return f"{'fwd+bwd' if e.problem['backward'] else 'fwd'} {e.shape}"

    def own(e: Entry) -> list[str]:
        return [_milliseconds(e.median), f"{100 * e.info['roofline'] / e.median:.0f} %"]

    head = ("attention core (B, N, H, D)", "{mine}, ms", "of the roofline")
    return _versus(run, _core_groups(run), case, own, head)


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
        plain, bare = _find(entries, YARDSTICK[mine.info["kind"]]), _find(entries, "convit without GPSA")
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
            if not e.info["ours"] and e.over(mine) < 1:
                cases.setdefault(e.peer, []).append(f"{_case(e)}, {_where(e.problem)} ({_times(e.over(mine))}×)")
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
            e = _find(entries, peer)
            if e is None or "peak" not in e.info:
                cells.append("–")
            else:
                held = f" + {_megabytes(e.info['held'])}" if e.info["held"] > 1e6 else ""
                cells.append(_megabytes(e.info["peak"]) + held)
        rows.append([f"{'fwd+bwd' if entries[0].problem['backward'] else 'fwd'} {entries[0].shape}", *cells])
    return _table(["peak MB of one call + held between calls", *peers], rows) if rows else ""


def exponent(points: Iterable[tuple[float, float]]) -> float:
    """Slope of the least-squares line through the logarithms of (x, y)."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mx, my = (sum(c) / len(logs) for c in zip(*logs, strict=True))
    return sum((x - mx) * (y - my) for x, y in logs) / sum((x - mx) ** 2 for x, _ in logs)


def series(run: Run, axis: str) -> dict[str, list[Entry]]:
    """Forward entries of one scaling axis by peer: "tokens" (batch 1), "batch" (the smallest grid) or "threads"."""
    cores = [e for g in run.kind("core") for e in g if not e.problem["backward"] and e.problem["dtype"] == "float32"]
    cores = [e for e in cores if (e.problem["heads"], e.problem["head_dim"]) == (4, 48)]
    if axis == "threads":
        largest = max((e.tokens for e in cores), default=0)
        cores = [e for e in cores if e.tokens == largest]
    else:
        cores = [e for e in cores if e.problem["threads"] == run.threads]
        smallest = min((e.tokens for e in cores), default=0)
        cores = [e for e in cores if (e.problem["batch"] == 1 if axis == "tokens" else e.tokens == smallest)]
    value = {"tokens": lambda e: e.tokens, "batch": lambda e: e.problem["batch"], "threads": lambda e: e.problem["threads"]}[axis]
    first = next((e.peer for g in run.kind("core") if (e := leader(g))), None)
    found: dict[str, list[Entry]] = {}
    for e in sorted(cores, key=value):
        if e.peer in (first, "plain SDPA", "timm eager"):
            found.setdefault(e.peer, []).append(e)
    return {peer: entries for peer, entries in found.items() if len(entries) > 1}


LARGE = 784  # tokens: below, the terms linear in N still count, and a fit over them says little


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
            plain = _find(run.groups[e.group], "plain SDPA")
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


TABLES: dict[str, Callable[[Run], str]] = {
    "headline": headline_table,
    "core": core_table,
    "models": model_table,
    "faster": faster_list,
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


# ---- files ------------------------------------------------------------------------------------------------------------------


def runs() -> dict[str, Run]:
    """Every kept run by its name, DEVICE/RUN."""
    paths = sorted(path for path in RESULTS.glob("*/*.json") if not path.name.startswith("mindspore"))
    return {f"{path.parent.name}/{path.stem}": Run.load(path) for path in paths}


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


def add(path: Path) -> Path:
    """Keep the run in ``path`` under the results of its device."""
    target = RESULTS / (Run.load(path).name + ".json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(json.loads(path.read_text()), indent=1) + "\n")
    return target


def filled(text: str, found: dict[str, Run]) -> str:
    """``text`` with every marked table rewritten from its run.

    Raises:
        ValueError: A marker names a run or table that does not exist, or its end does not follow.
    """

    def table(match: re.Match) -> str:
        name, kind = match[1], match[2]
        if kind == "models" and name.endswith("/mindspore"):
            text = mindspore_table(RESULTS / name.removesuffix("/mindspore"))
            return f"<!-- bench:begin {name} {kind} -->\n{text}<!-- bench:end {name} {kind} -->"
        if name not in found:
            raise ValueError(f"bench:begin names run {name!r}; kept are: {', '.join(found) or 'none'}")
        if kind not in TABLES:
            raise ValueError(f"bench:begin names table {kind!r}; known are: {', '.join(TABLES)}")
        return f"<!-- bench:begin {name} {kind} -->\n{TABLES[kind](found[name])}<!-- bench:end {name} {kind} -->"

    if text.count("<!-- bench:begin") != len(MARKER.findall(text)):
        raise ValueError("a bench:begin marker has no bench:end of the same name")
    return MARKER.sub(table, text)


def report(run: Run, stem: str) -> str:
    plots = [f"![{PLOTS[name]}]({stem}-{name}.png)\n" for name in plots_of(run)]
    text_of = [text for name, make in TABLES.items() if name != "headline" and (text := make(run))]
    return "\n".join([f"# {run.record['device']}\n", *text_of, *plots])


def stale() -> list[Path]:
    """The files whose figures are not those of the kept runs."""
    found = runs()
    readme = ROOT / "README.md"
    old = [readme] if filled(readme.read_text(), found) != readme.read_text() else []
    for name, run in found.items():
        path = RESULTS / f"{name}.md"
        if not path.exists() or path.read_text() != report(run, Path(name).name):
            old.append(path)
    return old


def refresh() -> None:
    """Rewrite every report, plot and README table from the kept runs."""
    from plots import draw

    found = runs()
    for name, run in found.items():
        (RESULTS / f"{name}.md").write_text(report(run, Path(name).name))
        draw(run, RESULTS / name)
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(), found))


PLOTS = {"speed": "Time relative to ours", "memory": "Peak memory against the number of patches", "roofline": "Rate against the roofline"}


# ---- comparison -------------------------------------------------------------------------------------------------------------


def regressions(old: Run, new: Run, tolerance: float) -> list[str]:
    """Where one of ours needs more than ``tolerance`` times what it needed: time in units of the same run's yardstick, and memory.

    The yardstick, attention or a ViT without position, takes the machine's mood out of the comparison; without it in both runs, the
    times themselves are compared.
    """
    found = []
    for group, entries in new.groups.items():
        before = old.groups.get(group, [])
        for mine in (e for e in entries if e.info["ours"]):
            then = _find(before, mine.peer)
            if then is None:
                continue
            base = YARDSTICK[mine.info["kind"]]
            now_base, then_base = _find(entries, base), _find(before, base)
            if now_base and then_base:
                change = mine.over(now_base) / then.over(then_base)
                unit = f"over {base}"
            else:
                change, unit = mine.median / then.median, "in seconds"
            if change > tolerance:
                found.append(f"{group}: {mine.peer} takes {change:.2f} times as long as before ({unit})")
            if then.info.get("peak") and mine.info.get("peak", 0) > tolerance * then.info["peak"] + 1e6:
                found.append(f"{group}: {mine.peer} needs {mine.info['peak'] / then.info['peak']:.2f} times the memory")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--add", type=Path, metavar="JSON", help="keep this run under bench/results/<device>/ first")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="only compare two runs; exit 1 on a regression")
    parser.add_argument("--tolerance", type=float, default=1.10, help="of --compare, as a factor (default 1.10)")
    parser.add_argument("--check", action="store_true", help="only check that the reports and the README say what the runs say")
    args = parser.parse_args(argv)
    if args.compare:
        old, new = map(Run.load, args.compare)
        shared = set(old.groups) & set(new.groups)
        if not shared:
            parser.error("the two runs have no group in common")
        found = regressions(old, new, args.tolerance)
        print("\n".join(found) or f"no regression beyond {args.tolerance:.2f} in {len(shared)} groups")
        return bool(found)
    if args.check:
        old_files = stale()
        print("\n".join(f"{path.relative_to(ROOT)} is not what the kept runs say" for path in old_files) or "all reports are current")
        return bool(old_files)
    if args.add:
        print(f"kept {add(args.add).relative_to(ROOT)}")
    refresh()
    return 0


if __name__ == "__main__":
    sys.exit(main())
