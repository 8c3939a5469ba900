"""Rungs of the Triton forward kernel on Ascend: triton-ascend to linalg, that linalg on x86 against float64, HIVM for Ascend910B1.

    python on_triton.py linalg|hivm

No torch and no CANN: the kernels use neither.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np

from convit.kernels.gpsa.definition import gpsa, relative_error

KERNELS = Path(__file__).resolve().parents[2] / "kernels/gpsa"
ENVIRONMENTS = Path(os.environ["ASCEND_CHECK_ENVS"])
DEBIAN = ("mlir-19-tools", "libmlir-19", "llvm-19", "libllvm19")
TARGET = "Ascend910B1"
GRID, HEADS, DIM, ROWS, KEYS = (14, 14), 2, 48, 32, 32  # what the kernels are compiled for, on 16 x 16 slots: tiles of 32 by 32 slots
BACKWARD = ("dq_tile_kernel", "dkdv_tile_kernel")

PASSES = [
    "--convert-elementwise-to-linalg",
    "--canonicalize",
    "--eliminate-empty-tensors",
    "--empty-tensor-to-alloc-tensor",
    "--one-shot-bufferize=allow-return-allocs-from-loops=true",
    "--convert-linalg-to-loops",
    "--memref-expand",
    "--expand-strided-metadata",
    "--lower-affine",
    "--convert-scf-to-cf",
    "--convert-math-to-llvm",
    "--convert-math-to-libm",
    "--convert-arith-to-llvm",
    "--finalize-memref-to-llvm",
    "--convert-func-to-llvm",
    "--convert-cf-to-llvm",
    "--convert-index-to-llvm",
    "--lower-affine",
    "--convert-arith-to-llvm",
    "--reconcile-unrealized-casts",
]

# MLIR's runtime function for a copy between strided buffers
MEMREF_COPY = """
#include <stdint.h>
#include <string.h>
typedef struct { int64_t rank; void *descriptor; } any_t;
typedef struct { char *base, *data; int64_t offset; int64_t sizes[]; } ranked_t;
void memrefCopy(int64_t bytes, any_t *from, any_t *to) {
  int64_t rank = from->rank, at[16] = {0};
  ranked_t *a = from->descriptor, *b = to->descriptor;
  for (int d = 0; d < rank; ++d) if (a->sizes[d] <= 0) return;
  for (;;) {
    int64_t i = a->offset, j = b->offset;
    for (int d = 0; d < rank; ++d) { i += at[d] * a->sizes[rank + d]; j += at[d] * b->sizes[rank + d]; }
    memcpy(b->data + j * bytes, a->data + i * bytes, bytes);
    int d = rank - 1;
    for (; d >= 0; --d) { if (++at[d] < a->sizes[d]) break; at[d] = 0; }
    if (d < 0) return;
  }
}
"""


def row(op: str, rung: str, result: str, unproven: str) -> None:
    print("ROW " + json.dumps({"op": op, "rung": rung, "result": result, "unproven": unproven}), flush=True)


def kernels() -> ModuleType:
    """The module of the tile kernels, without its package's own imports: those need torch, the kernels do not."""
    package = sys.modules["convit.kernels.gpsa.gpu_triton"] = ModuleType("convit.kernels.gpsa.gpu_triton")
    package.__path__ = [str(KERNELS / "gpu_triton")]
    return import_module("convit.kernels.gpsa.gpu_triton.tile")


def to_linalg(name: str) -> str:
    """A kernel of ``tile`` in float16 as triton-ascend's linalg."""
    kernel = getattr(kernels(), name)

    import triton.backends.ascend.compiler as ascend
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {name: "*fp32" for name in ("w_ptr", "gating_ptr", "lse_ptr", "stats_ptr", "part_ptr")}
    kinds |= {"scale_log2": "fp32", "scale": "fp32", "H": "i32"}
    constants = {"GH": GRID[0], "GW": GRID[1], "GHP": 16, "GWP": 16, "D": DIM, "BD": 64, "BM": ROWS, "BN": KEYS, "BP": KEYS, "STEPS": 1}
    constants |= {"PRECISION": "ieee", "POSITION": True, "NEGATIVE": False, "EXACT": True, "CHANNELS": 0, "LARGE_SCORES": False}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: kinds.get(name, "*fp16" if name.endswith("_ptr") else "i32") for name in kernel.arg_names if name not in constants}
    target = GPUTarget("npu", TARGET, 0)
    backend = ascend.AscendBackend(target)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    code = ASTSource(kernel, signature, constants).make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = {"target": target, **options.__dict__}
    code = ascend.make_ttir(code, metadata, options)
    return ascend.ttir_to_linalg(code, metadata, options, named_ops=True)


def llvm() -> Path:
    """Debian's LLVM 19 with MLIR: installed, or unpacked beside the environments without touching the system."""
    if Path("/usr/lib/llvm-19/bin/mlir-opt").exists():
        return Path("/usr")
    root = ENVIRONMENTS / "llvm-19"
    if not (root / "ready").exists():
        root.mkdir(exist_ok=True)
        subprocess.run(["apt-get", "update", "-qq"], check=False, stdout=sys.stderr)
        subprocess.run(["apt-get", "download", "-qq", *DEBIAN], check=True, cwd=root, stdout=sys.stderr)
        for package in root.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(root / "usr.tmp")], check=True)
            package.unlink()
        (root / "usr.tmp/usr").rename(root / "usr")
        (root / "ready").touch()
    return root / "usr"


