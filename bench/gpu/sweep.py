"""Configurations of every kernel, timed beside the table's own; large grids by the loops and by the framework's attention with our mix;
and the rows found, put to use."""

import functools
import math
import time

from stage import Stage, device_seconds, pooled, workers


def _candidates(rehearse: bool) -> dict[str, list[tuple[int, ...]]]:
    """Kernel -> (rows, keys, warps, stages, steps) to try beside the table's own."""
    if rehearse:
        return {kernel: [(16, 16, 4, 1, 16)] for kernel in ("dq_tile", "fwd_loop", "mix")} | {
            "fwd_tile": [(16, 16, 4, 1, 16), (16, 16, 4, 1, 0)]
        }

    def grid(rows, keys, warps, stages, steps=(16,)):
        return [(r, k, w, s, t) for r in rows for t in steps for k in keys for w in warps for s in stages]

    return {
        "fwd_tile": grid((32, 64), (256,), (4, 8), (1, 2), (1, 2, 4))
        + grid((128,), (256,), (8,), (1,), (1, 2))
        + [(128, 256, 8, 2, 0), (32, 256, 4, 2, 0), (64, 256, 4, 2, 0)],  # persistent
        "dq_tile": grid((32, 64), (32, 64, 128), (4, 8), (1, 2)) + grid((128,), (32, 64), (8,), (1,)),
        "dkdv_tile": grid((16, 32, 64), (64, 128, 256), (4, 8), (1,)) + grid((32,), (64, 128), (4, 8), (2,)),
        "fwd_loop": grid((64, 128), (32, 64, 128), (4, 8), (1, 2, 3)),
        "dkdv_loop": grid((32, 64, 128), (64, 128), (4, 8), (1, 2, 3)),
        "dq_loop": grid((64, 128), (32, 64), (4, 8), (1, 2, 3)),
        "mix": grid((32, 64, 128), (32, 64), (4, 8), (1, 2)),
        "moments": grid((32, 64, 128), (32, 64), (4, 8), (1, 2)),
    }


def _shapes(kernel: str, dtype: str, dim: int, rehearse: bool) -> list:
    from gpsa_cases import Case

    if rehearse:
        return [Case(1, 1, 16, (2, 3) if kernel.endswith("tile") or dtype == "float32" else (1, 65))]  # the loops are float32's at any size
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
    from convit.kernels.gpsa.gpu_triton import launch
    from convit.kernels.gpsa.gpu_triton.configs import Config, Row

    inputs, grad = _inputs(case, dtype, device)
    launches = []

    def record(call, *tensors):
        if call.kernel.__name__ == f"{kernel}_kernel":
            launches.append((call, tensors))
        launch.launch(call, *tensors)

    with launch.trial(through=record, rows={kernel: [Row("", "", 128, Config(*config))] if config else []}):
        scale = case.head_dim**-0.5
        outputs = launch.forward(*inputs, *case.grid, scale)
        if not kernel.startswith("fwd"):
            outputs = launch.backward(grad, *inputs, *outputs, *case.grid, scale)

    def replay():
        for call, tensors in launches:
            launch.launch(call, *tensors)
        return launches[0][0].compiled

    return [x.clone() for x in outputs], replay


def _compile_one(job: tuple) -> str:
    """What the gates of bench/aot.py say against the kernel, which is then in Triton's cache; empty where it may be timed."""
    try:
        kernel, case, dtype, config, device, family = job
        compiled = _captured(kernel, case, dtype, config, device)[1]()
        if not hasattr(compiled, "asm"):  # the interpreter
            return ""
        import aot

        if family not in aot.SHARED:
            return f"{compiled.n_spills} registers spilled" if compiled.n_spills else ""
        row = {"case": dtype, "matrix": dtype != "float32", **aot.resources(compiled, family, config[2])}
        return aot.problem(row) or ""
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def _timed(kernel: str, dtype: str, shapes: list, configs_: list, base: list, times: list[float], device: str, end: float):
    """Rows of figures for each configuration beside the table's, those that fail or differ with the reason; until ``end``."""
    import torch
    from checks import TOLERANCES, relative_error

    rows, refused = [], {}
    for config in configs_:
        if time.monotonic() > end:
            refused[f"{kernel} {dtype} {config}"] = "out of time"
            continue
        try:
            tries = [_captured(kernel, case, dtype, config, device) for case in shapes]
            floor = TOLERANCES.FLOOR[getattr(torch, dtype)]
            for (expected, _), (actual, _) in zip(base, tries, strict=True):
                for a, b in zip(actual, expected, strict=True):  # parameters' gradients are sums that cancel
                    error = relative_error(a, b.double())
                    if not error <= (2 if b.dim() > 2 else 20) * floor:
                        raise AssertionError(f"differs from the table's row by {error:.2e}")
            mine = [device_seconds(replay, device) for _, replay in tries]
            compiled = tries[0][1]()
        except Exception as error:
            refused[f"{kernel} {dtype} {config}"] = f"{type(error).__name__}: {str(error)[:200]}"
            if "CUDA error" in str(error):
                raise
            continue
        gain = math.prod(t / m for t, m in zip(times, mine, strict=True)) ** (1 / len(mine))
        rows.append({"config": list(config), "gain": gain, "seconds": mine, "registers": getattr(compiled, "n_regs", None)})
    return rows, refused


