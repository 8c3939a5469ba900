"""The model against its peers: MindCV cell by cell and step by step, timm by its stored logits; and what users can get wrong."""

from collections import Counter

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import convit.mindspore
from convit.engine.mindspore.trained import trained_model
from convit.mindspore.layers import GELU, DropPath, LayerNorm, Mlp
from convit.weights.load import read_file, write_file

# largest difference of logits, relative to the largest logit or 1. Against float64, over four batches, ours are off by 0.4e-6 to 0.8e-6 and
# MindCV's by as much for convit_tiny (they differ by 0.7e-6 to 0.85e-6), by 0.7e-6 to 1.1e-6 and 0.95e-6 to 1.2e-6 for convit_tiny_plus.
LOGITS = 1.5e-6
# relative Frobenius error of a parameter's gradient. Those of the gates and position weights are 4 or 12 sums that may cancel in one layer
# or another: they are judged by the largest of their kind among the layers
GRADIENT = 1e-5
SUMS = ("gating_param", "pos_proj.weight")
SHORT = {"depth": 2, "local_up_to_layer": 1, "num_classes": 10}


def images(batch=2, size=(224, 224), seed=0):
    return Tensor(np.random.default_rng(seed).standard_normal((batch, 3, *size)), ms.float32)


def close(logits, expected):
    return np.abs(logits - expected).max() <= LOGITS * max(1.0, np.abs(expected).max())


def peers(name, **kwargs):
    mindcv = pytest.importorskip("mindcv")
    ms.set_seed(0)
    theirs, ours = mindcv.create_model(name, **kwargs), convit.mindspore.create_model(name, **kwargs)
    own = ours.parameters_dict()
    for parameter in theirs.get_parameters():
        own.pop(parameter.name).set_data(parameter.value())
    assert not own, f"MindCV has no {list(own)}"
    return theirs, ours


def test_names_and_shapes_are_mindcvs():
    theirs, ours = peers("convit_tiny")
    assert {p.name: p.shape for p in theirs.get_parameters()} == {p.name: p.shape for p in ours.get_parameters()}


def test_initial_weights_are_mindcvs():
    """The local initialisation to the number; what is drawn, by its spread."""
    theirs = pytest.importorskip("mindcv.models.convit").ConViT
    keys = {
        "depth": 2,
        "local_up_to_layer": 1,
        "locality_strength": 3.0,
        "image_size": 64,
        "qkv_bias": True,
        "embed_dim": 60,
        "num_heads": 10,
    }
    ours = {p.name: p.asnumpy() for p in convit.mindspore.ConViT(**keys).get_parameters()}
    for p in theirs(**keys).get_parameters():
        name = p.name if p.name in ours else next(name for name in ours if name.endswith(p.name))
        mine, other = ours.pop(name), p.asnumpy()
        if name.endswith("pos_proj.weight"):  # nine heads look at the points of a square, the tenth is drawn
            assert np.array_equal(mine[:9], other[:9]) and abs(mine[9]).max() < 0.3
        elif np.ptp(other) == 0 or name == "blocks.0.attn.v.weight":
            assert np.array_equal(mine, other), name
        elif not name.startswith("patch_embed"):
            assert mine.std() == pytest.approx(other.std(), rel=0.35), name
    assert not ours


@pytest.mark.parametrize("name", ["convit_tiny", "convit_tiny_plus"])
def test_logits_are_mindcvs(name):
    ms.set_context(mode=ms.PYNATIVE_MODE)  # whole models take long to compile
    theirs, ours = peers(name)
    for model in (theirs, ours):
        model.set_train(False)
    assert close(ours(images()).asnumpy(), theirs(images()).asnumpy())


class Loss(nn.Cell):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def construct(self, x, labels):
        return self.loss(self.model(x), labels)


@pytest.mark.parametrize("name", ["convit_tiny", "convit_tiny_plus"])
def test_a_training_step_is_mindcvs(mode, name):
    """Loss, gradients, and the weights after one step of momentum."""
    labels = Tensor([3, 7], ms.int32)
    results = []
    for model in peers(name, drop_path_rate=0.0, qkv_bias=True, **SHORT | {"depth": 3, "local_up_to_layer": 2}):
        model.set_train(True)
        parameters = model.trainable_params()
        loss, grads = ms.value_and_grad(Loss(model), None, parameters)(images(), labels)
        nn.Momentum(parameters, 0.1, 0.9)(grads)
        gradients = {p.name: g.asnumpy() for p, g in zip(parameters, grads, strict=True)}
        results.append((loss.asnumpy(), gradients, {p.name: p for p in parameters}))
    (their_loss, their_grads, their_weights), (loss, grads, weights) = results
    assert loss == pytest.approx(their_loss, rel=1e-6)
    for name, expected in their_grads.items():
        key = name if name in grads else next(n for n in grads if n.endswith(name))
        if name.endswith(("pos_proj.bias", ".k.bias")):  # zero but for rounding: the softmax cancels them
            assert np.abs(grads[key]).max() <= 1e-6
            continue
        kind = next((kind for kind in SUMS if name.endswith(kind)), name)
        size = max(np.linalg.norm(other) for at, other in their_grads.items() if at.endswith(kind))
        error = np.linalg.norm(grads[key] - expected) / size
        assert error <= GRADIENT, f"{name}: relative error {error:.2e}"
        weight, their_weight = weights[key].asnumpy(), their_weights[name].asnumpy()
        rounding = np.spacing(np.abs(weight).max())
        assert np.abs(weight - their_weight).max() <= 0.1 * GRADIENT * size + rounding, name


