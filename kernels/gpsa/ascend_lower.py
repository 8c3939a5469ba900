"""Compile one hybrid function with the AKG inside a MindSpore wheel, as MindSpore itself would, but outside it.

    LD_LIBRARY_PATH=WHEEL/lib/plugin/cpu python ascend_lower.py WHEEL < request.json

``ascend_akg`` calls this in a process of its own before it hands an operator to MindSpore: a refusal there ends the process'
compile server for good, and a search that does not end would hang it. ``tests/ascend`` calls it for Ascend ("aicore") and CUDA
source. The request is the JSON form of ``Request``; the exit status is 0 when every operator compiled, and the reason is on stderr.
"""

import json
import sys
from typing import Any, NamedTuple


class Request(NamedTuple):
    """One operator: ``tensors`` are pairs (shape, dtype), the output last; ``process`` is "cpu", "cuda" or "aicore"."""

    name: str
    source: str
    tensors: list[Any]
    process: str
    attrs: dict[str, Any]


def describe(request: Request) -> str:
    """The composite description of the operator that MindSpore sends to AKG's compile server."""

    def tensor(index: int, kind: str, name: str | None = None) -> dict[str, Any]:
        shape, dtype = request.tensors[index]
        unique = f"{kind}_{index}" if kind == "input" else "output_0_0"
        out = {"data_type": dtype, "format": "DefaultFormat", "shape": list(shape), "tensor_name": unique}
        return out | ({"name": name} if name else {})

    inputs = range(len(request.tensors) - 1)
    attrs = {
        "func_type": "hybrid",
        "func_source_str": request.source,
        "func_name": request.name,
        "func_compile_attrs": json.dumps(request.attrs),
    }
    op = {
        "name": "Custom",
        "impl_path": "",
        "attr": [{"data_type": "str", "name": name, "value": value} for name, value in attrs.items()]
        + [{"data_type": "int", "name": "inputs_num", "value": len(inputs)}],
        "input_desc": [[tensor(i, "input", f"input_{i}")] for i in inputs],
        "output_desc": [tensor(-1, "output", "output_0")],
    }
    description = {
        "composite": True,
        "composite_graph": "gpsa",
        "id": 0,
        "op": f"Fused_{request.name}",
        "op_desc": [op],
        "input_desc": [[tensor(i, "input")] for i in inputs],
        "output_desc": [tensor(-1, "output")],
        "platform": "AKG",
        "process": request.process,
        "version": 2,
    }
    if request.process == "cpu":
        description["target_info"] = {"arch": "x86_64", "cpu": "core-avx2", "feature": "avx", "system": "linux"}
    elif request.process == "cuda":
        description["target_info"] = {"compute_capability": "8.0", "sm_count": 108}
    return json.dumps(description)


def main(wheel: str) -> None:
    sys.path.insert(0, f"{wheel}/_akg")
    from akg.composite import build_module

    for fields in json.load(sys.stdin):
        request = Request(*fields)
        if not build_module.build(describe(request), dict(request.attrs)):
            raise SystemExit(f"AKG returned no module for {request.name}")
        print(f"compiled {request.name}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
