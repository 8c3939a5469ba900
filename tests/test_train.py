"""Training: the digits, schedules, and every option of a recipe."""

import dataclasses
import importlib.machinery
import sys
import types

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")
np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from training import SHARED, assert_same_curve, losses, records, small  # noqa: E402

from convit.engine import run as run_module  # noqa: E402
from convit.engine.pytorch.build import build_model  # noqa: E402
from convit.engine.pytorch.checkpoint import load  # noqa: E402
from convit.engine.pytorch.data import EvalData  # noqa: E402
from convit.engine.pytorch.train import train  # noqa: E402
from convit.engine.recipe import load_recipe, packaged_recipes  # noqa: E402
from convit.engine.shown import Boards  # noqa: E402
from convit.engine.world import World  # noqa: E402
from convit.pytorch.diagnostics import diagnose  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_digits_learn(tmp_path):
    """A little of the packaged recipe, with a shallower model, lifts the accuracy well above the 10 % of chance."""
    keys = {"epoch_size": 4, "warmup_epochs": 1, "decay_epochs": 3, "depth": 2, "local_up_to_layer": 1}
    result = train(load_recipe("digits", keys), tmp_path / "run", progress=False)
    assert result.top1 > 25
    epoch = result.history[-1]
    assert 0 < epoch["data_seconds"] < epoch["seconds"]
    assert len(epoch["gate"]) == 1 and all(0 < gate < 1 for gate in epoch["gate"][0])


MINDCV = [name for name in packaged_recipes() if name.startswith("convit_") and not name.endswith("_fair")]


@pytest.mark.parametrize("name", MINDCV)
def test_every_recipe_of_mindcvs_trains_an_epoch(folder, tmp_path, name):
    """As it is, but for the sizes of model and data: its policy, mixing, erasing, mixed precision, loss scale and schedule."""
    keys = {"embed_dim": 16, "num_heads": 4, "depth": 2, "local_up_to_layer": 1, "image_resize": 16, "patch_size": 4, "num_classes": 2}
    keys |= {"data_dir": str(folder), "epoch_size": 1, "batch_size": 8, "warmup_epochs": 0, "num_parallel_workers": 0, "device": "cpu"}
    result = train(load_recipe(name, keys), tmp_path / "run", progress=False)
    assert np.isfinite([result.train_loss, result.val_loss]).all() and result.history[0]["skipped_steps"] == 0
    assert result.history[0]["update"] == 3 and all(torch.isfinite(p).all() for p in result.model.parameters())


def test_accumulation_gives_the_curve_of_the_whole_batch(alone, tmp_path):
    train(small(**SHARED | {"batch_size": 8, "gradient_accumulation_steps": 4}), tmp_path / "run", progress=False)
    assert_same_curve(alone, tmp_path / "run")


def rates(tmp_path, **keys):
    train(small(embed_dim=4, **keys), tmp_path / "run", progress=False)
    return [record["lr"] for record in records(tmp_path / "run", "step")]


def test_the_schedule_of_mindcv(tmp_path):
    """Linear warm-up, then the cosine over decay_epochs, then min_lr."""
    lr = rates(tmp_path, epoch_size=4, warmup_epochs=1, decay_epochs=2, lr=0.01, min_lr=0.001)
    t = np.arange(22) / 22
    expected = np.concatenate([0.01 * np.arange(11) / 11, 0.001 + 0.0045 * (1 + np.cos(np.pi * t)), np.full(11, 0.001)])
    np.testing.assert_allclose(lr, expected, rtol=1e-9)


def test_the_schedule_of_fair(tmp_path):
    """Once per epoch, the warm-up inside the cosine, the rate scaled with the batch of all passes."""
    keys = {"lr_epoch_stair": True, "warmup_prefix": False, "warmup_factor": 0.5, "scale_lr": True, "scale_lr_batch": 64}
    keys |= {"batch_size": 16, "gradient_accumulation_steps": 2}
    lr = rates(tmp_path, epoch_size=4, warmup_epochs=2, decay_epochs=4, lr=0.02, min_lr=0.0, **keys)
    expected = [0.005, 0.0075, 0.005, 0.005 * (1 + np.cos(np.pi * 0.75))]
    np.testing.assert_allclose(lr, np.repeat(expected, 11), rtol=1e-9)