def _pass(kind: str, case, dtype: str, device: str, source: str, rows: dict) -> tuple[list, dict[str, float]]:
    """Outputs of a forward and backward pass with content from ``source``, and the device's seconds forward and in both."""
    from graphs import timed

    from convit.kernels.gpsa.gpu_triton import launch
    from convit.kernels.gpsa.gpu_triton.configs import Content

    inputs, grad = _inputs(case, dtype, device)
    rest = *case.grid, case.head_dim**-0.5
    kept: list = []

    def forward() -> tuple:
        return launch.forward(*inputs, *rest)

    def both() -> None:
        outputs = forward()
        kept[:] = outputs[0], *launch.backward(grad, *inputs, *outputs, *rest)

    seconds = {}
    with launch.trial(rows=rows, content=[Content("", kind, 256, 1, source)]):
        for name, call in (("fwd", forward), ("fwd+bwd", both)):
            seconds[name] = device_seconds(timed(call)[0] if device == "cuda" else call, device)
    return [x.clone() for x in kept], seconds


def _content(dtype: str, dim: int, block: int, family: str, device: str, rehearse: bool, rows: dict) -> dict:
    """Where the loop family's content is to come from: both ways timed on the loops' shapes, each with the rows that were found."""
    import torch
    from checks import TOLERANCES, relative_error

    from convit.kernels.gpsa.gpu_triton.configs import SLOTS

    kind = "float32" if dtype == "float32" else "half"
    found: dict = {"cases": {}}
    tokens = None
    shapes = sorted(_shapes("mix", dtype, dim, rehearse), key=lambda case: -case.grid[0] * case.grid[1])
    for case in shapes:  # the largest first: from which size on the framework's is faster
        (loop, mine), (sdpa, theirs) = (_pass(kind, case, dtype, device, source, rows) for source in ("loop", "sdpa"))
        floor = TOLERANCES.FLOOR[getattr(torch, dtype)]
        worst = max(relative_error(a, b.double()) / (2 if b.dim() > 2 else 20) for a, b in zip(sdpa, loop, strict=True))
        gain = math.prod(mine[name] / theirs[name] for name in mine) ** 0.5
        found["cases"][str(case)] = {"loop": mine, "sdpa": theirs, "gain": gain, "error": worst}
        if not worst <= floor:
            found["refused"] = f"{case}: differs from the loops by {worst:.2e}, where {floor:.0e} is allowed"
            break
        if gain <= 1.03:
            break
        tokens = SLOTS + 1 if case is shapes[-1] else case.grid[0] * case.grid[1]
    if tokens and "refused" not in found:
        found["row"] = (family, kind, block, tokens, "sdpa")
    return found


