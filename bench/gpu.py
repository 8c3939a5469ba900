"""The stages of ``bench/gpu.sh``: ``python bench/gpu.py STAGE --out DIR --limit SECONDS [--rehearse]``.

    environment  device, driver, versions, clocks
    correctness  values, gradients, determinism, poisoned memory, CUDA graphs, torch.compile, compute-sanitizer
    roofline     the rate of matrix products and the bandwidth of a copy
    sweep        configurations of every kernel; rows for the table in kernels/gpsa/gpu_triton.py -> configs.txt
    core         the attention core against its peers, with the rows just found
    models       whole models, inference and training steps
    profile      device time of each kernel of one call; Nsight Compute where it is installed -> profile.txt
    plots        PNG
    summary      at most 40 lines -> summary.txt

Each keeps its result as it goes in DIR/run.json. With --rehearse all of it runs on the CPU in Triton's interpreter. The variable
CONVIT_GPU_FAIL names stages that shall fail, for the test that nothing else goes with them.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests")]
STAGES = ("environment", "correctness", "roofline", "sweep", "core", "models", "profile", "plots")
COMPILED = ("torch.compile(timm)", "FlexAttention x 2")


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


# ---------------------------------------------------------------------------------------------------------------- environment
def environment(stage: Stage) -> None:
    import torch
    from machine import cpu_name, versions

    found = {"versions": versions(), "cpu": cpu_name(), "cores": os.cpu_count(), "cuda": torch.version.cuda, "hip": torch.version.hip}
    found["tools"] = {tool: shutil.which(tool) for tool in ("nvidia-smi", "ncu", "nsys", "compute-sanitizer", "ptxas", "cc", "gcc")}
    if stage.rehearse:
        found["device"] = "rehearsal"
    else:
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "capability": torch.cuda.get_device_capability(), "memory": properties.total_memory}
        found["multiprocessors"] = properties.multi_processor_count
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
        values = _answer("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").split("\n")[0].split(",")
        found["nvidia-smi"] = dict(zip(fields.split(","), (x.strip() for x in values), strict=False))
    stage.save(**found, commit=_answer("git", "rev-parse", "HEAD") or "unknown", date=time.strftime("%Y-%m-%d"))


def _answer(*command: str) -> str:
    """What a tool prints; nothing where it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


# ------------------------------------------------------------------------------------------------------------ work in processes
def _pooled(stage: Stage, work, jobs: list, workers: int, seconds: float, fresh: bool = False) -> list:
    """``work(job)`` for each job in processes of their own; a job without an answer in time, or whose process died, yields an error.

    Triton compiles one kernel at a time, so the compilers of many run side by side here and leave their results in its cache.
    """
    import multiprocessing

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


def _workers(stage: Stage, jobs: int) -> int:
    return 1 if stage.rehearse else max(1, min(14, (os.cpu_count() or 2) - 2, jobs))


# ---------------------------------------------------------------------------------------------------------------- correctness
def _poison() -> None:
    import torch

    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)


def _triton(*args):
    import convit

    return convit.gpsa(*args, backend="triton")


def _values(case, dtype, tf32: bool, device: str) -> str:
    """Values and gradients against float64 in poisoned memory, twice with the same bits."""
    import torch
    from gpsa_cases import check, eager, make_inputs, reference64, relative_error, run

    inputs, grad = make_inputs(case, dtype=dtype, device=device)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        ours, again = run(_triton, inputs, grad, case.grid), run(_triton, inputs, grad, case.grid)
        for name in ours:
            if not torch.equal(ours[name], again[name]):
                return f"{name}: two runs differ by up to {(ours[name] - again[name]).abs().max().item():.3g}"
        if not tf32:
            check(ours, inputs, grad, case.grid)
            return ""
        # the table of tolerances speaks of float32 products; those of tf32 are held to the eager path's own in tf32
        truth, peer = reference64(inputs, grad, case.grid), run(eager, inputs, grad, case.grid)
        worst = max(relative_error(peer[name], truth[name]) for name in truth)
        for name in truth:
            error = relative_error(ours[name], truth[name])
            if not error <= max(2 * worst, 1e-3) and truth[name].norm() > 1e-12 * truth["out"].norm():
                return f"{name}: relative error {error:.3g}, the eager path's worst in tf32 is {worst:.3g}"
        return ""
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def _graph(case, dtype, tf32: bool, device: str) -> str:
    """A CUDA graph of forward and backward, replayed on other input, against the same calls without it."""
    import torch
    from gpsa_cases import make_inputs, run

    if device == "cpu":
        return ""
    inputs, grad = make_inputs(case, dtype=dtype, device=device)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(_triton, inputs, grad, case.grid)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(_triton, inputs, grad, case.grid)
    other, other_grad = make_inputs(case, seed=1, dtype=dtype, device=device)
    for old, new in zip((*inputs, grad), (*other, other_grad), strict=True):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    expected = run(_triton, other, other_grad, case.grid)
    return "; ".join(f"{name} of the graph differs" for name in expected if not torch.equal(captured[name], expected[name]))