def test_exponential_decay_loses_its_factor_every_epoch(tmp_path):
    lr = rates(tmp_path, scheduler="exponential_decay", epoch_size=3, warmup_epochs=0, decay_epochs=2, decay_rate=0.25, lr=0.01)
    np.testing.assert_allclose(lr, 0.01 * 0.25 ** (np.arange(33) / 11), rtol=1e-9)


@pytest.mark.parametrize(
    "keys",
    [
        {"amp_level": "O2", "amp_dtype": "bfloat16"},
        {"amp_level": "O2", "amp_dtype": "float16", "loss_scale": 1024, "clip_grad": True},
        {"grad_checkpointing": True, "channels_last": True},
        {"layer_decay": 0.7, "loss": "BCE", "opt": "sgd", "use_nesterov": True},
        {
            "opt": "lamb",
            "scheduler": "multi_step_decay",
            "multi_step_decay_milestones": "[1, 2]",
            "drop_remainder": False,
            "num_samples": 361,
        },
    ],
    ids=lambda keys: next(iter(keys)) + "=" + str(next(iter(keys.values()))),
)
def test_options_train(tmp_path, keys):
    result = train(small(**keys), tmp_path / "run", progress=False)
    first, last = result.history[0]["train_loss"], result.train_loss
    assert last < first and result.history[-1]["skipped_steps"] == 0


def test_layer_decay_scales_the_rate_by_depth(tmp_path):
    train(small(layer_decay=0.5, epoch_size=1), tmp_path / "run", progress=False)
    scales = {group["lr_scale"] for group in load(tmp_path / "run" / "last.pth")["optimizer"]["param_groups"]}
    assert scales == {1.0, 0.5, 0.25, 0.125}


def test_a_compiled_model_gives_the_same_curve(alone, tmp_path):
    pytest.importorskip("torch._inductor")
    train(small(**SHARED | {"epoch_size": 1}, compile=True, val_while_train=False), tmp_path / "run", progress=False)
    assert np.abs(np.array(losses(tmp_path / "run")) - losses(alone)[:11]).max() < 1e-4


def test_gradient_checkpointing_changes_nothing(alone, tmp_path):
    train(small(**SHARED, grad_checkpointing=True), tmp_path / "run", progress=False)
    assert losses(tmp_path / "run") == losses(alone)


def test_an_epochs_record_is_of_its_steps_and_of_its_weights(tmp_path):
    """The mean of its steps' losses, though there be one; gates, distances and non-locality on the first 32 pictures that validate."""
    result = train(small(num_samples=32, epoch_size=2, warmup_epochs=0, decay_epochs=2), tmp_path, progress=False)
    steps, epochs = losses(tmp_path), records(tmp_path, "epoch")
    assert [epoch["train_loss"] for epoch in epochs] == pytest.approx(steps, rel=1e-6) and len(steps) == 2
    recipe = small(ckpt_path=str(tmp_path / "last.pth"))
    pictures = next(iter(EvalData(recipe, World(), torch.device("cpu"))))[0][:32]
    found = diagnose(build_model(recipe, 10).eval(), pictures)
    for name in ("gate", "distance", "nonlocality"):
        np.testing.assert_allclose(result.history[-1][name], found[name], rtol=0, atol=1e-5)


def test_the_best_checkpoints_are_kept(tmp_path):
    train(small(keep_checkpoint_max=1, ckpt_save_policy="top_k", epoch_size=4, decay_epochs=3), tmp_path / "run", progress=False)
    top1 = [record["top1"] for record in records(tmp_path / "run", "epoch")]
    names = [path.name for path in (tmp_path / "run").glob("epoch_*.pth")]
    assert len(names) == 1
    kept = torch.load(tmp_path / "run" / names[0], weights_only=True)
    best = torch.load(tmp_path / "run" / "best.pth", weights_only=True)
    assert kept["top1"] == best["top1"] == max(top1)
    assert best["epoch"] == top1.index(max(top1))


@pytest.mark.parametrize(("keys", "kept"), [({}, [3, 4]), ({"ckpt_save_interval": 3}, [3])], ids=str)
def test_the_latest_checkpoints_are_kept(tmp_path, keys, kept):
    keys = {"keep_checkpoint_max": 2, "ckpt_save_policy": "latest_k", "epoch_size": 4, "decay_epochs": 3, "num_samples": 64} | keys
    train(small(**keys), tmp_path / "run", progress=False)
    assert sorted(path.name for path in (tmp_path / "run").glob("epoch_*.pth")) == [f"epoch_{epoch}.pth" for epoch in kept]