def test_training_with_drop_path_and_dropout_moves_every_weight(mode):
    ms.set_seed(0)
    model = convit.mindspore.create_model("convit_tiny", image_size=32, attn_drop_rate=0.1, drop_rate=0.1, **SHORT)
    cell = nn.TrainOneStepCell(Loss(model), nn.SGD(model.trainable_params(), 0.1))
    cell.set_train(True)
    before = {p.name: p.asnumpy().copy() for p in model.get_parameters()}
    losses = [float(cell(images(4, (32, 32)), Tensor([1, 2, 3, 4], ms.int32)).asnumpy()) for _ in range(6)]
    assert np.isfinite(losses).all()
    still = [p.name for p in model.get_parameters() if (p.asnumpy() == before[p.name]).all()]
    assert all(name.endswith("pos_proj.bias") for name in still), still


def test_mindcv_checkpoint_loads_strictly(tmp_path):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    theirs, _ = peers("convit_tiny", **SHORT)
    ms.save_checkpoint(theirs, str(tmp_path / "convit.ckpt"))
    theirs.set_train(False)
    expected = theirs(images()).asnumpy()
    ours = convit.mindspore.create_model("convit_tiny", **SHORT)
    not_loaded, _ = ms.load_param_into_net(ours, ms.load_checkpoint(str(tmp_path / "convit.ckpt")), strict_load=True)
    assert not not_loaded
    again = convit.mindspore.create_model("convit_tiny", pretrained=tmp_path / "convit.ckpt", **SHORT)
    other = convit.mindspore.create_model(
        "convit_tiny", pretrained=tmp_path / "convit.ckpt", **SHORT | {"num_classes": 3}
    )  # a head of its own
    assert other.classifier.weight.shape == (3, 192) and np.array_equal(other.cls_token.asnumpy(), again.cls_token.asnumpy())
    for model in (ours, again):
        model.set_train(False)
        assert close(model(images()).asnumpy(), expected)


def test_mindcv_registry():
    mindcv = pytest.importorskip("mindcv")
    assert set(mindcv.list_models("convit*_kernel")) == {f"{name}_kernel" for name in convit.mindspore.list_models()}
    model = mindcv.create_model("convit_tiny_kernel", num_classes=7, in_channels=1, image_size=32, depth=2, drop_path_rate=None)
    assert isinstance(model, convit.mindspore.ConViT)
    assert model(Tensor(np.zeros((1, 1, 32, 32)), ms.float32)).shape == (1, 7)


def test_timm_weights_give_timms_logits(mode, request):
    """A safetensors of timm's: its names, exact GELU and eps 1e-6, also for a model that has already run with MindCV's."""
    data = request.path.parent / "data"
    model = convit.mindspore.ConViT(image_size=64, embed_dim=16, num_heads=4, depth=3, local_up_to_layer=2, num_classes=10)
    model.set_train(False)
    x = images(2, (64, 64))
    model(x)
    convit.mindspore.load_checkpoint(model, data / "timm_convit.safetensors")
    assert close(model(x).asnumpy(), np.load(data / "timm_convit.npz")["logits"])
    cells = [cell for _, cell in model.cells_and_names()]
    assert not any(cell.approximate for cell in cells if isinstance(cell, GELU))
    assert all(cell.epsilon == 1e-6 for cell in cells if isinstance(cell, LayerNorm))


def test_any_grid_and_resampling(mode, tmp_path):
    small = convit.mindspore.create_model("convit_tiny", image_size=64, **SHORT)
    ms.save_checkpoint(small, str(tmp_path / "small.ckpt"))
    wide = convit.mindspore.create_model("convit_tiny", image_size=(48, 96), pretrained=tmp_path / "small.ckpt", **SHORT)
    assert wide.grid == (3, 6) and wide.pos_embed.shape == (1, 18, 192)
    wide.set_train(False)
    logits = wide(images(2, (48, 96))).asnumpy()
    # the grid matters: the same patches as 6 x 3 give something else
    with convit.use_backend("reference"):
        wide.compile_cache.clear()
        assert close(wide(images(2, (48, 96))).asnumpy(), logits)
    assert np.isfinite(logits).all()