def _compiled(case, dtype, tf32: bool, device: str) -> str:
    """torch.compile without a graph break, forward and backward, against the same calls without it."""
    import torch
    from gpsa_cases import make_inputs, relative_error, run

    inputs, grad = make_inputs(case, dtype=dtype, device=device)
    compiled = torch.compile(lambda *args: _triton(*args) * 2.0, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    ours, expected = run(compiled, inputs, grad, case.grid), run(lambda *a: _triton(*a) * 2.0, inputs, grad, case.grid)
    return "; ".join(f"{name} differs" for name in ours if not relative_error(ours[name], expected[name]) <= 1e-2)


CHECKS = {"values": _values, "graph": _graph, "compile": _compiled}


def _judge(job: tuple) -> str:
    """The answer of one check, empty where all is well; runs in a process of its own."""
    import torch

    kind, case, dtype, tf32, device = job
    _poison()
    try:
        return CHECKS[kind](case, getattr(torch, dtype), tf32, device)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:500]}"


def correctness(stage: Stage) -> None:
    from gpsa_cases import CASES, Case

    kinds = [("float32", False), ("float32", True), ("float16", False), ("bfloat16", False)]
    loops = [Case(1, 2, 48, (17, 18)), Case(1, 2, 64, (32, 32)), Case(1, 1, 128, (3, 100)), Case(1, 1, 48, (56, 56))]
    many = [Case(130, 4, 48, (14, 14)), Case(64, 9, 48, (17, 17)), Case(128, 4, 33, (5, 6))]  # several blocks of queries to a program
    cases, odd = [*CASES, *loops, *many], CASES[0]
    if stage.rehearse:  # bfloat16 is beyond the interpreter
        kinds, cases, odd = (
            [("float32", False), ("float32", True), ("float16", False)],
            [Case(1, 1, 16, (2, 3)), Case(1, 1, 7, (1, 65))],
            Case(1, 1, 16, (2, 3)),
        )
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a process of a pool may have none of its own
    # every case in bfloat16 and float32; float16 and tf32 differ from them in the element type alone: some cases
    few = cases if stage.rehearse else [CASES[0], CASES[5], CASES[6], CASES[7], loops[1], many[0]]
    jobs = [
        ("values", case, dtype, tf32, stage.device)
        for dtype, tf32 in reversed(kinds)
        for case in (few if tf32 or dtype == "float16" else cases)
    ]
    jobs += [
        (kind, case, dtype, False, stage.device) for kind in ("graph", "compile") for dtype in ("float16",) for case in (odd, cases[-1])
    ]
    answers = _pooled(stage, _judge, jobs, _workers(stage, len(jobs)), 0.7 * stage.left())
    # a process that one check spoiled may have failed the ones after it: each gets another
    suspects = [i for i, answer in enumerate(answers) if "CUDA error" in answer or "illegal" in answer or "no answer" in answer]
    if suspects and stage.left() > 15:
        again = _pooled(stage, _judge, [jobs[i] for i in suspects], _workers(stage, len(suspects)), 0.6 * stage.left(), fresh=True)
        for i, answer in zip(suspects, again, strict=True):
            answers[i] = answer
    names = [f"{kind} {case} {dtype}{' tf32' if tf32 else ''}" for kind, case, dtype, tf32, _ in jobs]
    wrong = {name: answer for name, answer in zip(names, answers, strict=True) if answer}
    stage.save(
        checks=len(jobs), passed=len(jobs) - len(wrong), wrong=wrong, skipped=["CUDA graphs: no CUDA device"] if stage.rehearse else []
    )
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and stage.left() > 12:
        command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *_one_call(tiny=True)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=stage.left() - 4, cwd=ROOT)
            report = {"status": done.returncode, "tail": (done.stdout + done.stderr)[-600:]}
        except subprocess.TimeoutExpired:
            report = {"status": "out of time"}
        stage.save(sanitizer=report)
        if report["status"] == 9:
            wrong["compute-sanitizer"] = report["tail"]
    else:
        stage.save(sanitizer={"status": "not run" if sanitizer else "not installed"})
    if wrong:
        raise AssertionError("\n".join(f"{name}: {answer}" for name, answer in wrong.items()))


