"""Where the kernels run and in what sizes: the devices, and the tile sizes of each kernel for each family of chips."""

import functools
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton.backends import backends

INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
SLOTS = 256  # the largest padded grid that the tile kernels hold
TILE_D = 128  # the largest head dimension of the tile kernels, and of float32
LARGEST_D = 256  # and of half precision, in the loops
ALL = SLOTS // 16  # a tile has 16 query slots at least, so that this many are all of a head
MANY = 512  # batch times heads from which on one program takes several query blocks, or many lines of an axis


# --------------------------------------------------------------------------------------------------------------------- devices
def _tf32() -> bool:
    """Torch's own setting for CUDA, by either of its names."""
    matmul = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32)
    except RuntimeError:  # torch 2.9 renamed the setting; once a program has used the new name, reading the old one is an error
        return bool(matmul.fp32_precision == "tf32")


OPTIONS = {"enable_fp_fusion": True}  # Triton 3.10 leaves it off by default; the exponents of all kernels count on it


def _options(config: "Config") -> dict[str, Any]:
    return {"num_warps": config.warps, "num_stages": config.stages, **OPTIONS}


class Device(NamedTuple):
    """A type of torch device that Triton launches on. Its streams, current device and guard are ``torch.get_device_module``'s."""

    key: str  # torch's dispatch key, under which the operator is registered
    family: Callable[[int], str]  # index of a device -> key of the table of tile sizes
    why_not: Callable[[], str | None]  # why nothing runs there, or None
    direct: bool = False  # compiled kernels may be called past Triton's launch: nothing but the tensors' alignment chooses between them
    tf32: Callable[[], bool] = _tf32  # whether float32 products may be rounded to tf32
    options: Callable[["Config"], dict[str, Any]] = _options  # what Triton's launch is told beside the arguments
    programs: int = 2**31 - 1  # the most of one launch
    largest_d: int = LARGEST_D  # head dimension
    selects: bool = True  # whether a kernel may select one of two addresses as it runs
    # index of a device -> programs of SLOTS keys that run at once, where persistent rows are taken
    cores: Callable[[int], int] | None = None


@functools.cache
def _gpu_family(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:  # why_not knows the type of device alone, and asks the current one
        raise RuntimeError(
            f"convit: cuda:{index} has compute capability {major}.{minor}, and the Triton kernels need 8.0; use backend='sdpa' there"
        )
    return f"sm{major}0"


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@functools.cache
def _no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is usable (torch.cuda.is_available() is false)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"compute capability {major}.{minor} is older than 8.0 (Ampere): 'sdpa' serves Volta and Turing"
    return None


def _no_backend(device: str, backend: str, package: str) -> str | None:
    return None if backend in backends else f"Triton {triton.__version__} has no back end for {device}: install {package}"


@functools.cache
def _no_xpu() -> str | None:
    return _no_backend("xpu", "intel", "triton-xpu") if torch.xpu.is_available() else "torch finds no xpu device"


@functools.cache
def _no_npu() -> str | None:
    npu = getattr(torch, "npu", None)
    if npu is None:
        return "torch knows no npu: install torch_npu, and CANN, which it loads"
    if not npu.is_available():
        return "torch_npu finds no npu (torch.npu.is_available() is false)"
    name = npu.get_device_name()
    if not re.match(r"Ascend910(B\d|_93)", name):
        return f"the kernels were lowered for Atlas A2 and A3 (Ascend910B1 and the like), not for {name}"
    return _no_backend("npu", "ascend", "triton-ascend in place of triton")


TRITON = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])
# before 3.3 a compiled kernel takes other arguments; on AMD more than alignment matters
_DIRECT = torch.version.hip is None and TRITON >= (3, 3)

# torch device type -> device: the one place that says under which key the operator is registered, which tile sizes a chip takes, and
# how launches reach it. On xpu nothing here has run: it is used by name (``backend="triton"``) and not by the automatic choice (``ORDER``
# in convit/dispatch.py), with the general rows of the table below until it has rows of its families.
# triton-ascend has neither warps nor stages, and buffers loads twice where it is asked to; its compiler dies of a selected address;
# CANN counts programs in 16 bits.
# Triton's interpreter takes CPU tensors, and no others.
NPU = Device(
    "PrivateUse1",
    lambda index: "npu",
    _no_npu,
    tf32=lambda: False,
    options=lambda config: {"multibuffer": config.stages > 1},
    programs=2**16 - 1,
    largest_d=64,  # of every published model; nothing larger was lowered
    selects=False,
)
DEVICES: dict[str, Device] = {
    "cuda": Device("CUDA", _gpu_family, _no_gpu, _DIRECT, cores=_multiprocessors),
    "xpu": Device("XPU", lambda index: "xpu", _no_xpu, tf32=lambda: False),
    "npu": NPU,
}
if INTERPRET:
    DEVICES = {"cpu": Device("CPU", lambda index: "interpret", lambda: None, cores=lambda index: 2)}


