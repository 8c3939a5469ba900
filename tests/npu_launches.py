"""What the Triton backend launches on an NPU, without one: ``python tests/npu_launches.py`` writes ascend/launches.json, which
``make ascend-check`` lowers launch by launch with triton-ascend, in an environment that has no torch."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convit.kernels.gpsa.gpu_triton import configs, launch

FILE = Path(__file__).parent / "ascend/launches.json"
# B, H, grid, D, type: the tile kernels in both half types, the loops in half and in float32
CASES = [
    (1, 2, (14, 14), 48, "float16"),
    (1, 2, (14, 14), 48, "bfloat16"),
    (1, 2, (28, 28), 48, "float16"),
    (1, 2, (14, 14), 48, "float32"),
]


def record(batch: int, heads: int, grid: tuple[int, int], dim: int, dtype: str) -> dict[str, Any]:
    """Tensors by name, and the launches of a forward and a backward pass on them."""
    shape = batch, grid[0] * grid[1], heads, dim
    q, k, v, grad = (torch.empty(shape, dtype=getattr(torch, dtype), device="meta").transpose(1, 2) for _ in range(4))
    known = {"q": q, "k": k, "v": v, "grad": grad}
    known |= {"pos_weight": torch.empty(heads, 3, device="meta"), "gating": torch.empty(heads, device="meta")}
    launches: list[dict[str, Any]] = []

    def name(x: Tensor) -> str:
        for other, y in known.items():
            if x is y:
                return other
        known[f"scratch{len(known)}"] = x
        return name(x)

    def through(call: launch.Call, *tensors: Tensor) -> None:
        launches.append(
            {
                "kernel": call.kernel.__name__,
                "programs": call.programs,
                "tensors": [name(x) for x in tensors],
                "numbers": list(call.numbers),
                "constants": call.constants,
                "options": call.options,
            }
        )

    with launch.trial(through=through, devices={"meta": configs.NPU}):
        inputs = q, k, v, known["pos_weight"], known["gating"]
        results = launch.forward(*inputs, *grid, dim**-0.5)
        results += launch.backward(grad, *inputs, *results, *grid, dim**-0.5)
    names = dict(zip(map(name, results), ("out", "lse", "dq", "dk", "dv", "dpos_weight", "dgating"), strict=True))
    for step in launches:
        step["tensors"] = [names.get(x, x) for x in step["tensors"]]
    tensors = {names.get(x, x): [str(y.dtype)[6:], list(y.shape), list(y.stride())] for x, y in known.items()}
    return {"batch": batch, "heads": heads, "grid": list(grid), "dim": dim, "dtype": dtype, "tensors": tensors, "launches": launches}


def text() -> str:
    lines = [json.dumps(record(*case)).replace('{"kernel"', '\n {"kernel"') for case in CASES]
    return "[" + ",\n".join(lines) + "]\n"


if __name__ == "__main__":
    FILE.write_text(text())