def _one_call(tiny: bool) -> list[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r}); import gpu; gpu.one_call({tiny})"
    return [sys.executable, "-c", code]


def one_call(tiny: bool) -> None:
    """One forward and one backward launch, for the tools that watch a process; ``tiny``: kernels that the checks have compiled."""
    import torch
    from gpsa_cases import Case, make_inputs, run

    for case in (Case(2, 4, 48, (14, 14)), Case(1, 2, 48, (17, 18))) if tiny else (Case(128, 9, 48, (14, 14)), Case(4, 9, 48, (56, 56))):
        inputs, grad = make_inputs(case, dtype=torch.bfloat16, device="cuda")
        run(_triton, inputs, grad, case.grid)
    torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------------------- roofline
def roofline_stage(stage: Stage) -> None:
    import torch
    from roofline import measure

    for dtype in ("float32",) if stage.rehearse else ("bfloat16", "float16", "float32"):
        peaks = measure(stage.device, dtype, 0.02 if stage.rehearse else 0.5)
        stage.save(**{f"{stage.device} {dtype} {torch.get_num_threads()}": peaks.asdict()})


# ---------------------------------------------------------------------------------------------------------------------- sweep
def _candidates(rehearse: bool) -> dict[str, list[tuple[int, int, int, int]]]:
    """Kernel -> (rows, keys, warps, stages) to try beside the table's own."""
    if rehearse:
        return {kernel: [(16, 16, 4, 1)] for kernel in ("fwd_tile", "dq_tile", "fwd_loop", "mix")}

    def grid(rows, keys, warps, stages):
        return [(r, k, w, s) for r in rows for k in keys for w in warps for s in stages]

    return {
        "fwd_tile": grid((32, 64), (1, 2, 4), (4, 8), (1, 2)) + grid((128,), (1, 2), (8,), (1,)),
        "dq_tile": grid((32, 64), (32, 64, 128), (4, 8), (1, 2)) + grid((128,), (32, 64), (8,), (1,)),
        "dkdv_tile": grid((16, 32, 64), (64, 128, 256), (4, 8), (1,)) + grid((32,), (64, 128), (4, 8), (2,)),
        "fwd_loop": grid((64, 128), (32, 64, 128), (4, 8), (2, 3)),
        "dkdv_loop": grid((32, 64, 128), (64, 128), (4, 8), (2, 3)),
        "dq_loop": grid((64, 128), (32, 64), (4, 8), (2, 3)),
        "mix": grid((32, 64, 128), (32, 64), (4, 8), (2,)),
        "moments": grid((32, 64, 128), (32, 64), (4, 8), (2,)),
    }


def _shapes(kernel: str, dim: int, rehearse: bool) -> list:
    from gpsa_cases import Case

    if rehearse:
        return [Case(1, 1, 16, (2, 3) if kernel.endswith("tile") else (1, 65))]
    if kernel.endswith("tile"):
        return [Case(128, 9, dim, (14, 14)), Case(64, 16, dim, (14, 14))]
    return [Case(8, 9, dim, (28, 28)), Case(2, 9, dim, (56, 56))]


@functools.lru_cache(maxsize=4)
def _inputs(case, dtype: str, device: str) -> tuple:
    import torch
    from gpsa_cases import make_inputs

    return make_inputs(case, dtype=getattr(torch, dtype), device=device)


