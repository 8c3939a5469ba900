"""The deployed form equals the model; exported files run in their runtimes; a failed export leaves nothing."""

import json
import logging
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import convit
from convit import export as exporting
from convit.cli import main
from convit.engine.preparation import Preparation
from convit.export import export, torch_program
from convit.export.check import Report, check_images, check_request, write_checked
from convit.export.deploy import Deployed

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2", "torchscript": ".pt"}


def small(**kwargs):
    torch.manual_seed(0)
    shape = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "num_heads": 4, "depth": 3, "local_up_to_layer": 2, "num_classes": 5}
    model = convit.ConViT(**shape | kwargs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def photographs(tmp_path):
    """Two images that look like something: smooth gradients with an edge."""
    pillow = pytest.importorskip("PIL.Image")
    y, x = np.mgrid[:60, :80]
    for i in (1, 2):
        array = np.stack([x * 3, y * 4, (x + i * y > 70) * 200], -1).astype(np.uint8)
        pillow.fromarray(array).save(tmp_path / f"{i}.png")
    return [tmp_path / "1.png", tmp_path / "2.png"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dynamic_size", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"reg_tokens": 2},
        {"global_pool": "avg"},
        {"global_pool": ""},
        {"local_up_to_layer": 3, "global_pool": "avg"},
        {"local_up_to_layer": 0},
        {"qkv_bias": True},
        {"use_pos_embed": False},
        {"num_classes": 0},
    ],
)
def test_deployed_equals_the_model(kwargs, dynamic_size, fused):
    model = small(dynamic_img_size=True, **kwargs)
    deployed = Deployed(model, dynamic_size=dynamic_size, fused=fused)
    for size in ((32, 48), (40, 24)) if dynamic_size else ((32, 48),):
        images = torch.randn(2, 3, *size)
        with torch.no_grad(), convit.use_backend("reference"):
            expected, found = model(images), deployed(images)
        assert (found - expected).abs().max() <= exporting.TOLERANCE * expected.abs().max()


