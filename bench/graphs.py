"""Device time without the host: a call captured once as a CUDA graph and replayed; and what the host takes to issue it."""

import time
from collections.abc import Callable

import torch


def host_seconds(call: Callable, count: int = 20) -> float:
    """Seconds until one call has been issued, the device working behind: the best of ``count``."""
    best = float("inf")
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    torch.cuda.synchronize()
    return best


def captured(call: Callable, pool: object = None) -> Callable[[], None]:
    """The replay of ``call`` as a CUDA graph. Graphs that share a ``pool`` of memory may be replayed in turn, not read.

    Raises:
        RuntimeError: The call cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm on a stream like the one of the capture: libraries keep workspaces for each
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def timed(call: Callable, pool: object = None) -> tuple[Callable, dict]:
    """What to time for the device's share of ``call``, and what to note beside it: the host's seconds and how the device was timed."""
    noted: dict = {"host": host_seconds(call), "timed": "graph"}
    try:
        return captured(call, pool), noted
    except RuntimeError as error:
        torch.cuda.synchronize()  # raises where the device itself is spoiled
        return call, noted | {"timed": "eager", "not_captured": str(error)[:200]}