def _captured(kernel: str, case, dtype: str, config: tuple | None, device: str):
    """Run the operator with ``config`` for ``kernel``; returns its outputs and a call that launches this kernel alone."""
    from convit.kernels.gpsa import gpu_triton as gt

    inputs, grad = _inputs(case, dtype, device)
    launches, launch, table = [], gt._launch, gt._CONFIGS[kernel]

    def record(call, *tensors):
        if call.kernel is getattr(gt, f"_{kernel}_kernel"):
            launches.append((call, tensors))
        launch(call, *tensors)

    gt._launch = record
    gt._CONFIGS[kernel] = table if config is None else [("", "", 128, gt._Config(*config)), *table]
    gt._cached_plan.cache_clear()
    try:
        scale = case.head_dim**-0.5
        outputs = gt._forward(*inputs, *case.grid, scale)
        if not kernel.startswith("fwd"):
            outputs = gt._backward(grad, *inputs, *outputs, *case.grid, scale)
    finally:
        gt._launch, gt._CONFIGS[kernel] = launch, table
        gt._cached_plan.cache_clear()

    def replay():
        for call, tensors in launches:
            gt._launch(call, *tensors)
        return launches[0][0].compiled

    return [x.clone() for x in outputs], replay


def _compile_one(job: tuple) -> str:
    try:
        _captured(*job)
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def _seconds(call, device: str, budget: float = 0.015) -> float:
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


def sweep(stage: Stage) -> None:
    import torch
    from checks import TOLERANCES, relative_error

    from convit.kernels.gpsa import gpu_triton as gt

    family = gt._family(0)
    found, lines = {}, []
    # (element type, head dim, largest BD of the row): the models first
    targets = [("float16", 16, 16), ("float32", 16, 16)] if stage.rehearse else [("bfloat16", 48, 64), ("float32", 48, 64)]
    for number, (dtype, dim, block) in enumerate(targets):
        share = stage.left() - 8 if number + 1 == len(targets) else 0.72 * stage.left()
        end = time.monotonic() + share
        arithmetic = "half" if dtype != "float32" else gt._precision(torch.float32)
        # the tile kernels are for half precision
        candidates = {k: c for k, c in _candidates(stage.rehearse).items() if arithmetic == "half" or "tile" not in k}
        jobs = [
            (kernel, _shapes(kernel, dim, stage.rehearse)[0], dtype, config, stage.device)
            for kernel, all_ in candidates.items()
            for config in all_
        ]
        jobs.sort(key=lambda job: candidates[job[0]].index(job[3]))  # every kernel gets its turn before time is up
        answers = _pooled(stage, _compile_one, jobs, _workers(stage, len(jobs)), 0.6 * share)
        usable = {kernel: [] for kernel in candidates}
        for job, answer in zip(jobs, answers, strict=True):
            if not answer:
                usable[job[0]].append(job[3])
        refused = {f"{job[0]} {job[3]}": answer for job, answer in zip(jobs, answers, strict=True) if answer}
        for kernel, configs in usable.items():
            if time.monotonic() > end:
                refused[kernel] = "out of time"
                continue
            shapes = _shapes(kernel, dim, stage.rehearse)
            base, rows = [_captured(kernel, case, dtype, None, stage.device) for case in shapes], []
            times = [_seconds(replay, stage.device) for _, replay in base]
            for config in configs:
                if time.monotonic() > end:
                    break
                try:
                    tries = [_captured(kernel, case, dtype, config, stage.device) for case in shapes]
                    floor = TOLERANCES.FLOOR[getattr(torch, dtype)]
                    for (expected, _), (actual, _) in zip(base, tries, strict=True):
                        for a, b in zip(actual, expected, strict=True):  # parameters' gradients are sums that cancel
                            error = relative_error(a, b.double())
                            if not error <= (2 if b.dim() > 2 else 20) * floor:
                                raise AssertionError(f"differs from the table's row by {error:.2e}")
                    mine = [_seconds(replay, stage.device) for _, replay in tries]
                    compiled = tries[0][1]()
                except Exception as error:
                    refused[f"{kernel} {config}"] = f"{type(error).__name__}: {str(error)[:200]}"
                    if "CUDA error" in str(error):
                        raise
                    continue
                gain = math.prod(t / m for t, m in zip(times, mine, strict=True)) ** (1 / len(mine))
                rows.append(
                    {
                        "config": config,
                        "gain": gain,
                        "seconds": mine,
                        "registers": getattr(compiled, "n_regs", None),
                        "spills": getattr(compiled, "n_spills", None),
                    }
                )
            rows.sort(key=lambda row: -row["gain"])
            table = gt._config(kernel, family, arithmetic, block)
            found[f"{kernel} {dtype}"] = {"cases": [str(c) for c in shapes], "table": table, "table_seconds": times, "tried": rows}
            if rows and rows[0]["gain"] > 1.03:
                config = rows[0]["config"]
                found[f"{kernel} {dtype}"]["row"] = (family, arithmetic, block, config)
                faster = f"{rows[0]['gain']:.2f} x as fast as {tuple(table)}"
                lines.append(f'    "{kernel}": ("{family}", "{arithmetic}", {block}, _Config{config}),  # {faster}')
            stage.save(family=family, kernels=found, refused=refused)
    text = "\n".join(["# rows for _CONFIGS in kernels/gpsa/gpu_triton.py, each ahead of its kernel's others", *lines, ""])
    (stage.out / "configs.txt").write_text(text)
    if not found:
        raise RuntimeError("no kernel was timed")


