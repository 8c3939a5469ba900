"""The model against its peers: MindCV cell by cell and step by step, timm by its stored logits; and what users can get wrong."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import convit.mindspore
from convit.mindspore.layers import GELU, LayerNorm

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
    cell = convit.mindspore.GPSA(16, 4)
    cell.local_init()
    attention = cell.get_attention(Tensor(np.random.default_rng(0).standard_normal((2, 6, 16)), ms.float32), (2, 3)).asnumpy()
    assert attention.shape == (2, 4, 6, 6) and np.allclose(attention.sum(-1), 1, atol=1e-5)


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
