"""MindIR files: equal to the eager model on images, at batches that the export did not see; a failed export leaves nothing."""

import json
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from mindspore.train.mind_ir_pb2 import ModelProto

from convit.cli import main
from convit.engine.preparation import Preparation
from convit.export import mindir
from convit.export.check import Report
from convit.export.mindir import export_mindir
from convit.mindspore.model import ConViT


@pytest.mark.parametrize("kwargs", [{}, {"approximate_gelu": False, "norm_eps": 1e-6, "qkv_bias": True}, {"local_up_to_layer": 2}])
def test_export_mindir(tmp_path, kwargs):
    pillow = pytest.importorskip("PIL.Image")
    y, x = np.mgrid[:60, :80]
    pillow.fromarray(np.stack([x * 3, y * 4, (x + y > 70) * 200], -1).astype(np.uint8)).save(tmp_path / "image.png")
    shape = {"image_size": (32, 48), "patch_size": 8, "embed_dim": 32, "num_heads": 4, "depth": 2, "local_up_to_layer": 1, "num_classes": 5}
    model = ConViT(**shape | kwargs)
    rng = np.random.default_rng(0)
    for parameter in model.get_parameters():
        parameter.set_data(ms.Tensor((parameter.asnumpy() + 0.2 * rng.standard_normal(parameter.shape)).astype(np.float32)))
    model.set_train(True)
    path = tmp_path / "out" / "m.mindir"
    report = export_mindir(model, path, images=[tmp_path / "image.png"], classes=list("abcdé"))
    assert report.difference <= 1e-5 and report.files == [path] and list(path.parent.iterdir()) == [path]
    facts = {name: json.loads(value) for name, value in ModelProto.FromString(path.read_bytes()).user_info.items()}
    assert facts["convit.classes"] == list("abcdé") and facts["convit.size"] == [32, 48] and facts["convit.mean"] == [0.485, 0.456, 0.406]
    assert model.training and path.stat().st_mode & 0o222  # the file can be written to, as any that its owner has made
    model.set_train(False)
    images = ms.Tensor(rng.standard_normal((5, 3, 32, 48)).astype(np.float32))
    expected = model(images).asnumpy()
    found = nn.GraphCell(ms.load(str(path)))(images).asnumpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    with pytest.raises(ValueError, match="is not an image"):
        (tmp_path / "bad.png").write_bytes(b"x")
        export_mindir(model, tmp_path / "none" / "m.mindir", images=[tmp_path / "bad.png"])
    assert not (tmp_path / "none").exists()


def test_a_file_per_image_size(tmp_path):
    """The image size of a file is fixed, the batch is not; a wrong suffix is refused."""
    size = (24, 56)
    pillow = pytest.importorskip("PIL.Image")
    pillow.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)).save(tmp_path / "image.png")
    shape = {"patch_size": 8, "embed_dim": 32, "num_heads": 4, "depth": 2, "local_up_to_layer": 1, "num_classes": 5}
    model = ConViT(image_size=size, **shape)
    with pytest.raises(ValueError, match="end in .mindir"):
        export_mindir(model, tmp_path / "m.onnx", images=[tmp_path / "image.png"])
    report = export_mindir(model, tmp_path / "m.mindir", images=[tmp_path / "image.png"])
    assert report.sizes == [size] and report.batches == [1, 2]
    run = nn.GraphCell(ms.load(str(tmp_path / "m.mindir")))
    for batch in (1, 3):
        images = ms.Tensor(np.random.default_rng(batch).standard_normal((batch, 3, *size)).astype(np.float32))
        expected = model(images).asnumpy()
        assert np.abs(run(images).asnumpy() - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.fixture
def asked(monkeypatch):
    """What an export would write: nothing is."""
    found = {}

    def checked(path, name, write, eager, batches):
        found.update(shape=batches[0].shape)
        path.write_bytes(b"x")
        return Report([path], 0.0, [1, 2], [batches[0].shape[2:]])

    monkeypatch.setattr(mindir, "write_checked", checked)
    monkeypatch.setattr(mindir, "facts_of", lambda preparation, classes: found.update(preparation=preparation, classes=classes) or {})
    return found


def test_what_is_given_goes_before_the_runs(tmp_path, monkeypatch, asked):
    pillow = pytest.importorskip("PIL.Image")
    pillow.new("RGB", (40, 40)).save(tmp_path / "one.png")
    shape = {"patch_size": 8, "embed_dim": 16, "num_heads": 2, "depth": 1, "local_up_to_layer": 0}
    run = SimpleNamespace(classes=["cat", "dog"], preparation=Preparation((16, 16), crop_pct=0.5, interpolation="bilinear"))
    monkeypatch.setattr(mindir, "trained_model", lambda place: (ConViT(image_size=16, num_classes=2, **shape), run))
    other = Preparation((16, 16), crop_pct=0.7)
    for given, classes, preparation in (
        ({}, ["cat", "dog"], run.preparation),
        ({"img_size": (24, 32)}, ["cat", "dog"], run.preparation._replace(size=(24, 32))),
        ({"classes": ["a", "b"], "preparation": other}, ["a", "b"], other),
    ):
        export_mindir(Path("run"), tmp_path / "m.mindir", images=[tmp_path / "one.png"], **given)
        assert (asked["classes"], asked["preparation"]) == (classes, preparation) and asked["shape"] == (2, 3, *preparation.size)
    (tmp_path / "m.mindir").unlink()
    for model, given, message in (
        (Path("run"), {"classes": ["a"]}, "classes must name the 2 outputs of the model, got 1"),
        (ConViT(image_size=16, num_classes=0, **shape), {}, "must have a classifier"),
    ):
        with pytest.raises(ValueError, match=message):
            export_mindir(model, tmp_path / "m.mindir", images=[tmp_path / "one.png"], **given)
    assert not (tmp_path / "m.mindir").exists()


def test_the_command_hands_on_what_it_is_asked(tmp_path, monkeypatch, asked):
    pillow = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    pillow.new("RGB", (40, 40)).save("one.png")
    words = ["--num_classes", "3", "--image_resize", "32,48", "--images", "one.png", "one.png", "one.png"]
    assert main(["export", "convit_tiny", "--format", "mindir", *words]) == 0
    assert (asked["shape"], asked["classes"]) == ((3, 3, 32, 48), ["0", "1", "2"]) and Path("convit_tiny.mindir").exists()