def _prepare(stage: Stage) -> list[str]:
    """Let this process run Triton with the rows that the sweep found; returns them."""
    from convit.dispatch import ORDER
    from convit.kernels.gpsa import gpu_triton as gt

    ORDER["torch", stage.device] = ("triton", "sdpa")  # "sdpa" is the peer of SDPA with the factored position
    used = []
    for name, kernel in stage.load().get("sweep", {}).get("kernels", {}).items():
        if "row" in kernel:
            family, arithmetic, largest, config = kernel["row"]
            gt._CONFIGS[name.split()[0]].insert(0, (family, arithmetic, largest, gt._Config(*config)))
            used.append(f"{name}: {tuple(config)}")
    return used


# ----------------------------------------------------------------------------------------------------------------- benchmarks
def _session(stage: Stage, budget: float):
    import torch
    from roofline import Roofline
    from session import Session

    session = Session(
        stage.device,
        full=not stage.rehearse,
        threads=str(torch.get_num_threads()),
        budget=budget,
        rounds=3 if stage.rehearse else 25,
        isa=None,
    )
    session.rooflines = {key: Roofline(**peaks) for key, peaks in stage.load().get("roofline", {}).items() if isinstance(peaks, dict)}
    return session


def _group(stage: Stage, session, problem, peers, with_memory: bool = False) -> None:
    """Measure one group and keep it: in run.json, each competitor's samples."""
    import checks
    import torch

    group = session.group(problem, peers, with_memory and not stage.rehearse)
    checks._expected.cache_clear()
    if stage.device == "cuda":
        torch.cuda.empty_cache()
    entries, absent = [], {}
    for name, mine in group.items():
        if mine.samples:
            entries.append({"group": str(problem), "info": mine.info, "wall": [float(f"{t:.5g}") for t in mine.samples.wall]})
        else:
            absent[name] = mine.missing or f"{type(mine.error).__name__}: {str(mine.error)[:300]}"
            if mine.error:
                traceback.print_exception(mine.error)
                if "CUDA error" in str(mine.error):
                    raise mine.error
    groups = stage.load().get(stage.name, {}).get("groups", [])
    stage.save(groups=[*groups, {"name": str(problem), "entries": entries, "absent": absent}], record=session.record())


def _ours_failed(stage: Stage) -> None:
    groups = stage.load().get(stage.name, {}).get("groups", [])
    wrong = [f"{g['name']}: {name}: {why}" for g in groups for name, why in g["absent"].items() if name in ("convit triton",)]
    if wrong:
        raise AssertionError("\n".join(wrong))
    if not groups:
        raise RuntimeError("nothing was measured")


def _core_problems(stage: Stage) -> list[tuple]:
    """(problem, with the peers that compile, with memory), the most telling first."""
    import torch
    from peers import Core

    threads = torch.get_num_threads()
    if stage.rehearse:
        return [(Core(1, (2, 2), 1, 16, backward, threads), False, False) for backward in (False, True)]

    def both(batch, side, heads, dim, dtype="bfloat16", compiled=False, with_memory=False):
        return [(Core(batch, (side, side), heads, dim, b, threads, dtype, "cuda"), compiled, with_memory) for b in (False, True)]

    large = (Core(1, (128, 128), 4, 48, False, threads, "bfloat16", "cuda"), False, False)
    return [
        *both(128, 14, 9, 48, with_memory=True), *both(4, 56, 9, 48, with_memory=True), *both(128, 14, 4, 48), *both(64, 14, 16, 48),
        *both(16, 28, 9, 48), *both(64, 14, 16, 64), *both(16, 32, 9, 48), large,
        *both(64, 14, 9, 48, compiled=True), *both(2, 56, 9, 48, compiled=True),
        *both(1, 14, 4, 48), *both(8, 14, 9, 48), *both(256, 14, 9, 48), *both(128, 14, 9, 48, "float16"), *both(64, 14, 9, 48, "float32"),
    ]  # fmt: skip


