"""Rungs in MindSpore 2.7.0's AKG, without MindSpore: Ascend code (CCE) of the AKG and TBE operators, CUDA of the AKG ones.

    python lower.py cce|tbe|cuda          (the environment of MindSpore 2.10 beside this one describes the operators)

CANN's compiler ``ccec`` is stood in for by a script that keeps the source it is given and compiles nothing: what is shown is that AKG's
Ascend scheduler accepts the operators and what it makes of them. 2.10's library refuses to emit, 2.7.0's does.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels/gpsa"
ENVIRONMENTS = Path(os.environ["ASCEND_CHECK_ENVS"])
KILOBYTE = 1024

CCEC = """#!/bin/sh
# stands in for CANN's ccec: keeps the source, compiles nothing
out=""
while [ $# -gt 0 ]; do
  case "$1" in
    *.cce) cp "$1" "$KEEP" ;;
    -o) out="$2" ;;
  esac
  shift
done
[ -z "$out" ] || echo stand-in > "$out"
"""

# the vector instructions that the arithmetic of each operator must come to; float32 inside, so half is converted both ways
SOFTMAX = {"copy_gm_to_ubuf", "copy_ubuf_to_gm", "vconv_f162f32", "vmax", "vsub", "vexp", "vadd"}
INSTRUCTIONS = {
    "mix": SOFTMAX | {"vdiv", "vmul", "vconv_f322f16"},
    "delta": SOFTMAX | {"vdiv", "vmul"},
    "dscores": SOFTMAX | {"vdiv", "vmul", "vconv_f322f16"},
    "dpx": {"copy_gm_to_ubuf", "copy_ubuf_to_gm", "vconv_f162f32", "vmul", "vadd"},
    "dpy": {"copy_gm_to_ubuf", "copy_ubuf_to_gm", "vconv_f162f32", "vmul", "vadd"},
}


def wheel(environment: str) -> Path:
    return next((ENVIRONMENTS / environment).glob("lib/python3*/site-packages/mindspore"))


def requests(device: str, maps: int, grid: tuple[int, int], dtype: str) -> list[list]:
    """``ascend_akg.lowering`` in the environment that can import it."""
    code = (
        "import json, sys; from convit.kernels.gpsa.ascend_akg import lowering;"
        "print('REQUESTS', json.dumps(lowering(*json.loads(sys.argv[1]))))"
    )
    arguments = json.dumps([device, maps, list(grid), dtype])
    command = [str(ENVIRONMENTS / "mindspore/bin/python"), "-c", code, arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith("REQUESTS"))[9:])


def emit(command: list[str], request: str, plugin: str, name: str) -> tuple[Path, float]:
    """Run ``command`` with AKG's library for ``plugin`` in a folder of its own; the folder and the seconds it took."""
    folder = Path(f"emitted_{name}").resolve()
    folder.mkdir()
    tools = folder / "tools"
    tools.mkdir()
    for tool in ("ccec", "cce-ld", "ld.lld"):
        (tools / tool).write_text(CCEC)
        (tools / tool).chmod(0o755)
    here = wheel("mindspore-2.7")
    settings = os.environ | {
        "LD_LIBRARY_PATH": f"{here}/lib/plugin/{plugin}:{here}/lib",
        "PATH": f"{tools}:{os.environ['PATH']}",
        "KEEP": str(folder / f"{name}.cce"),
    }
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-I", *command], input=request, env=settings, cwd=folder, capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise AssertionError(f"{name}: exit status {done.returncode}\n{done.stderr[-1500:]}")
    return folder, time.monotonic() - start


def examine(name: str, source: str, instructions: set[str]) -> str:
    """Check emitted CCE of one operator; what to say of it."""
    found = set(re.findall(r"\b([a-z][a-z0-9_]*)\(", source))
    if missing := instructions - found:
        raise AssertionError(f"{name}: the emitted source lacks {', '.join(sorted(missing))}")
    buffers = [int(x) for x in re.findall(r"__ubuf__\s+\w+\s*\*\)\s*\((\d+)\)", source)]
    if max(buffers) >= 256 * KILOBYTE:
        raise AssertionError(f"{name}: a buffer starts at {max(buffers)}, past the unified buffer's 256 KB")
    if not re.search(r"\bset_flag\(", source) or not re.search(r"\bwait_flag\(", source):
        raise AssertionError(f"{name}: no synchronisation between pipes")
    double = "double-buffered" if re.search(r"\bcc\d+_db\w*", source) else "single-buffered"
    cores = "many cores" if "block_idx" in source else "one core"
    return f"{name}: {double}, {cores}, last buffer at {max(buffers) // KILOBYTE} KB"


