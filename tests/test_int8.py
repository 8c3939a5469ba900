"""Eight-bit exports: measured before they are kept, refused with the figures where they do not pay."""

import json
import logging
import shutil
import sys

import numpy as np
import pytest
import torch

import convit
from convit.cli import main
from convit.engine.preparation import Preparation
from convit.export import export, int8
from convit.weights.load import save_checkpoint

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes that a linear map of the pixels tells apart, in folders, and a model that does."""
    pillow = pytest.importorskip("PIL.Image")
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 155)):
        (folder / name).mkdir()
        for i in range(30):
            pillow.fromarray(rng.integers(low, low + 100, (32, 32, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def model():
    torch.manual_seed(0)
    made = convit.ConViT(img_size=32, patch_size=8, embed_dim=32, num_heads=4, depth=3, local_up_to_layer=2, num_classes=2)
    with torch.no_grad():
        x = torch.stack([torch.full((3, 32, 32), -1.5), torch.full((3, 32, 32), 1.5)])
        features = made.eval().forward_head(made.forward_features(x), pre_logits=True)
        made.head.weight.copy_(10 * (features - features.mean(0)))  # nearest of the two means
        made.head.bias.copy_(-made.head.weight @ features.mean(0))
    return made


def timed(ratios):
    """Stands for the clock: the first way of each side, and these ratios."""

    def measured(runs, floats, images):
        timings = [int8.Timing(batch, 2.0, 2.0 * ratio, ratio) for batch, ratio in zip(int8.BATCHES, ratios, strict=True)]
        return next(iter(runs)), next(iter(floats)), timings

    return measured


def needs(format):
    from convit.export.check import FORMATS

    for package in (*FORMATS[format].needs, int8.FORMATS[format][0]):
        pytest.importorskip(package)


@pytest.mark.parametrize("format", SUFFIXES)
def test_an_int8_file(tmp_path, pictures, format, monkeypatch):
    needs(format)
    path, plain = (tmp_path / folder / f"model{SUFFIXES[format]}" for folder in ("out", "plain"))
    floats = int8._floats
    monkeypatch.setattr(int8, "_timed", timed((1.5, 1.2)))
    monkeypatch.setattr(int8, "_floats", lambda path, form: shutil.copytree(path.parent, plain.parent) and floats(path, form))
    monkeypatch.setattr(logging.root.manager, "disable", logging.DEBUG)
    found = export(model(), path, format, int8_data=pictures).int8
    assert logging.root.manager.disable == logging.DEBUG and logging.getLogger("nncf").level != logging.ERROR
    assert found.agreement == 1.0 and (found.calibrated, found.compared) == (20, 40)
    assert "100.0% of 40 others" in str(found) and "batch 8 2.0 ms to 2.4 (1.20 times as fast)" in str(found)
    images = (np.random.default_rng(1).standard_normal((3, 3, 32, 32)) * 0.3).astype(np.float32) + np.float32(
        [[[[-1.3]]], [[[1.3]]], [[[1.0]]]]
    )
    if format == "onnx":
        import onnx
        import onnxruntime

        kinds = [{node.op_type for node in onnx.load(file).graph.node} for file in (path, plain)]
        session = onnxruntime.InferenceSession(path)
        facts = session.get_modelmeta().custom_metadata_map
        logits = [onnxruntime.InferenceSession(file).run(None, {"images": images})[0] for file in (path, plain)]
        assert "QuantizeLinear" in kinds[0] - kinds[1]
    else:
        import openvino

        models = [openvino.Core().read_model(file) for file in (path, plain)]
        kinds = [{node.get_type_name() for node in each.get_ops()} for each in models]
        facts = {name: value.astype(str) for name, value in models[0].get_rt_info(["convit"]).astype(dict).items()}
        compiled = [openvino.Core().compile_model(each, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}) for each in models]
        logits = [each([images])[0] for each in compiled]
        assert "FakeQuantize" in kinds[0] - kinds[1]
    assert json.loads(facts["size"]) == [32, 32]
    assert json.loads(facts["int8"])["timings"][1] == {"batch": 8, "milliseconds": 2.0, "float_milliseconds": 2.4, "ratio": 1.2}
    error = np.abs(logits[0] - logits[1]).max() / np.abs(logits[1]).max()
    assert 0 < error < 0.2
    assert sorted(file.name for file in path.parent.iterdir()) == sorted(file.name for file in plain.parent.iterdir())


def test_of_many_pictures_384_are_taken_evenly(tmp_path):
    """A third to calibrate, two to compare, from all of the folder."""
    pillow = pytest.importorskip("PIL.Image")
    for i in range(420):
        pillow.new("L", (2, 2), i * 255 // 419).save(tmp_path / f"{i:03d}.png")
    calibrate, compare = int8.read_images(tmp_path, Preparation((2, 2), (0.0,), (1.0,), 1.0, "bilinear"))
    assert (len(calibrate), len(compare)) == (128, 256)
    for taken in (calibrate, compare):
        assert taken.min() < 0.02 and taken.max() > 0.98 and abs(float(np.mean(taken)) - 0.5) < 0.01


def test_another_model_is_refused_with_the_figures(tmp_path, pictures, monkeypatch):
    needs("onnx")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")
    monkeypatch.setattr(int8, "_timed", timed((1.5, 1.5)))
    compared = []

    def alternate(infer, images):
        compared.append(images)
        return np.full(len(images), len(compared) % 2)

    monkeypatch.setattr(int8, "_top", alternate)
    with pytest.raises(ValueError, match=r"another model; nothing is written.*(?s:.)* 0.0% of 40"):
        export(model(), path, "onnx", int8_data=pictures)
    for side in (compared[::2], compared[1::2]):  # each picture once, by the int8 file and by the float one
        assert len(np.unique(np.concatenate(side), axis=0)) == sum(map(len, side)) == 40
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"] and path.read_bytes() == b"before"


@pytest.mark.parametrize("format", SUFFIXES)
def test_agreement_is_with_the_float_file_on_every_image_to_compare(tmp_path, monkeypatch, format):
    """A stand-in for the quantised model that is wrong about three images of twelve, the last one among them. What agrees has to be
    faster at every batch, not only as fast."""
    right = lambda images: np.stack([images, -images], -1)  # noqa: E731
    monkeypatch.setattr(int8, "_timed", timed((1.5, 1.5)))
    monkeypatch.setattr(int8, "_with_onnxruntime", lambda path, made, images: made)
    monkeypatch.setattr(int8, "_with_nncf", lambda path, images: path)
    monkeypatch.setattr(int8, "_onnxruntime", lambda path: right)
    monkeypatch.setattr(int8, "_openvino", lambda path, config: right if config else lambda images: right(-images))  # in bfloat16
    monkeypatch.setattr(int8, "_floats", lambda path, form: {"float": right})
    monkeypatch.setattr(int8, "_runs", lambda made, form: {"int8": lambda images: right(np.where(abs(images) < 2, images, -images))})
    compare = np.array([1.0, -1, 1, 3, -1, 1, 1, 1, -3, -1, 1, 3])
    (tmp_path / "inner").mkdir()
    with pytest.raises(ValueError, match=r"another model(?s:.)* 75\.0% of 12 others"):
        int8.quantise(tmp_path / "inner" / "a.onnx", format, np.ones(5), compare)
    for ratio, figures in ((0.9, r"2\.0 ms to 1\.8 \(0\.90 times"), (1.0, r"2\.0 ms to 2\.0 \(1\.00 times")):
        monkeypatch.setattr(int8, "_timed", timed((1.5, ratio)))
        with pytest.raises(ValueError, match=rf"not faster on this machine(?s:.)* 100\.0% of 12 others(?s:.)*{figures}"):
            int8.quantise(tmp_path / "inner" / "a.onnx", format, np.ones(5), compare[abs(compare) < 2].repeat(2)[:12])
    assert not list((tmp_path / "inner").iterdir())


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_what_is_held_against_what(monkeypatch, kind):
    """OpenVINO as it comes where that is another type than asked for: of floats the fastest there is, for ONNX too."""

    class Stand:
        def __init__(self, model, config=None):
            self.type = "float32" if config else kind

    monkeypatch.setattr(int8, "_openvino", Stand)
    monkeypatch.setattr(int8, "_onnxruntime", lambda path: "onnxruntime")
    monkeypatch.setattr(int8, "find_spec", lambda name: name)
    names = {form: [list(int8._runs("model", form)), list(int8._floats("model", form))] for form in int8.FORMATS}
    loose, held = "OpenVINO in int8 as it comes", "OpenVINO in int8, INFERENCE_PRECISION_HINT f32"
    other = kind == "bfloat16"
    assert names == {
        "onnx": [["ONNX Runtime in int8"], ["ONNX Runtime in float32", *["OpenVINO as it comes, in bfloat16"] * other]],
        "openvino": [[*[loose] * other, held], [f"OpenVINO as it comes, in {kind}"]],
    }
    monkeypatch.setattr(int8, "find_spec", lambda name: None)
    assert list(int8._floats("model", "onnx")) == ["ONNX Runtime in float32"]


def test_one_slow_call_changes_no_figure(monkeypatch):
    """Medians throughout; and who was fastest at the first batch is timed at the others."""
    found = {1: {"a": [1.0, 1.0, 90.0], "b": [2.0, 2.0, 2.0], "f": [3.0, 3.0, 3.0], "g": [4.0, 90.0, 4.0]}}
    found[8] = {"a": [8.0, 8.0, 8.0], "b": [1.0] * 3, "f": [20.0, 90.0, 20.0], "g": [1.0] * 3}
    monkeypatch.setattr(int8, "_interleaved", lambda calls, images: found[len(images)])
    name, against, timings = int8._timed({"a": None, "b": None}, {"f": None, "g": None}, np.zeros((3, 1)))
    assert (name, against) == ("a", "f")
    assert timings == [int8.Timing(1, 1e3, 3e3, 3.0), int8.Timing(8, 8e3, 20e3, 2.5)]


def test_the_clock(monkeypatch):
    """The fastest of each side, every one of them timed in turn, the ratio within rounds."""
    import time

    def lasts(seconds):
        return lambda images: time.sleep(seconds * len(images))

    monkeypatch.setattr(int8, "SECONDS", 0.1)
    runs, floats = {"slow int8": lasts(0.024), "int8": lasts(0.004)}, {"float": lasts(0.012), "slow float": lasts(0.036)}
    int8_name, against, timings = int8._timed(runs, floats, np.zeros((3, 1)))
    assert (int8_name, against, [t.batch for t in timings]) == ("int8", "float", [1, 8])
    assert all(t.ratio > 1.2 and t.milliseconds >= 4 * t.batch and t.float_milliseconds >= 12 * t.batch for t in timings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "torchscript", "--int8", "--data_dir", "{}"], "--int8 is for onnx and openvino, got --format torchscript"),
        (["--format", "onnx", "--int8"], "name a folder of them, --data_dir DIR"),
        (["--format", "onnx", "--int8", "--data_dir", "{}/none"], "none is no folder"),
        (["--format", "onnx", "--int8", "--data_dir", "{}"], "needs at least 48 images, data_dir {} holds 0"),
        (["--format", "onnx", "--data_dir", "{}"], "--data_dir is of --int8"),
    ],
)
def test_bad_requests(tmp_path, capsys, monkeypatch, words, message):
    needs("onnx")
    save_checkpoint(model(), tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "w.safetensors", *(word.format(tmp_path) for word in words)]) == 1
    assert message.format(tmp_path) in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_missing_quantiser_is_said(tmp_path, capsys, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setitem(sys.modules, "nncf", None)
    assert main(["export", "convit_tiny", "--format", "openvino", "--int8", "--data_dir", str(tmp_path)]) == 1
    assert r"needs nncf" in (error := capsys.readouterr().err) and "pip install '.[int8]'" in error


def test_images_to_compare_with_are_others_and_from_everywhere(tmp_path):
    """60 grey images in two folders, each of its own shade."""
    from convit.engine.preparation import Preparation

    pillow = pytest.importorskip("PIL.Image")
    for i in range(60):
        folder = tmp_path / ("a" if i < 30 else "b")
        folder.mkdir(exist_ok=True)
        pillow.new("L", (8, 8), 4 * i).save(folder / f"{i:02}.png")
    plain = Preparation((8, 8), (0.0,), (1.0,), 1.0)
    shades = [np.rint(part[:, 0, 0, 0] * 255 / 4).astype(int) for part in int8.read_images(tmp_path, plain)]
    assert sorted([*shades[0], *shades[1]]) == list(range(60)) and len(shades[0]) == 20
    assert all(part.min() < 5 and part.max() >= 55 for part in shades)


def test_an_unreadable_image_is_named(tmp_path, pictures):
    from convit.engine.preparation import Preparation

    for i in range(48):
        (tmp_path / f"{i}.png").write_bytes(next(pictures.rglob("0.png")).read_bytes() if i else b"no image")
    with pytest.raises(ValueError, match=r"0\.png is not an image"):
        int8.read_images(tmp_path, Preparation((32, 32)))