def core(stage: Stage) -> None:
    from peers import core_peers

    stage.save(groups=[], tuned=_prepare(stage))
    session = _session(stage, 0.1 if stage.rehearse else 1.2)
    peers, left_out = core_peers(stage.device), []
    for problem, compiled, with_memory in _core_problems(stage):
        if stage.left() < (35 if compiled else 8):
            left_out.append(str(problem))
            continue
        _group(stage, session, problem, [p for p in peers if compiled or p.name not in COMPILED], with_memory)
    stage.save(out_of_time=left_out)
    _ours_failed(stage)


def _launch_times(stage: Stage) -> dict[str, dict[str, float]]:
    """Seconds of host and device for one small call: what the host takes to issue it, and a CUDA graph of it replayed."""
    import torch
    from peers import Core, core_peers

    found = {}
    for backward in (False, True):
        problem = Core(
            1,
            (2, 2) if stage.rehearse else (14, 14),
            4,
            48,
            backward,
            dtype="float32" if stage.rehearse else "bfloat16",
            device=stage.device,
        )
        for peer in core_peers(stage.device):
            if peer.name not in ("convit triton", "plain SDPA", "convit sdpa", "timm eager"):
                continue
            call, count = peer.build(problem), 2 if stage.rehearse else 100
            call()
            if stage.device == "cuda":
                for _ in range(10):
                    call()
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                call()
            mine = {"host": (time.perf_counter() - start) / count}
            if stage.device == "cuda":
                torch.cuda.synchronize()
                try:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        call()
                    mine["graph"] = _seconds(graph.replay, "cuda", 0.005)
                except RuntimeError as error:
                    mine["graph_error"] = str(error)[:200]
            found[f"{'fwd+bwd' if backward else 'fwd'} {peer.name}"] = mine
    return found


def models(stage: Stage) -> None:
    import torch
    from models import Model, model_peers

    stage.save(groups=[], tuned=_prepare(stage))
    session = _session(stage, 0.1 if stage.rehearse else 3.0)
    threads = torch.get_num_threads()
    if stage.rehearse:
        # a whole model takes minutes in the interpreter: here its attention is the framework's, and only the harness is rehearsed
        from convit.dispatch import ORDER

        ORDER["torch", "cpu"] = ("sdpa",)
        problems = [(Model("convit_tiny", 1, threads, train=train), False) for train in (False, True)]
        names = ("convit sdpa", "timm ViT with SDPA")
    else:
        sizes = [("small", 128), ("tiny", 128), ("base", 64), ("base_plus", 64)]
        known = [(f"convit_{name}", batch) for name, batch in sizes]
        plain = [(Model(name, batch, threads, "bfloat16", "cuda", train), False) for name, batch in known for train in (False, True)]
        few = [(Model(name, 1, threads, "bfloat16", "cuda"), False) for name in ("convit_tiny", "convit_small")]
        full = [(Model("convit_small", 256, threads, "bfloat16", "cuda"), False)]
        problems = [*plain[:4], *few, *plain[4:6], (Model("convit_tiny", 64, threads, "bfloat16", "cuda"), True), *plain[6:], *full]
        problems += [(Model("convit_tiny", 64, threads, "bfloat16", "cuda", True), True)]
        names = ("convit triton", "convit.accelerate(timm)", "timm convit eager", "timm ViT with SDPA")
    left_out = []
    for problem, compiled in problems:
        if stage.left() < (50 if compiled else 20 if "base" in problem.name else 12):
            left_out.append(str(problem))
            continue
        peers = [p for p in model_peers(stage.device) if p.name in names or (compiled and p.name in COMPILED)]
        _group(stage, session, problem, peers)
    stage.save(out_of_time=left_out)
    _ours_failed(stage)


