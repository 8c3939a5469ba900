"""Recipes: the keys of MindCV's yaml files plus ours, checked, with defaults; from a file, a packaged name and the command line.

A recipe is a flat yaml mapping. Every key is a field of ``Recipe``; every field is also an option ``--key VALUE`` of the commands.
The precedence is command line, file, default. Imports no framework.
"""

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from convit.architecture import IMAGENET_MEAN, IMAGENET_STD, VARIANTS
from convit.dispatch import nearest
from convit.engine.yaml_mapping import read_mapping
from convit.weights.files import read_text, shown

MAX_RECIPE = 64 << 10  # bytes; yaml is read at some 100 kB a second
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse_bool(value: Any) -> bool:
    """The boolean that ``value`` spells: a bool, 0 or 1, or true/yes/on/1 and false/no/off/0 in any case.

    Raises:
        ValueError: It spells none.
    """
    text = str(value).strip().lower()
    if text in TRUE:
        return True
    if text in FALSE:
        return False
    raise ValueError(f"expected a boolean ({'/'.join(TRUE)} or {'/'.join(FALSE)}), got {shown(value)}")


def key(default: Any, help: str, *, choices: tuple[Any, ...] = (), low: float | None = None, high: float | None = None) -> Any:
    """One recipe key: its default, its help, and what values it may take (``low`` and ``high`` are inclusive)."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Recipe:
    """Everything a run depends on. Names, meanings and, unless a comment says otherwise, defaults are MindCV's."""

    # system
    framework: str = key("pytorch", "engine that trains", choices=("pytorch", "mindspore"))
    device: str = key("auto", "auto, cpu, cuda, mps, npu, xpu; MindSpore's GPU and Ascend are cuda and npu")
    mode: int = key(0, "MindSpore: 0 graph mode, 1 PyNative", choices=(0, 1))
    distribute: bool | None = key(None, "run on several processes; null: if a launcher started several")
    seed: int = key(42, "of weights, data order and augmentation", low=0)
    num_parallel_workers: int = key(8, "data-loading processes (0: none)", low=0)
    log_interval: int = key(100, "optimiser steps between two step records in log.jsonl", low=1)
    tensorboard: bool = key(False, "also write TensorBoard events to the run's folder")
    wandb: str = key("", "also log each epoch to the Weights & Biases project of this name")

    # data
    dataset: str = key(
        "imagenet", "imagenet: whatever data_dir holds (image folders, tar shards, Hugging Face files), or one of these by name",
        choices=("imagenet", "folder", "wds", "hfds", "digits"),
    )  # fmt: skip
    data_dir: str = key("", "folder of the data set: a folder per class, or a folder or file group per split")
    train_split: str = key("train", "name of the training split")
    val_split: str = key("val", "name of the validation split")
    class_map: str = key("", "text file with the names of the classes in order, one a line (timm's option); empty: the data's own order")
    val_share: float = key(0.2, "share of each class kept to validate where data_dir has no splits", low=0.01, high=0.9)
    shuffle: bool = key(True, "shuffle the training data")
    num_samples: int | None = key(None, "use only this many training samples, as evenly from all classes as they allow", low=1)
    sampling_ratio: float = key(1.0, "share of each class to train on (FAIR's option)", low=0.0, high=1.0)
    batch_size: int = key(128, "images per device and forward pass", low=1)
    drop_remainder: bool = key(True, "drop the last incomplete global batch of an epoch")
    aug_repeats: int = key(0, "repeated augmentation: copies of each image in a batch (0 or 1: off)", low=0)
    class_balanced: bool = key(False, "draw the training samples with replacement, so that all classes come equally often")
    max_bad_images: int = key(100, "unreadable training images per epoch that are replaced before the run stops", low=0)

    # augmentation
    image_resize: int = key(224, "side of the square input, pixels", low=1)
    scale: list[float] = key([0.08, 1.0], "range of the random crop's share of the area")
    ratio: list[float] = key([0.75, 1.333], "range of the random crop's aspect ratio")
    hflip: float = key(0.5, "probability of a horizontal flip", low=0.0, high=1.0)
    vflip: float = key(0.0, "probability of a vertical flip", low=0.0, high=1.0)
    shift: int = key(0, "digits: largest random shift, pixels", low=0)
    color_jitter: float | list[float] | None = key(0.4, "colour jitter: one factor, or brightness, contrast, saturation[, hue]")
    interpolation: str = key(
        "bilinear", "of resizing; random: either, in training (bicubic to evaluate)", choices=("bilinear", "bicubic", "random")
    )
    auto_augment: str | None = key(None, "policy: randaug-..., autoaug-..., autoaugr-..., augmix-..., or timm's names")
    re_prob: float = key(0.0, "probability of random erasing", low=0.0, high=1.0)
    re_scale: list[float] = key([0.02, 0.33], "range of the erased share of the area")
    re_ratio: list[float] = key([0.3, 3.3], "range of the erased area's aspect ratio")
    re_max_attempts: int = key(10, "tries to place the erased area (timm's, of PyTorch, are always 10)", low=1)
    re_value: str = key("0", "what fills the erased area: 0, or random (noise per pixel)", choices=("0", "random"))
    mean: list[float] = key(list(IMAGENET_MEAN), "per channel; values above 1 are of 0 to 255")
    std: list[float] = key(list(IMAGENET_STD), "per channel; values above 1 are of 0 to 255")
    crop_pct: float = key(
        0.875, "share of the resized image that the evaluation crop keeps (above 1: with a black margin)", low=0.01, high=2.0
    )
    mixup: float = key(0.0, "alpha of mixup (0: off)", low=0.0)
    cutmix: float = key(0.0, "alpha of cutmix (0: off)", low=0.0)
    mixup_off_epoch: int = key(0, "no mixup and cutmix from this epoch on (0: to the end)", low=0)
    cutmix_prob: float = key(1.0, "probability that a batch is mixed", low=0.0, high=1.0)

    # model; null leaves the variant's own value
    model: str = key("convit_tiny", "name of a variant, or convit for one described by the keys below")
    num_classes: int | None = key(
        None, "size of the head; null: the data's. A smaller number keeps the first classes (FAIR's option)", low=1
    )
    in_channels: int = key(3, "channels of the input", low=1)
    patch_size: int | None = key(None, "side of a patch, pixels", low=1)
    embed_dim: int | None = key(None, "width, all heads together", low=1)
    depth: int | None = key(None, "number of blocks", low=1)
    num_heads: int | None = key(None, "number of heads", low=1)
    local_up_to_layer: int | None = key(None, "number of GPSA blocks; the class token joins after them", low=0)
    locality_strength: float | None = key(None, "sharpness of the initial positional attention")
    drop_rate: float = key(0.0, "dropout before the head", low=0.0, high=0.99)
    drop_path_rate: float = key(0.1, "stochastic depth (0.1 is the default of MindCV's ConViT models)", low=0.0, high=0.99)
    pretrained: bool = key(False, "start from the published weights")
    ckpt_path: str = key("", "start from, or evaluate, this checkpoint")

    # run
    epoch_size: int = key(90, "number of epochs", low=1)
    ckpt_save_dir: str = key("./ckpt", "folder of the run, as --output")
    ckpt_save_interval: int = key(1, "epochs between two kept checkpoints", low=1)
    ckpt_save_steps: int = key(1000, "optimiser steps between two writes of last.* inside an epoch (0: only at its end)", low=0)
    ckpt_save_policy: str | None = key("latest_k", "which checkpoints to keep; null: all", choices=("latest_k", "top_k", None))
    keep_checkpoint_max: int = key(10, "how many to keep beside last and best", low=0)
    val_while_train: bool = key(True, "validate while training; best.* needs it (MindCV's default is False)")
    early_stop: int | None = key(None, "stop after so many epochs without a better top-1", low=1)
    val_interval: int = key(1, "epochs between two validations", low=1)
    dataset_sink_mode: bool = key(True, "MindSpore: feed the device a whole epoch at a time")

    # precision and speed
    amp_level: str = key("O0", "O0: float32; O1 to O3: mixed precision", choices=("O0", "O1", "O2", "O3"))
    amp_dtype: str = key(
        "auto", "PyTorch's mixed precision type; auto: bfloat16, or float16 with a gradient scaler where the GPU lacks it, and none on CPU",
        choices=("auto", "bfloat16", "float16"),
    )  # fmt: skip
    val_amp_level: str | None = key(
        None, "amp_level of convit validate; null: as amp_level (MindCV's default is O0)", choices=("O0", "O1", "O2", "O3", None)
    )
    amp_cast_list: str | None = key(None, "MindSpore: cells that O1 casts to float16, or O2 does not, as in [nn.Dense, nn.Conv2d]")
    loss_scale: float = key(1.0, "float16: (first) loss scale", low=1.0)
    loss_scale_type: str = key(
        "fixed", "MindSpore: fixed; dynamic: halved by an overflow (PyTorch's always is); auto: dynamic from 2^24 with O2, else none",
        choices=("fixed", "dynamic", "auto"),
    )  # fmt: skip
    gradient_accumulation_steps: int = key(1, "forward passes per optimiser step", low=1)
    clip_grad: bool = key(False, "clip the norm of the gradient")
    clip_value: float = key(15.0, "largest norm of the gradient", low=0.0)
    grad_checkpointing: bool = key(False, "recompute activations in the backward pass: less memory, more time")
    channels_last: bool = key(False, "channels-last memory format")
    compile: bool = key(False, "torch.compile the model")
    fsdp: bool = key(False, "shard the model over the processes (FSDP2) in place of replicating it")
    max_skipped_steps: int = key(10, "steps in a row that a NaN or infinite loss or gradient may skip before the run stops", low=0)

    # loss
    loss: str = key("CE", "CE: cross entropy; BCE: binary cross entropy per class", choices=("CE", "BCE"))
    label_smoothing: float = key(0.0, "label smoothing", low=0.0, high=0.99)

    # learning rate
    scheduler: str = key(
        "cosine_decay", "learning-rate schedule",
        choices=(
            *("constant", "cosine_decay", "warmup_cosine_decay", "step_decay"),
            *("multi_step_decay", "exponential_decay", "polynomial_decay", "one_cycle", "cyclic"),
        ),
    )  # fmt: skip
    lr: float = key(0.001, "learning rate", low=0.0)
    scale_lr: bool = key(False, "multiply lr by the global batch over scale_lr_batch")
    scale_lr_batch: int = key(512, "global batch that lr is meant for if scale_lr is set (FAIR's 512)", low=1)
    min_lr: float = key(1e-6, "final learning rate", low=0.0)
    warmup_epochs: int = key(3, "epochs of linear warm-up", low=0)
    warmup_factor: float = key(0.0, "warm-up starts at this share of lr", low=0.0, high=1.0)
    warmup_lr: float | None = key(None, "warm-up starts at this rate, whatever lr is (timm, FAIR); null: at warmup_factor", low=0.0)
    warmup_prefix: bool = key(True, "the decay starts after the warm-up (MindCV); false: the warm-up hides its start (timm, FAIR)")
    decay_epochs: int = key(100, "epochs of a cosine, or between two steps of step_decay", low=1)
    decay_rate: float = key(0.9, "factor of step, multi-step and (every epoch) exponential decay; power of polynomial decay")
    multi_step_decay_milestones: list[int] = key([30, 60, 90], "epochs of multi_step_decay, counted as warmup_prefix says")
    lr_epoch_stair: bool = key(False, "change the learning rate once per epoch in place of every step")
    num_cycles: int = key(1, "cycles of the cosine, or of cyclic", low=1)
    cycle_decay: float = key(1.0, "factor of lr from one cycle to the next")

    # optimiser
    opt: str = key("adam", "optimiser", choices=("sgd", "momentum", "adam", "adamw", "lion", "rmsprop", "adagrad", "lamb", "nadam"))
    momentum: float = key(0.9, "of sgd, momentum and rmsprop", low=0.0, high=1.0)
    weight_decay: float = key(1e-6, "weight decay", low=0.0)
    use_nesterov: bool = key(False, "Nesterov momentum")
    weight_decay_filter: str = key(
        "disable", "what has no weight decay. disable: nothing; auto: norms; norm_and_bias: these and biases; "
        "timm: all vectors, position embedding and class token",
        choices=("disable", "auto", "norm_and_bias", "timm"),
    )  # fmt: skip
    layer_decay: float | None = key(None, "factor of the learning rate per block, from the head down", low=0.0, high=1.0)
    eps: float = key(1e-8, "of adaptive optimisers (MindCV's default is 1e-10)", low=0.0)
    ema: bool = key(False, "keep and evaluate an exponential moving average of the weights")
    ema_decay: float = key(0.9999, "of the moving average", low=0.0, high=1.0)
    ema_warmup: bool = key(True, "the average follows the weights closely at first (MindCV); false: ema_decay from the start (timm)")


