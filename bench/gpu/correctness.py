"""Values, gradients, determinism, poisoned memory, CUDA graphs, torch.compile; compute-sanitizer."""

import os
import re
import shutil

from stage import Stage, gpsa_triton, one_call_command, pooled, watched, workers


def _poison() -> None:
    import torch

    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)


def _values(case, dtype, tf32: bool, device: str) -> str:
    """Values and gradients against float64 in poisoned memory, twice with the same bits."""
    import torch
    from gpsa_cases import check, eager, make_inputs, reference64, relative_error, run

    inputs, grad = make_inputs(case, dtype=dtype, device=device)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        ours, again = run(gpsa_triton, inputs, grad, case.grid), run(gpsa_triton, inputs, grad, case.grid)
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
        run(gpsa_triton, inputs, grad, case.grid)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(gpsa_triton, inputs, grad, case.grid)
    other, other_grad = make_inputs(case, seed=1, dtype=dtype, device=device)
    for old, new in zip((*inputs, grad), (*other, other_grad), strict=True):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    expected = run(gpsa_triton, other, other_grad, case.grid)
    return "; ".join(f"{name} of the graph differs" for name in expected if not torch.equal(captured[name], expected[name]))


def _compiled(case, dtype, tf32: bool, device: str) -> str:
    """torch.compile without a graph break, forward and backward, against the same calls without it."""
    import torch
    from gpsa_cases import make_inputs, relative_error, run

    inputs, grad = make_inputs(case, dtype=dtype, device=device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(lambda *args: gpsa_triton(*args) * 2.0, fullgraph=True, backend=backend)
    ours, expected = run(compiled, inputs, grad, case.grid), run(lambda *a: gpsa_triton(*a) * 2.0, inputs, grad, case.grid)
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
    few = cases[:1] if stage.rehearse else [CASES[0], CASES[5], CASES[6], CASES[7], loops[1], many[0]]
    jobs = [
        ("values", case, dtype, tf32, stage.device)
        for dtype, tf32 in reversed(kinds)
        for case in (few if tf32 or dtype == "float16" else cases)
    ]
    jobs += [
        (kind, case, dtype, False, stage.device) for kind in ("graph", "compile") for dtype in ("float16",) for case in (odd, cases[-1])
    ]
    answers = pooled(stage, _judge, jobs, workers(stage, len(jobs)), 0.7 * stage.left())
    # a process that one check spoiled may have failed the ones after it: each gets another
    suspects = [i for i, answer in enumerate(answers) if "CUDA error" in answer or "illegal" in answer or "no answer" in answer]
    if suspects and stage.left() > 15:
        again = pooled(stage, _judge, [jobs[i] for i in suspects], workers(stage, len(suspects)), 0.6 * stage.left(), fresh=True)
        for i, answer in zip(suspects, again, strict=True):
            answers[i] = answer
    names = [f"{kind} {case} {dtype}{' tf32' if tf32 else ''}" for kind, case, dtype, tf32, _ in jobs]
    wrong = {name: answer for name, answer in zip(names, answers, strict=True) if answer}
    stage.save(
        checks=len(jobs), passed=len(jobs) - len(wrong), wrong=wrong, skipped=["CUDA graphs: no CUDA device"] if stage.rehearse else []
    )
    if wrong:
        raise AssertionError("\n".join(f"{name}: {answer}" for name, answer in wrong.items()))


SANITIZERS = ("memcheck", "initcheck", "racecheck", "synccheck")


def sanitizer(stage: Stage) -> None:
    """The kernels under each tool of compute-sanitizer; every tensor an allocation of its own, so that a read past one is seen."""
    program = shutil.which("compute-sanitizer")
    found: dict[str, dict] = {}
    for number, tool in enumerate(SANITIZERS):
        if not program or stage.rehearse:
            found[tool] = {"status": "not installed" if not program else "no CUDA device"}
            continue
        command = [program, "--tool", tool, "--error-exitcode", "9", *one_call_command(tiny=True)]
        status, said = watched(command, (stage.left() - 4) / (len(SANITIZERS) - number), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found[tool] = {"status": status, "kernels": sorted(set(re.findall(r"\b\w+_kernel\b", said)))[:8], "tail": said[-600:]}
        stage.save(tools=found)
    stage.save(tools=found)
    wrong = {tool: report["tail"] for tool, report in found.items() if report["status"] == 9}
    if wrong:
        raise AssertionError("\n".join(f"{tool}: {tail}" for tool, tail in wrong.items()))