# -------------------------------------------------------------------------------------------------------------------- profile
def profile(stage: Stage) -> None:
    import torch
    from gpsa_cases import Case, make_inputs, run
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    _prepare(stage)
    cuda = stage.device == "cuda"
    tables = []
    for case in [Case(128, 9, 48, (14, 14)), Case(4, 9, 48, (56, 56))] if cuda else [Case(1, 1, 16, (2, 3))]:
        inputs, grad = make_inputs(case, dtype=torch.bfloat16 if cuda else torch.float32, device=stage.device)
        run(_triton, inputs, grad, case.grid)
        with profiled(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
            run(_triton, inputs, grad, case.grid)
            if cuda:
                torch.cuda.synchronize()
        rows = record.key_averages()
        kernels = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) for e in rows}
        kernels = {name: us for name, us in sorted(kernels.items(), key=lambda item: -item[1])[:14] if us > 0}
        tables.append(
            f"{case}: microseconds of each kernel of forward and backward\n"
            + "\n".join(f"{us:10.1f}  {name[:110]}" for name, us in kernels.items())
        )
        stage.save(**{str(case): kernels})
    stage.save(launch=_launch_times(stage))
    ncu = shutil.which("ncu")
    if ncu and cuda and stage.left() > 12:
        sections = [
            x
            for name in ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
            for x in ("--section", name)
        ]
        command = [
            ncu,
            *sections,
            "--kernel-name",
            "regex:_(fwd|dq|dkdv)_(tile|loop)_kernel",
            "--launch-count",
            "6",
            *_one_call(tiny=False),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=stage.left() - 4, cwd=ROOT)
            tables.append((done.stdout + done.stderr)[-40000:])
            stage.save(ncu=done.returncode)
        except subprocess.TimeoutExpired as error:
            tables.append((error.stdout or b"").decode(errors="replace")[-40000:])
            stage.save(ncu="out of time")
    else:
        stage.save(ncu="not run" if ncu else "not installed")
    (stage.out / "profile.txt").write_text("\n\n".join(tables) + "\n")


# ----------------------------------------------------------------------------------------------------------- plots and summary
def _entries(data: dict, names: tuple[str, ...] = ("core", "models")) -> list:
    from report import Entry

    groups = [g for name in names for g in data.get(name, {}).get("groups", [])]
    return [Entry(e["group"], e["info"], tuple(e["wall"])) for g in groups for e in g["entries"]]


def plots(stage: Stage) -> None:
    import plots as drawing
    from report import Run

    data, entries = stage.load(), _entries(stage.load())
    entries.sort(key=lambda e: e.problem["dtype"] == "bfloat16")  # the plots show the last type
    record = next((data[name]["record"] for name in ("core", "models") if "record" in data.get(name, {})), None)
    if record is None:
        raise RuntimeError("there is nothing to plot: neither benchmark left a result")
    run = Run.of(entries, record | {"rooflines": {k: v for k, v in data.get("roofline", {}).items() if isinstance(v, dict)}})
    with drawing.plt.rc_context(drawing.STYLE):
        for name in ("speed", "roofline"):
            figure = getattr(drawing, name)(run)
            figure.savefig(stage.out / f"{name}.png", bbox_inches="tight", metadata={"Software": None})
            drawing.plt.close(figure)


