"""One stage of ``bench/gpu.sh``: when it runs, where it writes, how long it may go on, work in processes of its own, and the call that
tools watch."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MORE = 75  # exit status of a stage that left work for the next call
UNFINISHED = (MORE, 124, 137)  # and of one that ``timeout`` ended


class Limits(NamedTuple):
    """Seconds: a stage is not begun with less than ``least``, and gets no more than ``most``."""

    least: int
    most: int


STAGES = {
    "environment": Limits(5, 25),
    "correctness": Limits(60, 170),
    "roofline": Limits(10, 25),
    "sanitizer": Limits(40, 170),
    "profile": Limits(50, 140),
    "sweep": Limits(400, 535),
    "core": Limits(60, 400),
    "models": Limits(60, 440),
    "plots": Limits(10, 25),
}
RESUMED = ("sweep", "core", "models")  # these go on where they stopped; the others begin again


def following(ended: dict[str, dict], seconds: float, only: str = "", tried: str = "") -> tuple[str, int] | None:
    """The next stage and its limit, from what has ended so far (name -> status) and the seconds left; None where the call is over."""
    for name, (least, most) in STAGES.items():
        status = ended.get(name, {}).get("status", MORE)
        if name in tried.split(",") or (only and name not in only.split(",")) or status not in UNFINISHED:
            continue
        return (name, int(min(most, seconds))) if seconds >= least else None
    return None


def plan(ended: dict[str, dict], seconds: int) -> list[str]:
    """What each further call will do, if every stage takes all of its time."""
    lines, ended, number, spent = [], dict(ended), 0, dict.fromkeys(STAGES, 0)
    while following(ended, math.inf):
        number, left, stages, tried = number + 1, float(seconds), [], []
        while step := following(ended, left, tried=",".join(tried)):
            name, limit = step
            stages.append(f"{name} ({limit} s)")
            tried.append(name)
            spent[name] += limit
            ended[name] = {"status": 0 if spent[name] >= STAGES[name].most or name not in RESUMED else MORE}
            left -= limit
        if not stages:
            return [f"calls of {seconds} s are too short for {following(ended, math.inf)[0]}"]
        lines.append(f"call {number}: bench/gpu.sh: " + ", ".join(stages))
    return lines or ["all is done"]


class Stage:
    """One stage: where it writes, how long it may go on, and its section of run.json."""

    def __init__(self, name: str, out: Path, limit: float, rehearse: bool):
        self.name, self.out, self.rehearse = name, out, rehearse
        self.end = time.monotonic() + limit
        self.device = "cpu" if rehearse else "cuda"
        self.file = out / "run.json"

    def left(self) -> float:
        return self.end - time.monotonic()

    def load(self) -> dict:
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def begin(self) -> None:
        """Drop what an earlier call left of this stage; of those that go on where they stopped, the error alone."""
        data = self.load()
        mine = {key: value for key, value in data.pop(self.name, {}).items() if key != "error"}
        self._write(data | {self.name: mine} if self.name in RESUMED and mine else data)

    def forget(self, names: list[str]) -> None:
        """As if these stages had never run."""
        data = self.load()
        data["stages"] = {name: end for name, end in data.get("stages", {}).items() if name not in names}
        self._write({key: value for key, value in data.items() if key not in names})

    def save(self, name: str | None = None, **values) -> None:
        """Put ``values`` into the section; the file is whole at every moment."""
        name = name or self.name
        data = self.load()
        data[name] = data.get(name, {}) | values
        self._write(data)

    def _write(self, data: dict) -> None:
        fresh = self.file.with_suffix(".tmp")
        fresh.write_text(json.dumps(data, indent=1, default=str))
        fresh.replace(self.file)


def answer(*command: str) -> str:
    """What a tool prints; nothing where it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def watched(command: list[str], seconds: float, **variables: str) -> tuple[int | str, str]:
    """Exit status, or "out of time", and all that a tool printed."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=os.environ | variables)
        return done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        return "out of time", (error.stdout or b"").decode(errors="replace")


def interpret() -> None:
    """Let this process, and those that it starts, run kernels in Triton's interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton_quickly import once_a_launch

    once_a_launch()


def pooled(stage: Stage, work: Callable, jobs: list, workers: int, seconds: float, fresh: bool = False) -> list:
    """``work(job)`` for each job in processes of their own; a job without an answer in time, or whose process died, yields an error.

    Triton compiles one kernel at a time, so the compilers of many run side by side here and leave their results in its cache.
    """
    end = time.monotonic() + min(seconds, stage.left() - 5)
    results: list = [f"no answer within {seconds:.0f} s"] * len(jobs)
    pool = multiprocessing.get_context("spawn").Pool(workers, interpret if stage.rehearse else None, maxtasksperchild=1 if fresh else None)
    try:
        handles = dict(enumerate([pool.apply_async(work, (job,)) for job in jobs]))
        while handles and time.monotonic() < end:
            for index, handle in list(handles.items()):
                if handle.ready():
                    try:
                        results[index] = handle.get()
                    except Exception as error:
                        results[index] = f"{type(error).__name__}: {error}"
                    del handles[index]
            time.sleep(0.02)
    finally:
        pool.terminate()
    return results


def workers(stage: Stage, jobs: int) -> int:
    return 1 if stage.rehearse else max(1, min(14, (os.cpu_count() or 2) - 2, jobs))


def gpsa_triton(*args):
    import convit

    return convit.gpsa(*args, backend="triton")


def one_call_command(tiny: bool) -> list[str]:
    """Starts a process that does nothing but ``one_call``."""
    return [sys.executable, str(ROOT / "bench/gpu"), "tiny-call" if tiny else "call"]


def one_call(tiny: bool) -> None:
    """One forward and one backward launch, for the tools that watch a process; ``tiny``: kernels that the checks have compiled."""
    import torch
    from gpsa_cases import Case, make_inputs, run

    for case in (Case(2, 4, 48, (14, 14)), Case(1, 2, 48, (17, 18))) if tiny else (Case(128, 9, 48, (14, 14)), Case(4, 9, 48, (56, 56))):
        inputs, grad = make_inputs(case, dtype=torch.bfloat16, device="cuda")
        run(gpsa_triton, inputs, grad, case.grid)
    torch.cuda.synchronize()


def device_seconds(call: Callable, device: str, budget: float = 0.015) -> float:
    """Device seconds of ``call``: the best of several batches."""
    import torch

    start = time.perf_counter()
    call()
    if device == "cpu":  # a rehearsal: it is called, and the figure means nothing
        return time.perf_counter() - start
    best, spent = math.inf, 0.0
    while spent < budget:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            call()
        end.record()
        end.synchronize()
        taken = start.elapsed_time(end) / 1e3
        best, spent = min(best, taken / 5), spent + taken
    return best
