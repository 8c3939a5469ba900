"""``convit validate``: top-1, top-5, loss and speed of a checkpoint on a validation set."""

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convit.engine.fit import most_workers
from convit.engine.recipe import Recipe, add_recipe_arguments, dump_recipe, load_recipe, recipe_from, recipe_overrides
from convit.engine.trained import find_trained, weights_at
from convit.engine.world import find_world
from convit.weights.published import variants

# recipe keys that evaluation asks about
EVALUATION = ("framework", "device", "ckpt_path", "pretrained", "model", "num_classes", "image_resize", "crop_pct", "interpolation")

# recipe keys of the model's shape; without them a variant has its own
SHAPE = ("patch_size", "embed_dim", "depth", "num_heads", "local_up_to_layer", "locality_strength")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  convit validate RUN                                          a run, on the data that it was trained with
  convit validate weights.safetensors --data_dir IMAGENET --json"""
    parser.add_argument("place", nargs="?", metavar="CHECKPOINT", help="a run's folder or any checkpoint; the same as --ckpt_path")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    add_precision(parser)
    add_recipe_arguments(parser, {*EVALUATION, "data_dir", "dataset", "val_split", "batch_size", "num_parallel_workers", "amp_level"})


def run(args: argparse.Namespace) -> int | None:
    recipe = evaluation_recipe(args)
    if args.print_config:
        print(dump_recipe(recipe) if find_world().rank == 0 else "", end="")
        return None
    options = precision(args, recipe)
    result = engine(recipe.framework, "validate").validate(recipe, progress=not args.quiet and sys.stderr.isatty(), **options)
    if find_world().rank:
        return None
    if args.json:
        print(json.dumps(result))
        return None
    print(f"{result['model']}, {result['checkpoint'] or 'untrained weights'}, {result['samples']} images")
    print(
        f"top-1 {result['top1']:.3f} %   top-5 {result['top5']:.3f} %   "
        f"loss {result['loss']:.5f}   {result['images_per_second']:.1f} images/s"
        + (f", {result['precision']}" if "precision" in result else "")
    )
    if result["bad_images"]:
        print(f"left out {len(result['bad_images'])} unreadable images: {', '.join(result['bad_images'][:10])}", file=sys.stderr)
    return None


def add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of convit.optimize, through which PyTorch models run on CPU; auto: bfloat16 where the chip multiplies it, but float32 with "
        "--amp_level O0 [auto]",
    )


def precision(args: argparse.Namespace, recipe: Recipe) -> dict[str, str]:
    """The argument of the engines that have one. An ``amp_level`` O0 of the command line, as against a recipe's, asks for float32."""
    if recipe.framework == "pytorch":
        if not any(getattr(recipe, name) == "O0" for name in ("amp_level", "val_amp_level") if name in recipe_overrides(args)):
            return {"precision": args.precision}
        if args.precision == "bfloat16":
            raise ValueError("--precision bfloat16 and --amp_level O0 (float32) contradict one another: leave one out")
        return {"precision": "float32"}
    if args.precision != "auto":
        raise ValueError(f"--precision is of PyTorch on CPU, the framework is {recipe.framework}")
    return {}


def engine(framework: str, module: str) -> Any:
    """The module of that name of a framework's engine."""
    return importlib.import_module(f"convit.engine.{framework}.{module}")


def evaluation_recipe(args: argparse.Namespace) -> Recipe:
    """Of ``--config``; without one, what the checkpoint says; without either, of the model, with convit_tiny as the default."""
    overrides = recipe_overrides(args)
    place = getattr(args, "place", None)
    if place and overrides.get("ckpt_path") not in (None, place):
        raise ValueError(f"{place} and --ckpt_path {overrides['ckpt_path']} name two checkpoints")
    place = place or overrides.get("ckpt_path")
    if not place:
        return as_published(load_recipe(args.config or overrides.get("model", "convit_tiny"), overrides), overrides)
    overrides["ckpt_path"] = str(weights_at(Path(place)))
    if args.config is not None:
        return load_recipe(args.config, overrides)
    found = find_trained(place, engine(overrides.get("framework", "pytorch"), "checkpoint").facts_of)
    own = {"num_parallel_workers": most_workers(), **found.recipe()}
    return recipe_from({**own, "pretrained": False, **overrides}, source=str(place))


def as_published(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """With published weights, their shape and the image size, crop, interpolation, mean and std that they were published with, but for keys
    that are ``given``."""
    if not recipe.pretrained or recipe.in_channels != 3 or recipe.model not in variants():
        return recipe
    own: dict[str, Any] = {"crop_pct": 0.875, "interpolation": "bicubic", "mean": Recipe().mean, "std": Recipe().std}
    if recipe.framework == "mindspore" or recipe.model not in variants("timm"):  # MindCV's weights
        published = load_recipe(recipe.model)
        own = {name: getattr(published, name) for name in own}
    own |= {"image_resize": Recipe().image_resize} | dict.fromkeys(SHAPE)
    return dataclasses.replace(recipe, **{name: value for name, value in own.items() if name not in given})