def _median(values: list[float]) -> float:
    values = sorted(values)
    return values[len(values) // 2] if len(values) % 2 else (values[len(values) // 2 - 1] + values[len(values) // 2]) / 2


def _short(group: dict) -> str:
    """One line of the summary: ours, its distance from the roofline, everyone else's time over ours."""
    by_name = {e["info"]["peer"]: e for e in group["entries"]}
    mine = next((e for e in group["entries"] if e["info"]["ours"]), None)
    if mine is None:
        return f"{group['name']}: ours is missing: " + "; ".join(group["absent"].values())[:80]
    median, others = _median(mine["wall"]), []
    for name, e in by_name.items():
        if e is not mine:
            theirs = dict(zip(e["info"]["rounds"], e["wall"], strict=True))
            ratio = _median([theirs[r] / t for r, t in zip(mine["info"]["rounds"], mine["wall"], strict=True) if r in theirs] or [math.nan])
            short = {
                "timm eager": "timm",
                "timm convit eager": "timm",
                "SDPA + dense P@v": "dense",
                "plain SDPA": "SDPA",
                "convit sdpa": "factored",
            }
            short |= {
                "torch.compile(timm)": "compiled",
                "FlexAttention x 2": "flex",
                "timm ViT with SDPA": "ViT",
                "convit.accelerate(timm)": "accel",
            }
            others.append(f"{short.get(name, name)} {ratio:.2f}")
    floor = f" roof {100 * mine['info']['roofline'] / median:.0f}%" if "roofline" in mine["info"] else ""
    if "peak" in mine["info"]:
        floor += f" peak {mine['info']['peak'] / 1e6:.0f} MB"
    return f"{group['name'].replace(' cuda', '')}: {median * 1e6:.0f} us{floor} | " + ", ".join(others)


def summary(out: Path) -> int:
    """Print and write at most 40 lines, from whatever run.json holds; 1 if a stage failed."""
    data = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else {}
    found, ended = data.get("environment", {}), data.get("stages", {})
    versions = found.get("versions", {})
    lines = [
        f"{found.get('device', 'device unknown')}, torch {versions.get('torch')}, triton {versions.get('triton')}, "
        f"commit {str(found.get('commit'))[:10]}"
    ]
    words = [
        f"{name} {'ok' if ended[name]['status'] == 0 else 'FAILED(' + str(ended[name]['status']) + ')'} {ended[name]['seconds']}s"
        for name in STAGES
        if name in ended
    ]
    lines += ["stages: " + ", ".join(words)]
    for name, end in ended.items():
        if end["status"] != 0:
            lines.append(f"  {name}: " + str(data.get(name, {}).get("error", "killed or out of time")).splitlines()[0][:150])
    judged = data.get("correctness", {})
    if "checks" in judged:
        lines.append(f"correct: {judged['passed']} of {judged['checks']}; compute-sanitizer: {judged.get('sanitizer', {}).get('status')}")
        lines += [f"  {name}: {why.splitlines()[0]}"[:160] for name, why in list(judged["wrong"].items())[:4]]
    for key, peaks in data.get("roofline", {}).items():
        if isinstance(peaks, dict):
            lines.append(f"peak {key.rsplit(' ', 1)[0]}: {peaks['flops'] / 1e12:.4g} TFLOP/s, {peaks['bytes'] / 1e9:.4g} GB/s")
    rows = [
        f"{name} {tuple(k['row'][3])} {k['tried'][0]['gain']:.2f}x"
        for name, k in data.get("sweep", {}).get("kernels", {}).items()
        if "row" in k
    ]
    if "kernels" in data.get("sweep", {}):
        lines.append(("sweep (configs.txt), used below: " + "; ".join(rows) if rows else "sweep: the table's rows stand")[:400])
    launch = data.get("profile", {}).get("launch", {})
    if launch:
        lines.append(
            "one small call, host/graph us: "
            + ", ".join(f"{n} {t['host'] * 1e6:.0f}/{t.get('graph', math.nan) * 1e6:.0f}" for n, t in launch.items())[:380]
        )
    groups = [g for name in ("core", "models") for g in data.get(name, {}).get("groups", [])]
    if groups:
        lines.append("ours | the others' time over ours, medians of interleaved rounds:")
    room = 40 - len(lines) - 2
    models_ = [g for g in groups if g["name"].startswith("convit_")]
    kept = [g for g in groups if g not in models_][: max(room - len(models_), room // 2)] + models_
    lines += [_short(g)[:200] for g in kept[:room]]
    left_out = [x for name in ("core", "models") for x in data.get(name, {}).get("out_of_time", [])]
    lines.append(f"{len(groups) - len(kept[:room])} further groups in run.json; left out for time: {len(left_out)}")
    text = "\n".join(lines[:40]) + "\n"
    (out / "summary.txt").write_text(text)
    print(text, end="")
    return 0


WORK = {"environment": environment, "correctness": correctness, "roofline": roofline_stage, "sweep": sweep, "core": core, "models": models}
WORK |= {"profile": profile, "plots": plots}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "record", "summary"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that the stage may take")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--ended", help="with 'record': STAGE:STATUS:SECONDS")
    args = parser.parse_args(argv)
    if args.stage == "summary":
        return summary(args.out)
    stage = Stage(args.stage, args.out, args.limit, args.rehearse)
    if args.stage == "record":
        name, status, seconds = args.ended.split(":")
        stage.save("stages", **{name: {"status": int(status), "seconds": int(seconds)}})
        return 0
    print(f"==== {args.stage}", flush=True)
    try:
        stage.reset()
        if args.stage in os.environ.get("CONVIT_GPU_FAIL", "").split(","):
            raise RuntimeError("CONVIT_GPU_FAIL names this stage")
        if args.rehearse:
            os.environ["TRITON_INTERPRET"] = "1"
        WORK[args.stage](stage)
    except Exception as error:
        traceback.print_exc()
        stage.save(error=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
