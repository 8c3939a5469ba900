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


# keys whose run would do nothing, or nothing sensible, at 0; and shares, from none to all
COUNTS = ["log_interval", "num_samples", "batch_size", "image_resize", "re_max_attempts", "num_classes", "in_channels", "patch_size"]
COUNTS += [
    "embed_dim",
    "depth",
    "num_heads",
    "epoch_size",
    "ckpt_save_interval",
    "early_stop",
    "val_interval",
    "decay_epochs",
    "num_cycles",
]
COUNTS += ["gradient_accumulation_steps", "scale_lr_batch"]
NONE_OR_MORE = [
    "seed",
    "num_parallel_workers",
    "aug_repeats",
    "max_bad_images",
    "shift",
    "mixup",
    "cutmix",
    "mixup_off_epoch",
    "clip_value",
]
NONE_OR_MORE += ["local_up_to_layer", "ckpt_save_steps", "keep_checkpoint_max", "max_skipped_steps", "lr", "min_lr", "warmup_epochs"]
NONE_OR_MORE += ["warmup_lr", "weight_decay", "eps"]
SHARES = ["sampling_ratio", "hflip", "vflip", "re_prob", "cutmix_prob", "warmup_factor", "momentum", "layer_decay", "ema_decay"]
WITHIN = {"val_share": (0.01, 0.9), "crop_pct": (0.01, 2.0)} | {
    name: (0.0, 0.99) for name in ("drop_rate", "drop_path_rate", "label_smoothing")
}
LIMITS = {name: (1, None) for name in COUNTS} | {name: (0, None) for name in NONE_OR_MORE} | {"loss_scale": (1.0, None)}
LIMITS |= {name: (0.0, 1.0) for name in SHARES} | WITHIN


@pytest.mark.parametrize("name", LIMITS)
def test_numbers_are_taken_up_to_their_limits_and_not_beyond(name):
    low, high = LIMITS[name]
    more = {"in_channels": {"mean": [0.5], "std": [0.5]}, "re_max_attempts": {"framework": "mindspore"}}.get(name, {})
    step = 1 if isinstance(low, int) else 0.001
    assert getattr(recipe_from(more | {name: low}), name) == low
    with pytest.raises(ValueError, match=f"{name} must be at least {low}(.0)?, got"):
        recipe_from(more | {name: low - step})
    if high is not None:
        assert getattr(recipe_from(more | {name: high}), name) == high
        with pytest.raises(ValueError, match=f"{name} must be at most {high}, got"):
            recipe_from(more | {name: high + 0.001})


@pytest.mark.parametrize(
    ("name", "honoured", "refused"),
    [
        ("aux_factor", 0.0, 0.4),
        ("reduction", "mean", "sum"),
        ("dataset_download", False, True),
        ("resume_opt", False, True),
        ("aug_splits", 0, 3),
        ("enable_modelarts", False, True),
    ],
)
def test_keys_of_mindcv_that_mean_nothing_here_are_honoured_or_refused(name, honoured, refused):
    assert recipe_from({name: honoured}) == Recipe()
    for value in (refused, 1 if name == "aug_splits" else refused):
        with pytest.raises(ValueError, match=f"{name} can only be {honoured!r}, got {value!r}"):
            recipe_from({name: value})


@pytest.mark.parametrize(
    ("values", "more", "message"),
    [
        ({"mixup": 0.2, "batch_size": 3}, {"batch_size": 4}, "batch_size must be even with mixup or cutmix"),
        ({"cutmix": 0.2, "batch_size": 3}, {"batch_size": 4}, "batch_size must be even with mixup or cutmix"),
        ({"early_stop": 1, "val_while_train": False}, {"val_while_train": True}, "early_stop needs val_while_train"),
        ({"class_balanced": True, "aug_repeats": 2}, {"aug_repeats": 1}, "class_balanced is not supported with aug_repeats"),
        ({"ckpt_save_policy": "top_k", "val_while_train": False}, {"ckpt_save_policy": "latest_k"}, "top_k needs val_while_train"),
        ({"scheduler": "one_cycle", "warmup_epochs": 1}, {"warmup_epochs": 0}, "one_cycle needs warmup_epochs 0"),
        ({"scheduler": "cyclic", "warmup_epochs": 0, "lr_epoch_stair": True}, {"lr_epoch_stair": False}, "lr_epoch_stair false"),
        ({"re_max_attempts": 9}, {"framework": "mindspore"}, "re_max_attempts can only be 10 with framework pytorch"),
        ({"amp_cast_list": "[nn.Dense]"}, {"framework": "mindspore"}, "amp_cast_list names cells of MindSpore"),
        ({"amp_cast_list": "nn.Dense nn.Conv2d", "framework": "mindspore"}, {"amp_cast_list": "nn.Dense, nn.Conv2d"}, "must be a list of"),
        ({"fsdp": True, "ema": True}, {"ema": False}, "ema is not supported with fsdp"),
        ({"fsdp": True, "amp_dtype": "float16"}, {"amp_dtype": "bfloat16"}, "float16 is not supported with fsdp"),
        ({"std": [0.5, 0.0, 0.5]}, {"std": [0.5, 0.1, 0.5]}, "std must be positive"),
        ({"scale": [0.1, 0.5, 1.0]}, {"scale": [1.0, 1.0]}, "scale must be a range"),
        ({"ratio": [0.0, 1.0]}, {"ratio": [0.5, 1.0]}, "ratio must be a range"),
    ],
    ids=str,
)
def test_keys_that_do_not_go_together_are_refused_and_their_neighbours_taken(values, more, message):
    with pytest.raises(ValueError, match=message):
        recipe_from(values)
    recipe_from(values | more)


