"""Tables and plots from the benchmark's JSON. Nobody types a figure by hand.

    python bench/report.py                      rewrite every run's report and plots, and the tables in README.md and docs/
    python bench/report.py --add run.json       keep a run (--benchmark-json) under bench/results/<device>/ first
    python bench/report.py --compare OLD NEW    exit 1 where NEW is slower or larger than OLD

A table stands in a page between ``<!-- bench:begin DEVICE/RUN TABLE -->`` and ``<!-- bench:end DEVICE/RUN TABLE -->``. What
``bench/mindspore_models.py`` wrote is kept by hand as ``bench/results/<device>/mindspore*.json``; its table is ``DEVICE/mindspore models``.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from plots import draw
from results import PLOTS, YARDSTICK, Run, find, plots_of
from tables import TABLES, little_data_table, mindspore_table, range_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
MARKER = re.compile(r"<!-- bench:begin (\S+) (\S+) -->\n(.*?)<!-- bench:end \1 \2 -->", re.DOTALL)


def pages() -> list[Path]:
    """The documents that may hold tables of figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def runs() -> dict[str, Run]:
    """Every kept run by its name, DEVICE/RUN."""
    paths = sorted(path for path in RESULTS.glob("*/*.json") if not path.name.startswith("mindspore"))
    return {f"{path.parent.name}/{path.stem}": Run.load(path) for path in paths}


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
        if name == "all/default" and kind == "range":
            usual = {key: run for key, run in found.items() if key.endswith("/default") and not run.record["isa"]}
            return f"<!-- bench:begin {name} {kind} -->\n{range_table(usual)}<!-- bench:end {name} {kind} -->"
        if name == "little-data" and kind == "table":
            text = little_data_table(json.loads((RESULTS / "little-data.json").read_text()))
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
    old = [page for page in pages() if filled(page.read_text(), found) != page.read_text()]
    for name, run in found.items():
        path = RESULTS / f"{name}.md"
        if not path.exists() or path.read_text() != report(run, Path(name).name):
            old.append(path)
    return old


def refresh() -> None:
    """Rewrite every report, plot and table of a page from the kept runs."""
    found = runs()
    for name, run in found.items():
        (RESULTS / f"{name}.md").write_text(report(run, Path(name).name))
        draw(run, RESULTS / name)
    for page in pages():
        page.write_text(filled(page.read_text(), found))


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
            then = find(before, mine.peer)
            if then is None:
                continue
            base = YARDSTICK[mine.info["kind"]]
            now_base, then_base = find(entries, base), find(before, base)
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
