"""Compile the Triton kernels for GPUs that are not here, and read what came out: registers, stack, shared memory, issue time.

    python bench/aot.py                        # writes bench/results/aot.md
    python bench/aot.py --json FILE --targets sm90 gfx942 --cases tile   # the raw rows instead, for the tests
    python bench/aot.py --versions 3.3.1 3.6.0 3.9.0        # the report with a column for each of these too, installed under build/
    python bench/aot.py --report FILE FILE ...              # the report from raw rows

The launchers themselves are run on meta tensors with the launch recorded, so that what is compiled is what a GPU would be given.
``TRITON_INTERPRET`` must be unset. Issue time: the instructions of the machine code, loop bodies times their trips, over
the issue rate of an H100 (132 SM x 4 a clock, 1.7 GHz): a lower bound that ignores memory and latency. An estimate, not a timing.
"""

import argparse
import collections
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convit.kernels.gpsa.gpu_triton import launch as launcher
from convit.kernels.gpsa.gpu_triton.configs import OPTIONS, TRITON, Config, Content, Device, Row

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes a block may have; an A100 has 166912, but sm_86 and sm_89 take the same rows
SHARED = {"sm80": 101376, "sm90": 232448, "sm100": 232448, "gfx942": 65536}
CORES = 132  # multiprocessors of an H100
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Case(NamedTuple):
    batch: int
    heads: int
    grid: tuple[int, int]
    dim: int
    dtype: str = "bfloat16"
    tf32: bool = False
    content: str = "loop"  # or "sdpa", on grids past the tiles
    persistent: bool = False

    def __str__(self) -> str:
        kind = self.dtype + (" tf32" if self.tf32 else "") + (" content by SDPA" if self.content == "sdpa" else "")
        return f"B*H={self.batch * self.heads} {self.grid[0]}x{self.grid[1]} D={self.dim} {kind}"


# what bench/gpu.sh tries beside the table's rows where it passes the gates
PERSISTENT = [
    Row("sm80", "half", 64, Config(32, 256, 4, 2, 0)),
    *(Row(family, "half", 64, Config(128, 256, 8, 2, 0)) for family in ("sm90", "sm100")),
]

