"""Fair timing: every competitor of a group in turn, round after round, so that whatever disturbs the machine disturbs all of them.

pytest-benchmark's own loop times one test to its end before the next, which on a shared machine compares different minutes. Here a
group is timed as a whole, and ``ReplayTimer`` hands each test its samples back through pytest-benchmark's documented ``timer``
option, so its tables, its JSON and its comparisons work on the interleaved samples.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

TURN = 0.010  # seconds: a competitor's turn repeats a shorter call until it takes this long
SETTLE = 0.003  # seconds between turns: thread pools of other runtimes spin for about this long after their last call
FEWEST = 3  # samples of the slowest competitor


@dataclass
class Samples:
    """Timings of one competitor: seconds per call, by the round they were taken in."""

    iterations: int
    rounds: list[int] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def synchronize(device: str) -> None:
    if device != "cpu":
        import torch  # MindSpore's models are timed where there is none

        torch.accelerator.synchronize()


def _turn(call: Callable, iterations: int, device: str) -> tuple[float, float]:
    """Wall and processor seconds per call of one turn."""
    synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(iterations):
        call()
    synchronize(device)
    return (time.perf_counter() - wall) / iterations, (time.process_time() - cpu) / iterations


def interleave(calls: Mapping[str, Callable], device: str, rounds: int, budget: float, seconds: Mapping[str, float]) -> dict[str, Samples]:
    """Time ``calls`` in interleaved rounds.

    Args:
        calls: Name to a call without arguments, already warmed up.
        device: torch device type; synchronised around every turn.
        rounds: At most so many; a competitor too slow for its share of the budget takes part in fewer, evenly spread, never under 3.
        budget: Seconds for the group, divided evenly among the competitors.
        seconds: What each call takes, roughly.
    """
    samples, turns = {}, {}
    for name in calls:
        once = max(seconds[name], 1e-7)
        samples[name] = Samples(max(1, math.ceil(TURN / once)))
        cost = max(once, TURN) + SETTLE
        turns[name] = max(FEWEST, min(rounds, int(budget / len(calls) / cost)))
    total = max(turns.values())
    names = list(calls)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for r in range(total):
            # start each round with another competitor, so that nobody always follows the same neighbour at the same distance
            for name in names[r % len(names) :] + names[: r % len(names)]:
                if (r + 1) * turns[name] // total == r * turns[name] // total:
                    continue
                mine = samples[name]
                time.sleep(SETTLE)
                if mine.iterations > 1:
                    calls[name]()
                wall, cpu = _turn(calls[name], mine.iterations, device)
                mine.rounds.append(r)
                mine.wall.append(wall)
                mine.cpu.append(cpu)
            gc.collect(0)
    finally:
        if was_enabled:
            gc.enable()
    return samples


class ReplayTimer:
    """A clock for pytest-benchmark that shows the samples it was loaded with: 0 at the start of a round, the sample at its end."""

    def __init__(self) -> None:
        self._left: Iterator[float] = iter(())
        self._running = False

    def load(self, samples: list[float]) -> None:
        self._left, self._running = iter(samples), False

    def __call__(self) -> float:
        self._running = not self._running
        return 0.0 if self._running else next(self._left)


REPLAY = ReplayTimer()


def replay(benchmark, samples: Samples) -> None:
    """Give ``samples`` to the ``benchmark`` fixture of a test marked ``benchmark(timer=REPLAY)``."""
    REPLAY.load(samples.wall)
    benchmark.pedantic(lambda: None, rounds=len(samples.wall))