def test_the_latest_are_kept_though_the_first_were_best(tmp_path, monkeypatch):
    """Of equal scores the first is the best."""
    from convit.engine.pytorch import train as module

    scores = iter((90.0, 80.0, 90.0, 60.0))
    monkeypatch.setattr(module.TorchRun, "evaluate", lambda self: {"top1": next(scores), "top5": 99.0, "val_loss": 1.0})
    keys = {"keep_checkpoint_max": 2, "ckpt_save_policy": "latest_k", "epoch_size": 4, "decay_epochs": 3, "num_samples": 64}
    train(small(**keys), tmp_path / "run", progress=False)
    assert sorted(path.name for path in (tmp_path / "run").glob("epoch_*.pth")) == ["epoch_3.pth", "epoch_4.pth"]
    assert torch.load(tmp_path / "run" / "best.pth", weights_only=True)["epoch"] == 0


def test_a_resumed_run_goes_on_with_its_loss_scale(tmp_path):
    """float16 from a loss scale at which gradients overflow: the halvings that one run makes are not made again by the next."""
    keys = {
        "amp_level": "O2",
        "amp_dtype": "float16",
        "loss_scale": 2.0**40,
        "max_skipped_steps": 50,
        "num_samples": 64,
        "warmup_epochs": 0,
    }
    first = train(small(**keys, epoch_size=4, decay_epochs=4), tmp_path / "run", progress=False)
    scale = load(tmp_path / "run" / "last.pth")["scaler"]["scale"]
    assert scale < 2.0**40 and first.history[0]["skipped_steps"] > 0
    again = train(small(**keys, epoch_size=5, decay_epochs=4), tmp_path / "run", resume=True, progress=False)
    assert load(tmp_path / "run" / "last.pth")["scaler"]["scale"] <= scale and again.epochs == 5
    train(small(**keys | {"loss_scale": 1.0}, epoch_size=1, decay_epochs=1), tmp_path / "own", progress=False)
    own = load(tmp_path / "own" / "last.pth")["scaler"]["scale"]
    assert own in (2**16, 2**15)  # torch's own start, and a power of two: scaling is exact


def test_a_recipes_model_has_what_the_recipe_says():
    shape = {"embed_dim": 24, "depth": 4, "num_heads": 3, "local_up_to_layer": 2, "patch_size": 4, "locality_strength": 0.7}
    recipe = load_recipe("digits", shape | {"image_resize": 16, "drop_rate": 0.2, "drop_path_rate": 0.3, "ckpt_path": "", "seed": 5})
    model = build_model(recipe, 6)
    assert model.patch_embed.grid_size == (4, 4) and model.in_chans == recipe.in_channels and model.head.out_features == 6
    assert [type(block.attn).__name__ for block in model.blocks] == ["GPSA", "GPSA", "MHSA", "MHSA"]
    assert all(block.attn.num_heads == 3 and block.attn.proj.in_features == 24 for block in model.blocks)
    assert (model.blocks[1].attn.pos_proj.weight[:, 2] == -0.7).all()
    assert model.head_drop.p == 0.2 and [b.drop_path.drop_prob for b in model.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    again, other = build_model(recipe, 6), build_model(dataclasses.replace(recipe, seed=6), 6)
    assert torch.equal(again.head.weight, model.head.weight) and not torch.equal(other.head.weight, model.head.weight)


def test_what_a_run_tells(tmp_path, capsys, caplog):
    """The plan and the model's size, a line an epoch and the scores, nothing else; -q is silent."""
    from convit.cli import main

    keys = {"embed_dim": 16, "depth": 2, "num_heads": 4, "local_up_to_layer": 1, "num_samples": 64, "epoch_size": 2, "warmup_epochs": 0}
    words = ["train", "-c", "digits", *(word for name, value in (keys | {"batch_size": 32}).items() for word in (f"--{name}", str(value)))]
    assert main([*words, "--ckpt_save_dir", str(tmp_path / "told")]) == 0
    log = records(tmp_path / "told", "epoch")
    parameters = sum(p.numel() for p in build_model(load_recipe("digits", keys), 10).parameters())
    assert [record.getMessage() for record in caplog.records] == [
        "convit, 10 classes; 64 training samples, 2 epochs of 2 steps\n"
        f"{parameters / 1e6:.2f} M parameters, cpu, float32, 1 process; global batch 32; learning rate 0.002"
    ]
    told = capsys.readouterr().err.splitlines()
    for epoch, line in enumerate(told[:2]):
        scores = f"top-1 {log[epoch]['top1']:.2f} %  val loss {log[epoch]['val_loss']:.4f}"
        assert line.startswith(f"epoch {epoch + 1}/2  loss {log[epoch]['train_loss']:.4f}  {scores}") and line.endswith(" images/s")
    assert told[2].startswith("2 epochs in ") and told[2].endswith(f"; {tmp_path / 'told'}") and len(told) == 3
    assert f"top-1 {log[1]['top1']:.2f} %, top-5 {log[1]['top5']:.2f} %; best top-1 " in told[2]

    assert main([*words, "-q", "--ckpt_save_dir", str(tmp_path / "quiet")]) == 0
    assert capsys.readouterr() == ("", "")

    # what is there is neither lost nor gone on with unasked
    assert main([*words, "--ckpt_save_dir", str(tmp_path / "told")]) == 1 and "--resume" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path / "told"), "--epoch_size", "3"]) == 0
    assert records(tmp_path / "told", "epoch")[:2] == log and len(records(tmp_path / "told", "epoch")) == 3


