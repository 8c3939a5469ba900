"""torch.compile, torch.export and torch.jit: first thing in a process, at every size, and read back in another process."""

import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from test_model import images, small

import convit


def in_a_fresh_process(code):
    environment = {k: v for k, v in os.environ.items() if k != "CONVIT_BACKEND"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True, capture_output=True, text=True).stdout


def test_compile_and_export_first_thing_in_a_process(tmp_path):
    """Nothing has run before; then also types and dropout that the first kernel refuses, other grids, and another backend by context."""
    out = in_a_fresh_process(f"""
import torch, convit
m, x = convit.GPSA(48, 4), torch.randn(2, 16, 48)
compiled = lambda m: torch.compile(m, fullgraph=True, backend="aot_eager")
f = compiled(m)
assert torch.allclose(f(x), m(x), atol=1e-5)
d = convit.GPSA(48, 4).double()
assert torch.allclose(compiled(d)(x.double()), d(x.double()))
compiled(convit.GPSA(48, 4, attn_drop=0.3))(x).sum().backward()
for y in (torch.randn(3, 25, 48), torch.randn(1, 9, 48)):  # of other grids
    assert torch.allclose(f(y), m(y), atol=1e-5)
with convit.use_backend("sdpa"):
    assert torch.allclose(f(x), m(x), atol=1e-5)
with convit.use_backend("akg"):
    try:
        f(x)
    except Exception as error:
        print("refused")
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


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 fails at the gradient of interpolate with dynamic sizes")
def test_training_with_dynamic_sizes_compiles_once():
    """The position embedding is resampled, and its gradient too, with sizes that the compiler does not know, none the embedding's."""
    model = small(dynamic_img_size=True, depth=2, local_up_to_layer=1).train()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def gradients(module, x):
        model.zero_grad()
        out = module(x)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    for size in ((40, 48), (48, 64), (64, 24)):
        x = images(*size)
        for axis in (2, 3):
            torch._dynamo.mark_dynamic(x, axis)
        for found, expected in zip(gradients(compiled, x), gradients(model, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert counter.frame_count == 1


@pytest.mark.parametrize("training", [False, True])
def test_what_is_compiled_or_exported_calls_the_kernels(training):
    """One operator a block, trained or not: the reference in its place would give the same numbers, slowly."""
    model = small(depth=3, local_up_to_layer=2).train(training)
    x = images(32, 32)

    def called(graph):
        return sum(node.target is torch.ops.convit.gpsa.default for node in graph.nodes if node.op == "call_function")

    recorded = torch._dynamo.testing.AotEagerAndRecordGraphs()
    torch._dynamo.reset()
    out = torch.compile(model, fullgraph=True, backend=recorded)(x)
    graph = recorded.fw_graphs[0].graph
    assert called(graph) == 3
    if training:
        out.sum().backward()
        names = [str(node.target) for node in recorded.bw_graphs[0].graph.nodes]
        assert sum(name.startswith("convit.gpsa_backward") for name in names) == 3
    else:
        assert called(torch.export.export(model, (x,)).graph) == 3


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_compiles_into_one_graph(context):
    """Where the eager model takes its short cut."""
    model, x = small().eval(), images(32, 32)
    with context():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x), rtol=1e-4, atol=1e-5)


SHAPE = {"patch_size": 8, "num_classes": 5, "depth": 2, "local_up_to_layer": 1, "num_heads": 4}


@pytest.mark.parametrize(("dynamo", "size"), [(False, (32, 32)), (True, (32, 32)), (False, (8, 32)), (False, (32, 8)), (True, (8, 32))])
def test_torchs_own_export_to_onnx(dynamo, size, tmp_path):
    """Ours and accelerated ones, of one row or column of patches too: in torch's operators, whichever backend would run the call."""
    runtime, timm = pytest.importorskip("onnxruntime"), pytest.importorskip("timm")
    pytest.importorskip("onnxscript")
    models = [convit.accelerate(timm.models.convit.ConVit(embed_dim=6, img_size=size, **SHAPE)).eval()]
    models += [] if dynamo else [small(img_size=size)]
    x = images(*size)
    for i, model in enumerate(models):
        path = str(tmp_path / f"{i}.onnx")
        torch.onnx.export(model, (x,), path, dynamo=dynamo, input_names=["x"], **({"verbose": False} if dynamo else {}))
        (found,) = runtime.InferenceSession(path).run(None, {"x": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 32), (32, 8), (8, 8)])
def test_export_of_one_row_and_of_one_column(size):
    """Ours and accelerated ones, with a dynamic batch."""
    timm = pytest.importorskip("timm")
    batch = torch.export.Dim("batch", min=1, max=64)
    for model in (small(img_size=size), convit.accelerate(timm.models.convit.ConVit(embed_dim=6, img_size=size, **SHAPE)).eval()):
        program = torch.export.export(model, (images(*size),), dynamic_shapes=({0: batch},)).module()
        for x in (images(*size), images(*size).repeat(3, 1, 1, 1)[1:]):
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
