"""What a recipe names, beside MindCV's own code: schedules at every step, groups, eps, moving average, mixing, precision; and what becomes
of a step that is not finite, uneven or drawn. The train step of MindCV is in ``test_mindcv.py``."""

import itertools
import json
import signal

import pytest

ms = pytest.importorskip("mindspore")
pytest.importorskip("mindcv")
np = pytest.importorskip("numpy")
pytest.importorskip("sklearn")

from mindspore import Parameter, Tensor, nn  # noqa: E402

from convit.engine.mindspore import build, checkpoint, steps  # noqa: E402
from convit.engine.mindspore import train as train_module  # noqa: E402
from convit.engine.mindspore.build import build_model, build_step, check_precision, first_scale, sinks  # noqa: E402
from convit.engine.mindspore.data import Data  # noqa: E402
from convit.engine.mindspore.steps import Average, LossScale, Update, WholeStep  # noqa: E402
from convit.engine.mindspore.train import MindSporeRun, train  # noqa: E402
from convit.engine.order import mix_seed  # noqa: E402
from convit.engine.recipe import FIELDS, load_recipe  # noqa: E402
from convit.engine.run import Interrupted  # noqa: E402
from convit.engine.schedule import average_decay, rates  # noqa: E402
from convit.engine.world import World  # noqa: E402
from convit.mindspore.layers import DropPath  # noqa: E402

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
    """Each batch of two epochs is what MindCV's Mixup makes of the plain one from the same seed, another one for every process; none
    from mixup_off_epoch on."""
    from mindcv.data.mixup import Mixup

    rank = len(keys) % 2
    plain, mixed = (Data(small(num_samples=96, batch_size=16, **more), World(rank, 2)) for more in ({}, keys))
    theirs = Mixup(keys.get("mixup", 0.0), keys.get("cutmix", 0.0), prob=keys.get("cutmix_prob", 1.0), label_smoothing=0.0, num_classes=10)
    for number in range(6):
        epoch, step = divmod(number, 3)
        images, targets, _ = plain[number]
        found, found_targets, _ = mixed[number]
        if 0 < keys.get("mixup_off_epoch", 0) <= epoch:
            expected = images, np.eye(10, dtype=np.float32)[targets]
        else:
            np.random.seed(mix_seed(mixed.recipe.seed, epoch, step, 0, rank, 3) | 1 << 31)
            expected = theirs(images.copy(), targets)
        assert np.array_equal(found, expected[0]) and np.array_equal(found_targets, expected[1]), number


def test_a_model_is_what_the_recipe_says():
    """What is passed on; the weights follow from the seed."""
    keys = {"depth": 3, "local_up_to_layer": 2, "locality_strength": 3.0, "drop_rate": 0.2, "drop_path_rate": 0.4, "seed": 5}
    one, again, other = (build_model(small(**keys | more), 7) for more in ({}, {}, {"seed": 6}))
    assert one.locality_strength == 3 and one.pos_drop.p == 0.2 and one.classifier.weight.shape == (7, 16)
    assert [block.use_gpsa for block in one.blocks] == [True, True, False]
    np.testing.assert_allclose([block.drop_path.p for block in one.blocks], [0, 0.2, 0.4], rtol=1e-12)
    weights = [np.concatenate([p.asnumpy().ravel() for p in model.get_parameters()]) for model in (one, again, other)]
    assert np.array_equal(weights[0], weights[1]) and not np.array_equal(weights[0], weights[2])


def test_a_checkpoint_of_other_classes_is_for_training_alone(tmp_path):
    other = build_model(small(seed=5), 4)
    ms.save_checkpoint(other, str(tmp_path / "four.ckpt"))
    recipe = small(ckpt_path=str(tmp_path / "four.ckpt"))
    with pytest.raises(ValueError, match="Only the classifier differs"):
        build_model(recipe, 10)
    mine = build_model(recipe, 10, strict_head=False)
    assert mine.classifier.weight.shape == (10, 16) and np.array_equal(mine.cls_token.asnumpy(), other.cls_token.asnumpy())


