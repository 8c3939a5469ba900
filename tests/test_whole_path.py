"""From a folder of pictures to a served model, with no flag but folders."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

for package in ("timm", "yaml", "matplotlib", "fastapi", "httpx", "prometheus_client", "multipart", "PIL"):
    pytest.importorskip(package)

from PIL import Image  # noqa: E402

import convit  # noqa: E402
from convit.cli import main  # noqa: E402
from convit.engine import fit  # noqa: E402
from convit.engine.recipe import load_recipe  # noqa: E402
from convit.engine.sources import open_source  # noqa: E402

COLOURS = {"blue": (30, 40, 220), "green": (30, 200, 40), "red": (220, 30, 40), "yellow": (220, 210, 40)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """200 pictures of four classes, of many sizes: a noisy ground in the colour of the class."""
    root, random = tmp_path_factory.mktemp("data") / "pictures", np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(50):
            high, wide = random.integers(40, 90, 2)
            noise = random.integers(-30, 31, (high, wide, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def test_from_pictures_to_a_service(pictures, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit, "EPOCHS", (3, 3))
    caplog.set_level("INFO", "convit")
    assert main(["train", "--data_dir", str(pictures)]) == 0
    header = "pictures: 4 classes (blue, green, red, yellow), 160 images to train on, 40 to validate; fitted: batch 32, "
    assert [line.message for line in caplog.records if line.message.startswith(header)]
    run = Path("runs/pictures")
    capsys.readouterr()

    assert main(["validate", str(run), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["samples"] == 40 and scores["top1"] >= 60

    assert main(["infer", str(pictures / "red"), "--ckpt_path", str(run), "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 50 and {one["name"] for one in answers[0]["classes"]} == set(COLOURS)
    right = sum(answer["classes"][0]["name"] == "red" for answer in answers)

    assert main(["plot", str(run), "--image", str(pictures / "red" / "0.png")]) == 0
    assert (run / "plots" / "attention.png").stat().st_size > 5000

    assert main(["plot", str(run / "best.pth")]) == 1
    assert "best.pth has no log of a run: --image FILE draws where its heads look" in capsys.readouterr().err
    assert main(["plot", str(run / "best.pth"), "--image", str(pictures / "red" / "0.png")]) == 0
    assert Path("plots/attention.png").read_bytes() == (run / "plots" / "attention.png").read_bytes()

    for form, suffix in (("torchscript", ".pt"), ("torch-export", ".pt2")):
        assert main(["export", str(run), "--format", form]) == 0
        assert Path(f"pictures{suffix}").exists()

    from starlette.testclient import TestClient

    from convit.engine.preparation import Preparation
    from convit.serve import create_app

    model = convit.ConViT.from_pretrained(run)
    assert model.pretrained_cfg["label_names"] == list(COLOURS) and Preparation.of(model).size == (64, 64)
    with TestClient(create_app(model)) as client:
        found = client.post("/predict", content=(pictures / "red" / "0.png").read_bytes()).json()["classes"]
    expected = next(answer for answer in answers if answer["image"].endswith("/0.png"))["classes"]
    assert [one["name"] for one in found] == [one["name"] for one in expected]
    assert [one["probability"] for one in found] == pytest.approx([one["probability"] for one in expected], abs=1e-4)
    assert right >= 30

    model.save_pretrained("hub")
    card = Path("hub/README.md").read_text()
    assert "top1" in card and convit.ConViT.from_pretrained("hub").pretrained_cfg["results"] == model.pretrained_cfg["results"]


def test_a_share_of_each_class_is_held_out(pictures):
    parts = [open_source(load_recipe("small", {"data_dir": str(pictures)}), train) for train in (True, False)]
    assert not {*parts[0].paths} & {*parts[1].paths} and len({*parts[0].paths, *parts[1].paths}) == 200
    for part, count in zip(parts, (40, 10), strict=True):
        assert np.bincount(part.targets).tolist() == [count] * 4 and part.classes == list(COLOURS)
    again = open_source(load_recipe("small", {"data_dir": str(pictures)}), False)
    other = open_source(load_recipe("small", {"data_dir": str(pictures), "seed": 7}), False)
    assert again.paths == parts[1].paths != other.paths


@pytest.mark.parametrize(
    ("config", "keys", "changes"),
    [
        ("convit_tiny", {}, {"num_classes": None, "batch_size": 128}),
        ("convit_tiny", {"num_classes": 3, "batch_size": 8}, {}),
        ("small", {}, {}),
        ("finetune", {"pretrained": "true"}, {}),
    ],
)
def test_a_chosen_recipe_keeps_what_fits(pictures, config, keys, changes):
    recipe = load_recipe(config, {"data_dir": str(pictures), **keys})
    fitted, _ = fit.fit(recipe, keys)
    assert {name: getattr(fitted, name) for name in vars(recipe) if getattr(fitted, name) != getattr(recipe, name)} == changes


def test_what_is_fitted_to_few_pictures(pictures):
    """A batch that 160 images fill four times, a rate by its root, as many epochs as 40,000 images, a twentieth of them to warm up."""
    recipe = load_recipe("small", {"data_dir": str(pictures)})
    fitted, _ = fit.fit(recipe, {}, free=True)
    assert (fitted.batch_size, fitted.lr) == (32, pytest.approx(1e-3 / 2**0.5, abs=1e-6))
    assert (fitted.epoch_size, fitted.warmup_epochs, fitted.decay_epochs, fitted.num_parallel_workers) == (200, 10, 190, 0)
    together, _ = fit.fit(recipe, {}, processes=2, free=True)
    assert (together.batch_size, together.lr) == (16, fitted.lr)
    shorter, _ = fit.fit(load_recipe("small", {"data_dir": str(pictures), "epoch_size": 10, "lr": 0.5}), {"epoch_size", "lr"}, free=True)
    assert (shorter.epoch_size, shorter.warmup_epochs, shorter.decay_epochs, shorter.lr) == (10, 2, 8, 0.5)


def test_a_checkpoint_goes_on_with_the_pictures_it_knows(pictures, tmp_path, capsys):
    """Fine-tuned on, its size and its normalisation are its own, not the recipe's; so they are where it is measured."""
    model = convit.ConViT(img_size=48, patch_size=16, embed_dim=24, num_heads=3, depth=3, local_up_to_layer=2, num_classes=4)
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.6, 0.5, 0.4), "crop_pct": 0.7, "interpolation": "bilinear"}
    model.save_pretrained(tmp_path / "m", classes=list(COLOURS))
    own = {"image_resize": 48, "mean": [0.1, 0.2, 0.3], "std": [0.6, 0.5, 0.4], "embed_dim": 24, "depth": 3, "num_heads": 3}
    for command, more in (("train", {}), ("validate", {"crop_pct": 0.7, "interpolation": "bilinear", "num_classes": 4})):
        words = ["--data_dir", str(pictures), "--ckpt_path", str(tmp_path / "m"), "--print-config"]
        assert main([command, *words]) == 0
        told = yaml.safe_load(capsys.readouterr().out)
        assert {name: told[name] for name in own | more} == own | more


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "-c", "finetune", "--data_dir", "{}"], "finetune starts from weights"),
        (["train", "--data_dir", "nowhere"], "data_dir nowhere is no folder"),
        (["validate", "none.pth"], "none.pth"),
        (["infer", "{}", "--ckpt_path", "."], "holds none of best.pth"),
        (["validate", "a.pth", "--ckpt_path", "b.pth"], "name two checkpoints"),
        (["infer", "--pretrained", "cat.jpg"], "no such image: cat.jpg"),
    ],
)
def test_what_is_missing_is_said(pictures, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main([word.format(pictures) for word in words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["infer", "validate", "export", "serve", "train", "lr-find"])
def test_help_is_about_the_command(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert "--warmup_epochs" not in shown and shown.split("\nexamples:\n")[1].count(f"convit {command} ") >= 2
    if command not in ("export", "serve"):
        with pytest.raises(SystemExit):
            main([command, "--help-all"])
        assert "--warmup_epochs" in capsys.readouterr().out


def test_print_config_is_honoured(capsys):
    assert main(["infer", "cat.jpg", "--print-config", "--topk", "3"]) == 0
    assert "model: convit_tiny" in capsys.readouterr().out
