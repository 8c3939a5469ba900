"""What a MindCV user brings: every key of MindCV's config, its train step, float16 that overflows."""

import dataclasses
import subprocess
import sys
import types

import pytest

ms = pytest.importorskip("mindspore")
pytest.importorskip("mindcv")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

import ten_steps  # noqa: E402
from mindspore import Tensor, ops  # noqa: E402

from convit.engine.mindspore import train as train_module  # noqa: E402
from convit.engine.mindspore.build import build_model, build_step  # noqa: E402
from convit.engine.mindspore.data import Data  # noqa: E402
from convit.engine.mindspore.steps import Gradients, LossScale, Update  # noqa: E402
from convit.engine.mindspore.train import MindSporeRun, train  # noqa: E402
from convit.engine.recipe import MOOT, load_recipe, packaged_recipes, recipe_from  # noqa: E402
from convit.engine.world import World  # noqa: E402
from convit.mindspore import load_checkpoint  # noqa: E402

# key of MindCV 0.3.0's train.py: values that it takes beside its default; those after None are refused, with a reason that says the word
KEYS = {
    "mode": (1,),
    "distribute": (True,),
    "val_while_train": (True,),
    "val_interval": (2,),
    "log_interval": (10,),
    "seed": (7,),
    "device_target": ("Ascend", "GPU", "CPU"),
    "dataset": ("imagenet", None, "cifar10", "imagenet"),
    "data_dir": ("./data",),
    "train_split": ("training",),
    "val_split": ("test",),
    "dataset_download": (False, None, True, "not downloaded"),
    "num_parallel_workers": (2,),
    "shuffle": (False,),
    "num_samples": (None, 100),
    "batch_size": (64,),
    "drop_remainder": (False,),
    "image_resize": (256,),
    "scale": ([0.2, 1.0],),
    "ratio": ([0.5, 2.0],),
    "hflip": (0.0,),
    "vflip": (0.5,),
    "color_jitter": ([0.4, 0.4, 0.4], 0.1),
    "interpolation": ("bicubic",),
    "auto_augment": ("randaug-m7-mstd0.5-inc1", "autoaug", "autoaugr-mstd0.5", "3a", "augmix", "trivialaugwide"),
    "aug_splits": (0, None, 3, "three times"),
    "re_prob": (0.25,),
    "re_scale": ([0.1, 0.2],),
    "re_ratio": ([0.5, 2.0],),
    "re_value": (0, "random"),
    "re_max_attempts": (1,),
    "mean": ([123.675, 116.28, 103.53],),
    "std": ([58.395, 57.12, 57.375],),
    "crop_pct": (0.9, 1.15),
    "mixup": (0.2,),
    "cutmix": (1.0,),
    "cutmix_prob": (0.5,),
    "aug_repeats": (3,),
    "model": ("convit_small",),
    "num_classes": (10,),
    "in_channels": (3,),
    "drop_rate": (0.1,),
    "drop_path_rate": (0.2,),
    "pretrained": (True,),
    "ckpt_path": ("a.ckpt",),
    "resume_opt": (False, None, True, "--resume"),
    "keep_checkpoint_max": (3,),
    "ckpt_save_dir": ("./out",),
    "ckpt_save_interval": (5,),
    "ckpt_save_policy": ("latest_k",),
    "epoch_size": (300,),
    "dataset_sink_mode": (False,),
    "ema": (True,),
    "ema_decay": (0.99,),
    "clip_grad": (True,),
    "clip_value": (1.0,),
    "layer_decay": (0.75,),
    "gradient_accumulation_steps": (4,),
    "opt": ("sgd", "SGD", "momentum", "adam", "AdamW", "lion", "rmsprop", "adagrad", "lamb", "nadam"),
    "momentum": (0.8,),
    "weight_decay": (0.05,),
    "use_nesterov": (True,),
    "weight_decay_filter": ("disable", "auto", "norm_and_bias"),
    "eps": (1e-6,),
    "scheduler": ("constant", "cosine_decay", "exponential_decay", "step_decay", "multi_step_decay"),
    "lr": (0.1,),
    "min_lr": (0.0,),
    "warmup_epochs": (0,),
    "warmup_factor": (0.1,),
    "decay_epochs": (10,),
    "decay_rate": (0.5,),
    "multi_step_decay_milestones": ([10, 20],),
    "lr_epoch_stair": (True,),
    "num_cycles": (2,),
    "cycle_decay": (0.5,),
    "loss": ("CE", "ce", "BCE"),
    "label_smoothing": (0.1,),
    "aux_factor": (0.0, None, 0.1, "auxiliary head"),
    "reduction": ("mean", "Mean", None, "sum", "averaged"),
    "amp_level": ("O0", "O1", "o2", "O3"),
    "val_amp_level": ("O0", "O2"),
    "amp_cast_list": ("[nn.Conv1d, nn.Conv2d]",),
    "loss_scale_type": ("fixed", "dynamic", "auto"),
    "loss_scale": (1024,),
    "drop_overflow_update": (True, False),
    "eval_shuffle": (True, False),
}
NULL = {"num_samples", "num_classes", "drop_rate", "drop_path_rate", "auto_augment", "layer_decay", "color_jitter", "amp_cast_list"}
NULL |= {"ckpt_save_policy", "val_amp_level"}


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_mindcv_is_honoured_or_refused_with_the_reason(key):
    """A value that is taken is found again in the recipe, but for two keys that change no result."""
    values = KEYS[key]
    cut = values.index(None) if None in values[1:] else len(values)
    before = recipe_from({"framework": "mindspore"})
    for value in values[:cut]:
        now = recipe_from({"framework": "mindspore", key: value})
        changed = now != before or value in (getattr(before, key, value), None)
        assert changed or key in MOOT or str(value).lower() == str(getattr(before, key)).lower() or key == "reduction", value
    if cut < len(values):
        with pytest.raises(ValueError, match=values[-1]):
            recipe_from({"framework": "mindspore", key: values[-2]})
    if key in NULL:
        recipe_from({"framework": "mindspore", key: None})