# ------------------------------------------------------------------------------------------------------------------ tile sizes
class Config(NamedTuple):
    rows: int  # BM: query rows of a tile; of mix and moments, the patches of a line that are written
    keys: int  # BN: keys of a tile; of mix and moments, BK: the patches of a line that are summed over
    warps: int
    stages: int
    steps: int = 1  # tiles of query rows that a program of the tile family takes at most; of fwd_tile 0, see why_not_persistent


class Row(NamedTuple):
    """One row of a kernel's table; the first that fits is taken."""

    family: str  # of chips, "" is any
    arithmetic: str  # "half", "tf32", "ieee", "" is any
    largest: int  # BD, the head dimension as a power of two, that it serves
    config: Config


def _rows(*rows: tuple[str, str, int, Config]) -> list[Row]:
    return [Row(*row) for row in rows]


# Lowered to HIVM (tests/ascend/on_triton.py), timed by nobody. Two stages are buffers, with which dkdv_tile does not compile in minutes.
_NPU = ("npu", "", 64, Config(32, 32, 4, 2))

# Chosen by compiling (bench/aot.py): no stack, on sm90 no second group of four warps where wgmma is used (bench/aot.py, hazard), then
# the fewest instructions. What bench/gpu.sh measures to be faster goes above the
# general row.
CONFIGS: dict[str, list[Row]] = {
    "fwd_tile": _rows(
        _NPU,
        ("sm80", "half", 64, Config(32, SLOTS, 4, 1, steps=8)),
        ("sm80", "half", 128, Config(64, SLOTS, 8, 1, steps=4)),
        ("", "half", 128, Config(64, SLOTS, 4, 1, steps=4)),
    ),
    "dq_tile": _rows(
        _NPU,
        ("sm80", "half", 64, Config(32, 32, 4, 1, steps=ALL)),
        ("sm80", "half", 128, Config(64, 64, 8, 1, steps=ALL)),
        ("sm90", "half", 64, Config(64, 32, 4, 1, steps=ALL)),
        ("sm90", "half", 128, Config(64, 16, 4, 1, steps=ALL)),
        ("gfx942", "half", 64, Config(64, 32, 4, 1, steps=ALL)),
        ("", "half", 64, Config(64, 64, 4, 1, steps=ALL)),
        ("", "half", 128, Config(64, 64, 4, 1, steps=ALL)),
    ),
    "dkdv_tile": _rows(
        ("npu", "", 64, Config(32, 32, 4, 1)),
        ("sm80", "half", 64, Config(32, 128, 8, 1)),
        ("sm80", "half", 128, Config(32, 64, 4, 1)),
        ("sm90", "half", 64, Config(32, 128, 4, 1)),
        ("sm90", "half", 128, Config(32, 64, 4, 1)),
        ("", "half", 64, Config(32, 256, 8, 1)),
        ("gfx942", "half", 128, Config(32, 64, 4, 1)),
        ("sm100", "half", 128, Config(32, 128, 4, 1)),
        ("", "half", 128, Config(32, 128, 8, 1)),
    ),
    "fwd_loop": _rows(
        _NPU,
        ("sm90", "half", 64, Config(64, 128, 4, 1)),
        ("sm90", "half", 128, Config(64, 64, 4, 1)),
        ("", "half", 128, Config(128, 64, 8, 2)),
        ("sm90", "half", 256, Config(32, 32, 4, 1)),
        ("", "half", 256, Config(64, 32, 4, 1)),
        ("", "tf32", 128, Config(64, 32, 4, 1)),
        ("gfx942", "ieee", 128, Config(64, 32, 4, 1)),
        ("", "ieee", 64, Config(32, 32, 4, 1)),
        ("", "ieee", 128, Config(32, 32, 8, 1)),
    ),
    "dq_loop": _rows(
        _NPU,
        ("sm80", "half", 64, Config(64, 32, 4, 2)),
        ("", "half", 64, Config(64, 64, 4, 2)),
        ("sm80", "half", 128, Config(64, 64, 8, 1)),
        ("sm90", "half", 128, Config(64, 32, 4, 1)),
        ("", "half", 128, Config(64, 64, 4, 2)),
        ("gfx942", "half", 256, Config(16, 32, 4, 1)),
        ("", "half", 256, Config(32, 32, 8, 1)),
        ("", "tf32", 128, Config(32, 32, 4, 1)),
        ("gfx942", "ieee", 128, Config(32, 32, 4, 1)),
        ("", "ieee", 64, Config(32, 32, 8, 1)),
        ("", "ieee", 128, Config(16, 32, 8, 1)),
    ),
    "dkdv_loop": _rows(
        _NPU,
        ("sm80", "half", 64, Config(32, 64, 4, 2)),
        ("gfx942", "half", 128, Config(64, 64, 4, 1)),
        ("", "half", 64, Config(64, 64, 4, 2)),
        ("sm90", "half", 128, Config(32, 64, 4, 1)),
        ("", "half", 128, Config(64, 64, 4, 2)),
        ("gfx942", "half", 256, Config(16, 32, 4, 1)),
        ("", "half", 256, Config(32, 32, 8, 1)),
        ("", "tf32", 64, Config(32, 64, 4, 1)),
        ("", "tf32", 128, Config(32, 32, 4, 1)),
        ("gfx942", "ieee", 128, Config(32, 64, 4, 1)),
        ("", "ieee", 64, Config(32, 32, 4, 1)),
        ("sm80", "ieee", 128, Config(32, 32, 4, 1)),
        ("", "ieee", 128, Config(32, 32, 8, 1)),
    ),
    "mix": _rows(
        _NPU,
        ("", "half", 128, Config(64, 64, 4, 2)),
        ("gfx942", "", 128, Config(64, 64, 4, 1)),
        ("", "tf32", 64, Config(64, 64, 4, 1)),
        ("sm90", "tf32", 128, Config(64, 32, 4, 1)),
        ("", "", 128, Config(64, 32, 8, 1)),
        ("sm90", "half", 256, Config(32, 32, 4, 1)),
        ("", "half", 256, Config(64, 32, 8, 1)),
    ),
    "moments": _rows(
        _NPU,
        ("sm90", "half", 64, Config(64, 32, 4, 1)),
        ("sm90", "half", 128, Config(32, 64, 4, 1)),
        ("sm90", "tf32", 64, Config(64, 32, 4, 1)),
        ("", "half", 128, Config(64, 64, 8, 2)),
        ("", "half", 256, Config(32, 64, 4, 1)),
        ("gfx942", "", 128, Config(64, 64, 8, 1)),
        ("", "tf32", 64, Config(64, 64, 8, 1)),
        ("", "tf32", 128, Config(32, 64, 4, 1)),
        ("", "ieee", 128, Config(32, 32, 4, 1)),
    ),
}
SMALL = Config(64, 64, 4, 1)  # of what only sums


