"""MindIR files: equal to the eager model on images, at batches that the export did not see; a failed export leaves nothing."""

import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from mindspore.train.mind_ir_pb2 import ModelProto

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
    path = tmp_path / "out" / "m.mindir"
    report = export_mindir(model, path, images=[tmp_path / "image.png"], classes=list("abcdé"))
    assert report.difference <= 1e-5 and report.files == [path] and list(path.parent.iterdir()) == [path]
    facts = {name: json.loads(value) for name, value in ModelProto.FromString(path.read_bytes()).user_info.items()}
    assert facts["convit.classes"] == list("abcdé") and facts["convit.size"] == [32, 48] and facts["convit.mean"] == [0.485, 0.456, 0.406]
    images = ms.Tensor(rng.standard_normal((5, 3, 32, 48)).astype(np.float32))
    expected = model(images).asnumpy()
    found = nn.GraphCell(ms.load(str(path)))(images).asnumpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    with pytest.raises(ValueError, match="is not an image"):
        (tmp_path / "bad.png").write_bytes(b"x")
        export_mindir(model, tmp_path / "none" / "m.mindir", images=[tmp_path / "bad.png"])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("size", [(32, 32), (24, 56)])
def test_a_file_per_image_size(tmp_path, size):
    """The image size of a file is fixed, the batch is not; a wrong suffix and a wrong size of images are refused."""
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