def test_another_model_is_the_one_thing_said_of_its_recipe():
    """Of MindCV's yamls, all but the seven of ConViT are refused so, also those with keys that a ConViT cannot honour."""
    for keys in ({"model": "inception_v3", "aux_factor": 0.1}, {"model": "halonet_50t", "re_max_attempts": 1}, {"model": "a", "b": "c"}):
        for framework in ("mindspore", "pytorch"):
            with pytest.raises(ValueError, match=f"the recipe: model '{keys['model']}' is no ConViT"):
                recipe_from({"framework": framework, **keys})
    with pytest.raises(ValueError, match="model 'convit_tinny' is no ConViT; did you mean 'convit_tiny'"):
        recipe_from({"model": "convit_tinny"})


def test_keys_of_older_releases_and_cycles():
    assert recipe_from({"filter_bias_and_bn": True}).weight_decay_filter == "norm_and_bias"
    assert recipe_from({"filter_bias_and_bn": False, "dynamic_loss_scale": True}).weight_decay_filter == "disable"
    for name in ("one_cycle", "cyclic"):
        assert recipe_from({"scheduler": name, "warmup_epochs": 0}).scheduler == name
        with pytest.raises(ValueError, match="warmup_epochs 0"):
            recipe_from({"scheduler": name, "warmup_epochs": 3})
    with pytest.raises(ValueError, match="amp_cast_list must be a list of cells"):
        recipe_from({"framework": "mindspore", "amp_cast_list": "[__import__('os')]"})


