"""Recipes: every packaged one reads, MindCV's yaml is taken as it is, and mistakes are named."""

import dataclasses
import os
import subprocess
import sys

import pytest

pytest.importorskip("yaml")

from convit import cli
from convit.engine.recipe import FIELDS, Recipe, dump_recipe, load_recipe, packaged_recipes, parse_bool, recipe_from

# The recipe for Ascend that MindCV publishes for convit_tiny, key by key.
MINDCV = """
mode: 0
distribute: True
num_parallel_workers: 8
dataset: 'imagenet'
data_dir: '/path/to/imagenet'
shuffle: True
dataset_download: False
batch_size: 256
drop_remainder: True
image_resize: 224
scale: [0.08, 1.0]
ratio: [0.75, 1.333]
hflip: 0.5
interpolation: 'bicubic'
re_prob: 0.25
mixup: 0.2
cutmix: 1.0
cutmix_prob: 1.0
crop_pct: 0.875
color_jitter: 0.4
model: 'convit_tiny'
num_classes: 1000
pretrained: False
ckpt_path: ''
keep_checkpoint_max: 10
ckpt_save_dir: './ckpt'
epoch_size: 300
dataset_sink_mode: True
amp_level: 'O2'
loss: 'CE'
label_smoothing: 0.1
scheduler: 'cosine_decay'
lr: 0.00072
min_lr: 0.000001
warmup_epochs: 5
decay_epochs: 295
opt: 'adamw'
weight_decay: 0.0001
loss_scale: 1024
use_nesterov: False
"""

# batch, lr, warm-up, decay, weight decay, policy, erasing, crop, schedule: the table of MindCV's ConViT recipes
PUBLISHED = {
    "convit_tiny": (256, 7.2e-4, 5, 295, 1e-4, None, 0.25, 0.875, "cosine_decay"),
    "convit_tiny_plus": (256, 7.2e-4, 40, 260, 1e-4, None, 0.25, 0.87, "warmup_cosine_decay"),
    "convit_small": (192, 7e-4, 40, 260, 0.05, "autoaug-mstd0.5", 0.1, 0.915, "warmup_cosine_decay"),
    "convit_small_plus": (192, 7e-4, 40, 260, 0.05, "autoaug-mstd0.5", 0.1, 0.93, "warmup_cosine_decay"),
    "convit_base": (128, 7e-4, 40, 260, 0.1, "autoaug-mstd0.5", 0.1, 0.93, "warmup_cosine_decay"),
    "convit_base_plus": (128, 7e-4, 40, 260, 0.1, "autoaug-mstd0.5", 0.1, 0.925, "warmup_cosine_decay"),
    "convit_tiny_gpu": (128, 5e-4, 10, 200, 0.025, None, 0.25, 0.875, "cosine_decay"),
}


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_read_and_survive_printing(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_values(name):
    r = load_recipe(name)
    values = (r.batch_size, r.lr, r.warmup_epochs, r.decay_epochs, r.weight_decay, r.auto_augment, r.re_prob, r.crop_pct, r.scheduler)
    assert values == PUBLISHED[name]
    assert (r.epoch_size, r.opt, r.label_smoothing, r.drop_path_rate, r.amp_level) == (300, "adamw", 0.1, 0.1, "O2")


def test_a_mindcv_yaml_is_taken_as_it_is(tmp_path):
    path = tmp_path / "convit_tiny_ascend.yaml"
    path.write_text(MINDCV)
    theirs = dataclasses.asdict(load_recipe(path))
    ours = dataclasses.asdict(load_recipe("convit_tiny"))
    differing = {name for name in FIELDS if theirs[name] != ours[name]}
    assert differing == {"distribute", "data_dir"}  # ours leave both to the command line


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bach_size": 3}, "unknown key 'bach_size'; did you mean 'batch_size'?"),
        ({"epochs": 3}, "unknown key 'epochs'; did you mean 'epoch_size'?"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size: expected a whole number, got 1.5"),
        ({"batch_size": True}, "batch_size: expected int, got True"),
        ({"batch_size": None}, "batch_size: must have a value, got null"),
        ({"lr": "fast"}, "lr: expected float, got 'fast'"),
        ({"lr": float("nan")}, "lr: expected a finite number, got nan"),
        ({"hflip": 1.5}, "hflip must be at most 1.0, got 1.5"),
        ({"shuffle": "maybe"}, "shuffle: expected a boolean"),
        ({"opt": "adamww"}, "got 'adamww'; did you mean 'adamw'?"),
        ({"aux_factor": 0.4}, "aux_factor can only be 0.0, got 0.4: ConViT has no auxiliary head"),
        ({"scale": [1.0, 0.5]}, "scale must be a range"),
        ({"mean": [0.5]}, "mean needs one value per input channel (3)"),
        ({"mixup": 0.2, "batch_size": 3}, "batch_size must be even with mixup"),
        ({"epoch_size": "inf"}, "epoch_size: expected a whole number, got 'inf'"),
        ({"seed": "1e400"}, "seed: expected a whole number, got '1e400'"),
        ({"seed": "9223372036854775808"}, "seed: expected a whole number below 2^63"),
        ({"lr": float("inf")}, "lr: expected a finite number, got inf"),
        ({"fsdp": True, "ema": True}, "ema is not supported with fsdp"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ValueError) as error:
        recipe_from(values)
    assert message in str(error.value)


def test_whole_numbers_are_exact():
    assert recipe_from({"seed": str(2**53 + 1)}).seed == recipe_from({"seed": 2**53 + 1}).seed == 2**53 + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1, 1]\nb: &b [*a, *a]\nlr: [*b, *b]", "has aliases"),
        ("lr: " + "[" * 20_000, "is not yaml"),
        ("seed: " + "9" * 5_000, "is not yaml"),
        ("lr: 2001-99-99", "is not yaml"),
        ("x" * 100_000, "has 100,000 bytes, more than the 65,536"),
    ],
)
def test_hostile_recipes_are_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(tmp_path / "a.yaml")
    assert str(tmp_path / "a.yaml") in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("convit_tinny", "unknown recipe 'convit_tinny'; did you mean 'convit_tiny'?"),
        ("list.yaml", "must be a mapping of recipe keys, got list"),
    ],
)
def test_wrong_recipe_files_are_named(config, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError) as error:
        load_recipe(config)
    assert message in str(error.value)