class Content(NamedTuple):
    """A row of the table of where the loop family takes content from; the first that fits is taken, and where none is, its own loops."""

    family: str  # as in Row
    dtype: str  # "half" or "float32", which unlike Row's arithmetic no setting changes between forward and backward
    largest: int  # as in Row
    tokens: int  # with fewer it does not fit
    source: str  # "loop", or "sdpa": the framework's scaled_dot_product_attention, and our kernels add position and mix


CONTENT: list[Content] = []  # bench/gpu.sh times both beyond SLOTS tokens, and writes the rows


def most_stages(family: str) -> int:
    """Before 3.7.1 a loop of several stages on Hopper lacks the fence between filling shared memory and wgmma's reading it."""
    return 1 if family == "sm90" and TRITON < (3, 7, 1) else 8


def why_not_persistent(family: str) -> str | None:
    """Why rows of fwd_tile with 0 steps are passed over, if they are.

    With such a row as many programs are started as run at once, each goes through one tile of queries of many heads, and with two stages
    loads the next head's while it computes. None is in the table until bench/gpu.sh has found one to be faster.
    """
    if family in ("npu", "xpu"):
        return f"how many programs run at once is not known of {family}"
    if TRITON < (3, 6):
        return f"Triton {triton.__version__} keeps every address in registers"
    if family == "sm90" and TRITON < (3, 9):
        return f"Triton {triton.__version__} does not hold two warp groups together on Hopper, and the registers of one are too few"
    return None


def choose(kernel: str, family: str, arithmetic: str, block_d: int) -> Config:
    for row in CONFIGS[kernel]:
        if kernel == "fwd_tile" and row.config.steps == 0 and why_not_persistent(family):
            continue
        if row.family in ("", family) and row.arithmetic in ("", arithmetic) and block_d <= row.largest:
            return row.config._replace(stages=min(row.config.stages, most_stages(family)))
    raise AssertionError(f"no configuration of {kernel} for {family}, {arithmetic}, D <= {block_d}")


def content(family: str, half: bool, block_d: int, tokens: int) -> str:
    dtype = "half" if half else "float32"
    fitting = (
        row.source
        for row in CONTENT
        if row.family in ("", family) and row.dtype == dtype and block_d <= row.largest and tokens >= row.tokens
    )
    return next(fitting, "loop")


def padded_grid(grid: tuple[int, int]) -> tuple[int, int] | None:
    """The padded key grid of the tile kernels, at least 16 slots; ``None`` if ``grid`` is too large or too awkward for them."""
    gh, gw = grid
    columns = power_of_two(gw)
    rows = max(power_of_two(gh), 16 // columns)
    return (rows, columns) if rows * columns <= SLOTS and max(rows, columns) <= 64 else None


def most_programs(batch: int, heads: int, grid: tuple[int, int], half: bool) -> int:
    """A bound on the programs of one launch in tiles of 32 rows: what a type of device with a limit is asked about."""
    gh, gw = grid
    padded = padded_grid(grid) if half else None
    if padded:
        return batch * heads * max(1, -(-gh * padded[1] // 32))
    lines = 32 if batch * heads >= MANY else 4
    along = -(-gh // lines) * -(-gw // 32), -(-gw // lines) * -(-gh // 32)
    return batch * heads * max(-(-gh * gw // 32), *along) + heads * (-(-gh // 32) - (-gw // 32))


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def precision(dtype: torch.dtype, device: str) -> str:
    """``tl.dot``'s input precision on this type of device."""
    return "tf32" if dtype == torch.float32 and DEVICES[device].tf32() else "ieee"
