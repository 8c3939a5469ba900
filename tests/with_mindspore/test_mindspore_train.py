"""Training in MindSpore with the recipe and the command of PyTorch; runs in an environment that has MindSpore and MindCV."""

import json
import logging
import shutil
import signal
import subprocess
import sys
import time

import pytest

ms = pytest.importorskip("mindspore")
pytest.importorskip("mindcv")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from mindspore.train.mind_ir_pb2 import ModelProto  # noqa: E402

from convit import cli  # noqa: E402
from convit.engine.mindspore import checkpoint  # noqa: E402
from convit.engine.mindspore import train as train_module  # noqa: E402
from convit.engine.mindspore.train import MindSporeRun, train  # noqa: E402
from convit.engine.recipe import load_recipe  # noqa: E402
from convit.engine.run import Interrupted  # noqa: E402

# MindCV's recipe for convit_tiny, made small: epochs of two steps
SMALL = {"image_resize": 32, "embed_dim": 16, "num_heads": 4, "depth": 2, "local_up_to_layer": 1, "batch_size": 8, "num_classes": 2}
SMALL |= {"num_parallel_workers": 1, "epoch_size": 2, "warmup_epochs": 0, "decay_epochs": 2, "lr": 0.01, "loss_scale": 1, "log_interval": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes that colour tells apart: 8 + 8 training JPEGs, 3 + 3 for validation."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("blue", "red")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 90, (40 + i, 48, 3), dtype=np.uint8)
                pixels[..., 2 - 2 * label] += 150
                Image.fromarray(pixels).save(root / split / name / f"{i:02}.jpg")
    return root


def recipe(folder, **keys):
    return load_recipe("convit_tiny", {**SMALL, "data_dir": str(folder), **keys})


def records(output, kind):
    return [r for line in (output / "log.jsonl").read_text().splitlines() if (r := json.loads(line))["kind"] == kind]


GRAPH = {"ema": True, "clip_grad": True, "ckpt_save_steps": 1, "crop_pct": 0.8}


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    result = train(recipe(folder, **GRAPH), tmp_path_factory.mktemp("run") / "run", progress=False)
    assert ms.get_context("mode") == ms.GRAPH_MODE  # the recipe's
    return result


def test_mindcvs_recipe_trains(finished):
    """Two epochs under graph mode and O2 with mixup, cutmix, random erasing and a moving average; every file of a run is there."""
    names = {path.name for path in finished.output.iterdir()}
    assert names == {"best.ckpt", "last.ckpt", "epoch_1.ckpt", "epoch_2.ckpt", "log.jsonl", "recipe.yaml", "run.json"}
    epochs = records(finished.output, "epoch")
    assert [record["epoch"] for record in epochs] == [0, 1] and len(records(finished.output, "step")) == 4
    assert all(np.isfinite(record["train_loss"]) for record in epochs)
    assert len(epochs[0]["gate"]) == 1 and finished.best_top1 >= 50
    kept, _ = contents(finished.output / "epoch_2.ckpt")
    own = finished.model.parameters_dict()  # the moving average
    assert all(np.array_equal(own[name].asnumpy(), value) for name, value in kept.items())
    assert epochs[1]["gate"] == [pytest.approx((1 / (1 + np.exp(-kept["blocks.0.attn.gating_param"]))).tolist(), abs=1e-5)]


def test_a_run_validates_without_its_recipe(finished, folder, capsys):
    path = finished.output / "best.ckpt"
    assert cli.main(["validate", "--framework", "mindspore", "--ckpt_path", str(path), "--amp_level", "O0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    record = records(finished.output, "epoch")[finished.best_epoch]
    assert result["samples"] == 6 and result["top1"] == record["top1"]
    assert result["loss"] == pytest.approx(record["val_loss"], abs=2e-2)  # the run computed in float16 (O2)


def test_a_run_infers(finished, folder, tmp_path, capsys):
    """The classes of a run's checkpoint by name, the probabilities those of its logits; what is no image is named."""
    (tmp_path / "bad.png").write_bytes(b"no image")
    path, image = finished.output / "best.ckpt", folder / "val/red/00.jpg"
    words = ["infer", str(image), str(tmp_path / "bad.png"), "--framework", "mindspore", "--ckpt_path", str(path), "--amp_level", "O0"]
    assert cli.main([*words, "--json"]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["image"] == str(image) and {row["name"] for row in result["classes"]} == {"blue", "red"}
    assert sum(row["probability"] for row in result["classes"]) == pytest.approx(1)
    assert "bad.png" in err and "UnidentifiedImageError" in err
    # validation, of that image alone, has the same cross entropy
    (tmp_path / "data/val/blue").mkdir(parents=True)
    shutil.copytree(folder / "val/red", tmp_path / "data/val/red", ignore=lambda _, names: [n for n in names if n != "00.jpg"])
    shutil.copy(folder / "val/blue/00.jpg", tmp_path / "data/val/blue")
    assert cli.main([*words[:2], str(folder / "val/blue/00.jpg"), *words[3:], "--json"]) == 0
    probabilities = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("{"):
            one = json.loads(line)
            label = one["image"].split("/")[-2]
            probabilities[label] = next(row["probability"] for row in one["classes"] if row["name"] == label)
    keys = ["--framework", "mindspore", "--ckpt_path", str(path), "--amp_level", "O0", "--data_dir", str(tmp_path / "data")]
    assert cli.main(["validate", *keys, "--json"]) == 0
    loss = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
    assert loss == pytest.approx(-np.mean(np.log(list(probabilities.values()))), abs=1e-3)  # two JPEG decoders


def test_a_run_exports_to_mindir(finished, folder, tmp_path, capsys):
    """The run's best weights, at another image size; the export compares the file with the model itself."""
    words = ["--format", "mindir", "-o", str(tmp_path / "m.mindir"), "--image_resize", "48", "--images", str(folder / "val/red/00.jpg")]
    assert cli.main(["export", str(finished.output), *words]) == 0
    assert "48 x 48" in capsys.readouterr().out
    facts = {name: json.loads(value) for name, value in ModelProto.FromString((tmp_path / "m.mindir").read_bytes()).user_info.items()}
    assert (facts["convit.classes"], facts["convit.crop_pct"], facts["convit.size"]) == (["blue", "red"], 0.8, [48, 48])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}/val/red/00.jpg"], "infer needs weights: --ckpt_path FILE"),
        (["{}/none.jpg", "--ckpt_path", "{}/none.ckpt"], "none.ckpt"),
        (["{}/val", "--ckpt_path", "{}/none.ckpt"], "none.ckpt"),
    ],
)
def test_what_infer_refuses(folder, capsys, words, message):
    assert cli.main(["infer", *(word.format(folder) for word in words), "--framework", "mindspore"]) == 1
    assert message in capsys.readouterr().err


# everything on that could go astray: stochastic depth, mixing, a policy, erasing, a moving average, saves inside the epoch
WHOLE = {"epoch_size": 3, "decay_epochs": 3, "ema": True, "clip_grad": True, "ckpt_save_steps": 1, "keep_checkpoint_max": 2}
WHOLE |= {"drop_path_rate": 0.3, "auto_augment": "autoaug-mstd0.5", "re_value": "random", "mode": 1}  # pynative: nothing to compile
WHOLE |= {"opt": "adam"}  # as much state as adamw, one operator a parameter


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run of 3 epochs of 2 steps that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "run"
    ms.set_context(mode=ms.GRAPH_MODE)
    train(recipe(folder, **WHOLE), output, progress=False)
    assert ms.get_context("mode") == ms.PYNATIVE_MODE
    return output


def contents(path):
    """The parameters of a checkpoint of ours, and what it says beside them."""
    state = ms.load_checkpoint(str(path))
    facts = json.loads(str(state.pop("convit_run")))
    return {name: value.asnumpy() for name, value in state.items()}, facts


def saved(output):
    state, facts = contents(output / "last.ckpt")
    return state, facts["progress"]


def assert_same_run(one, other):
    """Every parameter of the model, the optimiser and the moving average, the progress, and the records, in every bit.

    But for the loss itself, which MindSpore sums from wherever the allocator put it: its last bit may differ, and nothing follows from it.
    """
    (left, progress), (right, other_progress) = saved(one), saved(other)
    assert left.keys() == right.keys() and any(name.startswith("ema") for name in left)
    for name, value in left.items():
        assert value.tobytes() == right[name].tobytes(), name
    assert progress == other_progress
    drop = {"seconds", "data_seconds", "images_per_second", "loss", "train_loss"}
    for kind, loss in (("step", "loss"), ("epoch", "train_loss")):
        mine, others = records(one, kind), records(other, kind)
        assert [r[loss] for r in mine] == pytest.approx([r[loss] for r in others], rel=3e-7)
        exact = [[{k: v for k, v in r.items() if k not in drop} for r in both] for both in (mine, others)]
        assert exact[0] == exact[1]
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    assert best(one) == best(other)


def best(output):
    """Every bit of best.ckpt, but for what only a command line says in its recipe."""
    state, facts = contents(output / "best.ckpt")
    del facts["recipe"]["ckpt_save_dir"], facts["recipe"]["framework"]
    return {name: value.tobytes() for name, value in state.items()}, facts


class Killed(BaseException):
    pass


# where a run is stopped, one after the other, each time resumed: (before or after a step, or before a file is written; epoch; step)
MOMENTS = [
    ("last", 0, 1),
    ("before", 0, 1),
    ("after", 0, 2),
    ("best", 0, None),
    ("epoch", 0, None),
    ("last", 1, 0),
    ("last", 1, 1),
    ("after", 1, 2),
]


def test_resume_is_bit_exact_wherever_it_stops(whole, folder, tmp_path, monkeypatch):
    """Stop the loop without any clean-up between any two of its writes; the resumed run equals the whole one in every bit."""
    step, write, moments = MindSporeRun._step, MindSporeRun.save, list(MOMENTS)

    def at(what, progress):
        if (what, progress["epoch"], progress.get("step")) == moments[0]:
            raise Killed

    def dying_step(self, batches):
        at("before", vars(self.progress))
        done = step(self, batches)
        at("after", {"epoch": self.progress.epoch, "step": self.progress.step + 1})
        return done

    def dying_save(path, tensors, facts):
        at(path.stem.split("_")[0], facts.get("progress", facts))
        write(path, tensors, facts)

    while moments:
        with monkeypatch.context() as patch:
            patch.setattr(MindSporeRun, "_step", dying_step)
            patch.setattr(MindSporeRun, "save", staticmethod(dying_save))
            with pytest.raises(Killed):
                train(recipe(folder, **WHOLE), tmp_path / "run", resume=True, progress=False)
        del moments[0]
    train(recipe(folder, **WHOLE), tmp_path / "run", resume=True, progress=False)
    assert_same_run(whole, tmp_path / "run")


def test_resume_after_sigkill_is_bit_exact(finished, folder, tmp_path):
    """The real thing, in graph mode: the command is killed in a process of its own, once it has taken a step."""
    words = [word for name, value in {**SMALL, **GRAPH, "data_dir": folder}.items() for word in (f"--{name}", str(value))]
    output = tmp_path / "run"
    command = [sys.executable, "-m", "convit", "train", "--framework", "mindspore", "-c", "convit_tiny", "-q", "--output", str(output)]
    child = subprocess.Popen([*command, *words])
    log, deadline = output / "log.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and child.poll() is None and not (log.exists() and b'"step"' in log.read_bytes()):
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    train(recipe(folder, **GRAPH), output, resume=True, progress=False)
    assert_same_run(finished.output, output)


def test_signals_save_and_exit(whole, folder, tmp_path, monkeypatch):
    """One run, stopped by either signal and resumed after each."""
    step = MindSporeRun._step
    words = [word for name, value in {**SMALL, **WHOLE, "data_dir": folder}.items() for word in (f"--{name}", str(value))]
    command = ["train", "--framework", "mindspore", "-c", "convit_tiny", "-q", "--resume", "--output", str(tmp_path / "run"), *words]
    for signum, place in ((signal.SIGTERM, (0, 0)), (signal.SIGINT, (1, 0))):

        def signalling_step(self, batches, signum=signum, place=place):
            done = step(self, batches)
            if (self.progress.epoch, self.progress.step) == place:
                signal.raise_signal(signum)
            return done

        before = signal.getsignal(signum)
        with monkeypatch.context() as patch:
            patch.setattr(MindSporeRun, "_step", signalling_step)
            assert cli.main(command) in (128 + signum, 128 + signal.SIGTERM)  # MindSpore's pipelines catch SIGINT, and send SIGTERM
        assert signal.getsignal(signum) is before
        _, at = saved(tmp_path / "run")
        assert (at["epoch"], at["step"]) == (place[0], 1)
    train(recipe(folder, **WHOLE), tmp_path / "run", resume=True, progress=False)
    assert_same_run(whole, tmp_path / "run")


def test_a_nan_loss_skips_the_step_and_stops_after_too_many(folder, tmp_path, monkeypatch):
    gradients, calls = MindSporeRun.gradients, []

    def poisoned(self, batches):
        calls.append(1)
        return gradients(self, ((images * float("nan"), *rest) for images, *rest in batches) if len(calls) in bad else batches)

    monkeypatch.setattr(MindSporeRun, "gradients", poisoned)
    bad = {1, 3}
    keys = {"max_skipped_steps": 2, "mode": 1, "val_while_train": False}
    result = train(recipe(folder, **keys), tmp_path / "some", progress=False)
    assert [record["skipped_steps"] for record in result.history] == [1, 1]
    assert all(np.isfinite(p.asnumpy()).all() for p in result.model.get_parameters())
    state, at = saved(tmp_path / "some")
    assert int(state["global_step"].item()) == at["updates"] == 4  # the schedule goes on

    calls.clear()
    bad = set(range(3, 100))
    with pytest.raises(FloatingPointError, match="not finite in 3 steps in a row"):
        train(recipe(folder, epoch_size=4, **keys), tmp_path / "all", progress=False)
    state, at = saved(tmp_path / "all")
    assert at["epoch"] == 1 and all(np.isfinite(value).all() for value in state.values() if value.dtype.kind == "f")


def test_an_infinite_gradient_skips_the_step_though_the_loss_is_finite(folder, tmp_path, monkeypatch, caplog):
    gradients, calls = MindSporeRun.gradients, []

    def poisoned(self, batches):
        calls.append(1)
        found = gradients(self, batches)
        if len(calls) == 2:
            self.summed = (self.summed[0] * float("inf"), *self.summed[1:])
        return found

    monkeypatch.setattr(MindSporeRun, "gradients", poisoned)
    result = train(recipe(folder, mode=1, epoch_size=1, val_while_train=False), tmp_path / "run", progress=False)
    assert result.history[0]["skipped_steps"] == 1 and "norm of the gradient" in caplog.text
    assert all(np.isfinite(p.asnumpy()).all() for p in result.model.get_parameters())


def test_classes_are_matched_by_name(finished, folder, tmp_path):
    """A validation split without one class scores the others; a class that the model does not have is named."""
    from convit.engine.mindspore.validate import validate

    keys = {"ckpt_path": str(finished.output / "best.ckpt"), "amp_level": "O0", "mode": 1, "batch_size": 1, "mixup": 0, "cutmix": 0}
    whole = validate(recipe(folder, **keys), progress=False)
    parts = []
    for name in ("blue", "red"):
        shutil.copytree(folder / "val" / name, tmp_path / name / "val" / name)
        parts.append(validate(recipe(tmp_path / name, **keys), progress=False))
    assert sum(part["samples"] * part["loss"] for part in parts) / 6 == pytest.approx(whole["loss"], rel=1e-5)
    assert sum(part["samples"] * part["top1"] for part in parts) / 6 == pytest.approx(whole["top1"])
    narrow = validate(recipe(folder, **keys, val_amp_level="O3"), progress=False)
    assert 0 < abs(narrow["loss"] - whole["loss"]) < 2e-2
    (tmp_path / "red/val/red").rename(tmp_path / "red/val/rot")
    with pytest.raises(ValueError, match="1 of its 1 classes are not among the 2"):
        validate(recipe(tmp_path / "red", **keys), progress=False)


def test_another_optimiser_starts_its_state_anew(folder, tmp_path, caplog):
    caplog.set_level("INFO", "convit")
    keys = {"mode": 1, "val_while_train": False, "ema": True, "ema_warmup": False}
    train(recipe(folder, epoch_size=1, opt="adamw", ema_decay=0.5, **keys), tmp_path / "run", progress=False)
    before, _ = saved(tmp_path / "run")
    keys |= {"opt": "momentum", "lr": 0.0, "min_lr": 0.0, "ema_decay": 1.0, "epoch_size": 2}  # nothing moves from here
    result = train(recipe(folder, **keys), tmp_path / "run", resume=True, progress=False)
    assert "the state of adamw is of no use to momentum: it starts anew" in caplog.text and result.epochs == 2
    after, _ = saved(tmp_path / "run")
    kept = {name.removeprefix("ema.") for name in before if name.startswith("ema.")}
    assert all(np.array_equal(before[name], after[name]) for one in kept for name in (one, f"ema.{one}"))
    assert int(before["global_step"].item()) == 2 and int(after["global_step"].item()) == 4  # the schedule goes on


def test_a_full_disk_stops_the_run_and_loses_nothing(whole, folder, tmp_path):
    """The kernel refuses to let a file grow, as on a full disk: the run stops with a message, last.ckpt stays as it was."""
    resource = pytest.importorskip("resource")
    shutil.copytree(whole, tmp_path / "run")
    before = (tmp_path / "run" / "last.ckpt").read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30000, old[1]))
    try:
        with pytest.raises(OSError, match="cannot write .*go on with --resume"):
            train(recipe(folder, **WHOLE | {"epoch_size": 4}), tmp_path / "run", resume=True, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before
    assert not [path.name for path in (tmp_path / "run").iterdir() if "tmp" in path.name]


def test_unreadable_images_are_replaced_counted_and_named(folder, tmp_path, caplog):
    """As in PyTorch: those to train on by the next readable one, up to max_bad_images; those to validate are left out."""
    shutil.copytree(folder, tmp_path / "data")
    for name in ("train/red/05.jpg", "val/red/01.jpg"):
        (tmp_path / "data" / name).write_bytes(b"not an image")
    result = train(recipe(tmp_path / "data", mode=1, epoch_size=1), tmp_path / "run", progress=False)
    assert result.history[0]["bad_images"] == 1 and result.history[0]["update"] == 2
    assert "replaced the unreadable image" in caplog.text and "red/05.jpg" in caplog.text and "red/01.jpg" in caplog.text
    with pytest.raises(ValueError, match="1 unreadable images in epoch 0; max_bad_images allows 0"):
        train(recipe(tmp_path / "data", mode=1, max_bad_images=0), tmp_path / "none", progress=False)


def test_resuming_inside_an_epoch_needs_the_same_batch(folder, tmp_path, monkeypatch, caplog):
    step, keys = MindSporeRun._step, {"mode": 1, "epoch_size": 1, "val_while_train": False, "scale_lr": True, "scale_lr_batch": 16}

    def signalling_step(self, batches):
        done = step(self, batches)
        signal.raise_signal(signal.SIGTERM)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(MindSporeRun, "_step", signalling_step)
        with pytest.raises(Interrupted, match="stopped by SIGTERM; saved"):
            train(recipe(folder, **keys), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="stands inside an epoch with a global batch of 8, and this run has 2"):
        train(recipe(folder, **keys, batch_size=2), tmp_path / "run", resume=True, progress=False)
    caplog.set_level("INFO", "convit")
    before, _ = saved(tmp_path / "run")
    train(recipe(folder, **keys, lr=0.0, min_lr=0.0, loss_scale=4.0), tmp_path / "run", resume=True, progress=False)
    assert "resuming with other keys: loss_scale 1.0 -> 4.0, lr 0.01 -> 0.0" in caplog.text
    assert [record["lr"] for record in records(tmp_path / "run", "step")] == [0.005, 0.0]
    after, progress = saved(tmp_path / "run")
    assert progress["updates"] == 2 and after["loss_scale"] == 4 and before["loss_scale"] == 1
    assert all(np.array_equal(after[name], value) for name, value in before.items() if name.startswith(("blocks", "patch", "cls", "pos")))


@pytest.mark.parametrize(
    "keys",
    [
        {"gradient_accumulation_steps": 2, "batch_size": 4, "mode": 1},
        {"loss": "BCE", "opt": "sgd", "loss_scale": 1024, "clip_grad": True, "mode": 1},
        {"amp_level": "O0", "mode": 1},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_options_train(folder, tmp_path, keys):
    result = train(recipe(folder, epoch_size=3, decay_epochs=3, mixup=0, cutmix=0, re_prob=0, **keys), tmp_path / "run", progress=False)
    assert result.train_loss < result.history[0]["train_loss"] and result.history[-1]["skipped_steps"] == 0


def test_a_step_is_that_of_mindcvs_engine(folder, tmp_path, monkeypatch):
    """Our two graphs, and the one that MindSpore's own loop runs for accelerators, give one run; each epoch trains, not only the first."""
    keys = {"drop_path_rate": 0.0, "mixup": 0, "cutmix": 0, "amp_level": "O0", "shuffle": False, "re_prob": 0, "color_jitter": None}
    keys |= {"mode": 1, "opt": "momentum", "hflip": 0, "scale": [1.0, 1.0], "ratio": [1.0, 1.0], "interpolation": "bilinear"}
    keys |= {"ema": True, "clip_grad": True, "clip_value": 0.1}
    ours = train(recipe(folder, **keys), tmp_path / "ours", progress=False)
    monkeypatch.setattr(train_module, "sinks", lambda recipe: True)
    construct, training = train_module.WholeStep.construct, []

    def recording(self, *batch):
        training.append({cell.training for _, cell in self.cells_and_names()})
        return construct(self, *batch)

    monkeypatch.setattr(train_module.WholeStep, "construct", recording)
    theirs = train(recipe(folder, **keys), tmp_path / "theirs", progress=False)
    assert training == [{True}] * 4
    for one, other in zip(ours.history, theirs.history, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    for one, other in zip(ours.model.get_parameters(), theirs.model.get_parameters(), strict=False):
        assert one.name == other.name
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), atol=1e-4)


def test_training_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    """As in PyTorch: no reseeded generator, no handler; nor does validation."""
    import random

    from convit.engine.mindspore.validate import validate

    (messages := logging.getLogger("mindcv.optim.optim_factory")).setLevel(logging.INFO)

    def state():
        drawn = [int(value) for value in ms.get_rng_state().asnumpy()]
        handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
        seeds = ms.get_seed(), ms.dataset.config.get_seed(), drawn
        return random.getstate(), np.random.get_state()[1].tolist(), seeds, handlers, messages.level

    random.seed(1), np.random.seed(1)
    before = state()
    train(recipe(folder, mode=1, epoch_size=1, val_while_train=False), tmp_path / "run", progress=False)
    assert state() == before
    monkeypatch.setitem(vars(sys.modules["mindspore.common.seed"]), "_GLOBAL_SEED", 5)
    before = state()
    validate(recipe(folder, mode=1, amp_level="O0", ckpt_path=str(tmp_path / "run/last.ckpt")), progress=False)
    assert state() == before


def test_a_run_is_not_overwritten_by_accident(finished, folder):
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(recipe(folder), finished.output, progress=False)
    with pytest.raises(ValueError, match=r"no checkpoint of a training run \(last.ckpt is\); to start from its weights use --ckpt_path"):
        checkpoint.load(finished.output / "best.ckpt")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fsdp": True}, "fsdp can only be False with framework mindspore"),
        ({"dataset": "wds"}, "no tar shards train*.tar"),
        ({"auto_augment": "nonsense"}, "auto_augment 'nonsense' is no policy of the kinds"),
        ({"model": "convit", "pretrained": True}, "pretrained needs the name of a variant"),
        ({"opt": "lamb"}, "opt lamb has no kernel in MindSpore on CPU"),
        ({"val_split": "holdout"}, "has no folder 'holdout'; --val_split names another"),
        ({"batch_size": 32}, "exceeds the 16 samples"),
    ],
)
def test_what_it_cannot_do_is_named(folder, tmp_path, keys, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train(recipe(folder, **keys), tmp_path / "run", progress=False)
    assert message in str(error.value)


def test_training_needs_no_torch(finished):
    assert "torch" not in sys.modules
