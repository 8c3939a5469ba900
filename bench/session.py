"""One run of the benchmark: the groups measured so far, the machine, and everything recorded beside the times."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import graphs
import memory
import roofline
import timing
import torch
from checks import check
from machine import cpu_name, versions
from models import Model
from peers import Core, Peer

SLOW = 0.5  # seconds: a call that takes longer needs no second one to learn how long it takes


@dataclass
class Competitor:
    """One peer in one group: its samples, or why there are none."""

    samples: timing.Samples | None = None
    missing: str | None = None
    error: Exception | None = None
    info: dict = field(default_factory=dict)


class Session:
    def __init__(self, device: str | None, full: bool, threads: str, budget: float | None, rounds: int | None, isa: str | None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.full = full
        self.cores = os.cpu_count() or 1
        self.threads = self._thread_counts(threads)
        self.budget = budget if budget is not None else (20.0 if full else 2.0)
        self.rounds = rounds if rounds is not None else (50 if full else 15)
        self.isa = isa
        self.graphs = False  # on CUDA: whether the device is timed apart from the host, by replaying each call as a graph
        self.groups: dict[Core | Model, dict[str, Competitor]] = {}
        self.rooflines: dict[str, roofline.Roofline] = {}
        self.started = time.time()
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None

    def _thread_counts(self, option: str) -> list[int]:
        if self.device != "cpu":
            return [torch.get_num_threads()]
        if option:
            counts = [int(word) for word in option.split(",")]
            if min(counts) < 1:
                raise ValueError(f"--bench-threads must be positive, got {option}")
            return counts
        between = [2**i for i in range(1, 10) if 2**i < self.cores] if self.full else []
        return sorted({1, *between, self.cores})

    def measure_roofline(self, problem: Core) -> None:
        """Peaks of the device at the problem's thread count and type: once a run; on CPU, whose clock and neighbours change during a run,
        the best of what is measured beside each group."""
        key = f"{problem.device} {problem.dtype} {problem.threads}"
        known = self.rooflines.get(key)
        if known is None:
            self.rooflines[key] = roofline.measure(problem.device, problem.dtype)
        elif problem.device == "cpu":
            found = roofline.measure(problem.device, problem.dtype, seconds=0.1)
            self.rooflines[key] = roofline.Roofline(max(found.flops, known.flops), max(found.bytes, known.bytes))

    def group(self, problem: Core | Model, peers: Sequence[Peer], with_memory: bool = False, series: str = "") -> dict[str, Competitor]:
        """Build, check and time ``peers`` on ``problem``; the second call returns the first's result."""
        if problem not in self.groups:
            torch.set_num_threads(problem.threads)
            self.groups[problem] = self._measure(problem, peers, with_memory, series)
        return self.groups[problem]

    def _measure(self, problem: Core | Model, peers: Sequence[Peer], with_memory: bool, series: str) -> dict[str, Competitor]:
        group, calls, first = {}, {}, {}
        if isinstance(problem, Core):
            self.measure_roofline(problem)
        pool = torch.cuda.graph_pool_handle() if self.graphs else None
        for peer in peers:
            mine = group[peer.name] = Competitor(missing=peer.missing(problem) or (None if self.full else peer.slow(problem)))
            if mine.missing:
                continue
            try:
                call = peer.build(problem)
                for _ in range(2):  # the first call warms up and the second says how long one takes, unless that is plain already
                    start = time.perf_counter()
                    outputs = call()
                    timing.synchronize(self.device)
                    first[peer.name] = time.perf_counter() - start
                    if first[peer.name] > SLOW:
                        break
                torch.set_num_threads(self.cores)
                errors = check(problem, peer, outputs)
            except Exception as error:  # this peer's test reports it; the others go on
                mine.error = error
                continue
            finally:
                torch.set_num_threads(problem.threads)
            mine.info = {"peer": peer.name, "ours": peer.ours, "truth": peer.truth, "kind": type(problem).__name__.lower()}
            mine.info |= {"problem": asdict(problem), "errors": errors}
            if hasattr(call, "note"):
                mine.info["note"] = call.note
            if series:
                mine.info["series"] = series
            if isinstance(problem, Core):
                mine.info |= {"flops": problem.flops, "bytes": problem.bytes}
                if with_memory and not memory.why_not(problem.device):
                    mine.info["peak"], mine.info["held"] = memory.peak(peer.name, problem)
            del outputs
            if self.graphs:
                call, noted = graphs.timed(call, pool)
                mine.info |= noted
                first[peer.name] = min(first[peer.name], self._once(call))
            calls[peer.name] = call
        if calls:
            for name, samples in timing.interleave(calls, self.device, self.rounds, self.budget, first).items():
                group[name].samples = samples
                group[name].info |= {"iterations": samples.iterations, "rounds": samples.rounds}
                group[name].info["cpu"] = [float(f"{seconds:.4g}") for seconds in samples.cpu]
        return group

    def _once(self, call: Callable) -> float:
        start = time.perf_counter()
        call()
        timing.synchronize(self.device)
        return time.perf_counter() - start

    def replay(self, benchmark, competitor: Competitor) -> None:
        timing.replay(benchmark, competitor.samples)

    def device_name(self) -> str:
        if self.device == "cuda":
            return torch.cuda.get_device_name()
        if self.device != "cpu":
            return self.device
        return f"{cpu_name()}, {self.cores} cores, {torch.backends.cpu.get_cpu_capability()}"

    def record(self) -> dict:
        """What the JSON holds beside pytest-benchmark's own."""
        return {
            "device": self.device_name(),
            "versions": versions(),
            "full": self.full,
            "isa": self.isa,
            "load": self.load,
            "seconds": round(time.time() - self.started, 1),
            "rooflines": {key: peaks.asdict() for key, peaks in self.rooflines.items()},
            "missing": [
                {"group": str(problem), "kind": type(problem).__name__.lower(), "peer": name, "reason": mine.missing}
                for problem, group in self.groups.items()
                for name, mine in group.items()
                if mine.missing
            ],
        }