def row(op: str, rung: str, result: str, unproven: str) -> None:
    print("ROW " + json.dumps({"op": op, "rung": rung, "result": result, "unproven": unproven}), flush=True)


UNPROVEN = "`ccec`, execution, 910B (the emitted architecture is dav-c100; for 910B AKG goes through CANN), speed"


def cce() -> None:
    def one(request: list, grid: tuple[int, int]) -> str:
        name = request[0].lstrip("_")
        tag = f"{name}_{grid[0]}x{grid[1]}"
        folder, _ = emit([str(KERNELS / "ascend_lower.py"), str(wheel("mindspore-2.7"))], json.dumps([request]), "ascend", tag)
        source = (folder / f"{tag}.cce").read_text()
        text = examine(name, source, INSTRUCTIONS[name])
        if grid == (14, 14):
            top = max(int(x) for x in re.findall(r"__ubuf__\s+\w+\s*\*\)\s*\((\d+)\)", source))
            if top >= 192 * KILOBYTE or "block_idx" not in source or "_db" not in source:
                raise AssertionError(f"at N = 196 an operator is to double-buffer, use all cores and fit 910B's 192 KB: {text}")
        return text

    for grid, maps in (((14, 14), 64), ((7, 11), 9), ((24, 24), 16)):
        said = [one(request, grid) for request in requests("ascend", maps, grid, "float16")]
        row("AKG", f"3: float16 scores lowered to CCE for Ascend, B H = {maps}, {grid[0]} x {grid[1]}", "; ".join(said), UNPROVEN)


def tbe() -> None:
    def one(name: str) -> str:
        folder, _ = emit(
            [str(HERE / "tbe_on_akg.py"), str(wheel("mindspore-2.7")), str(KERNELS / "ascend_tbe.py"), name], "", "ascend", name
        )
        return examine(name, (folder / f"{name}.cce").read_text(), INSTRUCTIONS[name] - {"vdiv"})

    said = [one(name) for name in INSTRUCTIONS]
    row(
        "TBE",
        "2: compute functions lowered to CCE through `akg.lang.ascend`, float16 scores, B H = 4, 14 x 14",
        "; ".join(said) + " (AKG has no vdiv: vmul by vrec here)",
        "the real `te` and `tbe`, its `auto_schedule`, " + UNPROVEN,
    )


def cuda() -> None:
    """AKG hands its CUDA source to nvcc for PTX; ptxas then tells whether a GPU could load it."""
    rung = "GPU: CUDA by AKG, PTX by nvcc, ptxas for sm_80, float32, B H = 8, 14 x 14"
    if not (shutil.which("nvcc") and shutil.which("ptxas")):
        row("AKG", rung, "not run: no nvcc on this machine", "everything")
        return
    loads, refused = [], []
    for request in requests("gpu", 8, (14, 14), "float32"):
        name = request[0].lstrip("_")
        folder, _ = emit([str(KERNELS / "ascend_lower.py"), str(wheel("mindspore-2.7"))], json.dumps([request]), "gpu11.6", name)
        ptx = next(folder.rglob("*.ptx"))
        done = subprocess.run(["ptxas", "-arch=sm_80", str(ptx), "-o", f"{name}.cubin"], capture_output=True, text=True)
        if done.returncode and "too much shared data" not in done.stderr:
            raise AssertionError(f"{name}: {done.stderr[-500:]}")
        (refused if done.returncode else loads).append(name)
    result = f"loads: {', '.join(loads)}; refused for shared memory (AKG keeps the temporaries of all maps there): {', '.join(refused)}"
    row("AKG", rung, result, "the operators on a GPU: `akg` is refused there, MindSpore on GPU takes the reference")
    if refused != ["mix", "delta", "dscores"]:
        raise AssertionError("what AKG's CUDA is good for has changed: see why_not in ascend_akg.py")


if __name__ == "__main__":
    {"cce": cce, "tbe": tbe, "cuda": cuda}[sys.argv[1]]()
