"""What the machine can do at most, measured: multiply-adds a second and bytes copied a second."""

import time
from dataclasses import asdict, dataclass

import torch
from timing import synchronize

from convit.dispatch import Problem
from convit.kernels.gpsa import cpu_cpp
from convit.kernels.linear import cpu_onednn


@dataclass(frozen=True)
class Roofline:
    """Peaks of one device at one thread count and type."""

    flops: float  # per second, two per multiply-add
    bytes: float  # per second, read and written

    def asdict(self) -> dict[str, float]:
        return asdict(self)


def _best(call, device: str, seconds: float) -> float:
    call()
    synchronize(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def measure(device: str = "cpu", dtype: str = "float32", seconds: float = 0.5) -> Roofline:
    """Measure with torch's current thread count.

    The rate of multiply-adds is that of the best product at hand, the practical peak: of the libraries' square ones (on CPU PyTorch's BLAS
    and oneDNN), and of our own tiles, as attention with rows so long that its softmax is under 2 % of the work. The bandwidth is that of
    copying an array too large for any cache.
    """
    kind = getattr(torch, dtype)
    large = device != "cpu"
    rate = 0.0
    for size in (4096, 8192) if large else (384, 768, 1536):
        a, b = torch.randn(2, size, size, device=device).to(kind).unbind(0)
        out = torch.empty(size, size, device=device, dtype=kind)
        products = [lambda a=a, b=b, out=out: torch.mm(a, b, out=out)]
        if cpu_onednn.why_not(a, b) is None:
            products.append(lambda a=a, b=b: cpu_onednn.linear(a, b, None))
        rate = max(rate, *(2.0 * size**3 / _best(product, device, seconds) for product in products))
    heads, tokens, dim = torch.get_num_threads(), 256, 768
    if cpu_cpp.why_not(Problem("torch", device, dtype, 1, heads, tokens, dim, (1, tokens))) is None:
        q, k, v = torch.randn(3, 1, heads, tokens, dim).to(kind).unbind(0)
        with torch.inference_mode():
            rate = max(rate, 4.0 * heads * tokens**2 * dim / _best(lambda: cpu_cpp.attention(q, k, v, dim**-0.5), device, seconds))
    source = torch.ones((2 if large else 1) * 2**27, device=device, dtype=torch.uint8).view(torch.float32)
    target = torch.empty_like(source)
    moved = 2.0 * source.numel() * 4 / _best(lambda: target.copy_(source), device, seconds)
    return Roofline(rate, moved)