@pytest.mark.parametrize(
    ("target", "keys", "whole"),
    [
        ("Ascend", {}, True),
        ("GPU", {}, True),
        ("CPU", {}, False),
        ("Ascend", {"dataset_sink_mode": False}, False),
        ("Ascend", {"gradient_accumulation_steps": 2}, False),  # MindSpore's loop would take a step a batch
    ],
)
def test_who_feeds_whole_epochs(monkeypatch, target, keys, whole):
    monkeypatch.setattr(build.ms, "get_context", lambda name: target)
    assert sinks(small(**keys)) is whole


def test_the_first_loss_scale():
    for keys, expected in (
        ({"loss_scale": 8}, (8, False)),
        ({"loss_scale": 8, "loss_scale_type": "dynamic"}, (8, True)),
        ({"loss_scale": 8, "loss_scale_type": "auto"}, (1, False)),
        ({"loss_scale": 8, "loss_scale_type": "auto", "amp_level": "O2"}, (2**24, True)),  # MindSpore's own
    ):
        assert first_scale(small(**keys)) == expected


def test_mixed_precision_that_fails_is_refused_and_the_rest_computes_in_it():
    for keys in (("O1", None), ("O1", "[nn.Dense, nn.Conv2d]"), ("O2", "nn.Dense")):
        with pytest.raises(ValueError, match="amp_level O1 fails in MindSpore|amp_cast_list cannot name nn.Dense"):
            check_precision(*keys)
    images = Tensor(np.random.default_rng(0).standard_normal((2, 1, 32, 32)), ms.float32)
    exact = None
    for level, cells in (("O0", None), ("O2", None), ("O3", None), ("O2", "[nn.LayerNorm]"), ("O1", "[nn.Conv2d]")):
        check_precision(level, cells)
        recipe = small(amp_level=level, amp_cast_list=cells, image_resize=32)
        build_step(recipe, model := build_model(recipe, 10), [0.1] * 4)
        logits = model.set_train(False)(images)
        exact = logits.asnumpy() if level == "O0" else exact
        error = np.abs(logits.asnumpy() - exact).max() / np.abs(exact).max()
        assert logits.dtype == (ms.float32 if level in ("O0", "O1") else ms.float16) and (level == "O0" or 0 < error < 1e-2), (level, error)


def test_a_dynamic_loss_scale(monkeypatch):
    """As MindCV's: halved by an overflow but not below 1, doubled after so many steps without one in a row."""
    monkeypatch.setattr(steps, "GROWTH_INTERVAL", 3)
    scale, fixed = LossScale(8.0, True), LossScale(8.0, False)
    seen = []
    for finite in (True, True, False, True, True, True, True, True, False, False, False, False, False):
        scale(Tensor(finite)), fixed(Tensor(finite))
        seen.append(float(scale.value.asnumpy()))
    assert seen == [8, 8, 4, 4, 4, 8, 8, 8, 4, 2, 1, 1, 1] and fixed.value.asnumpy() == 8


def test_a_whole_step_that_is_not_finite_changes_no_weight():
    """Two such steps, a good one and another, in MindSpore's own loop: counted, the longest row kept, the schedule goes on, the average
    waits."""
    recipe = small(opt="momentum", ema=True, image_resize=16)
    step = build_step(recipe, model := build_model(recipe, 10), [0.1] * 4)
    average = Average(model.get_parameters())
    whole = WholeStep(step, LossScale(1.0, False), None, average, 0.5, False).set_train(True)
    images, targets = Tensor(np.ones((2, 1, 16, 16)), ms.float32), Tensor([3, 4], ms.int32)
    before = {p.name: p.asnumpy().copy() for p in model.get_parameters()}
    for _ in range(2):
        whole(images * float("nan"), targets)
    assert all(np.array_equal(p.asnumpy(), before[p.name]) for p in model.get_parameters())
    whole(images, targets), whole(images * float("nan"), targets)
    counts = [int(count.asnumpy()) for count in (whole.skipped, whole.skipped_in_row, whole.longest_row, whole.updates)]
    assert counts == [3, 1, 2, 1] and int(step.optimizer.global_step.asnumpy().item()) == 4
    for p, mean in zip(model.get_parameters(), average.average, strict=True):
        np.testing.assert_allclose(mean.asnumpy(), (before[p.name] + p.asnumpy()) / 2, rtol=1e-5, atol=1e-7)
    assert not np.array_equal(model.classifier.weight.asnumpy(), before["classifier.weight"])