@pytest.mark.parametrize("distribute", [True, None])
def test_one_process_is_told_that_it_is_alone_where_several_were_asked_for(tmp_path, caplog, distribute):
    caplog.set_level("INFO", "convit")
    train(small(distribute=distribute, num_samples=32, epoch_size=1, warmup_epochs=0, decay_epochs=1), tmp_path, progress=False)
    assert ("distribute is set, but one process was started" in caplog.text) == bool(distribute)


def test_the_bar_of_a_terminal_counts_every_step(monkeypatch):
    pytest.importorskip("rich")
    from convit.engine.shown import Bar

    written = []
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: True, write=written.append, flush=lambda: None))
    bar = Bar(True, 22, 11)
    bar.update(12, 1, 0.5)
    task = bar.bar.tasks[0]
    assert (task.total, task.completed, task.description) == (22, 12, "epoch 2, loss 0.5000")
    bar.close()
    assert bar.bar is None and Bar(False, 22, 0).bar is None
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: False))
    assert Bar(True, 22, 0).bar is None


def test_epochs_go_to_weights_and_biases(tmp_path, monkeypatch):
    """Without the package a message and no run folder; with it, here a stand-in that keeps what it is given, each epoch's numbers."""
    monkeypatch.setattr(run_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install wandb"):
        train(small(wandb="digits"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    said = []
    run = types.SimpleNamespace(log=lambda record, step: said.append((step, record)), finish=lambda: said.append("finished"))
    module = types.ModuleType("wandb", None)
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init = lambda **keys: said.append(keys) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    train(small(wandb="digits", epoch_size=2), tmp_path / "run", progress=False)
    assert said[0]["project"] == "digits" and said[0]["config"]["embed_dim"] == 16
    assert [step for step, _ in said[1:3]] == [11, 22] and said[3:] == ["finished"]
    assert said[2][1]["top1"] == records(tmp_path / "run", "epoch")[1]["top1"]


def test_epochs_go_to_tensorboard(tmp_path):
    """By number of the epoch; what a run that was cut off had written beyond the point it goes on from is dropped."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    numbers = {"train_loss": 3.0, "val_loss": 2.0, "top1": 50.0, "top5": 90.0, "lr": 0.125, "images_per_second": 8.0}
    for start in (0, 1):  # the second time from the end of the first epoch
        boards = Boards(small(tensorboard=True), tmp_path, start)
        for epoch in range(start, 2):
            boards.write({"epoch": epoch, "update": 11 * (epoch + 1), "other": 1.0} | {n: x + epoch + start for n, x in numbers.items()})
        boards.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(numbers)
    for name, value in numbers.items():
        assert [(event.step, event.value) for event in events.Scalars(name)] == [(0, value), (1, value + 2)]