# other names of keys: the key, and how its value follows
ALIASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "device_target": ("device", str),
    "filter_bias_and_bn": ("weight_decay_filter", lambda value: "norm_and_bias" if parse_bool(value) else "disable"),  # MindCV to 0.2
    "dynamic_loss_scale": ("loss_scale_type", lambda value: "dynamic" if parse_bool(value) else "fixed"),
}
DEVICES = {"gpu": "cuda", "ascend": "npu"}

# MindCV keys that change nothing here, whatever they say
MOOT = {
    "drop_overflow_update": "a step whose gradient is not finite is always skipped",
    "eval_shuffle": "the order of validation images does not change their scores",
}

# MindCV keys that mean nothing here, with the only value that can be honoured: any other is an error, never a silent no.
INERT = {
    "aux_factor": (0.0, "ConViT has no auxiliary head"),
    "reduction": ("mean", "the loss is averaged over the global batch"),
    "dataset_download": (False, "data sets are not downloaded"),
    "resume_opt": (False, "--resume restores the optimiser with everything else"),
    "aug_splits": (0, "an image is not given three times; auto_augment augmix mixes its augmented views into one"),
    "enable_modelarts": (False, "ModelArts storage is not supported"),
}

# recipe keys that may differ when a run is resumed without changing what it computes
FREE = {
    "num_parallel_workers",
    "log_interval",
    "data_dir",
    "ckpt_save_dir",
    "ckpt_save_steps",
    "ckpt_save_interval",
    "tensorboard",
    "wandb",
    "device",
}