def to_x86(text: str) -> ctypes.CDLL:
    """The linalg compiled for this machine."""
    usr = llvm()
    tools = usr / "lib/llvm-19/bin"
    settings = os.environ | {"LD_LIBRARY_PATH": f"{usr}/lib/x86_64-linux-gnu:{usr}/lib/llvm-19/lib"}
    Path("kernel.mlir").write_text(text.replace(" {hivm.unlikely_condition}", ""))
    Path("copy.c").write_text(MEMREF_COPY)

    def step(*command: str, env=settings) -> None:
        subprocess.run(command, check=True, env=env)

    step(f"{tools}/mlir-opt", "--allow-unregistered-dialect", "kernel.mlir", *PASSES, "-o", "llvm.mlir")
    step(f"{tools}/mlir-translate", "--mlir-to-llvmir", "llvm.mlir", "-o", "kernel.ll")
    step(f"{tools}/llc", "-O2", "-filetype=obj", "-relocation-model=pic", "kernel.ll", "-o", "kernel.o")
    step("gcc", "-O2", "-fPIC", "-shared", "-o", "libkernel.so", "kernel.o", "copy.c", "-lm", env=None)
    return ctypes.CDLL("./libkernel.so")


def linalg() -> None:
    text = to_linalg("fwd_tile_kernel")
    row("Triton forward", "2: triton-ascend 3.2.0 to linalg, float16, 14 x 14", f"{text.count(chr(10))} lines", "")
    lines = [f"{name} {to_linalg(name).count(chr(10))} lines" for name in BACKWARD]
    row("Triton backward", "2: triton-ascend 3.2.0 to linalg, float16, 14 x 14", ", ".join(lines), "numerics of this form")
    kernel = to_x86(text).fwd_tile_kernel
    kernel.restype = None
    rng = np.random.default_rng(0)
    gh, gw = GRID
    n = gh * gw
    q, k, v = (rng.standard_normal((1, HEADS, n, DIM)).astype(np.float16) for _ in range(3))
    weight = rng.standard_normal((HEADS, 3)).astype(np.float32)
    weight[:, 2] = -abs(weight[:, 2])
    gating = rng.standard_normal(HEADS).astype(np.float32)
    out, lse = np.full((1, n, HEADS, DIM), np.nan, np.float16), np.full((1, HEADS, n), np.nan, np.float32)

    def memref(x: np.ndarray | None) -> list:
        pointer = ctypes.c_void_p(0 if x is None else x.ctypes.data)
        return [pointer, pointer, ctypes.c_int64(0), ctypes.c_int64(0 if x is None else x.size), ctypes.c_int64(1)]

    scale = DIM**-0.5
    strides = [HEADS * n * DIM, n * DIM, DIM] * 3
    programs = -(-gh // (ROWS // 16)) * HEADS
    for program in range(programs):
        arguments = [x for tensor in (None, None, q, k, v, weight, gating, out, lse) for x in memref(tensor)]
        arguments += [*map(ctypes.c_int32, strides), ctypes.c_float(scale * np.log2(np.e)), ctypes.c_int32(HEADS)]
        kernel(*arguments, *map(ctypes.c_int32, (programs, 1, 1, program, 0, 0)))

    want = gpsa(q, k, v, weight, gating, GRID, scale)
    error = relative_error(out.transpose(0, 2, 1, 3), want)
    scores = scale * q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2)
    top = scores.max(-1)
    wrong = np.abs(lse - (top + np.log(np.exp(scores - top[..., None]).sum(-1)))).max()
    if not (error < 1e-3 and wrong < 1e-3):
        raise AssertionError(f"out {error:.1e}, lse {wrong:.1e}")
    row(
        "Triton forward",
        "3: that linalg compiled for x86 and run, against float64",
        f"out {error:.1e} (relative), lse {wrong:.1e}",
        "execution on an NPU",
    )


def to_hivm(name: str) -> int:
    """Lines of a kernel's HIVM; raises if ascendnpu-ir does not come as far as the external assembler, for want of which alone it stops."""
    Path(f"{name}.mlir").write_text(to_linalg(name))
    compiler = next((ENVIRONMENTS / "ascendnpu-ir").glob("lib/python3*/site-packages/ascendnpuir/bin/bishengir-compile"))
    stages = ["--enable-hfusion-compile=true", "--enable-hivm-compile=true", "--enable-triton-kernel-compile=true"]
    # the last pass on HIVM, after memory planning and synchronisation
    dump = "--mlir-print-ir-after=hivm-mark-sync-block-lock-with-subblock"
    command = [str(compiler), f"{name}.mlir", f"--target={TARGET}", *stages, dump, "-o", f"{name}.o"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    if "Cannot find hivmc" not in done.stderr:
        raise AssertionError(f"{name}: bishengir-compile did not reach hivmc: {done.stderr[-800:]}")
    found = set(re.findall(r"hivm\.hir\.(\w+)", done.stderr))
    missing = {"mmadL1", "load", "vexp", "vmul", "set_flag", "wait_flag", "sync_block_set", "pointer_cast"} - found
    if missing:
        raise AssertionError(f"{name}: HIVM lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(found))}")
    return done.stderr.count(chr(10))


def hivm() -> None:
    said = "cube and vector parts, memory planned, synchronised; stops at `hivmc`, which is CANN's"
    for op, names in (("Triton forward", ("fwd_tile_kernel",)), ("Triton backward", BACKWARD)):
        lines = ", ".join(f"{name} {to_hivm(name)} lines" for name in names)
        row(op, f"4: HIVM for {TARGET} by ascendnpu-ir 1.2.0", f"{lines}: {said}", "`hivmc`, execution, speed")


if __name__ == "__main__":
    {"linalg": linalg, "hivm": hivm}[sys.argv[1]]()