def test_deployed_keeps_each_layers_own_scale():
    model = small()
    for block, scale in zip(model.blocks, (0.9, -0.3, 0.05), strict=True):
        block.attn.scale = scale
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad(), convit.use_backend("reference"):
        torch.testing.assert_close(Deployed(model, dynamic_size=False, fused=False)(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic_size", [False, True])
@pytest.mark.parametrize(("gate", "steep"), [(-100.0, 1.0), (100.0, 1.0), (1.0, 1e4)])
def test_deployed_at_closed_and_open_gates_and_steep_positions(gate, steep, dynamic_size):
    model = small()
    for block in model.blocks[:2]:
        torch.nn.init.constant_(block.attn.gating_param, gate)
        block.attn.pos_proj.weight.data *= steep
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad(), convit.use_backend("reference"):
        torch.testing.assert_close(Deployed(model, dynamic_size=dynamic_size, fused=False)(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic_size", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("format", SUFFIXES)
def test_export(tmp_path, photographs, format, dynamic_size):
    for package in exporting.FORMATS[format].needs:
        pytest.importorskip(package)
    # patches that are not square; of a dynamic size the fewest rows and columns that every format takes
    size, larger = ((16, 32), (24, 64)) if dynamic_size else ((32, 48), None)
    model = small(img_size=size, patch_size=(8, 16), depth=2, local_up_to_layer=1).train()
    path = tmp_path / "out" / "deeper" / f"model{SUFFIXES[format]}"
    # 0 to 255 and 0 to 1 alike
    model.pretrained_cfg = {"mean": [127.5, 63.75, 31.875], "std": [51.0, 51.0, 102.0], "crop_pct": 0.9, "interpolation": "bilinear"}
    model.pretrained_cfg["label_names"] = ["a", "b", "ç", "d", "e"]
    talkative = [logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")]
    report = export(model, path, format, images=photographs, dynamic_size=dynamic_size, opset=20)
    assert [logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")] == talkative
    assert model.training and not model.patch_embed.dynamic
    assert report.difference <= 1e-5 and report.batches == [1, 2]
    assert report.sizes == ([size, larger] if dynamic_size else [size])
    assert sorted(path.parent.iterdir()) == sorted(report.files)
    # a batch and (if dynamic) a size that the exporter did not see, in a fresh load of the file
    images = torch.randn(3, 3, *((64, 48) if dynamic_size else size))
    model.patch_embed.dynamic = True
    with torch.no_grad():
        expected = model.eval()(images).numpy()
    if format == "torch-export":
        most = [int(range_.upper) for range_ in torch.export.load(path).range_constraints.values()]
        assert (most.count(65536), most.count(1024)) == (1, 2 * dynamic_size)  # images at once; patches along either side
    found = run_file(format, path, images)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    if format == "onnx":
        check_graph(path, blocks=2, tokens=4 if dynamic_size else 12)
    assert {name: json.loads(value) for name, value in facts(format, path).items()} == {
        "size": list(size),
        "mean": [0.5, 0.25, 0.125],
        "std": [0.2, 0.2, 0.4],
        "crop_pct": 0.9,
        "interpolation": "bilinear",
        "classes": ["a", "b", "ç", "d", "e"],
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_what_is_given_goes_before_what_the_model_has(tmp_path, photographs):
    """Names of classes; and a model of grey images, in another type and in training, with dropout, is exported in float32 and as evaluated,
    and stays."""
    model = small(in_chans=1, proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5).bfloat16().train()
    model.pretrained_cfg = {"label_names": list("vwxyz")}
    report = export(model, tmp_path / "m.pt", "torchscript", images=photographs[:1], classes=list("abcde"))
    assert report.batches == [1, 2]  # one photograph comes with its mirror image
    assert json.loads(facts("torchscript", tmp_path / "m.pt")["classes"]) == list("abcde")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and all(module.training for module in model.modules())
    assert model.pretrained_cfg == {"label_names": list("vwxyz")}
    images = torch.randn(2, 1, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(
            run_file("torchscript", tmp_path / "m.pt", images), model.float().eval()(images).numpy(), rtol=1e-4, atol=1e-5
        )


def test_an_image_is_checked_with_its_mirror_image(photographs):
    one, other = check_images(photographs[:1], Preparation((32, 48)))
    assert np.array_equal(other, one[:, :, ::-1]) and not np.array_equal(other, one)


@pytest.mark.parametrize(
    ("make", "format", "options", "message"),
    [
        (small, "torchscript", {"classes": ["a", "b"]}, "classes must name the 5 outputs of the model, got 2"),
        (lambda: torch.nn.Linear(2, 2), "torchscript", {}, "must be a convit.ConViT, got Linear; load its checkpoint"),
        (small, "torchscript", {"int8_data": "."}, "--int8 is for onnx and openvino, got --format torchscript"),
        (small, "torchscript", {"opset": 24}, "opset must be in 18..23, got 24"),
        (lambda: small(img_size=(30, 47), dynamic_img_pad=True), "torchscript", {}, r"pads its 30 x 47: set_input_size\(\(32, 48\)\)"),
        (small, "torchscript", {"images": []}, "at least one image file, or be None"),
        (small, "mindir", {}, "use convit.export.mindir.export_mindir"),
    ],
)
def test_what_the_function_refuses(tmp_path, monkeypatch, make, format, options, message):
    monkeypatch.setitem(sys.modules, "mindspore", types.ModuleType("mindspore"))
    with pytest.raises(ValueError, match=message):
        export(make(), tmp_path / "out" / f"m{exporting.FORMATS[format].suffix}", format, **options)
    assert not list(tmp_path.iterdir())
    assert check_request("torchscript", opset=23) == check_request("torchscript") == exporting.FORMATS["torchscript"]


def run_file(format, path, images):
    if format == "onnx":
        import onnxruntime

        return onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})[0]
    if format == "openvino":
        import openvino

        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return compiled([images.numpy()])[0]
    module = torch.export.load(path).module() if format == "torch-export" else torch.jit.load(str(path))
    with torch.no_grad():
        return module(images).numpy()


def facts(format, path):
    """What the file says of preparation and classes, read with its runtime alone."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        assert session.get_inputs()[0].shape[0] == session.get_outputs()[0].shape[0] == "batch"
        return session.get_modelmeta().custom_metadata_map
    if format == "openvino":
        import openvino

        return {name: value.astype(str) for name, value in openvino.Core().read_model(path).get_rt_info(["convit"]).astype(dict).items()}
    files = {"convit.json": ""}
    if format == "torch-export":
        torch.export.load(path, extra_files=files)
    else:
        torch.jit.load(str(path), _extra_files=files)
    return {name: json.dumps(value) for name, value in json.loads(files["convit.json"]).items()}


def check_graph(path, blocks, tokens):
    """One content softmax per block, none for position; nothing as large as N x N is stored; no trace of this machine."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    assert sum(node.op_type == "Softmax" for node in model.graph.node) == blocks
    assert not [tensor.name for tensor in model.graph.initializer if list(tensor.dims[-2:]) == [tokens, tokens]]
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 20
    assert str(path.parent).encode() not in path.read_bytes() and b"site-packages" not in path.read_bytes()


@pytest.mark.parametrize("size", [(8, 48), (48, 8)])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_one_row_and_one_column(tmp_path, photographs, size):
    """Export at their own size; a dynamic one is refused where torch cannot vary an axis of length one, and nothing is left."""
    model = small(img_size=size)
    with pytest.raises(ValueError, match=f"two rows and two columns.*size is {size[0]} x {size[1]}.*set_input_size"):
        export(model, tmp_path / "out" / "model.pt2", "torch-export", images=photographs, dynamic_size=True)
    assert not (tmp_path / "out").exists()
    for format, dynamic_size in (("torch-export", False), ("torchscript", True)):
        report = export(model, tmp_path / f"model{SUFFIXES[format]}", format, images=photographs, dynamic_size=dynamic_size)
        assert report.difference <= exporting.TOLERANCE and report.sizes[0] == size
    assert json.loads(facts(format, report.files[0])["classes"]) == list("01234")  # nobody has named them


@pytest.mark.parametrize("sign", [1, -1])
def test_wrong_file_is_not_kept(tmp_path, sign, photographs, monkeypatch):
    """An exporter that gets the function wrong is found out, and the file that was there before stays."""

    right = torch_program.write_torchscript

    def wrong(deployed, *rest):
        deployed.head.bias += sign * 1e-3
        return right(deployed, *rest)

    monkeypatch.setattr(torch_program, "write_torchscript", wrong)
    path = tmp_path / "out" / "m.pt"
    path.parent.mkdir()
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="differs from the eager model by"):
        export(small(), path, "torchscript", images=photographs)
    assert [p.name for p in path.parent.iterdir()] == ["m.pt"] and path.read_bytes() == b"before"
    monkeypatch.setattr(torch_program, "write_torchscript", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(small(), path, "torchscript", images=photographs)
    assert [p.name for p in path.parent.iterdir()] == ["m.pt"]


@pytest.mark.parametrize("wrong", ["one image", "a batch", "the second size", "a lower value", "the shape", "no number"])
def test_every_batch_and_size_is_compared(tmp_path, wrong, monkeypatch):
    """To 1e-5 of the largest logit, whatever its sign; the named file appears when what lies beside it is there."""
    batches = [np.full((2, 1, side, side), side, np.float32) for side in (4, 6)]

    def eager(images):
        return np.stack([images[:, 0, 0, 0], np.full(len(images), -8.0)], 1) - 7

    def infer(images):
        logits = eager(images)
        places = {"one image": len(images) == 1, "a batch": len(images) == 2, "the second size": images.shape[2] == 6}
        if places.get(wrong, wrong == "a lower value"):
            logits[-1, 1] -= 2.5e-4
        if wrong == "no number":
            logits[-1, 1] = np.nan
        return logits[:, :1] if wrong == "the shape" else logits

    def nearly(images):
        return eager(images) + 1.2e-4

    def write(function):
        return lambda made: made.write_bytes(b"model") and made.with_suffix(".bin").write_bytes(b"weights") and function

    def disturbed(made):
        assert made.parents[1] == tmp_path / "out"  # on the disk that it is moved on
        (tmp_path / "out" / "another's").write_bytes(b"")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_checked(tmp_path / "out" / "m.pt", "torchscript", disturbed, eager, batches)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["another's"]
    (tmp_path / "out" / "another's").unlink()
    (tmp_path / "out").rmdir()
    with pytest.raises(ValueError, match="differs from the eager model by"):
        write_checked(tmp_path / "out" / "deeper" / "m.pt", "torchscript", write(infer), eager, batches)
    assert not list(tmp_path.iterdir())
    moved, move = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: moved.append(target) or move(source, target))
    report = write_checked(tmp_path / "m.pt", "torchscript", write(nearly), eager, batches)
    assert report == ([tmp_path / "m.pt", tmp_path / "m.bin"], pytest.approx(8e-6), [1, 2], [(4, 4), (6, 6)], None)
    assert moved == [tmp_path / "m.bin", tmp_path / "m.pt"] and [file.read_bytes() for file in report.files] == [b"model", b"weights"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convit_tiny", "--format", "tflite"], "format must be one of onnx, openvino"),
        (["convit_tiny", "--format", "onnx", "--opset", "9"], "opset must be in 18..23, got 9"),
        (["convit_tinny", "--format", "torchscript"], "no file, folder or variant; did you mean 'convit_tiny'"),
        (["convit_tiny", "--format", "mindir", "--dynamic-size"], "fixed image size"),
        (["convit_tiny", "--format", "torchscript", "--images", "{}/bad.png"], "bad.png is not an image"),
        (["convit_tiny", "--format", "torchscript", "--images", "{}/none.png"], "none.png"),
        (["convit_tiny", "--format", "torchscript", "--ckpt_path", "{}/bad.png"], "bad.png is no checkpoint"),
        (["{}", "--format", "torchscript"], "holds none of best.pth"),
        (["convit_tiny", "--format", "onnx", "--output", "model.pt2"], "onnx files end in .onnx, got 'model.pt2'"),
        (["{}/bad.png", "--format", "torchscript", "--pretrained"], "has its own weights"),
        (["convit_tiny", "--format", "torchscript", "--pretrained", "--ckpt_path", "w.pth"], "choose --ckpt_path or --pretrained"),
    ],
)
def test_bad_input(tmp_path, capsys, monkeypatch, arguments, message):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert main(["export", *(argument.format(tmp_path) for argument in arguments)]) == 1
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["bad.png"]


@pytest.mark.parametrize(
    ("format", "package", "extra"),
    [("onnx", "onnxruntime", "export"), ("openvino", "openvino", "export"), ("mindir", "mindspore", "mindspore")],
)
def test_missing_runtime_is_said(tmp_path, monkeypatch, capsys, format, package, extra):
    """By the function and by the command, before anything is written."""
    for needed in exporting.FORMATS[format].needs:
        if needed != package:
            pytest.importorskip(needed)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImportError, match=rf"needs {package} .*pip install '\.\[{extra}\]'"):
        export(small(), tmp_path / f"file{exporting.FORMATS[format].suffix}", format)
    assert main(["export", "convit_tiny", "--format", format]) == 1
    assert f"needs {package}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_file_is_called_as_the_model(tmp_path, monkeypatch):
    from convit.cli.export import file_name

    (tmp_path / "run 1.5").mkdir()
    monkeypatch.chdir(tmp_path / "run 1.5")
    given = {
        ".": "run 1.5",
        "..": tmp_path.name,
        "../run 1.5/": "run 1.5",
        "best.pth": "best",
        "a/w.ckpt": "w",
        "w.pt": "w.pt",
        "a_b": "a_b",
    }
    assert {model: file_name(model, ".pt") for model in given} == {model: f"{name}.pt" for model, name in given.items()}


def test_command(tmp_path, photographs, capsys):
    """A checkpoint with recorded settings, another image size, into TorchScript; an existing file stays without --force."""
    from convit.weights.load import save_checkpoint

    model = convit.create_model("convit_tiny", num_classes=7)
    for module in model.modules():
        if isinstance(module, torch.nn.GELU):
            module.approximate = "tanh"
    save_checkpoint(model, tmp_path / "w.safetensors")
    command = ["export", "convit_tiny", "--format", "torchscript", "-o", str(tmp_path / "m.pt"), "--image-resize", "64,96"]
    command += ["--ckpt_path", str(tmp_path / "w.safetensors"), "--images", *map(str, photographs)]
    assert main(command) == 0
    assert "batch 1 and 2, 64 x 96" in capsys.readouterr().out
    images = torch.randn(2, 3, 64, 96)
    model.set_input_size((64, 96))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(str(tmp_path / "m.pt"))(images), model.eval()(images), rtol=1e-4, atol=1e-5)
    assert main(command) == 1
    assert "--force" in capsys.readouterr().err


def test_the_command_hands_on_what_it_is_asked(tmp_path, monkeypatch, capsys):
    asked = {}

    def exported(model, path, format, **options):
        asked.update(options, outputs=model.num_classes, size=model.patch_embed.img_size, path=path.name, format=format)
        path.write_bytes(bytes(1_500_000))
        return Report([path], 2e-6, [1, 3], [(32, 48), (48, 32)], "measured so")

    monkeypatch.setattr(exporting, "export", exported)
    monkeypatch.chdir(tmp_path)
    words = ["--format", "torchscript", "--num_classes", "3", "--image_resize", "32,48", "--dynamic_size", "--opset", "21", "--images", "a"]
    assert main(["export", "convit_tiny", *words]) == 0
    options = {"images": [Path("a")], "dynamic_size": True, "opset": 21, "int8_data": None}
    assert asked == options | {"outputs": 3, "size": (32, 48), "path": "convit_tiny.pt", "format": "torchscript"}
    told = "batch 1 and 3, 32 x 48 and 48 x 32: largest difference to the eager model 2.0e-06 of the largest logit\nmeasured so\n"
    shown = capsys.readouterr().out
    assert "the weights are the initial ones" in shown and "convit_tiny.pt: 1.5 MB\n" in shown and shown.endswith(told)
    assert main(["export", "convit_tiny", *words]) == 1 and main(["export", "convit_tiny", *words, "--force"]) == 0
