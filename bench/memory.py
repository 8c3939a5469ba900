"""Peak memory of one call above what was there before it, in a process of its own."""

import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

# The children are forked from a server that has imported torch and run nothing: as clean as a fresh interpreter, without its seconds.
_context = multiprocessing.get_context("forkserver") if sys.platform.startswith("linux") else None
if _context is not None:
    _context.set_forkserver_preload(["torch", "peers"])


def why_not(device: str) -> str | None:
    if device == "cpu" and _context is None:
        return "peak memory of a process is read from /proc, which only Linux has"
    if device not in ("cpu", "cuda"):
        return f"peak memory is not measured on {device}"
    return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _resident(libc) -> int:
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    return _status("VmRSS")


def _child(name: str, core, connection) -> None:
    import ctypes

    import peers

    try:
        torch.set_num_threads(core.threads)
        libc = ctypes.CDLL(None)
        mmap_threshold, trim_threshold = -3, -1
        if hasattr(libc, "mallopt"):
            # freed memory goes back at once: it would hide in the base, and the next allocation would not show
            libc.mallopt(mmap_threshold, 1 << 16)
            libc.mallopt(trim_threshold, 1 << 16)
        peer = next(p for p in peers.core_peers(core.device) if p.name == name)
        small = replace(core, batch=1, grid=(4, 4))
        peer.build(small)()  # libraries loaded, pools started, kernels generated
        inputs = peers.CoreInputs(core)
        empty = _resident(libc)
        call = peer.build(core)  # its own copy of the inputs and its constants
        base = _resident(libc)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        result = call()
        peak_bytes = max(0, _status("VmHWM") - base)
        connection.send((peak_bytes, max(0, base - empty - inputs.nbytes)))
        del result
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")


def peak(name: str, core) -> tuple[int, int]:
    """Bytes that the peer ``name`` needs for ``core`` beside its inputs.

    Returns:
        (of one call at its peak, results included; of the constants held between calls, such as relative indices)
    """
    if core.device != "cpu":
        return _peak_on_device(name, core)
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_child, args=(name, core, theirs))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = f"the process ended with status {process.exitcode}"
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(f"peak memory of {name} on {core}: {answer}")
    return answer


def _peak_on_device(name: str, core) -> tuple[int, int]:
    import peers

    build: Callable = next(p for p in peers.core_peers(core.device) if p.name == name).build
    inputs = peers.CoreInputs(core)
    empty = torch.cuda.memory_allocated()
    call = build(core)
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak_bytes = torch.cuda.max_memory_allocated() - base
    del result
    return peak_bytes, max(0, base - empty - inputs.nbytes)
