"""Training in MindSpore with the recipe and the command of PyTorch; runs in an environment that has MindSpore and MindCV."""

import json
import shutil
import signal
import sys

import pytest

pytest.importorskip("mindspore")
pytest.importorskip("mindcv")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from convit import cli  # noqa: E402
from convit.config import load_recipe  # noqa: E402
from convit.mindspore import train as train_module  # noqa: E402
from convit.mindspore.train import train  # noqa: E402

# MindCV's recipe for convit_tiny, made small
SMALL = {"image_resize": 32, "embed_dim": 16, "num_heads": 4, "depth": 2, "local_up_to_layer": 1, "batch_size": 4, "num_classes": 2}
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


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    return train(recipe(folder), tmp_path_factory.mktemp("run") / "run", progress=False)


def test_mindcvs_recipe_trains(finished):
    """Two epochs under graph mode and O2 with mixup, cutmix and random erasing; every file of a run is there."""
    names = {path.name for path in finished.output.iterdir()}
    assert names == {"best.ckpt", "last.ckpt", "epoch_1.ckpt", "epoch_2.ckpt", "log.jsonl", "recipe.yaml"}
    epochs = records(finished.output, "epoch")
    assert [record["epoch"] for record in epochs] == [0, 1] and len(records(finished.output, "step")) == 8
    assert all(np.isfinite(record["train_loss"]) for record in epochs)
    assert len(epochs[0]["gating"]) == 1 and finished.best_top1 >= 50


def test_a_run_validates_without_its_recipe(finished, folder, capsys):
    path = finished.output / "best.ckpt"
    assert cli.main(["validate", "--framework", "mindspore", "--ckpt_path", str(path), "--amp_level", "O0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    record = records(finished.output, "epoch")[finished.best_epoch]
    assert result["samples"] == 6 and result["top1"] == record["top1"]
    assert result["loss"] == pytest.approx(record["val_loss"], abs=2e-2)  # the run computed in float16 (O2)


def test_resume_goes_on_after_the_last_epoch_and_a_signal_stops_between_steps(finished, folder, tmp_path, monkeypatch):
    shutil.copytree(finished.output, tmp_path / "run")
    finish = train_module._Keeper.finish_epoch

    def interrupted(self, losses, seconds):
        finish(self, losses, seconds)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train_module._Keeper, "finish_epoch", interrupted)
    with pytest.raises(train_module.Interrupted, match="SIGTERM"):
        train(recipe(folder, epoch_size=4, decay_epochs=4), tmp_path / "run", resume=True, progress=False)
    assert [record["epoch"] for record in records(tmp_path / "run", "epoch")] == [0, 1, 2]
    updates = [record["update"] for record in records(tmp_path / "run", "step")]
    assert updates[:12] == list(range(1, 13))  # the step that the signal cut off may follow


def test_a_run_is_not_overwritten_by_accident(finished, folder):
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(recipe(folder), finished.output, progress=False)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fsdp": True}, "fsdp can only be False with framework mindspore"),
        ({"sampling_ratio": 0.5}, "sampling_ratio can only be 1.0 with framework mindspore"),
        ({"dataset": "wds"}, "dataset must be imagenet, folder or digits with framework mindspore"),
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
