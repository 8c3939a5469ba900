"""What the machine reaches, and the attention core and whole models against their peers.

The time of a competitor is the device's, its call captured once and replayed as a CUDA graph; the host's is noted beside it.
"""

import os
import shutil
import time
import traceback

from stage import Stage, answer
from sweep import prepare

COMPILED = ("torch.compile(convit)", "torch.compile(timm)", "torch.compile(ViT)", "FlexAttention x 2")


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
    session.graphs = stage.device == "cuda"
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
    wrong = [f"{g['name']}: {why}" for g in groups for name, why in g["absent"].items() if name == "convit triton"]
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


def _groups(stage: Stage, budget: float, problems: list[tuple], peers: list, needed) -> bool:
    """Measure ``problems`` (problem, its peers, with memory) that no earlier call has; whether some are left for another.

    ``needed``: seconds without which a problem is not begun.
    """
    done = [group["name"] for group in stage.load().get(stage.name, {}).get("groups", [])]
    session, left = _session(stage, budget), []
    for problem, chosen, with_memory in problems:
        if str(problem) in done:
            continue
        if left or stage.left() < needed(problem, chosen):
            left.append(str(problem))
            continue
        _group(stage, session, problem, [peer for peer in peers if chosen(peer.name)], with_memory)
    stage.save(out_of_time=left)
    _ours_failed(stage)
    return bool(left)


def _compiled(name: str) -> bool:
    return name in COMPILED


def core(stage: Stage) -> bool:
    from peers import core_peers

    stage.save(tuned=prepare(stage))  # before the peers: it says which of ours there are
    problems = [(problem, (lambda name: True) if compiled else (lambda name: not _compiled(name)), with_memory)
                for problem, compiled, with_memory in _core_problems(stage)]  # fmt: skip
    return _groups(
        stage, 0.1 if stage.rehearse else 1.2, problems, core_peers(stage.device), lambda _, chosen: 50 if chosen(COMPILED[0]) else 10
    )


def models(stage: Stage) -> bool:
    import torch
    from models import Model, model_peers

    stage.save(tuned=prepare(stage))
    threads = torch.get_num_threads()
    if stage.rehearse:
        # a whole model takes minutes in the interpreter: here its attention is the framework's, and only the harness is rehearsed
        from convit.dispatch import ORDER

        ORDER["torch", "cpu"] = ("sdpa",)
        names: tuple[str, ...] = ("convit sdpa", "timm ViT with SDPA")
        problems = [(Model("convit_tiny", 1, threads, train=train), False) for train in (False, True)]
    else:
        names = ("convit triton", "convit.accelerate(timm)", "timm convit eager", "timm ViT with SDPA", "convit without GPSA")

        def both(name: str, batch: int, compiled: bool = False) -> list[tuple]:
            return [(Model(f"convit_{name}", batch, threads, "bfloat16", "cuda", train), compiled) for train in (False, True)]

        problems = [
            *both("small", 128), *both("tiny", 128), both("tiny", 1)[0], both("small", 1)[0], *both("tiny", 64, True), *both("base", 64),
            *both("small", 64, True), *both("base_plus", 64), both("small", 256)[0],
        ]  # fmt: skip

    def fitting(compiled: bool):
        return lambda name: name in names or (compiled and _compiled(name))

    def needed(problem, chosen) -> float:
        return 100 if chosen(COMPILED[0]) else 25 if "base" in problem.name else 15

    return _groups(stage, 0.1 if stage.rehearse else 2.5, [(p, fitting(c), False) for p, c in problems], model_peers(stage.device), needed)