@pytest.mark.parametrize("name", ["one_cycle", "cyclic"])
def test_cycles_are_mindcvs_own(name):
    from mindcv.scheduler import create_scheduler

    from convit.engine.schedule import rates

    keys = {"lr": 0.02, "min_lr": 0.001, "warmup_epochs": 0, "num_cycles": 2}
    ours = rates(recipe_from({**keys, "scheduler": name, "epoch_size": 12}), 0.02, 7)
    np.testing.assert_allclose(ours, create_scheduler(7, name, num_epochs=12, **keys), rtol=1e-12)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes that colour tells apart: 24 + 24 training images, 2 + 2 for validation."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 2)):
        for label, name in enumerate(("blue", "red")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 150, (16, 16, 3), dtype=np.uint8)
                pixels[..., 2 - 2 * label] += 80
                Image.fromarray(pixels).save(root / split / name / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    return ten_steps.paint(tmp_path_factory.mktemp("painted"))


# MindCV's recipe for convit_tiny on a small model, without augmentation: 12 steps
TINY = {"framework": "mindspore", "embed_dim": 16, "num_heads": 4, "depth": 2, "local_up_to_layer": 1, "image_resize": 16, "patch_size": 4}
TINY |= {"mode": 1, "epoch_size": 1, "batch_size": 4, "warmup_epochs": 0, "decay_epochs": 1, "num_classes": 2, "num_parallel_workers": 1}
TINY |= {"amp_level": "O0", "loss_scale": 1, "mixup": 0, "cutmix": 0, "re_prob": 0, "color_jitter": None, "hflip": 0, "drop_path_rate": 0}
TINY |= {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "lr": 0.005, "interpolation": "bilinear"}


def tiny(images, **keys):
    return load_recipe("convit_tiny", {**TINY, "data_dir": str(images), **keys})


# a rate at which the gradients soon exceed 2, whatever the initial weights: a scale near the largest float32 then overflows
ROUGH = 0.5


def finite(parameters):
    return all(np.isfinite(p.asnumpy()).all() for p in parameters if getattr(p, "dtype", None) == ms.float32)


@pytest.mark.parametrize("whole", [False, True])  # MindSpore's own loop, of accelerators, too
def test_an_overflow_lowers_the_scale_and_loses_nothing(images, tmp_path, monkeypatch, whole):
    """A loss scale that overflows: each such step is skipped and counted, and changes no weight, until the scale is low enough."""
    monkeypatch.setattr(train_module, "sinks", lambda recipe: whole)
    keys = {"loss_scale": 2.0**127, "loss_scale_type": "dynamic", "max_skipped_steps": 0, "lr": ROUGH, "num_samples": 32}
    result = train(tiny(images, **keys), tmp_path / "run", progress=False)
    skipped, steps = result.history[0]["skipped_steps"], result.history[0]["update"]
    assert 1 <= skipped < steps and finite(result.model.get_parameters())
    saved = ms.load_checkpoint(str(tmp_path / "run/last.ckpt"))
    assert float(saved["loss_scale"].asnumpy()) == 2.0 ** (127 - skipped) and int(saved["global_step"].asnumpy().item()) == steps
    assert np.isfinite(result.train_loss) and finite(ms.load_checkpoint(str(tmp_path / "run/best.ckpt")).values())


@pytest.mark.parametrize("whole", [False, True])
def test_a_fixed_scale_that_overflows_stops_the_run(images, tmp_path, monkeypatch, whole):
    monkeypatch.setattr(train_module, "sinks", lambda recipe: whole)
    with pytest.raises(FloatingPointError, match="was not finite in .* steps in a row"):
        train(tiny(images, loss_scale=3e38, max_skipped_steps=0, lr=ROUGH), tmp_path / "run", progress=False)
    assert not list((tmp_path / "run").glob("*.ckpt"))


PLAIN = {
    "momentum": 0.8,
    "weight_decay": 0.1,
    "lr": 0.005,
    "ema": False,
    "clip_grad": False,
    "scheduler": "constant",
    "num_samples": 16,
    "eps": 1e-8,
}
STEPS = {
    "nadam": PLAIN | {"weight_decay_filter": "disable"},
    "sgd": PLAIN,
    "lion": PLAIN | {"lr": 0.0005},
    "rmsprop": PLAIN | {"lr": 0.0005, "eps": 1e-6},
    "adagrad": PLAIN | {"loss": "BCE"},
    "momentum": PLAIN | {"use_nesterov": True, "weight_decay_filter": "norm_and_bias", "scheduler": "step_decay"},
}


@pytest.fixture
def recorded(monkeypatch):
    """The batches of each step that we take, its loss, and the loss scale after it."""
    seen, gradients, step = [], MindSporeRun.gradients, MindSporeRun._step

    def recording(self, batches):
        parts = [next(batches) for _ in range(self.recipe.gradient_accumulation_steps)]
        found = gradients(self, iter(parts))
        seen.append([[part[:2] for part in parts], found[0]])
        return found

    def recording_scale(self, batches):
        done = step(self, batches)
        seen[-1].append(float(self.scale.value.asnumpy()))
        return done

    monkeypatch.setattr(MindSporeRun, "gradients", recording)
    monkeypatch.setattr(MindSporeRun, "_step", recording_scale)
    monkeypatch.setenv("MS_JIT", "0")  # nothing of MindCV's need be compiled
    return seen


def mindcvs(recipe, steps, **more):
    """MindCV's model with our first weights, and the train step that its own train.py makes of the recipe."""
    from mindcv.loss import create_loss
    from mindcv.optim import create_optimizer
    from mindcv.scheduler import create_scheduler
    from mindcv.utils import create_trainer

    theirs = build_model(recipe, 2)
    keys = {"min_lr": recipe.min_lr, "warmup_epochs": 0, "decay_epochs": 1, "decay_rate": recipe.decay_rate, "num_epochs": 1}
    schedule = create_scheduler(steps, recipe.scheduler, lr=recipe.lr, **keys)
    keys = {name: getattr(recipe, name) for name in ("opt", "momentum", "weight_decay", "weight_decay_filter", "eps")}
    optimizer = create_optimizer(theirs, lr=schedule, nesterov=recipe.use_nesterov, **keys)
    loss = create_loss(recipe.loss, label_smoothing=recipe.label_smoothing)
    keys = {name: getattr(recipe, name) for name in ("ema", "ema_decay", "clip_grad", "clip_value", "loss_scale", "loss_scale_type")}
    if not recipe.ema:
        keys["amp_cast_list"] = "[nn.Conv1d]"  # none is in the model; with a list MindCV takes its own train step
    return theirs, create_trainer(theirs, loss, optimizer, None, "O0", **{"amp_cast_list": None} | keys | more).train_network


def assert_same_weights(output, theirs, step):
    """Of a run, and of MindCV's model and train step; the moving average too if there is one."""
    saved = ms.load_checkpoint(str(output / "last.ckpt"))
    average = {p.name: p.asnumpy() for p in step.ema_weight} if step.ema else {}
    for p in theirs.get_parameters():
        name = p.name.removeprefix("optimizer.")  # which MindCV's accumulation puts before it
        np.testing.assert_allclose(saved[name].asnumpy(), p.asnumpy(), atol=2e-4, err_msg=name)
        if average:
            np.testing.assert_allclose(saved[f"ema.{name}"].asnumpy(), average[f"ema.{name}"], atol=2e-4, err_msg=name)


@pytest.mark.parametrize("case", ten_steps.CASES)
def test_ten_steps_are_those_of_mindcvs_trainer(painted, tmp_path, recorded, case):
    """Losses, weights and moving average of MindCV's optimiser, schedule and train step, on our batches from our first weights; it takes
    in one what we take in several. And they are those that ``tests/test_steps.py`` compares PyTorch with."""
    found = ten_steps.taken(train, painted, tmp_path / "run", case, "mindspore")
    np.testing.assert_allclose(found, ten_steps.recorded(case), rtol=1e-4)
    recipe = ten_steps.recipe(painted, case, "mindspore")
    if recipe.layer_decay is not None:  # without effect on MindCV's ConViT
        return
    theirs, step = mindcvs(recipe, len(recorded))
    assert len(recorded) == 10
    for parts, loss, _ in recorded:
        batch = [ops.cat(tensors) for tensors in zip(*parts, strict=True)]
        assert loss == pytest.approx(float(step(*batch).asnumpy()), rel=1e-4)
    assert_same_weights(tmp_path / "run", theirs, step)


def test_gradients_of_binary_cross_entropy_are_those_of_their_own_batch(images):
    """In PyNative mode MindSpore 2.10 divides those of its mean by the size of the first batch that the process has seen."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    recipe = tiny(images, loss="BCE", label_smoothing=0.1, **PLAIN)
    for count in (8, 4, 3):
        model = build_model(recipe, 2)
        step = build_step(recipe, model, [0.1])
        x = Tensor(np.random.default_rng(count).standard_normal((count, 3, recipe.image_resize, recipe.image_resize)).astype(np.float32))
        targets = np.arange(count) % 3 % 2
        found = Gradients(step, LossScale(1.0, False))(x, Tensor(targets, ms.int32), Tensor(1.0, ms.float32))[1]
        excess = 1 / (1 + np.exp(-model(x).asnumpy().astype(float))) - (0.9 * np.eye(2)[targets] + 0.05)
        mine = next(gradient for gradient in found if gradient.shape == (2,))  # of the classifier's bias
        np.testing.assert_allclose(mine.asnumpy(), excess.sum(0) / (2 * count), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("opt", STEPS)
def test_steps_are_those_of_mindcvs_trainer(images, tmp_path, recorded, opt):
    recipe = tiny(images, opt=opt, val_while_train=False, **STEPS[opt])
    ours = train(recipe, tmp_path / "run", progress=False)
    theirs, step = mindcvs(recipe, len(recorded))
    assert len(recorded) * 4 == recipe.num_samples
    expected = [float(step(*batch).asnumpy()) for (batch,), *_ in recorded]
    np.testing.assert_allclose([loss for _, loss, _ in recorded], expected, rtol=1e-4)
    assert_same_weights(tmp_path / "run", theirs, step)
    assert ours.history[0]["skipped_steps"] == 0


def test_accumulated_steps_are_those_of_mindcvs_trainer(images, tmp_path, recorded, monkeypatch):
    """Two batches a step, as MindCV accumulates them; what it saves then loads, though its weights have other names."""
    from mindcv.utils.train_step import GradientAccumulation

    plain = GradientAccumulation.__setattr__

    def with_numbers(self, name, value):  # MindSpore 2.10 takes none for a parameter in PyNative mode
        plain(self, name, Tensor(value, ms.int32) if name == "_accumulation_step" and isinstance(value, int) else value)

    monkeypatch.setattr(GradientAccumulation, "__setattr__", with_numbers)
    recipe = tiny(images, val_while_train=False, gradient_accumulation_steps=2, **PLAIN | {"opt": "momentum", "num_samples": 32})
    train(recipe, tmp_path / "run", progress=False)
    theirs, step = mindcvs(recipe, len(recorded), gradient_accumulation_steps=2)
    assert len(recorded) * 8 == recipe.num_samples
    for parts, loss, _ in recorded:
        assert loss == pytest.approx(np.mean([float(step(*batch).asnumpy()) for batch in parts]), rel=1e-4)
    assert_same_weights(tmp_path / "run", theirs, step)
    ms.save_checkpoint(step, str(tmp_path / "theirs.ckpt"))  # as its train.py does
    loaded = load_checkpoint(build_model(recipe, 2), tmp_path / "theirs.ckpt")
    for mine, other in zip(loaded.get_parameters(), theirs.get_parameters(), strict=True):
        assert np.array_equal(mine.asnumpy(), other.asnumpy()), other.name


def test_steps_with_overflows_are_those_of_mindcvs_trainer(images, tmp_path, recorded, monkeypatch):
    """A dynamic loss scale that is too large: the same steps are skipped, and weights and moving average stay the same. MindCV's
    ``drop_overflow_update`` is for accelerators: it is told that this is one."""
    model = build_model(tiny(images), 2)
    model.classifier.weight.set_data(model.classifier.weight * 64)  # for gradients that overflow
    ms.save_checkpoint(model, str(tmp_path / "first.ckpt"))
    keys = {"opt": "momentum", "lr": 1e-3, "loss_scale": 2.0**127, "loss_scale_type": "dynamic", "max_skipped_steps": 0}
    keys |= {"ckpt_path": str(tmp_path / "first.ckpt"), "scheduler": "constant"}  # a step skipped is none of MindCV's schedule
    keys |= {"ema": True, "clip_grad": True, "clip_value": 0.5, "num_samples": 40}
    recipe = tiny(images, val_while_train=False, **keys)
    result = train(recipe, tmp_path / "run", progress=False)
    monkeypatch.setattr("mindcv.utils.trainer_factory.context.get_context", lambda name: name == "device_target" and "GPU")
    theirs, step = mindcvs(recipe, len(recorded), drop_overflow_update=True)
    # the operator that finds an overflow there has no kernel on CPU
    monkeypatch.setattr(step, "get_overflow_status", lambda status, grads: Tensor(not all(np.isfinite(g.asnumpy()).all() for g in grads)))
    for (batch,), loss, scale in recorded:
        assert loss == pytest.approx(float(step(*batch).asnumpy()), rel=1e-4)
        assert scale == float(step.scale_sense.asnumpy())
    assert 2 <= result.history[0]["skipped_steps"] <= 8 and step.scale_sense.asnumpy() < 2.0**126
    assert_same_weights(tmp_path / "run", theirs, step)


def test_lamb_lacks_on_cpu_nothing_but_its_kernel(images, tmp_path, monkeypatch):
    """It is refused before any data is sought; the graph of its update is whole up to the kernel; with one, its steps are LAMB's."""
    with pytest.raises(ValueError, match="opt lamb has no kernel in MindSpore on CPU: use opt adamw, another device"):
        train(tiny("nowhere", opt="lamb"), tmp_path / "none", progress=False)
    recipe = tiny(images, opt="lamb", val_while_train=False, weight_decay_filter="norm_and_bias", **PLAIN)
    train_module.check_recipe(dataclasses.replace(recipe, device="npu"))
    ms.set_context(mode=ms.GRAPH_MODE)
    step = build_step(recipe, model := build_model(recipe, 2), [0.01] * 4)
    with pytest.raises(RuntimeError, match=r"Unsupported op \[Lamb\] on CPU"):
        Update(step, 0.5)(*(ops.ones_like(p) for p in model.trainable_params()))

    calls = []

    class Kernel:
        def __call__(self, var, m, v, lr, beta1, beta2, eps, decay, step, gradient):
            calls.append((var.name, float(lr.asnumpy()), float(decay), int(step.asnumpy().item())))
            m.set_data(m * beta1 + gradient * (1 - beta1))
            v.set_data(v * beta2 + gradient * gradient * (1 - beta2))
            move = (m / (1 - beta1**step)) / (ops.sqrt(v / (1 - beta2**step)) + eps) + var * decay
            ratio = ops.norm(var) / ops.norm(move)
            var.set_data(var - move * lr * (ratio if ratio > 0 else 1))
            return var

    monkeypatch.setattr("mindspore.nn.optim.lamb.inner", types.SimpleNamespace(Lamb=Kernel))
    monkeypatch.setattr(train_module, "check_recipe", lambda recipe: None)
    result = train(recipe, tmp_path / "run", progress=False)
    assert [step for name, _, _, step in calls if name == "cls_token"] == [1, 2, 3, 4]
    assert {rate for _, rate, *_ in calls} == {float(np.float32(recipe.lr))}
    spared = {name for name, _, decay, _ in calls if decay == 0}
    assert spared == {p.name for p in result.model.trainable_params() if "norm" in p.name or "bias" in p.name}
    assert np.isfinite(result.train_loss) and finite(result.model.get_parameters())


def test_layer_decay_gives_every_parameter_the_rate_that_mindcv_gives_it(images):
    """MindCV's own groups, which need our model's ``group_matcher``; its own ConViT has none, and layer_decay no effect."""
    from mindcv.optim import create_optimizer

    recipe = tiny(images, layer_decay=0.5)
    steps = build_step(recipe, model := build_model(recipe, 2), [0.1] * 10).optimizer
    theirs = create_optimizer(build_model(recipe, 2), opt="adamw", lr=[0.1] * 10, layer_decay=0.5)
    rates = [{p.name: float(rate.asnumpy()) for p, rate in zip(one.parameters, one.get_lr(), strict=True)} for one in (steps, theirs)]
    assert rates[0] == pytest.approx(rates[1]) and len(rates[0]) == len(model.trainable_params())
    assert sorted({round(rate, 6) for rate in rates[0].values()}) == [0.0125, 0.025, 0.05, 0.1]


@pytest.mark.parametrize(
    ("name", "without"), [("disable", set()), ("timm", {"gamma", "beta", "bias", "gating_param", "pos_embed", "cls_token"})]
)
def test_what_has_no_weight_decay(images, name, without):
    recipe = tiny(images, weight_decay_filter=name, weight_decay=0.25)
    step = build_step(recipe, build_model(recipe, 2), [0.1] * 10)
    groups = step.optimizer.weight_decay if isinstance(step.optimizer.weight_decay, tuple) else (step.optimizer.weight_decay,)
    if without:
        bare = {p.name.split(".")[-1] for p, decay in zip(step.optimizer.parameters, groups, strict=True) if float(decay) == 0}
        assert bare == without
    else:
        assert {float(decay) for decay in groups} == {0.25}


def test_each_of_two_processes_has_its_half(images):
    """Shard 0 is a shard: the two halves are the whole, and differ."""
    recipe = tiny(images, shuffle=False)
    halves = [Data(recipe, World(rank, 2)) for rank in (0, 1)]
    seen = [np.concatenate([batch[0].asnumpy() for batch in half.batches(0)]) for half in halves]
    assert [half.order.steps for half in halves] == [6, 6] and {half.order.samples for half in halves} == {48}
    assert len({image.tobytes() for image in np.concatenate(seen)}) == 48


RECIPES = [name for name in packaged_recipes() if name.startswith("convit_") and not name.endswith("_fair")]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_of_mindcvs_trains_an_epoch(images, tmp_path, name):
    """As it is, but for the sizes of model and data: its policy, mixing, erasing, mixed precision, loss scale and schedule."""
    sizes = {
        key: TINY[key] for key in ("embed_dim", "num_heads", "depth", "local_up_to_layer", "image_resize", "patch_size", "num_classes")
    }
    keys = {**sizes, "framework": "mindspore", "mode": 1, "data_dir": str(images), "epoch_size": 1, "batch_size": 8, "num_samples": 16}
    keys["warmup_epochs"] = 0
    result = train(load_recipe(name, keys), tmp_path / "run", progress=False)
    assert np.isfinite([result.train_loss, result.val_loss]).all() and result.history[0]["skipped_steps"] == 0
    assert finite(result.model.get_parameters())


def test_a_script_of_mindcvs_runs_with_our_models(tmp_path):
    """What train.py and its like do: they take names from the command line and from the registry, and modules from their own folder."""
    (tmp_path / "config.py").write_text("NAME = 'convit_tiny_kernel'\n")
    (tmp_path / "script.py").write_text(
        "import sys\nfrom config import NAME\nfrom mindcv.models import create_model\n"
        "model = create_model(NAME, num_classes=int(sys.argv[1]), image_size=32, depth=1)\n"
        "assert __name__ == '__main__'\nprint(type(model).__module__, model.classifier.weight.shape)\n"
    )
    words = [sys.executable, "-m", "convit.mindspore.mindcv", str(tmp_path / "script.py"), "7"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert "convit.mindspore.model (7, 192)" in done.stdout, done.stderr
