"""What a run of the benchmark holds: competitors' samples by group, which groups compete, and how a series scales."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

YARDSTICK = {"core": "plain SDPA", "model": "timm ViT with SDPA"}  # attention, and a model, without position
LEADERS = ["convit triton", "convit cpp", "convit sdpa", "convit reference"]  # as the automatic choice takes them
PLOTS = {"speed": "Time relative to ours", "memory": "Peak memory against the number of patches", "roofline": "Rate against the roofline"}


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
        """Median, over the rounds both took part in, of this one's time over ``base``'s; NaN if there were none."""
        theirs = dict(zip(base.info["rounds"], base.wall, strict=True))
        mine = zip(self.info["rounds"], self.wall, strict=True)
        return median([t / theirs[r] for r, t in mine if r in theirs] or [math.nan])


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


def least_seconds(e: Entry, rooflines: Mapping[str, Mapping[str, float]]) -> float | None:
    """The least time that the entry's work can take by the peaks of its device, type and threads; None where they were not measured."""
    p = e.problem
    peaks = rooflines.get(f"{p['device']} {p['dtype']} {p['threads']}")
    return max(e.info["flops"] / peaks["flops"], e.info["bytes"] / peaks["bytes"]) if peaks else None


def leader(entries: list[Entry]) -> Entry | None:
    """Our entry that the automatic choice takes, in whichever order they were measured."""
    ours = [e for e in entries if e.info["ours"]]
    return min(ours, key=lambda e: LEADERS.index(e.peer) if e.peer in LEADERS else len(LEADERS), default=None)


def find(entries: list[Entry], peer: str) -> Entry | None:
    return next((e for e in entries if e.peer == peer), None)


def core_groups(run: Run) -> list[list[Entry]]:
    """The groups where the whole field competed, not those of a series against few."""
    return [g for g in run.kind("core") if "series" not in g[0].info]


def competitions(run: Run) -> list[list[Entry]]:
    return [*core_groups(run), *run.kind("model")]


def plots_of(run: Run) -> list[str]:
    """Names of the plots that the run has something to show in: the scaling series alone has no competitions."""
    return [name for name in PLOTS if name == "memory" or competitions(run)]


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