def test_set_input_size(mode, tmp_path):
    """As a model that was made for that size: also one that has run, and back."""
    small = convit.mindspore.create_model("convit_tiny", image_size=64, **SHORT).set_train(False)
    ms.save_checkpoint(small, str(tmp_path / "small.ckpt"))
    small(images(2, (64, 64)))
    small.set_input_size((48, 96))
    wide = convit.mindspore.create_model("convit_tiny", image_size=(48, 96), pretrained=tmp_path / "small.ckpt", **SHORT).set_train(False)
    assert close(small(images(2, (48, 96))).asnumpy(), wide(images(2, (48, 96))).asnumpy())
    assert [(p.name, p.shape) for p in small.trainable_params()] == [(p.name, p.shape) for p in wide.trainable_params()]
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size"):
        small.set_input_size(100)
    assert small.grid == (3, 6)


def test_a_dynamic_batch_in_graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)
    model = convit.mindspore.create_model("convit_tiny", image_size=32, **SHORT).set_train(False)
    expected = model(images(4, (32, 32))).asnumpy()
    model.set_inputs(Tensor(shape=[None, 3, 32, 32], dtype=ms.float32))
    for batch in (4, 1, 3):
        assert close(model(images(4, (32, 32))[:batch]).asnumpy(), expected[:batch])


def test_attention_map():
    """It is the one that the cell applies to its values."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    cell = convit.mindspore.GPSA(16, 4)
    cell.local_init()
    rng = np.random.default_rng(0)
    for p in (cell.q.weight, cell.k.weight, cell.v.weight, cell.gating_param):
        p.set_data(Tensor(rng.standard_normal(p.shape), ms.float32))
    x = Tensor(rng.standard_normal((2, 6, 16)), ms.float32)
    attention = cell.get_attention(x, (2, 3)).asnumpy()
    assert attention.shape == (2, 4, 6, 6) and np.allclose(attention.sum(-1), 1, atol=1e-5)
    values = cell.v(x).asnumpy().reshape(2, 6, 4, 4).transpose(0, 2, 1, 3)
    out = cell.proj(Tensor((attention @ values).transpose(0, 2, 1, 3).reshape(2, 6, 16)))
    np.testing.assert_allclose(cell(x, (2, 3)).asnumpy(), out.asnumpy(), atol=2e-5)


def test_dropout_acts_where_it_should_and_while_training_alone(monkeypatch):
    """drop_rate after the position embedding, both projections and both layers of a perceptron; attn_drop on either attention."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    calls, plain = Counter(), nn.Dropout.construct
    monkeypatch.setattr(nn.Dropout, "construct", lambda self, x: (calls.update([self.p]), plain(self, x))[1])
    keys = {"image_size": 32, "embed_dim": 16, "num_heads": 4, "drop_path_rate": 0.0, **SHORT}
    x = images(2, (32, 32))
    for more, drops in (({"drop_rate": 0.5}, 1 + 2 + 2 * 2), ({}, 0)):
        calls.clear()
        model = convit.mindspore.ConViT(**keys, **more).set_train(True)
        model(x)
        assert calls[0.5] == drops
    for cell in (convit.mindspore.GPSA(16, 4, attn_drop=0.5), convit.mindspore.MHSA(16, 4, attn_drop=0.5)):
        plain_cell = type(cell)(16, 4)
        for mine, other in zip(plain_cell.get_parameters(), cell.get_parameters(), strict=True):
            mine.set_data(other)
        tokens = Tensor(np.random.default_rng(0).standard_normal((1, 9, 16)), ms.float32)
        many = Tensor(np.repeat(tokens.asnumpy(), 2000, 0))
        expected = plain_cell(tokens).asnumpy()[0]
        np.testing.assert_allclose(cell.set_train(False)(tokens).asnumpy()[0], expected, atol=1e-6)
        drawn = cell.set_train(True)(many).asnumpy()
        spread = drawn.std(0)
        assert (spread > 0).all() and (np.abs(drawn.mean(0) - expected) < 5 * spread / 2000**0.5).all()  # kept ones are scaled
    mlp = Mlp(8, 16, 0.5, True).set_train(True)
    assert 0.4 < (mlp(Tensor(np.ones((500, 8)), ms.float32)).asnumpy() == 0).mean() < 0.6