SETS = {
    "tile": [
        Case(256, 4, (14, 14), 48),
        Case(64, 16, (14, 14), 64),
        *(Case(heads=h, batch=1024 // h, grid=(14, 14), dim=d, persistent=True) for h, d in ((4, 48), (16, 64))),
    ],
    "loop": [Case(64, 16, (56, 56), dim, content=content) for content in ("loop", "sdpa") for dim in (48, 64)],
    "dtypes": [
        Case(64, 16, grid, 64, dtype, tf32)
        for grid in ((14, 14), (56, 56))
        for dtype, tf32 in (("float16", False), ("float32", True), ("float32", False))
    ]
    + [Case(64, 16, (56, 56), 64, "float32", tf32, "sdpa") for tf32 in (True, False)],  # fmt: skip
    "wide": [
        Case(8, 8, grid, 128, dtype, tf32)
        for grid in ((14, 14), (56, 56))
        for dtype, tf32 in (("bfloat16", False), ("float32", True), ("float32", False))
    ]
    + [Case(8, 8, (56, 56), 256), Case(8, 8, (56, 56), 256, content="sdpa")],  # fmt: skip
    "odd": [Case(2, 3, (7, 30), 20), Case(2, 3, (1, 300), 20), Case(1, 1, (3, 4), 16), Case(1, 1, (65536, 1), 16)],
    "one": [Case(1, 1, (1, 1), 16, dtype) for dtype in ("bfloat16", "float32")],  # every size is 1, which Triton makes a constant
}
SETS["versions"] = [
    Case(64, 16, (14, 14), 64),
    Case(64, 16, (56, 56), 64),
    Case(64, 16, (14, 14), 64, persistent=True),
]  # for every Triton that is claimed
SETS["tiny"] = [Case(1, 1, (2, 3), 16, "float32")]
SETS["profile"] = [Case(128, 9, (14, 14), 48), Case(4, 9, (56, 56), 48)]  # of bench/gpu.sh
SETS["models"] = [*SETS["tile"], *SETS["loop"]]
SETS["chips"] = [*SETS["tile"][1::2], *SETS["loop"][::2]]  # each kernel of the models
SETS["all"] = [case for name in ("tile", "loop", "dtypes", "wide", "odd", "one") for case in SETS[name]]


class Launch(NamedTuple):
    kernel: Any
    programs: int
    config: Any
    args: tuple
    constants: dict


def launches(case: Case, family: str) -> list[Launch]:
    """What a forward and a backward of ``case`` launch on a chip of ``family``."""
    recorded: list[Launch] = []

    def record(call, *tensors):
        recorded.append(Launch(call.kernel, call.programs, call.config, (*tensors, *call.numbers), call.constants))

    chip = Device("Meta", lambda index: family, lambda: None, cores=lambda index: CORES)
    content = [Content("", dtype, 256, 257, case.content) for dtype in ("half", "float32")]
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = case.tf32
    try:
        gh, gw = case.grid
        shape = (case.batch, gh * gw, 3, case.heads, case.dim)
        q, k, v = torch.empty(shape, dtype=getattr(torch, case.dtype), device="meta").permute(2, 0, 3, 1, 4)
        w, gating = torch.empty(case.heads, 3, device="meta"), torch.empty(case.heads, device="meta")
        scale = case.dim**-0.5
        rows = {"fwd_tile": PERSISTENT if case.persistent else []}
        with launcher.trial(through=record, devices={"meta": chip}, rows=rows, content=content):
            out, lse = launcher.forward(q, k, v, w, gating, gh, gw, scale)
            launcher.backward(torch.empty_like(out), q, k, v, w, gating, out, lse, gh, gw, scale)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return recorded


TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def source(launch: Launch) -> ASTSource:
    """The launch as the compiler's input, specialised as the JIT specialises: 16-divisible arguments, ones as constants."""
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.args[position] if position < len(launch.args) else launch.constants[name]
        if position >= len(launch.args) or (isinstance(value, int) and value == 1):
            signature[name], constants[(position,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(position,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)


def trips(launch: Launch, case: Case) -> tuple[float, float]:
    """How often the kernel's outer loop runs, and the loop inside it."""
    name, c, tokens, fixed = launch.kernel.__name__, launch.config, case.grid[0] * case.grid[1], launch.constants
    if name == "dkdv_tile_kernel":
        return -(-case.grid[0] // (fixed["BM"] // fixed["GWP"])), 1
    if name == "dkdv_loop_kernel":
        return -(-tokens // c.rows), 1
    if name in ("fwd_loop_kernel", "dq_loop_kernel"):
        return max(tokens // c.keys, 1), 1
    if name == "dq_tile_kernel":
        pieces = -(-case.grid[0] // (fixed["BN"] // fixed["GWP"]))
        return (fixed["STEPS"], pieces) if fixed["STEPS"] > 1 else (pieces, 1)
    if "LINES" in fixed:
        is_x = fixed.get("X", True)  # moments take both axes
        size, count = case.grid[is_x], case.grid[not is_x]
        lines, blocks = min(fixed["LINES"], count), -(-size // c.keys)
        return (lines, blocks) if name == "mix_kernel" else (blocks, lines)
    if fixed.get("STEPS") == 0:  # the blocks of a head times the heads, over the programs
        return case.batch * case.heads * -(-case.grid[0] // (fixed["BM"] // fixed["GWP"])) / launch.programs, 1
    return fixed.get("STEPS", 1), 1


def instructions(sass: str, repeats: tuple[float, float]) -> collections.Counter:
    """Executed instructions of a warp: bodies of backward branches counted ``repeats`` times, outer and inner."""
    operations, labels, branches = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(operations)
        elif op := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)", line):
            target = re.search(r"\((\.L_x_\d+)\)", op[2])
            if op[1].startswith("BRA") and target:
                branches.append((len(operations), target[1]))
            operations.append(op[1])
    end = max((i for i, op in enumerate(operations) if op.startswith("EXIT")), default=len(operations))
    weights = [1] * len(operations)
    loops = [(labels[label], place) for place, label in branches if label in labels and labels[label] < place - 20]  # shorter: waits
    for low, high in loops:
        inner = any(a <= low and high <= b and (a, b) != (low, high) for a, b in loops)
        for i in range(low, high + 1):
            weights[i] *= repeats[inner]
    count = collections.Counter()
    for i, op in enumerate(operations[: end + 1]):
        if op != "NOP":
            count[op.split(".")[0]] += weights[i]
    return count


def compile_launch(launch: Launch, case: Case, chip: str) -> dict:
    """Compile for ``chip`` and return one row of figures; a failure to compile is a row with ``error``."""
    row = {"chip": chip, "case": str(case), "kernel": launch.kernel.__name__.removesuffix("_kernel"),
           "config": list(launch.config), "programs": launch.programs, "triton": triton.__version__}  # fmt: skip
    row["kernel"] += "".join(f" {n}" for n in ("X", "TRANSPOSE", "SUMS", "CONTENT") if launch.constants.get(n))
    if launch.constants.get("STEPS") == 0:
        row["kernel"] += " persistent"
    if launch.constants.get("POSITION") is False:
        row["kernel"] += " without position"
    row["bytes"] = sum(x.numel() * x.element_size() for x in launch.args if isinstance(x, torch.Tensor))
    row["dots"] = "tl.dot" in launch.kernel.src or "_loop_step" in launch.kernel.src
    row["matrix"] = row["dots"] and not (case.dtype == "float32" and not case.tf32)
    began = time.perf_counter()
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages, **OPTIONS}
    try:
        compiled = triton.compile(source(launch), target=TARGETS[chip], options=options)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"[:300]}
    row |= {"seconds": round(time.perf_counter() - began, 2), **resources(compiled, chip, launch.config.warps)}
    if chip != "sm90":
        return row
    rare = {name: False for name in ("LARGE_SCORES", "SUMS") if launch.constants.get(name)}
    if rare:  # branches that no or few programs take would be counted
        usual = launch._replace(constants=launch.constants | rare)
        compiled = triton.compile(source(usual), target=TARGETS[chip], options=options)
    count = instructions(disassembled(compiled.asm["cubin"])[1], trips(launch, case))
    total = sum(count.values())
    exps = count["MUFU"]
    rate = CORES * 4 * 1.7e9
    row["instructions"], row["issue_us"] = total, total * launch.programs * launch.config.warps / rate * 1e6
    row["exp_us"] = exps * 8 * launch.programs * launch.config.warps / rate * 1e6
    row["top"] = dict(count.most_common(14))
    return row


def resources(compiled: Any, chip: str, warps: int) -> dict:
    """What the gates ask of a compiled kernel."""
    row = {"chip": chip, "shared": compiled.metadata.shared}
    if chip.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        field = {k: int(re.search(rf"\.{k}:\s*(\d+)", text)[1]) for k in ("vgpr_count", "private_segment_fixed_size")}
        mma = len(re.findall(r"\bv_mfma_", text))
        return row | {"registers": field["vgpr_count"], "stack": field["private_segment_fixed_size"], "mma": mma}
    usage, sass = disassembled(compiled.asm["cubin"])
    row["registers"], row["stack"] = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))
    row["mma"] = len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA|QGMMA)\b", sass))
    row["wgmma"] = len(re.findall(r"\b(?:HGMMA|UTCHMMA)\b", sass))
    return row | ({"hazard": hazard(compiled.asm["ptx"], warps)} if chip == "sm90" else {})


@functools.lru_cache(maxsize=2)  # a kernel is looked at for its resources, then for its issue time
def disassembled(cubin: bytes) -> tuple[str, str]:
    """What cuobjdump says of a compiled kernel's resources, and its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([BINARIES / "cuobjdump", "--dump-resource-usage", file.name], text=True)
        disassemble = [BINARIES / "nvdisasm", "--print-code", "--no-dataflow", file.name]
        return usage, subprocess.run(disassemble, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def stack_allowed(row: dict) -> int:
    """Bytes of stack: none, but 64 in float32.

    The float32 kernels live at the limit of the registers, the products on CUDA cores above all; what is left over are a few addresses
    and masks.
    """
    return 64 if "float32" in row["case"] else 0


def problem(row: dict) -> str | None:
    """What is wrong with a compiled kernel, if anything."""
    if "error" in row:
        return row["error"]
    if row["stack"] > stack_allowed(row):
        return f"{row['stack']} bytes of stack"
    if row["shared"] > SHARED[row["chip"]]:
        return f"{row['shared']} bytes of shared memory, {SHARED[row['chip']]} allowed"
    if row["matrix"] and not row["mma"]:
        return "no matrix instruction"
    return row.get("hazard")


def hazard(ptx: str, warps: int) -> str | None:
    """What of a kernel for Hopper is right only by chance, if anything.

    wgmma reads shared memory through a proxy of its own: between a wait for cp.async and the next wgmma there must be a
    ``fence.proxy.async``. Triton before 3.7.1 leaves it out of loops with several stages. And up to 3.8 its wait for wgmma does not hold
    back a second group of four warps, which may refill what the first still reads.
    """
    if "wgmma.mma_async" not in ptx:
        return None
    if warps > 4 and TRITON < (3, 9):
        return "two warp groups without a barrier after wgmma"
    events = re.compile(r"^\s*(?:@\S+\s+)?(cp\.async\.wait|wgmma\.mma_async|fence\.proxy\.async|bra)\S*\s*(.*?);|^(\$\S+):", re.M)
    found = [match.groups() for match in events.finditer(ptx)]
    labels = {label: place for place, (_, _, label) in enumerate(found) if label}
    loops = [(labels[target], place) for place, (op, target, _) in enumerate(found) if op == "bra" and labels.get(target, place) < place]
    for first, last in [(0, len(found)), *loops]:
        body = [op for op, _, _ in found[first:last] if op and op != "bra"]
        filled = False
        for op in body if (first, last) == (0, len(found)) else body * 2:  # what an iteration fills the next one may read
            if op == "fence.proxy.async":
                filled = False
            elif op != "wgmma.mma_async":
                filled = True
            elif filled:
                return "wgmma reads shared memory without fence.proxy.async after it was filled"
    return None


def rows(cases: list[Case], chips: list[str], kernels: str = "") -> list[dict]:
    found, seen = [], set()
    for chip in chips:
        for case in cases:
            recorded = launches(case, chip)
            for launch in with_baselines(recorded) if chip == "sm90" else recorded:
                key = (chip, source(launch).hash(), launch.config)
                if key not in seen and re.search(kernels, launch.kernel.__name__):
                    seen.add(key)
                    found.append(compile_launch(launch, case, chip))
                    bad = problem(found[-1])
                    print(
                        {k: v for k, v in found[-1].items() if k not in ("triton", "dots", "matrix")},
                        f"BAD {bad}" if bad else "",
                        file=sys.stderr,
                    )
    return found


def with_baselines(recorded: list[Launch]) -> list[Launch]:
    """Each forward also without its positional term, to see what that costs."""
    plain = [x._replace(constants=x.constants | {"POSITION": False}) for x in recorded if "POSITION" in x.constants]
    return recorded + plain


FORWARD = ("fwd_tile", "fwd_loop", "mix", "mix X", "mix CONTENT")  # rows of the report


def report(found: list[dict]) -> str:
    """bench/results/aot.md: what a change of a kernel does shows in this file's diff."""
    versions = sorted({row["triton"] for row in found}, key=lambda v: [int(part) for part in v.split(".")])
    lines = [
        "# The Triton kernels, compiled without a GPU",
        "",
        f"By `bench/aot.py` with Triton {', '.join(versions)}; nothing here was timed. Under each version: registers, bytes of stack and,",
        "for sm90, issue time in us, that is instructions over the issue rate of an H100: a lower bound without memory or latency; in",
        "brackets against the same kernel without position. Then what the gates say where they object: stack, shared memory past the",
        "chip's, no matrix instruction; on sm90 no fence before wgmma, a second group of four warps. `-`: not compiled. The floor",
        "of moving q, k, v and out once is 26.0 us at B*H=1024, 14x14, D=48 and 34.5 us at D=64.",
        "",
        "| chip | case | kernel | rows, keys, warps, stages, steps | shared | " + " | ".join(versions) + " |",
        "|" + "---|" * (5 + len(versions)),
    ]
    keyed: dict[tuple, dict[str, dict]] = {}
    for row in found:
        keyed.setdefault((row["chip"], row["case"], row["kernel"], *row["config"]), {})[row["triton"]] = row
    plain = {(r["triton"], r["case"], r["kernel"]): r["issue_us"] for r in found if "issue_us" in r and "without" in r["kernel"]}

    def cell(row: dict | None) -> str:
        if row is None:
            return "-"
        if "error" in row:
            return str(row["error"])
        text = f"{row['registers']} / {row['stack']}"
        if "issue_us" in row:
            base = plain.get((row["triton"], row["case"], f"{row['kernel']} without position"))
            text += f" / {row['issue_us']:.1f}" + (f" (x {row['issue_us'] / base:.2f})" if base else "")
        return text + (f": {bad}" if (bad := problem(row)) else "")

    for (chip, case, kernel, *config), by_version in keyed.items():
        shared = next((r["shared"] for r in by_version.values() if "shared" in r), "")
        cells = " | ".join(cell(by_version.get(version)) for version in versions)
        lines.append(f"| {chip} | {case} | {kernel} | {', '.join(map(str, config))} | {shared} | {cells} |")
    lines += ["", "Issue time of all the launches of a call on sm90, us:", ""]
    lines += ["| Triton | case | forward | the same without position | backward |", "|---|---|---|---|---|"]
    for version, case in dict.fromkeys((version, case) for version, case, _ in plain):
        rows_ = [r for r in found if (r["chip"], r["triton"], r["case"]) == ("sm90", version, case) and "error" not in r]
        mine = {r["kernel"]: r["issue_us"] for r in rows_ if "persistent" not in r["kernel"]}  # which is not in the table
        base = sum(time for kernel, time in mine.items() if "without" in kernel)
        ours = sum(time for kernel, time in mine.items() if kernel in FORWARD)
        back = sum(time for kernel, time in mine.items() if kernel not in FORWARD and "without" not in kernel)
        lines.append(f"| {version} | {case} | {ours:.1f} (x {ours / base:.2f}) | {base:.1f} | {back:.1f} |")
    judged = len(found) - sum(bool(problem(row)) for row in found)
    lines += ["", f"{judged} of {len(found)} kernels pass every gate."]
    return "\n".join(lines) + "\n"


def installed(version: str) -> Path:
    """The folder with Triton of this version alone, for PYTHONPATH; installed where it is not there yet.

    Raises:
        RuntimeError: pip cannot install it.
    """
    folder = Path(__file__).resolve().parents[1] / "build" / f"triton-{version}"
    if not (folder / "triton").exists():
        fresh = folder.with_name(f"{folder.name}-{os.getpid()}")  # renamed when whole: other processes may be at it too
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(fresh), f"triton=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(fresh, ignore_errors=True)
            raise RuntimeError(f"Triton {version} cannot be installed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        try:
            fresh.rename(folder)
        except OSError:  # another was faster
            shutil.rmtree(fresh)
    return folder


def by_version(version: str, folder: Path) -> list[dict]:
    """Rows of the versions' cases for sm90 under another Triton."""
    file = folder / f"{version}.json"
    command = [sys.executable, __file__, "--json", str(file), "--targets", "sm90", "--cases", "versions"]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(installed(version))}, check=False)  # its status is that of the gates
    return json.loads(file.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the raw rows here instead of the report")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--cases", default="all", choices=SETS)
    parser.add_argument("--kernels", default="", help="regular expression on the kernel's name")
    parser.add_argument("--versions", nargs="+", default=[], help="further Tritons for a column of their own, sm90 alone")
    parser.add_argument("--report", type=Path, nargs="+", help="compile nothing: write the report from these files of raw rows")
    args = parser.parse_args()
    if args.report:
        found = [row for file in args.report for row in json.loads(file.read_text())]
        (Path(__file__).parent / "results" / "aot.md").write_text(report(found))
        return any(problem(row) for row in found)
    with tempfile.TemporaryDirectory() as folder:
        others = [row for version in args.versions for row in by_version(version, Path(folder))]
    found = others + rows(SETS[args.cases], args.targets, args.kernels)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    else:
        (Path(__file__).parent / "results" / "aot.md").write_text(report(found))
    return any(problem(row) for row in found)


if __name__ == "__main__":
    sys.exit(main())
