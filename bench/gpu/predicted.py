"""Each kernel of a call, predicted and measured, and what Nsight Compute says of it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from stage import ROOT, Stage, gpsa_triton, one_call_command, watched
from sweep import prepare

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")


def _predicted(stage: Stage, family: str) -> dict[str, dict[str, dict]]:
    """Case -> kernel -> launches, bytes of its tensors and, on sm90, issue time in us. By bench/aot.py, in a process of its own:
    in this one Triton may interpret."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        cases = ("tiny", "--kernels", "reduce") if stage.rehearse else ("profile",)
        command = [sys.executable, str(ROOT / "bench/aot.py"), "--json", str(file), "--targets", family, "--cases", *cases]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=stage.left() - 5)
        if not file.exists():
            raise RuntimeError(done.stderr[-500:])
        rows = json.loads(file.read_text())
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        if "without" not in row["kernel"] and "error" not in row:
            mine = found.setdefault(row["case"], {}).setdefault(row["kernel"].split()[0], {"launches": 0, "bytes": 0, "issue": 0.0})
            mine["launches"] += 1
            mine["bytes"] += row["bytes"]
            mine["issue"] += row.get("issue_us", 0.0)
    return found


def _measured(stage: Stage, case, dtype: str) -> dict[str, float]:
    """Kernel -> microseconds of one forward and backward pass, what is not ours under the names that torch gives it."""
    import torch
    from gpsa_cases import Case, make_inputs, run
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    cuda = stage.device == "cuda"
    shape = Case(case.batch, case.heads, case.dim, case.grid)
    inputs, grad = make_inputs(shape, dtype=getattr(torch, dtype), device=stage.device)
    rounds = 10 if cuda else 1
    for _ in range(3 if cuda else 1):
        run(gpsa_triton, inputs, grad, case.grid)
    with profiled(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        for _ in range(rounds):
            run(gpsa_triton, inputs, grad, case.grid)
        if cuda:
            torch.cuda.synchronize()
    times = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / rounds for e in record.key_averages()}
    return {name.removesuffix("_kernel"): us for name, us in sorted(times.items(), key=lambda item: -item[1])[:14] if us > 0}


def table(case: str, predicted: dict[str, dict], measured: dict[str, float], bandwidth: float | None) -> list[str]:
    """Rows of kernels.md: a kernel can take no less than its instructions take to issue, nor than its tensors take to move once."""
    lines = ["", f"## {case}", "", "| kernel | launches | issue, us | bytes once, us | measured, us | measured over the larger |"]
    lines += ["|---|---|---|---|---|---|"]
    for name in [*predicted, *(name for name in measured if name not in predicted)]:
        mine, took = predicted.get(name), measured.get(name)
        issue = mine["issue"] if mine else 0.0
        moved = mine["bytes"] / bandwidth * 1e6 if mine and bandwidth else 0.0
        floor = max(issue, moved)
        cells = [f"{x:.1f}" if x else "-" for x in (issue, moved, took)]
        ratio = f"{took / floor:.2f}" if took and floor else "-"
        lines.append(f"| {name[:80]} | {mine['launches'] if mine else '-'} | " + " | ".join(cells) + f" | {ratio} |")
    return lines


def profile(stage: Stage) -> None:
    from aot import SETS, TARGETS

    from convit.kernels.gpsa.gpu_triton.configs import DEVICES

    prepare(stage)
    cuda = stage.device == "cuda"
    family = DEVICES["cuda"].family(0) if cuda else "sm90"
    bandwidth = max((peaks["bytes"] for peaks in stage.load().get("roofline", {}).values() if isinstance(peaks, dict)), default=None)
    measured = {str(case): _measured(stage, case, case.dtype) for case in SETS["profile" if cuda else "tiny"]}
    stage.save(measured=measured)
    predicted = _predicted(stage, family) if family in TARGETS else {}
    stage.save(predicted=predicted)
    lines = [
        "# The kernels, predicted and measured",
        "",
        f"{family}. Issue: instructions over the issue rate of an H100 (`bench/aot.py`). Bytes:",
    ]
    lines += ["every tensor of a launch once, at the copy bandwidth measured here."]
    for case, mine in measured.items():
        lines += table(case, predicted.get(case, {}), mine, bandwidth)
    (stage.out / "kernels.md").write_text("\n".join(lines) + "\n")
    ncu = shutil.which("ncu")
    if not (ncu and cuda and stage.left() > 12):
        stage.save(ncu="not run" if ncu else "not installed")
        return
    sections = [word for name in SECTIONS for word in ("--section", name)]
    # the clocks stay as they are: what is timed elsewhere runs at these too
    filters = ["--clock-control", "none", "--kernel-name", "regex:_(tile|loop)_kernel|mix|moments", "--launch-count", "14"]
    status, said = watched([ncu, *filters, *sections, *one_call_command(tiny=False)], stage.left() - 4)
    (stage.out / "ncu.txt").write_text(said[-60000:])
    stage.save(ncu=status)
