"""Plant small mistakes, one at a time, in a copy of the tree, and see whether the tests notice: ``make mutate``.

    python tests/mutate.py [--count 10] [--seed 0] [--only kernels/ csrc/] [--budget 60] [--results FILE] [--again] [--report FILE]

A mutant runs the tests that run its line, those named for its file first, the quickest first, until one fails; a mistake in C++ runs those
named for its file. A mutant that makes a test fail or crash was noticed; so was one that takes three times as long as these tests take
without it and 30 seconds, which the report counts apart; one that no test notices is a survivor and is listed with file, line and change.
Every test that noticed is run once without a mistake: one that fails then has noticed nothing. The sample follows from the seed: files are
drawn with the weight of their lines.
"""

import argparse
import ast
import json
import subprocess
import sys
import time
from pathlib import Path

from mutants import Mutant, sample, tests_of
from workshop import ROOT, Workshop

UNTRACED_SECONDS = 100.0  # a file of tests that is run as a whole: its time was not measured


class Bench:
    """Judges mutants in the workshop."""

    def __init__(self, workshop: Workshop, budget: float) -> None:
        self.workshop, self.budget = workshop, budget
        reach = workshop.reach()
        self.seconds: dict[str, float] = reach["seconds"]
        self.lines: dict[str, dict[int, set[str]]] = reach["lines"]

    def reached_by(self, mutant: Mutant) -> list[str]:
        """The tests that run the statement that the line belongs to; a line that runs at import is run by all that run any of its file."""
        lines = self.lines.get(mutant.file, {})
        inside, header = False, {mutant.line}
        for node in ast.walk(ast.parse((self.workshop.folder / mutant.file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.body[0].lineno <= mutant.line <= (node.end_lineno or 0):
                inside = True
            if isinstance(node, ast.stmt):
                body = getattr(node, "body", None)
                last = body[0].lineno - 1 if isinstance(body, list) and body else node.end_lineno or node.lineno
                if node.lineno <= mutant.line <= last:
                    header |= set(range(node.lineno, last + 1))
        return sorted({test for line in (header | {0} if inside else set(lines)) for test in lines.get(line, ())})

    def tests(self, mutant: Mutant) -> list[str]:
        """Those named for the file before the others, the quickest first, as many as the budget holds; then what is not traced."""
        named = tests_of(mutant.file) or ()
        traced = {test.split("::")[0] for test in self.seconds}
        chosen = [t for t in self.seconds if t.split("::")[0] in named]
        reached = self.reached_by(mutant) if mutant.file.endswith(".py") else []
        if reached:
            # a file of tests: the line runs while it is imported, in a shared fixture, or in a process that does not know its test
            whole = {test.split("::")[0] for test in reached if "::" not in test or test.endswith(" (setup)")}
            chosen = [t for t in self.seconds if t in reached or t.split("::")[0] in whole]
        kept, spent = [], 0.0
        for test in sorted(chosen, key=lambda t: (t.split("::")[0] not in named, t not in reached, self.cost(t))):
            if spent + self.cost(test) <= self.budget or not kept:
                kept.append(test)
                spent += self.cost(test)
        return kept + [name for name in named if name not in traced]

    def cost(self, test: str) -> float:
        return self.seconds.get(test, UNTRACED_SECONDS)

    def told(self, tests: list[str], stop: bool = True) -> dict:
        """What these tests say, those that ask for Triton's interpreter in a process before the others'."""
        told: dict = {"status": 0, "all_failed": []}
        for part in ([t for t in tests if t.startswith("tests/triton_")], [t for t in tests if not t.startswith("tests/triton_")]):
            if part and not (stop and told["status"] not in (0, 5)):
                new = self.workshop.test(part, 3 * sum(map(self.cost, part)) + 30, stop)
                told = new | {"all_failed": told["all_failed"] + new.get("all_failed", [])}
        return told

    def judge(self, mutant: Mutant, without: set[str]) -> dict:
        """What became of the mutant: noticed (by which test), too slow, does not build, survived."""
        path = self.workshop.folder / mutant.file
        original = path.read_bytes()
        began = time.monotonic()
        tests = [test for test in self.tests(mutant) if test not in without]
        try:
            path.write_text(mutant.text, encoding="utf-8")
            if not mutant.file.endswith(".py") and not self.workshop.build_changed(mutant.file):
                return {"verdict": "does not build"}
            told = self.told(tests)
        finally:
            path.write_bytes(original)
            if not mutant.file.endswith(".py"):
                self.workshop.restore()
        verdict = {0: "survived", 5: "survived", None: "too slow"}.get(told["status"], "noticed")
        return {"verdict": verdict, "by": told.get("failed", ""), "tests": len(tests), "took": time.monotonic() - began}


def report(results: list[dict], args: argparse.Namespace, seconds: float) -> str:
    judged = [r for r in results if r["verdict"] != "does not build"]
    survivors = [r for r in judged if r["verdict"] == "survived"]
    slow = sum(r["verdict"] == "too slow" for r in judged)
    score = 100 * (1 - len(survivors) / max(1, len(judged)))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    lines = [
        "# Planted mistakes",
        "",
        f"`python tests/mutate.py --count {args.count} --seed {args.seed}` at commit {commit}: {len(judged)} mutants that build, "
        f"{len(judged) - len(survivors)} noticed ({score:.0f} %; {slow} of them by taking three times as long as the tests take without a "
        f"mistake and 30 s), {len(survivors)} survived, in {seconds:.0f} s.",
        "",
        "| survivor | before | after | tests run |",
        "|---|---|---|---|",
    ]
    for r in survivors:
        before, after = (r[key].replace("|", "\\|") for key in ("before", "after"))
        lines.append(f"| {r['file']}:{r['line']} | `{before}` | `{after}` | {r['tests']} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10, help="mutants to plant [10]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], metavar="PREFIX", help="files or folders to plant in")
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests for one mutant, as they take without it [60]")
    parser.add_argument("--workshop", type=Path, default=ROOT / "build/workshop", help="where the copy is [build/workshop]")
    parser.add_argument("--results", type=Path, help="a file of one result a line, added to; what it holds is not judged again")
    parser.add_argument("--again", action="store_true", help="but judge its survivors again")
    parser.add_argument("--report", type=Path, help="write the result here, as Markdown")
    args = parser.parse_args()
    mutants = sample(args.count, args.seed, args.only)
    known: dict[tuple, dict] = {}
    if args.results and args.results.exists():
        known = {tuple(r["key"]): r for r in map(json.loads, args.results.read_text().splitlines())}
    began = time.monotonic()
    with Workshop(args.workshop.resolve()) as workshop:
        bench = Bench(workshop, args.budget)
        broken: set[str] = set()
        waiting = sorted(enumerate(mutants), key=lambda m: not m[1].file.endswith(".py"))
        done = 0
        while waiting:
            for number, m in waiting:
                key = (number, m.file, m.line, m.before, m.after)
                done += 1
                if key in known and not (args.again and known[key]["verdict"] == "survived"):
                    continue
                found = {"key": key, **m._asdict(), **bench.judge(m, broken)}
                found.pop("text")
                known[key] = found
                if args.results:
                    with args.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found) + "\n")
                by = f" by {found['by']}" if found.get("by") else ""
                print(f"{done}/{len(mutants)} {found['verdict']}{by}: {m.file}:{m.line}: {m.before}  ->  {m.after}", flush=True)
            # the tests that noticed, without a mistake
            keys = {(n, m.file, m.line, m.before, m.after): (n, m) for n, m in enumerate(mutants)}
            failing = {known[k]["by"] for k in keys if known[k].get("by")} - broken
            newly = set(bench.told(sorted(failing), stop=False)["all_failed"]) & failing
            broken |= newly
            waiting = [keys[k] for k in keys if known[k].get("by") in newly]
            for k in keys:
                if known[k].get("by") in newly:
                    del known[k]
            if newly:
                print(f"fail without a mistake, and so have noticed nothing: {sorted(newly)}", flush=True)
    results = [known[k] for n, m in enumerate(mutants) if (k := (n, m.file, m.line, m.before, m.after)) in known]
    text = report(results, args, time.monotonic() - began)
    print(text)
    if args.report:
        args.report.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