def test_drop_path():
    """Rates grow linearly to the last block; each branch drops samples for itself and scales the kept ones, while training alone."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    model = convit.mindspore.ConViT(image_size=32, embed_dim=16, num_heads=4, drop_path_rate=0.3, depth=4, local_up_to_layer=2)
    np.testing.assert_allclose([block.drop_path.p for block in model.blocks], [0, 0.1, 0.2, 0.3], rtol=1e-12)
    x = Tensor(np.ones((2000, 3)), ms.float32)
    for drawn in (False, True):  # by MindSpore, or by whoever trains
        cell = DropPath(0.25).set_train(True)
        if drawn:
            cell.take_draws(2100, "draws")
            cell.draw(np.random.default_rng(0))
        branches = [cell(x, branch).asnumpy() for branch in (0, 1)]
        for out in branches:
            assert (out == out[:, :1]).all() and set(np.unique(out)) == {np.float32(0), np.float32(1 / 0.75)}
            assert out.mean() == pytest.approx(1, abs=0.05)
        assert abs(np.corrcoef(branches[0][:, 0], branches[1][:, 0])[0, 1]) < 0.1
        assert np.array_equal(cell.set_train(False)(x, 0).asnumpy(), x.asnumpy())


def test_bad_arguments(mode):
    with pytest.raises(ValueError, match="unknown model 'convit_tny'; did you mean 'convit_tiny'"):
        convit.mindspore.create_model("convit_tny")
    with pytest.raises(TypeError, match="img_size"):
        convit.mindspore.create_model("convit_tiny", img_size=224)
    with pytest.raises(ValueError, match="num_heads must divide dim = 10, got 4"):
        convit.mindspore.GPSA(10, 4)
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size"):
        convit.mindspore.create_model("convit_tiny", image_size=100)
    model = convit.mindspore.create_model("convit_tiny", image_size=32, depth=1)
    with pytest.raises(ValueError, match="set_input_size"):
        model(images(1, (48, 32)))
    with pytest.raises(ValueError, match="6 patches form no square grid"):
        convit.mindspore.GPSA(16, 4)(Tensor(np.zeros((1, 6, 16)), ms.float32))


def test_unfit_checkpoint_changes_nothing(request):
    model = convit.mindspore.create_model("convit_tiny", image_size=64, **SHORT)
    before = [p.asnumpy().copy() for p in model.get_parameters()]
    with pytest.raises(ValueError, match="does not fit this model"):
        convit.mindspore.load_checkpoint(model, request.path.parent / "data" / "timm_convit.safetensors")
    assert all((p.asnumpy() == x).all() for p, x in zip(model.get_parameters(), before, strict=True))
    for p in model.get_parameters():
        p.set_dtype(ms.float16)
    before[0][0, 0, 0] = 1e5
    ms.save_checkpoint([{"name": p.name, "data": Tensor(x)} for p, x in zip(model.get_parameters(), before, strict=True)], "large.ckpt")
    with pytest.raises(ValueError, match="does not fit the model's type, in which it would be infinite: cls_token reaches 1e"):
        convit.mindspore.load_checkpoint(model, "large.ckpt")


def test_weights_in_float16_take_images_in_float32():
    ms.set_context(mode=ms.PYNATIVE_MODE)
    norm, x = LayerNorm(16, 1e-6), Tensor(np.random.default_rng(0).standard_normal((3, 16)), ms.float32)
    expected = norm(x).asnumpy()
    for p in norm.get_parameters():
        p.set_dtype(ms.float16)
    np.testing.assert_allclose(norm(x).asnumpy(), expected, atol=1e-6)


def test_models_that_mindspores_cannot_be_are_refused(request, tmp_path):
    """A checkpoint with register tokens, or one whose patches are pooled."""
    tensors, settings = read_file(request.path.parent / "data" / "timm_convit.safetensors")
    write_file(tmp_path / "model.safetensors", tensors, settings)
    assert trained_model(tmp_path)[0].embed_dim == 16
    (tmp_path / "config.json").write_text('{"global_pool": "avg"}')
    with pytest.raises(ValueError, match="register tokens or pools its patches"):
        trained_model(tmp_path)
    (tmp_path / "config.json").unlink()
    write_file(tmp_path / "model.safetensors", tensors | {"reg_token": np.zeros((1, 2, 16), np.float32)}, settings)
    with pytest.raises(ValueError, match="register tokens or pools its patches"):
        trained_model(tmp_path)


@pytest.mark.parametrize(
    "versions, message",
    [
        ({"numpy": "2.4.1"}, r"does not work with numpy 2\.4\.1: pip install 'numpy<2'"),
        ({"mindspore": "2.5.0"}, r"needs MindSpore 2\.7 or newer, got 2\.5\.0: pip install"),
        ({"mindspore": None}, "MindSpore, which is not installed: pip install"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_environment(monkeypatch, versions, message):
    real = convit.mindspore.version

    def version(package):
        if package in versions and versions[package] is None:
            raise convit.mindspore.PackageNotFoundError(package)
        return versions.get(package) or real(package)

    monkeypatch.setattr(convit.mindspore, "version", version)
    with pytest.raises(ImportError, match=message):
        convit.mindspore.check_environment()
