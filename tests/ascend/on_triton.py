"""Rungs of the Triton kernels on Ascend: triton-ascend to linalg, that linalg on x86 against float64, HIVM for Ascend910B1.

    python on_triton.py linalg|hivm

What is lowered is launches.json: each launch of the library's own plan for an NPU, forward and backward, with its sizes and options
(tests/npu_launches.py writes it, tests/test_npu.py holds it to the plan). No torch and no CANN: the kernels use neither.
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
from typing import Any

import numpy as np

from convit.kernels.gpsa.definition import gpsa_with_gradients, relative_error

KERNELS = Path(__file__).resolve().parents[2] / "kernels/gpsa/gpu_triton"
CASES = json.loads((Path(__file__).parent / "launches.json").read_text())
ENVIRONMENTS = Path(os.environ["ASCEND_CHECK_ENVS"])
DEBIAN = ("mlir-19-tools", "libmlir-19", "llvm-19", "libllvm19")
TARGET = "Ascend910B1"
TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
ALLOWED = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 5e-6}  # relative error of the output and of every gradient

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

# MLIR's runtime function for a copy between strided buffers, and the compiler's for rounding to bfloat16, which is returned as a float is
RUNTIME = """
#include <stdint.h>
#include <string.h>
float __truncsfbf2(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  memcpy(&x, &bits, 4);
  return x;
}
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


def kernel(name: str) -> Any:
    """A kernel of the library, without its package's own imports: those need torch, the kernels do not."""
    package = sys.modules.setdefault("convit.kernels.gpsa.gpu_triton", ModuleType("convit.kernels.gpsa.gpu_triton"))
    package.__path__ = [str(KERNELS)]
    modules = [import_module(f"convit.kernels.gpsa.gpu_triton.{home}") for home in ("common", "tile", "loop")]
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def to_linalg(case: dict, launch: dict) -> str:
    """The kernel of a launch as triton-ascend's linalg."""
    function = kernel(launch["kernel"])

    import triton.backends.ascend.compiler as ascend
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = [TYPES[case["tensors"][name][0]] for name in launch["tensors"]]
    kinds += ["fp32" if isinstance(x, float) else "i32" for x in launch["numbers"]]
    signature = dict(zip(function.arg_names, kinds, strict=False))
    target = GPUTarget("npu", TARGET, 0)
    backend = ascend.AscendBackend(target)
    options = backend.parse_options(launch["options"])
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(function, signature, launch["constants"])
    code = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = {"target": target, **options.__dict__}
    code = ascend.make_ttir(code, metadata, options)
    return ascend.ttir_to_linalg(code, metadata, options, named_ops=True)


def title(case: dict) -> str:
    gh, gw = case["grid"]
    return f"{case['dtype']}, {gh} x {gw}, D {case['dim']}"


def each_once(case: dict) -> dict[str, dict]:
    """The launches of a case that differ in what is compiled."""
    return {json.dumps([x["kernel"], [case["tensors"][t][0] for t in x["tensors"]], x["constants"]]): x for x in case["launches"]}


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


def to_x86(text: str, name: str) -> ctypes.CDLL:
    """The linalg compiled for this machine."""
    usr = llvm()
    tools = usr / "lib/llvm-19/bin"
    settings = os.environ | {"LD_LIBRARY_PATH": f"{usr}/lib/x86_64-linux-gnu:{usr}/lib/llvm-19/lib"}
    Path("kernel.mlir").write_text(text.replace(" {hivm.unlikely_condition}", ""))
    Path("runtime.c").write_text(RUNTIME)

    def step(*command: str, env=settings) -> None:
        subprocess.run(command, check=True, env=env)

    step(f"{tools}/mlir-opt", "--allow-unregistered-dialect", "kernel.mlir", *PASSES, "-o", "llvm.mlir")
    step(f"{tools}/mlir-translate", "--mlir-to-llvmir", "llvm.mlir", "-o", "kernel.ll")
    step(f"{tools}/llc", "-O2", "-filetype=obj", "-relocation-model=pic", "kernel.ll", "-o", "kernel.o")
    step("gcc", "-O2", "-fPIC", "-shared", "-o", f"lib{name}.so", "kernel.o", "runtime.c", "-lm", env=None)
    return ctypes.CDLL(f"./lib{name}.so")


