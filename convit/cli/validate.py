"""``convit validate``: top-1, top-5, loss and speed of a checkpoint on a validation set."""

import argparse
import importlib
import json
import sys
from typing import Any

from convit.engine.recipe import Recipe, add_recipe_arguments, dump_recipe, load_recipe, recipe_from, recipe_overrides
from convit.engine.world import find_world


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int | None:
    recipe = evaluation_recipe(args)
    if args.print_config:
        print(dump_recipe(recipe), end="")
        return None
    result = engine(recipe.framework, "validate").validate(recipe, progress=not args.quiet and sys.stderr.isatty())
    if find_world().rank:
        return None
    if args.json:
        print(json.dumps(result))
        return None
    print(f"{result['model']}, {result['checkpoint'] or 'untrained weights'}, {result['samples']} images")
    print(
        f"top-1 {result['top1']:.3f} %   top-5 {result['top5']:.3f} %   "
        f"loss {result['loss']:.5f}   {result['images_per_second']:.1f} images/s"
    )
    if result["bad_images"]:
        print(f"left out {len(result['bad_images'])} unreadable images: {', '.join(result['bad_images'][:10])}", file=sys.stderr)
    return None


def engine(framework: str, module: str) -> Any:
    """The module of that name of a framework's engine."""
    return importlib.import_module(f"convit.engine.{framework}.{module}")


def evaluation_recipe(args: argparse.Namespace) -> Recipe:
    """Of ``--config``; without one, of the run that wrote the checkpoint; else of the model, with convit_tiny as the default."""
    overrides = recipe_overrides(args)
    path = overrides.get("ckpt_path")
    if args.config is None and path:
        facts = engine(overrides.get("framework", "pytorch"), "checkpoint").facts_of(path)
        if facts:
            return recipe_from({**facts["recipe"], "pretrained": False, **overrides}, source=path)
    return load_recipe(args.config or overrides.get("model", "convit_tiny"), overrides)