FIELDS = {f.name: f for f in dataclasses.fields(Recipe)}
_TYPES = get_type_hints(Recipe)


def packaged_recipes() -> list[str]:
    """Names that ``--config NAME`` takes."""
    return sorted(f.name[:-5] for f in resources.files("convit.engine.recipes").iterdir() if f.name.endswith(".yaml"))


def load_recipe(config: str | os.PathLike[str] | None = None, overrides: dict[str, Any] | None = None) -> Recipe:
    """A checked recipe.

    Args:
        config: Name of a packaged recipe or path of a yaml file; ``None``: the defaults alone.
        overrides: Keys that take precedence over the file; strings are parsed as on the command line.

    Raises:
        ValueError: Unknown recipe or key (the nearest is named), or a value that its key does not take.
        FileNotFoundError: A path to no file.
    """
    values = {} if config is None else _read(config)
    return recipe_from(values | (overrides or {}), source=str(config or "the recipe"))


def recipe_from(values: dict[str, Any], source: str = "the recipe") -> Recipe:
    """The recipe that ``values`` over the defaults make; raises ``ValueError`` as ``load_recipe`` does."""
    model = values.get("model", "convit")
    if model not in ("convit", *VARIANTS):  # the one thing to say of another model's recipe, whatever else it holds
        raise ValueError(
            f"{source}: model {shown(model)} is no ConViT{nearest(str(model), VARIANTS)} (known: {', '.join(VARIANTS)}, convit)"
        )
    known: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise ValueError(f"{source}: a key must be a name, got {shown(name)}")
        if name in MOOT:
            continue
        if name in INERT:
            only, why = INERT[name]
            if str(value).lower() != str(only).lower() and value != only:
                raise ValueError(f"{source}: {name} can only be {only!r}, got {shown(value)}: {why}")
            continue
        if name in ("drop_rate", "drop_path_rate") and value is None:
            continue  # the model's default, as in MindCV
        try:
            if name in ALIASES:
                name, follow = ALIASES[name]
                value = follow(value)
            if name not in FIELDS:
                raise KeyError
            known[name] = _spelt(name, _coerce(_TYPES[name], value))
        except KeyError:
            raise ValueError(f"{source}: unknown key {shown(name)}{nearest(name, [*FIELDS, *ALIASES])}") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source}: {name}: {error}") from None
        _check_value(source, name, known[name])
    recipe = Recipe(**known)
    _check_together(source, recipe)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as yaml, every key in the order of ``Recipe``; ``load_recipe`` reads it back equal."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, default_flow_style=None)


