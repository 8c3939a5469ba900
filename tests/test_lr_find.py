"""``convit lr-find``: rates in equal factors, the engine's own steps, where the loss falls fastest, and nothing left behind."""

import json
import math
import os
import re

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")
np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from training import SMALL, losses, small  # noqa: E402

from convit import cli  # noqa: E402
from convit.engine.pytorch.range_test import _steepest, lr_find  # noqa: E402
from convit.engine.pytorch.train import train  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_constant_rate_is_a_training_run(tmp_path):
    """Over nearly equal rates the losses are those of training, across the end of an epoch too; the caller's generator is as it was."""
    keys = {
        "scheduler": "constant",
        "warmup_epochs": 0,
        "lr": 1e-9,
        "opt": "momentum",
        "num_samples": 160,
        "drop_rate": 0,
        "drop_path_rate": 0,
    }
    train(small(**keys, epoch_size=2, shuffle=False, val_while_train=False), tmp_path / "run", progress=False)
    before = torch.get_rng_state()
    found = lr_find(small(**keys, shuffle=False), 1e-9, 1.001e-9, 10)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_allclose(found.losses, losses(tmp_path / "run"), rtol=1e-5)
    weights = 0.9 ** np.arange(10)[::-1]  # a mean over what has been, without a pull towards zero
    np.testing.assert_allclose(found.smoothed, [np.average(found.losses[:n], weights=weights[-n:]) for n in range(1, 11)], rtol=1e-9)


def test_the_command_draws_and_tells_a_rate_that_trains(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    assert cli.main(["lr-find", "-c", "digits", *words, "--opt", "adamw", "--low", "1e-5", "--high", "100", "--steps", "60", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert np.allclose(np.diff(np.log(told["rates"])), math.log(1e7) / 59) and told["rates"][0] == 1e-5
    assert 1e-4 < told["steepest"] < 1 and told["smoothed"][-1] > 2 * min(told["smoothed"])
    assert os.listdir(tmp_path) == ["lr_find.png"]


def test_the_rate_that_is_told_is_the_recipes_own(tmp_path, capsys, monkeypatch):
    """Where the recipe scales its rate with the batch, the one to give is smaller by that factor."""
    monkeypatch.chdir(tmp_path)
    keys = SMALL | {"scale_lr": "true", "scale_lr_batch": 16}
    words = [word for name, value in keys.items() for word in (f"--{name}", str(value))]
    assert cli.main(["lr-find", "-c", "digits", *words, "--opt", "adamw", "--low", "1e-5", "--high", "1", "--steps", "30"]) == 0
    fastest, told = re.search(r"fastest at (\S+): --lr (\S+)", capsys.readouterr().out).groups()
    assert float(told) == pytest.approx(float(fastest) / 2, rel=0.06)


def test_where_the_loss_falls_fastest():
    rates = np.geomspace(1e-6, 1, 61)
    loss = 2 - 1 / (1 + np.exp(-4 * (np.log10(rates) + 3))) + np.where(rates > 0.1, 5 * rates, 0)
    assert _steepest(list(rates), list(loss)) == pytest.approx(1e-3, rel=0.3)
    assert _steepest(list(rates), list(1 + rates)) is None and _steepest([], []) is None
    step = np.arange(61)
    for steepest in (4, 5):  # the first five are of the untrained model's noise, however steep
        loss = 2 - 0.001 * step - (step >= steepest) - (step > steepest)
        assert _steepest(list(rates), list(loss)) == rates[5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--low", "0"], "needs 0 < low < high"),
        (["--low", "1e-3", "--high", "1e-4"], "needs 0 < low < high"),
        (["--steps", "3"], "10 steps or more"),
        (["--output", "lr.txt"], "must be a picture: .png, .pdf, .svg"),
        (["--framework", "mindspore"], "the framework is mindspore"),
    ],
)
def test_what_makes_no_range_is_said(words, message, capsys):
    assert cli.main(["lr-find", "-c", "digits", *words]) == 1
    assert message in capsys.readouterr().err