def sweep(stage: Stage) -> None:
    """One element type after the other, of each all kernels; what an earlier call has timed is not timed again."""
    import torch

    from convit.kernels.gpsa.gpu_triton import configs

    family = configs.DEVICES[stage.device].family(0)
    known = stage.load().get("sweep", {})
    content = known.get("content", {})
    found, refused = known.get("kernels", {}), known.get("refused", {})
    # (element type, head dim, largest BD of the row): the models first
    targets = [("float16", 16, 16), ("float32", 16, 16)] if stage.rehearse else [("bfloat16", 48, 64), ("float32", 48, 64)]
    for number, (dtype, dim, block) in enumerate(targets):
        share = stage.left() - 40 if number + 1 == len(targets) else 0.72 * stage.left()
        end = time.monotonic() + share
        arithmetic = "half" if dtype != "float32" else configs.precision(torch.float32, stage.device)
        # the tile kernels are for half precision
        candidates = {k: c for k, c in _candidates(stage.rehearse).items() if arithmetic == "half" or "tile" not in k}
        tried = {k: [tuple(row["config"]) for row in found.get(f"{k} {dtype}", {}).get("tried", [])] for k in candidates}
        jobs = [
            (kernel, _shapes(kernel, dtype, dim, stage.rehearse)[0], dtype, config, stage.device, family)
            for kernel, all_ in candidates.items()
            for config in all_
            if config[3] <= configs.most_stages(family) and config not in tried[kernel]
        ]
        if reason := configs.why_not_persistent(family):
            refused |= {f"{job[0]} {dtype} {job[3]}": reason for job in jobs if job[3][4] == 0}
            jobs = [job for job in jobs if job[3][4] != 0]
        jobs.sort(key=lambda job: candidates[job[0]].index(job[3]))  # every kernel gets its turn before time is up
        answers = pooled(stage, _compile_one, jobs, workers(stage, len(jobs)), 0.6 * share) if jobs else []
        usable = {
            kernel: [job[3] for job, answer in zip(jobs, answers, strict=True) if job[0] == kernel and not answer] for kernel in candidates
        }
        refused |= {f"{job[0]} {dtype} {job[3]}": answer for job, answer in zip(jobs, answers, strict=True) if answer}
        for kernel, some in usable.items():
            if time.monotonic() > end:
                refused[f"{kernel} {dtype}"] = "out of time"
                continue
            shapes = _shapes(kernel, dtype, dim, stage.rehearse)
            base = [_captured(kernel, case, dtype, None, stage.device) for case in shapes]
            times = [device_seconds(replay, stage.device) for _, replay in base]
            rows, others = _timed(kernel, dtype, shapes, some, base, times, stage.device, end)
            refused |= others
            rows += found.get(f"{kernel} {dtype}", {}).get("tried", [])
            rows.sort(key=lambda row: -row["gain"])
            table = configs.choose(kernel, family, arithmetic, block)
            mine = {"cases": [str(c) for c in shapes], "table": list(table), "table_seconds": times, "tried": rows}
            if rows and rows[0]["gain"] > 1.03:
                mine["row"] = (family, arithmetic, block, rows[0]["config"])
            found[f"{kernel} {dtype}"] = mine
            stage.save(family=family, kernels=found, refused=refused)
        if dtype not in content and stage.left() > 10:
            rows = {name.split()[0]: [_row(k["row"])] for name, k in found.items() if "row" in k and name.endswith(f" {dtype}")}
            content[dtype] = _content(dtype, dim, block, family, stage.device, stage.rehearse, rows)
            stage.save(content=content)
    lines = [
        f'    "{name.split()[0]}": ("{family}", "{arithmetic}", {block}, Config{tuple(config)}),'
        f"  # {k['tried'][0]['gain']:.2f} x as fast as {tuple(k['table'])}"
        for name, k in found.items()
        if "row" in k
        for family, arithmetic, block, config in [k["row"]]
    ]
    lines += [f"    Content{tuple(k['row'])},  # for CONTENT" for k in content.values() if "row" in k]
    text = "\n".join(["# rows for CONFIGS in kernels/gpsa/gpu_triton/configs.py, each ahead of its kernel's others", *lines, ""])
    (stage.out / "configs.txt").write_text(text)
    if not found:
        raise RuntimeError("no kernel was timed")


def _row(found: list):
    from convit.kernels.gpsa.gpu_triton.configs import Config, Row

    family, arithmetic, largest, config = found
    return Row(family, arithmetic, largest, Config(*config))


def prepare(stage: Stage) -> list[str]:
    """Let this process run Triton with the rows that the sweep found; returns them."""
    from convit.dispatch import ORDER
    from convit.kernels.gpsa.gpu_triton.configs import CONFIGS, CONTENT, Content

    ORDER["torch", stage.device] = ("triton", "sdpa")  # "sdpa" is the peer of SDPA with the factored position
    used, swept = [], stage.load().get("sweep", {})
    for name, kernel in swept.get("kernels", {}).items():
        if "row" in kernel:
            CONFIGS[name.split()[0]].insert(0, row := _row(kernel["row"]))
            used.append(f"{name}: {tuple(row.config)}")
    for dtype, mine in swept.get("content", {}).items():
        if "row" in mine:
            CONTENT.insert(0, Content(*mine["row"]))
            used.append(f"content {dtype}: {tuple(mine['row'])}")
    return used