def changed_keys(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys that differ: name -> (old, new)."""
    return {name: (getattr(old, name), getattr(new, name)) for name in FIELDS if getattr(old, name) != getattr(new, name)}


class _HelpAll(argparse.Action):
    """Print the help with the options that ``--help`` leaves out."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for action in parser._actions:
            action.help = getattr(action, "full_help", action.help)
        parser.print_help()
        parser.exit()


def add_recipe_arguments(parser: argparse.ArgumentParser, own: Collection[str]) -> None:
    """``-c/--config``, ``--print-config`` and one ``--key`` per recipe key (dashes work as well as underscores).

    ``own`` are the keys that ``--help`` shows; the others come with ``--help-all``.
    """
    parser.add_argument("-c", "--config", metavar="RECIPE", help=f"packaged recipe or yaml file ({', '.join(packaged_recipes())})")
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe as yaml and stop")
    parser.add_argument("--help-all", action=_HelpAll, nargs=0, help="show all keys of the recipe, and exit")
    group = parser.add_argument_group("recipe keys, overriding the recipe [value where a recipe sets none]")
    for name, f in FIELDS.items():
        flags = list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))
        more: dict[str, Any] = {"nargs": "?", "const": "true"} if _kinds(_TYPES[name])[0] is bool else {}
        default = "" if dataclasses.MISSING in (f.default,) or f.default in ("", None) else f" [{f.default}]"
        choices = f" ({', '.join(map(str, f.metadata['choices']))})" if f.metadata["choices"] else ""
        help = (f.metadata["help"] + choices + default).replace("%", "%%")
        action = group.add_argument(*flags, dest=f"key_{name}", metavar="X", default=None, help=help, **more)
        if name not in own:
            action.full_help, action.help = help, argparse.SUPPRESS  # type: ignore[attr-defined]
    for name in ALIASES:
        group.add_argument(f"--{name}", dest=f"key_{name}", default=None, help=argparse.SUPPRESS)


