"""What is known of a trained model, from wherever it lies: a run's folder, a folder of the Hub, any checkpoint. Imports no framework."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from convit.architecture import VARIANTS
from convit.engine.preparation import Preparation
from convit.engine.recipe import FIELDS, Recipe, load_recipe, recipe_from
from convit.weights.files import BadFile, parse_json, read_text, shown
from convit.weights.load import Checkpoint, read

MAX_CONFIG = 16 << 20  # bytes of a config.json; it may hold the names of all classes
# what a folder may hold, the best first: of runs of either framework, then of the Hub
WEIGHTS = ("best.pth", "last.pth", "best.ckpt", "last.ckpt", "model.safetensors", "pytorch_model.bin")


# dimensions of the tensors that tell the shape of a model
_DIMS = {"patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2, "head.weight": 2, "pos_embed": 3, "reg_token": 3}
# what config.json may say, as far as it is asked here
_CONFIG: dict[str, tuple[type, ...]] = {
    **{name: (dict,) for name in ("shape", "pretrained_cfg", "label_descriptions", "results")},
    "label_names": (list, dict),
    "global_pool": (str,),
}


class Trained(NamedTuple):
    """A trained model before it is built.

    Attributes:
        path: The file of the weights.
        shape: Arguments of ``convit.ConViT``.
        variant: Its name, if it is one.
        preparation: How an image becomes its input.
        classes: What its outputs are called.
        results: Figures that were recorded with it, such as ``top1``.
        saved: The recipe of the run that wrote it; empty for other files.
    """

    path: Path
    shape: dict[str, Any]
    variant: str | None
    preparation: Preparation
    classes: list[str]
    results: dict[str, float]
    saved: dict[str, Any]

    def recipe(self) -> dict[str, Any]:
        """The keys of a recipe: those of the run that wrote it, or what shape and preparation say.

        Raises:
            ValueError: Recipes do not describe such a model.
        """
        keys = dict(self.saved)
        if not keys:
            asked, names = self.preparation._asdict(), ("embed_dim", "depth", "num_heads", "local_up_to_layer")
            keys = {name: asked[name] for name in ("crop_pct", "interpolation")} | {name: self.shape[name] for name in names}
            keys |= {"mean": list(asked["mean"]), "std": list(asked["std"]), "in_channels": self.shape["in_chans"]}
            keys |= {"patch_size": self.shape["patch_size"][0], "drop_path_rate": 0.0}
        height, width = self.preparation.size
        patch = self.shape["patch_size"]
        if height != width or patch[0] != patch[1]:
            takes = f"images of {height} x {width} in patches of {patch[0]} x {patch[1]}"
            raise ValueError(f"{self.path} takes {takes}: infer and validate want squares, serve and export do not")
        keys |= {"model": self.variant or "convit", "image_resize": height}
        return keys | {"num_classes": self.shape["num_classes"] or None}


def find_trained(place: str | Path, facts_of: Callable[[str], dict[str, Any]]) -> Trained:
    """What the files at ``place`` say.

    Args:
        place: A run's folder (of either framework), a folder with ``config.json`` (timm's or ours), or a checkpoint of any kind.
        facts_of: The engine's reader of what a run stored beside its weights.

    Raises:
        FileNotFoundError: There is no such file, or no weights in the folder.
        ValueError: The file is no checkpoint of a ConViT, or what it describes does not fit together.
    """
    path = weights_at(Path(place))
    checkpoint = read(path)
    try:
        return _described(path, checkpoint, facts_of(str(path)), _hub_config(path.parent))
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None


def _described(path: Path, checkpoint: Checkpoint, facts: dict[str, Any], config: dict[str, Any]) -> Trained:
    recipe = _recipe(path, facts)
    shape = shape_of(checkpoint, recipe.num_heads if recipe else (config.get("shape") or {}).get("num_heads"))
    if "img_size" not in shape and recipe is not None:
        shape["img_size"] = (recipe.image_resize, recipe.image_resize)
    if config.get("global_pool"):
        shape["global_pool"] = config["global_pool"]
    variant = variant_of(shape)
    if recipe is None and not config and checkpoint.source == "mindcv" and variant:
        recipe = load_recipe(variant)  # MindCV's own: its crops differ
    size = shape.get("img_size", (224, 224))
    if recipe is not None:
        preparation = Preparation.of_recipe(recipe)._replace(size=size)
    else:
        preparation = Preparation.of_config(config.get("pretrained_cfg") or {}, size, shape["in_chans"])
    recorded = _names(facts.get("classes") or config.get("label_names"), config)
    figures = facts or config.get("results") or {}
    results = {name: figures[name] for name in ("top1", "top5", "val_loss") if isinstance(figures.get(name), float)}
    saved = {name: value for name, value in vars(recipe).items() if name in FIELDS} if recipe is not None else {}
    return Trained(path, shape, variant, preparation, class_names(recorded, shape["num_classes"]), results, saved)


def weights_at(place: Path) -> Path:
    """The file of the weights: ``place`` itself, or the best that the folder holds."""
    if not place.is_dir():
        return place
    found = next((place / name for name in WEIGHTS if (place / name).exists()), None)
    if found is None:
        raise FileNotFoundError(f"{place} holds none of {', '.join(WEIGHTS)}: expected the folder of a run, or one of the Hub")
    return found


def shape_of(checkpoint: Checkpoint, num_heads: int | None = None) -> dict[str, Any]:
    """The arguments of ``convit.ConViT`` that these weights were made with, from their shapes.

    ``num_heads`` is asked where no GPSA block tells it, nor a variant of the same width.

    Raises:
        ValueError: The weights do not say it: GPSA blocks after MHSA ones, or an unknown number of heads or grid.
    """
    tensors = checkpoint.tensors
    for name, dims in _DIMS.items():
        if name in tensors and tensors[name].ndim != dims or name not in tensors and dims in (2, 4) and not name.startswith("head"):
            it = f"it has the shape {list(tensors[name].shape)}" if name in tensors else "it is missing"
            raise ValueError(f"{name} must have {dims} dimensions, {it}")
    blocks = {found[1] for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))}
    depth = len(blocks)  # not the largest number, which costs a file nothing
    if blocks != set(map(str, range(depth))):
        raise ValueError(f"blocks must be numbered from 0, the file has {', '.join(shown(one) for one in sorted(blocks)[:8])}")
    gates = [i for i in range(depth) if f"blocks.{i}.attn.gating_param" in tensors]
    if gates != list(range(len(gates))):
        raise ValueError(f"GPSA must come before MHSA, the file has it in blocks {gates}")
    dim, channels, height, width = tensors["patch_embed.proj.weight"].shape
    heads = tensors["blocks.0.attn.gating_param"].size if gates else num_heads
    heads = heads or next((shape["num_heads"] for shape in VARIANTS.values() if shape["embed_dim"] == dim), None)
    if not heads:
        raise ValueError("weights without GPSA blocks do not tell the number of heads: build the model and use load_checkpoint")
    if type(heads) is not int or heads < 1 or dim % heads:
        raise ValueError(f"the number of heads must divide the width {dim}, got {shown(heads)}")
    shape: dict[str, Any] = {
        "patch_size": (height, width),
        "in_chans": channels,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "local_up_to_layer": len(gates),
        "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "qkv_bias": any(name.endswith((".qk.bias", ".qkv.bias")) for name in tensors),
        "num_classes": tensors["head.weight"].shape[0] if "head.weight" in tensors else 0,
        "use_pos_embed": "pos_embed" in tensors,
    }
    if "reg_token" in tensors:
        shape["reg_tokens"] = tensors["reg_token"].shape[1]
    if checkpoint.grid:
        shape["img_size"] = (checkpoint.grid[0] * height, checkpoint.grid[1] * width)
    elif "pos_embed" in tensors:
        patches = tensors["pos_embed"].shape[1]
        side = round(patches**0.5)
        if side * side != patches:
            raise ValueError(f"a position embedding of {patches} patches does not tell their grid: build the model and use load_checkpoint")
        shape["img_size"] = (side * height, side * width)
    return shape


def variant_of(shape: dict[str, Any]) -> str | None:
    """The variant that a ConViT of this shape is, if it is one."""
    usual = shape["depth"] == 12 and shape["local_up_to_layer"] == 10 and tuple(shape["patch_size"]) == (16, 16)
    size = {"embed_dim": shape["embed_dim"], "num_heads": shape["num_heads"]}
    return next((name for name, each in VARIANTS.items() if each == size), None) if usual else None


def recorded_classes(path: str, facts_of: Callable[[str], dict[str, Any]], described: bool = False) -> list[str]:
    """The classes that the run which wrote ``path`` stored, or the ``config.json`` beside it; empty if there are none.

    ``described``: in the words that ``config.json`` has for them.
    """
    if not path:
        return []
    config = _hub_config(Path(path).parent)
    return _names(facts_of(path).get("classes") or config.get("label_names"), config if described else {})


def class_names(recorded: list[str], num_classes: int) -> list[str]:
    """Those that a checkpoint or data set gives; without any, ImageNet's for a head of 1000, if timm is there; numbers for the rest."""
    if not recorded and num_classes == 1000:
        try:
            from timm.data import ImageNetInfo
        except ImportError:
            pass
        else:
            info = ImageNetInfo()
            return [info.index_to_description(i) for i in range(1000)]
    return (recorded + [str(i) for i in range(len(recorded), num_classes)])[:num_classes]


