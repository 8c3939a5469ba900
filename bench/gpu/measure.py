"""What the machine reaches, the attention core and whole models against their peers, and device time kernel by kernel."""

import os
import shutil
import subprocess
import time
import traceback

from stage import ROOT, Stage, answer, device_seconds, gpsa_triton, one_call_command
from sweep import prepare

COMPILED = ("torch.compile(timm)", "FlexAttention x 2")


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
        values = answer("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").split("\n")[0].split(",")
        found["nvidia-smi"] = dict(zip(fields.split(","), (x.strip() for x in values), strict=False))
    stage.save(**found, commit=answer("git", "rev-parse", "HEAD") or "unknown", date=time.strftime("%Y-%m-%d"))


def roofline(stage: Stage) -> None:
    import torch
    from roofline import measure as measured

    for dtype in ("float32",) if stage.rehearse else ("bfloat16", "float16", "float32"):
        peaks = measured(stage.device, dtype, 0.02 if stage.rehearse else 0.5)
        stage.save(**{f"{stage.device} {dtype} {torch.get_num_threads()}": peaks.asdict()})


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

    stage.save(groups=[], tuned=prepare(stage))
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
                    mine["graph"] = device_seconds(graph.replay, "cuda", 0.005)
                except RuntimeError as error:
                    mine["graph_error"] = str(error)[:200]
            found[f"{'fwd+bwd' if backward else 'fwd'} {peer.name}"] = mine
    return found


def models(stage: Stage) -> None:
    import torch
    from models import Model, model_peers

    stage.save(groups=[], tuned=prepare(stage))
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


def profile(stage: Stage) -> None:
    import torch
    from gpsa_cases import Case, make_inputs, run
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    prepare(stage)
    cuda = stage.device == "cuda"
    tables = []
    for case in [Case(128, 9, 48, (14, 14)), Case(4, 9, 48, (56, 56))] if cuda else [Case(1, 1, 16, (2, 3))]:
        inputs, grad = make_inputs(case, dtype=torch.bfloat16 if cuda else torch.float32, device=stage.device)
        run(gpsa_triton, inputs, grad, case.grid)
        with profiled(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
            run(gpsa_triton, inputs, grad, case.grid)
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
            *one_call_command(tiny=False),
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
