"""Lower one compute function of ``ascend_tbe.py`` to CCE through AKG's version of the TBE vocabulary.

    python tbe_on_akg.py WHEEL ascend_tbe.py OPERATOR

AKG names two things otherwise: ``reduce_sum`` is ``sum``, and for ``vdiv`` there is the product with ``vrec``.
The functions are taken from the file's text: importing it would need MindSpore.
"""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

wheel, file, name = sys.argv[1:]
sys.path.insert(0, f"{wheel}/_akg")
import akg  # noqa: E402
import akg.lang.ascend as akg_dsl  # noqa: E402
from akg import tvm  # noqa: E402

text = Path(file).read_text()
scope: dict = {"KEYS": None}
for node in ast.parse(text).body:
    if isinstance(node, ast.Assign) and node.targets[0].id == "KEYS":
        scope["KEYS"] = ast.literal_eval(node.value)
    if isinstance(node, ast.FunctionDef) and (
        node.name.endswith("_compute") or node.name in ("_shape", "_exponentials", "_content_weight")
    ):
        exec(ast.get_source_segment(text, node), scope)

dsl = SimpleNamespace(
    **{word: getattr(akg_dsl, word) for word in ["cast_to", "reduce_max", "broadcast", "vexp", "vsub", "vadd", "vmul", "vmuls", "vadds"]},
    reduce_sum=akg_dsl.sum,
    vdiv=lambda a, b: akg_dsl.vmul(a, akg_dsl.vrec(b)),
)
maps, gh, gw, lanes = 4, 14, 14, 208
known = {
    "s": [maps, gh, gw, lanes],
    "da": [maps, gh, gw, lanes],
    "px": [maps, 1, gw, lanes],
    "py": [maps, gh, 1, lanes],
    "g": [maps, 1, 1, lanes],
    "delta": [maps, 1, 1, lanes],
}
compute = scope[f"{name}_compute"]
inputs = compute.__code__.co_varnames[1 : compute.__code__.co_argcount]
tensors = [tvm.placeholder(known[x], "float16" if x in ("s", "da") else "float32", x) for x in inputs]
result = compute(dsl, *tensors)
schedule = tvm.create_schedule(result.op)
with akg.build_config(add_lower_pass=[]):
    akg.build(schedule, [*tensors, result], "cce", name=f"gpsa_{name}", polyhedral=True)