def from_bfloat16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Memory:
    """The tensors of a case: poisoned with NaN, but for the inputs."""

    def __init__(self, case: dict) -> None:
        self.kinds = {name: kind for name, (kind, _, _) in case["tensors"].items()}
        self.shapes = {name: (shape, strides) for name, (_, shape, strides) in case["tensors"].items()}
        self.flat = {}
        for name, (shape, _) in self.shapes.items():
            self.flat[name] = self.rounded(np.full(np.prod(shape), np.nan, np.float32), self.kinds[name])

    @staticmethod
    def rounded(x: np.ndarray, kind: str) -> np.ndarray:
        return to_bfloat16(x) if kind == "bfloat16" else x.astype(kind)

    def view(self, name: str) -> np.ndarray:
        shape, strides = self.shapes[name]
        flat = self.flat[name]
        return np.lib.stride_tricks.as_strided(flat, shape, [step * flat.itemsize for step in strides])

    def read(self, name: str) -> np.ndarray:
        x = self.view(name)
        return from_bfloat16(x) if self.kinds[name] == "bfloat16" else x

    def write(self, name: str, value: np.ndarray) -> None:
        self.view(name)[...] = self.rounded(value, self.kinds[name])

    def memref(self, name: str | None) -> list:
        x = self.flat[name] if name else None
        pointer = ctypes.c_void_p(0 if x is None else x.ctypes.data)
        return [pointer, pointer, ctypes.c_int64(0), ctypes.c_int64(0 if x is None else x.size), ctypes.c_int64(1)]


def on_x86(case: dict) -> str:
    """Every launch of a case, its linalg compiled for x86 and run in order; the errors against float64."""
    memory, rng, compiled = Memory(case), np.random.default_rng(0), {}
    for name in ("q", "k", "v", "grad", "pos_weight", "gating"):
        value = rng.standard_normal(memory.shapes[name][0])
        if name == "pos_weight":
            value[:, 2] = -abs(value[:, 2])
        memory.write(name, value)
    for launch in case["launches"]:
        text = to_linalg(case, launch)
        if text not in compiled:
            compiled[text] = getattr(to_x86(text, f"{CASES.index(case)}_{len(compiled)}"), launch["kernel"])
        function = compiled[text]
        function.restype = None
        arguments = [x for name in (None, None, *launch["tensors"]) for x in memory.memref(name)]
        arguments += [ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int32(x) for x in launch["numbers"]]
        programs = launch["programs"]
        for program in range(programs):
            function(*arguments, *map(ctypes.c_int32, (programs, 1, 1, program, 0, 0)))
    q, k, v, pos_weight, gating, grad = (memory.read(x).astype(np.float64) for x in ("q", "k", "v", "pos_weight", "gating", "grad"))
    scale = case["dim"] ** -0.5
    want = gpsa_with_gradients(q, k, v, pos_weight, gating, tuple(case["grid"]), scale, grad)
    names = ("out", "dq", "dk", "dv", "dpos_weight", "dgating")
    errors = {name: relative_error(memory.read(name), x) for name, x in zip(names, want, strict=True)}
    said = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    if not max(errors.values()) < ALLOWED[case["dtype"]]:
        raise AssertionError(f"{title(case)}: {said}")
    return said


def linalg() -> None:
    rung = "2: triton-ascend 3.2.0 to linalg, compiled for x86 and run, against float64"
    for case in CASES:
        result = f"{len(each_once(case))} kernels: {on_x86(case)}"
        row("Triton", f"{rung}: {title(case)}", result, "execution on an NPU")


def to_hivm(case: dict, launch: dict) -> int:
    """Lines of a kernel's HIVM; raises if ascendnpu-ir does not come as far as the external assembler, for want of which alone it stops."""
    name = launch["kernel"]
    Path(f"{name}.mlir").write_text(to_linalg(case, launch))
    compiler = next((ENVIRONMENTS / "ascendnpu-ir").glob("lib/python3*/site-packages/ascendnpuir/bin/bishengir-compile"))
    # as triton-ascend calls it
    stages = [f"--enable-auto-multi-buffer={launch['options']['multibuffer']}", "--enable-auto-bind-sub-block=True"]
    stages += ["--enable-hfusion-compile=true", "--enable-hivm-compile=true", "--enable-triton-kernel-compile=true"]
    # the last pass on HIVM, after memory planning and synchronisation
    dump = "--mlir-print-ir-after=hivm-mark-sync-block-lock-with-subblock"
    command = [str(compiler), f"{name}.mlir", f"--target={TARGET}", *stages, dump, "-o", f"{name}.o"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    if "Cannot find hivmc" not in done.stderr:
        raise AssertionError(f"{title(case)}, {name}: bishengir-compile did not reach hivmc: {done.stderr[-800:]}")
    found = set(re.findall(r"hivm\.hir\.(\w+)", done.stderr))
    wanted = {"set_flag", "wait_flag", "pointer_cast"} | (set() if name == "reduce_kernel" else {"mmadL1", "vexp", "vmul"})
    wanted |= set() if found & {"load", "nd2nz"} else {"load"}
    if missing := wanted - found:
        raise AssertionError(f"{title(case)}, {name}: HIVM lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(found))}")
    return done.stderr.count(chr(10))


def hivm() -> None:
    for case in CASES:
        lines = [to_hivm(case, launch) for launch in each_once(case).values()]
        result = f"{len(lines)} kernels, {sum(lines)} lines: memory planned, synchronised; stops at `hivmc`, which is CANN's"
        row("Triton", f"3: HIVM for {TARGET} by ascendnpu-ir 1.2.0: {title(case)}", result, "`hivmc`, execution, speed")


if __name__ == "__main__":
    {"linalg": linalg, "hivm": hivm}[sys.argv[1]]()
