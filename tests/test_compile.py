"""torch.compile, torch.export and torch.jit: first thing in a process, at every size, and read back in another process."""

import os
import subprocess
import sys

import pytest
import torch
from test_model import images, small

import convit


def in_a_fresh_process(code):
    environment = {k: v for k, v in os.environ.items() if k != "CONVIT_BACKEND"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True, capture_output=True, text=True).stdout


def test_compile_and_export_first_thing_in_a_process(tmp_path):
    """Nothing has run before; then also types and dropout that the first kernel refuses, and another backend by context."""
    out = in_a_fresh_process(f"""
import torch, convit
m, x = convit.GPSA(48, 4), torch.randn(2, 16, 48)
compiled = lambda m: torch.compile(m, fullgraph=True, backend="aot_eager")
f = compiled(m)
assert torch.allclose(f(x), m(x), atol=1e-5)
with convit.use_backend("sdpa"):
    assert torch.allclose(f(x), m(x), atol=1e-5)
with convit.use_backend("akg"):
    try:
        f(x)
    except Exception as error:
        print("refused")
d = convit.GPSA(48, 4).double()
assert torch.allclose(compiled(d)(x.double()), d(x.double()))
compiled(convit.GPSA(48, 4, attn_drop=0.3))(x).sum().backward()
for transform in (lambda x: torch.func.jvp(m, (x,), (x,))[1], torch.func.grad(lambda x: m(x).square().sum())):
    assert torch.allclose(compiled(transform)(x), transform(x), atol=1e-4)
program = torch.export.export(m, (x,), strict=True)
assert torch.allclose(program.module()(x), m(x), atol=1e-5)
torch.export.save(program, {str(tmp_path / "a.pt2")!r})
torch.jit.trace(m, x).save({str(tmp_path / "a.pt")!r})
torch.save((x, m(x)), {str(tmp_path / "x.pt")!r})
""")
    assert out == "refused\n"
    in_a_fresh_process(f"""
import torch, convit.ops
x, y = torch.load({str(tmp_path / "x.pt")!r})
for f in (torch.export.load({str(tmp_path / "a.pt2")!r}).module(), torch.jit.load({str(tmp_path / "a.pt")!r})):
    assert torch.allclose(f(x), y, atol=1e-5)
""")


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_sizes_takes_every_size(strict):
    """Whatever size it is traced at: the model's own, or another."""
    model = small(dynamic_img_size=True)
    height, width = torch.export.Dim("height", min=2, max=12), torch.export.Dim("width", min=2, max=12)
    for traced in ((32, 32), (24, 40)):
        shapes = ({2: 8 * height, 3: 8 * width},)
        program = torch.export.export(model, (images(*traced),), dynamic_shapes=shapes, strict=strict).module()
        for size in ((32, 32), (48, 48), (24, 40), (64, 24)):
            torch.testing.assert_close(program(images(*size)), model(images(*size)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamo", [False, True])
def test_torchs_own_export_to_onnx(dynamo, tmp_path):
    """Ours and accelerated ones: in torch's operators, whichever backend would run the call."""
    runtime, timm = pytest.importorskip("onnxruntime"), pytest.importorskip("timm")
    pytest.importorskip("onnxscript")
    shape = {"img_size": 32, "patch_size": 8, "num_classes": 5, "depth": 2, "local_up_to_layer": 1, "num_heads": 4}
    models = [convit.accelerate(timm.models.convit.ConVit(embed_dim=6, **shape)).eval()]
    models += [] if dynamo else [small()]
    for i, model in enumerate(models):
        path = str(tmp_path / f"{i}.onnx")
        torch.onnx.export(model, (images(),), path, dynamo=dynamo, input_names=["x"], **({"verbose": False} if dynamo else {}))
        (found,) = runtime.InferenceSession(path).run(None, {"x": images().numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(images()), rtol=1e-4, atol=1e-5)
