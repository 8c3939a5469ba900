"""One stage of ``bench/gpu.sh``: where it writes, how long it may go on, work in processes of its own, and the call that tools watch."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("environment", "correctness", "roofline", "sweep", "core", "models", "profile", "plots")


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

    def reset(self) -> None:
        """Drop what an earlier run left of this stage."""
        if self.name in (data := self.load()):
            self._write({key: value for key, value in data.items() if key != self.name})

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


def pooled(stage: Stage, work: Callable, jobs: list, workers: int, seconds: float, fresh: bool = False) -> list:
    """``work(job)`` for each job in processes of their own; a job without an answer in time, or whose process died, yields an error.

    Triton compiles one kernel at a time, so the compilers of many run side by side here and leave their results in its cache.
    """
    end = time.monotonic() + min(seconds, stage.left() - 5)
    results: list = [f"no answer within {seconds:.0f} s"] * len(jobs)
    pool = multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1 if fresh else None)
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

    call()
    if device == "cpu":
        start = time.perf_counter()
        call()
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