def recipe_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe keys that were given on the command line."""
    return {name: value for name in (*FIELDS, *ALIASES) if (value := getattr(args, f"key_{name}", None)) is not None}


def _read(config: str | os.PathLike[str]) -> dict[str, Any]:
    name = os.fspath(config)
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or os.sep in name or path.is_file():
        text = read_text(path, MAX_RECIPE)
    elif name in packaged_recipes():
        text = (resources.files("convit.engine.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise ValueError(f"unknown recipe {name!r}{nearest(name, packaged_recipes())} (packaged: {', '.join(packaged_recipes())})")
    return read_mapping(name, text, {alias: follow[0] for alias, follow in ALIASES.items()})


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


def _coerce(annotation: Any, value: Any) -> Any:
    """``value``, from yaml or the command line, in the type of ``annotation``."""
    kinds = _kinds(annotation)
    if NoneType in kinds and (value is None or str(value).strip().lower() in ("null", "none", "~")):
        return None
    if value is None:
        raise ValueError("must have a value, got null")
    for kind in kinds:
        if get_origin(kind) is list and (isinstance(value, (list, tuple)) or (isinstance(value, str) and value.strip()[:1] in ("[", "("))):
            return _list(get_args(kind)[0], value)
    kind = kinds[0]
    if get_origin(kind) is list:
        return _list(get_args(kind)[0], value)
    return _scalar(kind, value)


def _list(kind: type, value: Any) -> list[Any]:
    if isinstance(value, str):
        value = [part for part in value.strip().strip("[]()").split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected a list, got {shown(value)}")
    return [_scalar(kind, item) for item in value]


def _scalar(kind: type, value: Any) -> Any:
    if kind is bool:
        return parse_bool(value)
    if kind is str:
        if isinstance(value, (bool, float, list, dict, set, bytes)):  # yaml's no, 1.10, [a]: what was written cannot be told
            raise ValueError(f"expected a text, got {shown(value)}: put it in quotes")
        return str(value)
    if isinstance(value, (bool, list, dict)):
        raise ValueError(f"expected {kind.__name__}, got {shown(value)}")
    try:
        number = float(value)  # yaml reads 1e-4, without a dot, as text
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"expected {kind.__name__}, got {shown(value)}") from None
    if kind is not int and math.isfinite(number):
        return number
    if kind is not int:
        raise ValueError(f"expected a finite number, got {shown(value)}")
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"expected a whole number, got {shown(value)}")
    try:
        whole = int(value)  # exact, where a float is not
    except ValueError:
        whole = int(number)
    if abs(whole) >= 1 << 63:
        raise ValueError(f"expected a whole number below 2^63, got {shown(value)}")
    return whole


def _spelt(name: str, value: Any) -> Any:
    """``value`` in the spelling of its choices, whose case does not matter."""
    if name == "device":
        return DEVICES.get(value.lower(), value.lower())
    return next((one for one in FIELDS[name].metadata["choices"] if str(one).lower() == str(value).lower()), value)


def _check_value(source: str, name: str, value: Any) -> None:
    about = FIELDS[name].metadata
    if about["choices"] and value not in about["choices"]:
        hint = nearest(str(value), map(str, about["choices"]))
        raise ValueError(f"{source}: {name} must be one of {', '.join(map(repr, about['choices']))}, got {shown(value)}{hint}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if about["low"] is not None and not value >= about["low"]:
            raise ValueError(f"{source}: {name} must be at least {about['low']}, got {value}")
        if about["high"] is not None and not value <= about["high"]:
            raise ValueError(f"{source}: {name} must be at most {about['high']}, got {value}")


def _check_together(source: str, recipe: Recipe) -> None:
    for name in ("scale", "ratio", "re_scale", "re_ratio"):
        pair = getattr(recipe, name)
        if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
            raise ValueError(f"{source}: {name} must be a range [low, high] with 0 < low <= high, got {shown(pair)}")
    for name in ("mean", "std"):
        if len(getattr(recipe, name)) != recipe.in_channels:
            raise ValueError(
                f"{source}: {name} needs one value per input channel ({recipe.in_channels}), got {shown(getattr(recipe, name))}"
            )
    if min(recipe.std) <= 0:
        raise ValueError(f"{source}: std must be positive, got {shown(recipe.std)}")
    policy, *sections = (recipe.auto_augment or "").split("-")
    for section in sections:  # timm and MindCV pass over what has no number, but for timm's names of sets, as tweights
        if not re.fullmatch(r"[a-z]+[0-9.]+" + r"|t\w+" * policy.startswith("rand"), section):
            raise ValueError(f"{source}: auto_augment {shown(recipe.auto_augment)}: {section!r} is no name with a number, as mstd0.5 is")
    if (recipe.mixup or recipe.cutmix) and recipe.batch_size % 2:
        raise ValueError(f"{source}: batch_size must be even with mixup or cutmix, got {recipe.batch_size}")
    if recipe.early_stop and not recipe.val_while_train:
        raise ValueError(f"{source}: early_stop needs val_while_train")
    if recipe.class_balanced and recipe.aug_repeats > 1:
        raise ValueError(f"{source}: class_balanced is not supported with aug_repeats; set one of them to 0")
    if recipe.ckpt_save_policy == "top_k" and not recipe.val_while_train:
        raise ValueError(f"{source}: ckpt_save_policy top_k needs val_while_train")
    if recipe.scheduler in ("one_cycle", "cyclic") and (recipe.warmup_epochs or recipe.lr_epoch_stair):
        raise ValueError(f"{source}: scheduler {recipe.scheduler} needs warmup_epochs 0 and lr_epoch_stair false: it warms up itself")
    if recipe.framework == "pytorch" and recipe.re_max_attempts != 10:
        raise ValueError(f"{source}: re_max_attempts can only be 10 with framework pytorch (timm's), got {recipe.re_max_attempts}")
    if recipe.amp_cast_list is not None:
        if recipe.framework == "pytorch":
            raise ValueError(f"{source}: amp_cast_list names cells of MindSpore, and autocast chooses by itself: framework mindspore")
        if not re.fullmatch(r"\s*\[?\s*nn\.\w+\s*(,\s*nn\.\w+\s*)*,?\s*\]?\s*", recipe.amp_cast_list):
            raise ValueError(
                f"{source}: amp_cast_list must be a list of cells such as [nn.Dense, nn.Conv2d], got {shown(recipe.amp_cast_list)}"
            )
    if recipe.fsdp and recipe.ema:
        raise ValueError(f"{source}: ema is not supported with fsdp; set one of them to false")
    if recipe.fsdp and recipe.amp_dtype == "float16":
        raise ValueError(f"{source}: amp_dtype float16 is not supported with fsdp; use bfloat16")