def _recipe(path: Path, facts: dict[str, Any]) -> Recipe | None:
    if facts:
        return recipe_from(facts["recipe"], source=str(path))
    beside = path.with_name("recipe.yaml")
    return load_recipe(beside) if beside.exists() and re.fullmatch(r"(best|last|epoch_\d+)\..*", path.name) else None


def _names(recorded: Any, config: dict[str, Any]) -> list[str]:
    """Names of the classes as timm stores them: a list, or a mapping from numbers; with descriptions by name, or without."""
    if isinstance(recorded, dict):
        recorded = [recorded.get(str(i)) for i in range(len(recorded))]
    if not isinstance(recorded, (list, type(None))) or not all(isinstance(one, (str, int)) for one in recorded or []):
        raise ValueError(f"the classes must be a list of names, got {shown(recorded)}")
    described = config.get("label_descriptions") or {}
    return [str(described.get(name, name)) for name in recorded or []]


def _hub_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        return {}
    config = parse_json(path, read_text(path, MAX_CONFIG), "as JSON,")
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object, got {type(config).__name__}")
    for name, kinds in _CONFIG.items():
        if config.get(name) is not None and not isinstance(config[name], kinds):
            raise BadFile(path, f"must be {'a text' if str in kinds else 'an object or a list'}, got {shown(config[name])}", name)
    return config