def test_values_keep_their_types():
    r = recipe_from(
        {"lr": "1e-4", "color_jitter": "[0.4, 0.4, 0.4]", "scale": "0.2,1", "num_samples": "null", "ema": "YES", "layer_decay": 1}
    )
    assert (r.lr, r.color_jitter, r.scale, r.num_samples, r.ema, r.layer_decay) == (1e-4, [0.4, 0.4, 0.4], [0.2, 1.0], None, True, 1.0)
    assert recipe_from({"color_jitter": None}).color_jitter is None


@pytest.mark.parametrize(("text", "value"), [("true", True), ("No", False), (1, True), (0, False), (" on ", True), (False, False)])
def test_parse_bool(text, value):
    assert parse_bool(text) is value


@pytest.mark.parametrize("text", ["", "2", None, "tru", 0.5])
def test_parse_bool_refuses_the_rest(text):
    with pytest.raises(ValueError):
        parse_bool(text)


def test_every_key_can_be_overridden_on_the_command_line(capsys):
    """--print-config shows each override; underscores and dashes are one; a bare boolean is true."""
    other = {"batch_size": "7", "lr": "1e-5", "scale_lr": "true", "opt": "sgd", "scale": "[0.5, 1.0]", "seed": "3"}
    argv = [word for name, value in other.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert cli.main(["train", "-c", "digits", "--print-config", *argv, "--ema"]) == 0
    import yaml

    printed = recipe_from(yaml.safe_load(capsys.readouterr().out))
    expected = load_recipe("digits", {**other, "ema": True})
    assert printed == expected
    assert (printed.batch_size, printed.scale_lr, printed.ema) == (7, True, True)


@pytest.mark.parametrize("name", FIELDS)
def test_every_key_is_read_somewhere(name):
    """A key that no engine reads would be a promise that nobody keeps."""
    from pathlib import Path

    import convit

    root = Path(convit.__file__).parent
    text = "".join(path.read_text() for path in root.rglob("*.py") if path.name != "config.py")
    assert f"recipe.{name}" in text or f'"{name}"' in text


def test_unknown_options_suggest_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--bach_size", "3"])
    assert stopped.value.code == 2
    assert "--bach_size 3; did you mean '--batch_size'?" in capsys.readouterr().err


def test_config_needs_no_framework():
    commands = "convit.cli.train, convit.cli.validate, convit.cli.infer"
    code = f"import sys, convit.engine.recipe, {commands}\nprint({{'torch', 'mindspore'}} & {{*sys.modules}} or '[]')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": ""})
    assert out.stdout.strip() == "[]"


def test_defaults_make_a_valid_recipe():
    assert recipe_from({}) == Recipe()