# a run of two steps an epoch
SHORT = {
    "num_samples": 16,
    "batch_size": 8,
    "epoch_size": 1,
    "warmup_epochs": 0,
    "decay_epochs": 1,
    "val_while_train": False,
    "log_interval": 1,
}


@pytest.mark.parametrize("whole", [False, True])
def test_weights_that_are_not_finite_stop_the_run(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(train_module, "sinks", lambda recipe: whole)
    with pytest.raises(FloatingPointError, match="the weights are not finite"):
        train(small(**SHORT, lr=3e38, scheduler="constant"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run/last.ckpt").exists()


def test_a_signal_ends_mindspores_own_loop_after_its_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "sinks", lambda recipe: True)
    diagnose = MindSporeRun.diagnose

    def signalling(self):
        if self.progress.epoch == 0:
            signal.raise_signal(signal.SIGTERM)
        return diagnose(self)

    monkeypatch.setattr(MindSporeRun, "diagnose", signalling)
    with pytest.raises(Interrupted, match="stopped by SIGTERM; saved"):
        train(small(**SHORT | {"epoch_size": 3}), tmp_path / "run", progress=False)
    assert checkpoint.load(tmp_path / "run/last.ckpt")["progress"]["epoch"] == 1


@pytest.mark.parametrize("whole", [False, True])
def test_a_run_that_gets_no_better_stops_early(tmp_path, monkeypatch, caplog, whole):
    """In MindSpore's own loop too."""
    caplog.set_level("INFO", "convit")
    monkeypatch.setattr(train_module, "sinks", lambda recipe: whole)
    monkeypatch.setattr(MindSporeRun, "evaluate", lambda self: {"val_loss": 1.0, "top1": 50.0, "top5": 100.0})
    keys = SHORT | {"epoch_size": 4, "val_while_train": True, "early_stop": 1, "num_samples": 8}
    assert train(small(**keys), tmp_path / "run", progress=False).epochs == 2
    assert caplog.text.count("stopped after 2 epochs: no better top-1 in the last 1") == 1


def test_uneven_parts_weigh_by_their_images(tmp_path):
    """Of a last step of 5 images: in parts of 3 and 2 as in one. The body is that of a model of other classes."""
    ms.save_checkpoint(build_model(small(), 4), str(tmp_path / "four.ckpt"))
    keys = SHORT | {"num_samples": 13, "drop_remainder": False, "opt": "momentum", "ckpt_path": str(tmp_path / "four.ckpt")}
    found = []
    for more in ({"batch_size": 8}, {"batch_size": 4, "gradient_accumulation_steps": 2}):
        output = tmp_path / str(more["batch_size"])
        model = train(small(**keys | more), output, progress=False).model
        steps = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        found.append(([step["loss"] for step in steps if step["kind"] == "step"], {p.name: p.asnumpy() for p in model.get_parameters()}))
    (losses, weights), (others, parts) = found
    assert len(losses) == 2 and losses == pytest.approx(others, rel=1e-5)
    for name, value in weights.items():
        np.testing.assert_allclose(parts[name], value, atol=2e-6, err_msg=name)


def test_stochastic_depth_is_drawn_anew_by_epoch_step_process_and_part(tmp_path, monkeypatch):
    gradients, draw, seen = MindSporeRun.gradients, DropPath.draw, []
    monkeypatch.setattr(DropPath, "draw", lambda self, random: (seen.append(str(random.bit_generator.state)), draw(self, random))[1])

    def two_processes(self, batches):
        parts, world = [next(batches) for _ in range(2)], self.world
        self.step_gradients = lambda *_: (Tensor(1.0), tuple(ms.ops.zeros_like(p) for p in self.trained))
        for rank in (1, 0):
            self.world = world._replace(rank=rank)
            found = gradients(self, iter(parts))
        return found

    monkeypatch.setattr(MindSporeRun, "gradients", two_processes)
    keys = {"epoch_size": 2, "batch_size": 4, "gradient_accumulation_steps": 2, "drop_path_rate": 0.5}
    train(small(**SHORT | keys), tmp_path / "run", progress=False)
    assert len(seen) == 16 and len(set(seen)) == 16