def test_whole_numbers_are_exact():
    assert recipe_from({"seed": str(2**53 + 1)}).seed == recipe_from({"seed": 2**53 + 1}).seed == 2**53 + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1, 1]\nb: &b [*a, *a]\nlr: [*b, *b]", "has aliases"),
        ("lr: " + "[" * 20_000, "is not yaml"),
        ("lr: " + "[" * 20 + "]" * 20, "is nested too deeply"),
        ("lr: " + "[" * 19 + "]" * 19, "lr: expected float, got a list"),
        ("lr: [" + "[], " * 100 + "]", "lr: expected float, got a list"),
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


def test_mindcvs_other_names_of_keys_are_options_too(capsys):
    import yaml

    words = ["--device_target", "CPU", "--filter_bias_and_bn", "false", "--dynamic_loss_scale", "true"]
    assert cli.main(["train", "-c", "digits", "--print-config", *words]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["device"], printed["weight_decay_filter"], printed["loss_scale_type"]) == ("cpu", "disable", "dynamic")


def test_help_all_is_a_flag_that_shows_every_key(capsys):
    for shown, words in ((False, ["--help"]), (True, ["--help-all", "--lr", "1"])):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["train", *words])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert all((f"--{name}" in text) >= shown for name in FIELDS) and ("--lr_epoch_stair" in text) == shown


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


# what a recipe that leaves a key out means, and has to go on meaning
DEFAULTS = """
{framework: pytorch, device: auto, mode: 0, distribute: null, seed: 42, num_parallel_workers: 8, log_interval: 100, tensorboard: false,
wandb: '', dataset: imagenet, data_dir: '', train_split: train, val_split: val, class_map: '', val_share: 0.2, shuffle: true, num_samples:
null, sampling_ratio: 1.0, batch_size: 128, drop_remainder: true, aug_repeats: 0, class_balanced: false, max_bad_images: 100,
image_resize: 224, scale: [0.08, 1.0], ratio: [0.75, 1.333], hflip: 0.5, vflip: 0.0, shift: 0, color_jitter: 0.4, interpolation: bilinear,
auto_augment: null, re_prob: 0.0, re_scale: [0.02, 0.33], re_ratio: [0.3, 3.3], re_max_attempts: 10, re_value: '0', mean: [0.485, 0.456,
0.406], std: [0.229, 0.224, 0.225], crop_pct: 0.875, mixup: 0.0, cutmix: 0.0, mixup_off_epoch: 0, cutmix_prob: 1.0, model: convit_tiny,
num_classes: null, in_channels: 3, patch_size: null, embed_dim: null, depth: null, num_heads: null, local_up_to_layer: null,
locality_strength: null, drop_rate: 0.0, drop_path_rate: 0.1, pretrained: false, ckpt_path: '', epoch_size: 90, ckpt_save_dir: ./ckpt,
ckpt_save_interval: 1, ckpt_save_steps: 1000, ckpt_save_policy: latest_k, keep_checkpoint_max: 10, val_while_train: true, early_stop:
null, val_interval: 1, dataset_sink_mode: true, amp_level: O0, amp_dtype: auto, val_amp_level: null, amp_cast_list: null, loss_scale: 1.0,
loss_scale_type: fixed, gradient_accumulation_steps: 1, clip_grad: false, clip_value: 15.0, grad_checkpointing: false, channels_last:
false, compile: false, fsdp: false, max_skipped_steps: 10, loss: CE, label_smoothing: 0.0, scheduler: cosine_decay, lr: 0.001, scale_lr:
false, scale_lr_batch: 512, min_lr: 1.0e-06, warmup_epochs: 3, warmup_factor: 0.0, warmup_lr: null, warmup_prefix: true, decay_epochs:
100, decay_rate: 0.9, multi_step_decay_milestones: [30, 60, 90], lr_epoch_stair: false, num_cycles: 1, cycle_decay: 1.0, opt: adam,
momentum: 0.9, weight_decay: 1.0e-06, use_nesterov: false, weight_decay_filter: disable, layer_decay: null, eps: 1.0e-08, ema: false,
ema_decay: 0.9999, ema_warmup: true}
"""


def test_defaults_are_what_they_were():
    import yaml

    known = yaml.safe_load(DEFAULTS)
    assert recipe_from({}) == Recipe() and {name: getattr(Recipe(), name) for name in known} == known


def test_a_command_is_asked_for(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith("usage: convit") and "required: command" in told


def test_a_runs_recipe_is_taken_when_it_is_resumed_and_not_before(tmp_path, capsys):
    import yaml

    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe("digits", {"depth": 3})))
    depths = []
    for words in (["--ckpt_save_dir", str(tmp_path)], ["--resume", str(tmp_path)], ["--resume", str(tmp_path), "--depth", "4"]):
        assert cli.main(["train", "--print-config", *words]) == 0
        depths.append(yaml.safe_load(capsys.readouterr().out)["depth"])
    assert depths == [load_recipe("digits").depth, 3, 4] and depths[0] != 3
