"""What a recipe names, beside MindCV's own code: schedules at every step, groups, eps, moving average, mixing. Its train step is in
``test_mindcv.py``."""

import itertools

import pytest

ms = pytest.importorskip("mindspore")
pytest.importorskip("mindcv")
np = pytest.importorskip("numpy")
pytest.importorskip("sklearn")

from mindspore import Parameter, Tensor, nn  # noqa: E402

from convit.engine.mindspore.build import build_model, build_step  # noqa: E402
from convit.engine.mindspore.data import Data  # noqa: E402
from convit.engine.mindspore.steps import Average, Update  # noqa: E402
from convit.engine.order import mix_seed  # noqa: E402
from convit.engine.recipe import FIELDS, load_recipe  # noqa: E402
from convit.engine.schedule import average_decay, rates  # noqa: E402
from convit.engine.world import World  # noqa: E402

TINY = {"framework": "mindspore", "mode": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "local_up_to_layer": 1, "patch_size": 8}


@pytest.fixture(autouse=True)
def pynative(monkeypatch):
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")
    ms.runtime.launch_blocking()
    monkeypatch.setenv("MS_JIT", "0")  # nothing of MindCV's need be compiled


def small(**keys):
    return load_recipe("digits", {**TINY, **keys})


@pytest.mark.parametrize("name", FIELDS["scheduler"].metadata["choices"])
def test_rates_are_those_of_create_scheduler(name):
    """Every schedule, at every step, over warm-up, its start, cycles and their decay, by step and by epoch: to float64's rounding."""
    from mindcv.scheduler import create_scheduler

    own = name in ("one_cycle", "cyclic")  # they warm up themselves, by step
    warmups = [(0, 0.0)] if own else [(0, 0.0), (3, 0.0), (3, 0.1), (12, 0.5)]
    for (warmup, factor), cycles, stair in itertools.product(warmups, (1, 2, 5), (False,) if own else (False, True)):
        if warmup == 12 and name == "polynomial_decay":
            continue  # MindCV divides by the epochs that are left: none
        for decay, epochs in ((3, 12), (20, 12)):
            keys = {"warmup_epochs": warmup, "warmup_factor": factor, "decay_epochs": decay, "min_lr": 0.001, "decay_rate": 0.7}
            keys |= {"lr_epoch_stair": stair, "num_cycles": cycles, "cycle_decay": 0.5}
            recipe = load_recipe(None, {**keys, "scheduler": name, "epoch_size": epochs, "multi_step_decay_milestones": [5, 2]})
            theirs = create_scheduler(7, name, lr=0.02, num_epochs=epochs, milestones=[5, 2], **keys)
            ours = rates(recipe, 0.02, 7)
            assert len(ours) == len(theirs) == epochs * 7
            np.testing.assert_allclose(ours, theirs, rtol=4e-15, atol=4e-18, err_msg=str(keys))


@pytest.mark.parametrize("name", ["disable", "auto", "norm_and_bias"])
def test_groups_are_those_of_create_optimizer(name):
    """What decays, of each parameter."""
    from mindcv.optim import create_optimizer

    recipe = small(opt="adamw", weight_decay_filter=name, weight_decay=0.25)
    ours = build_step(recipe, build_model(recipe, 10), [0.1] * 4).optimizer
    theirs = create_optimizer(build_model(recipe, 10), opt="adamw", lr=[0.1] * 4, weight_decay=0.25, weight_decay_filter=name)
    assert decays(ours) == decays(theirs) and len(decays(ours)) == len(ours.parameters)


def decays(optimizer):
    decay = optimizer.weight_decay
    every = decay if isinstance(decay, (tuple, list)) else [decay] * len(optimizer.parameters)
    return {p.name: float(d) * flag for p, d, flag in zip(optimizer.parameters, every, optimizer.decay_flags, strict=True)}


@pytest.mark.parametrize("opt", ["adam", "adamw", "nadam"])
def test_eps_is_that_of_the_recipe(opt):
    """MindCV hands it to rmsprop alone. One gradient, far smaller than eps: the step is as large as eps is small."""
    steps = {}
    for eps in (1e-3, 1e-2):
        recipe = small(opt=opt, eps=eps, weight_decay=0.0)
        step = build_step(recipe, model := build_model(recipe, 10), [1.0] * 4)
        before = {p.name: p.asnumpy().copy() for p in model.trainable_params()}
        Update(step, None)(*(ms.ops.full_like(p, 1e-6) for p in model.trainable_params()))
        steps[eps] = max(np.abs(p.asnumpy() - before[p.name]).max() for p in model.trainable_params())
    assert steps[1e-3] / steps[1e-2] == pytest.approx(10, rel=0.05)


def test_the_moving_average_is_mindcvs():
    """At every update: MindCV rounds its decay to float32 (1 - exp(-1 / 2000) keeps four digits of it), ours is rounded once."""
    from mindcv.utils.train_step import TrainStep

    class Line(nn.Cell):
        def __init__(self):
            super().__init__()
            self.weight = Parameter(Tensor(np.ones(5), ms.float32), name="weight")

        def construct(self, x, y):
            return (self.weight * x - y).sum()

    line, recipe = Line(), load_recipe(None, {"ema": True, "ema_decay": 0.999})
    step = TrainStep(line, nn.SGD(line.trainable_params(), 0.1), scale_sense=Tensor(1.0, ms.float32), ema=True, ema_decay=0.999)
    average = Average(line.get_parameters())
    for update in range(1, 30):
        line.weight.set_data(Tensor(np.random.default_rng(update).normal(size=5), ms.float32))
        average(Tensor(average_decay(recipe, update), ms.float32))
        step.ema_update()
        np.testing.assert_allclose(average.average[0].asnumpy(), step.ema_weight[0].asnumpy(), atol=5e-7)


@pytest.mark.parametrize("keys", [{"mixup": 0.4, "cutmix": 1.0}, {"mixup": 0.4, "cutmix_prob": 0.5, "mixup_off_epoch": 1}, {"cutmix": 1.0}])
def test_mixing_is_mindcvs(keys):
    """Each batch of two epochs is what MindCV's Mixup makes of the plain one from the same seed; none from mixup_off_epoch on."""
    from mindcv.data.mixup import Mixup

    plain, mixed = (Data(small(num_samples=48, batch_size=16, **more), World()) for more in ({}, keys))
    theirs = Mixup(keys.get("mixup", 0.0), keys.get("cutmix", 0.0), prob=keys.get("cutmix_prob", 1.0), label_smoothing=0.0, num_classes=10)
    for number in range(6):
        epoch, step = divmod(number, 3)
        images, targets, _ = plain[number]
        found, found_targets, _ = mixed[number]
        if 0 < keys.get("mixup_off_epoch", 0) <= epoch:
            expected = images, np.eye(10, dtype=np.float32)[targets]
        else:
            np.random.seed(mix_seed(mixed.recipe.seed, epoch, step, 0, 0, 3) | 1 << 31)
            expected = theirs(images.copy(), targets)
        assert np.array_equal(found, expected[0]) and np.array_equal(found_targets, expected[1]), number
