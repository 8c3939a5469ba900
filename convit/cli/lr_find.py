"""``convit lr-find``: the learning-rate range test of a recipe, with its plot."""

import argparse
import json
from pathlib import Path

from convit import figures
from convit.cli import train
from convit.engine.recipe import add_recipe_arguments, dump_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  convit lr-find --data_dir PICS                               of the recipe that convit train takes for these pictures
  convit lr-find -c convit_tiny --data_dir IMAGENET --low 1e-5"""
    test = parser.add_argument_group("range test")
    test.add_argument("--low", type=float, default=1e-6, metavar="X", help="first learning rate [1e-6]")
    test.add_argument("--high", type=float, default=1.0, metavar="X", help="last learning rate, if the loss does not diverge before [1]")
    test.add_argument("--steps", type=int, default=100, metavar="N", help="optimiser steps between the two [100]")
    test.add_argument("-o", "--output", type=Path, default=Path("lr_find.png"), metavar="FILE", help="the picture [lr_find.png]")
    test.add_argument("--json", action="store_true", help="print rates and losses as one JSON object")
    add_recipe_arguments(parser, {"framework", "device", "data_dir", "model", "batch_size", "opt", "pretrained", "ckpt_path"})


def run(args: argparse.Namespace) -> None:
    recipe, _ = train.chosen_recipe(args, None, None)
    if args.print_config:
        print(dump_recipe(recipe), end="")
        return
    if recipe.framework != "pytorch":
        raise ValueError(f"the range test is of PyTorch, the framework is {recipe.framework}")
    if args.output.suffix not in figures.SUFFIXES:
        raise ValueError(f"--output {args.output} must be a picture: {', '.join(figures.SUFFIXES)}")
    from convit.engine.pytorch.range_test import lr_find

    found = lr_find(recipe, args.low, args.high, args.steps)
    if len(found.rates) < 2:
        raise ValueError(f"the loss is no number within {len(found.rates) + 1} steps from --low {args.low:g}: start lower")
    picture = figures.plot_range_test(found.rates, found.losses, found.smoothed, found.steepest, args.output)
    if args.json:
        print(json.dumps(found._asdict() | {"picture": str(picture)}))
        return
    ended = f"{len(found.rates)} steps, learning rates {found.rates[0]:g} to {found.rates[-1]:g}; {picture}"
    if found.steepest is None:
        print(f"{ended}\nthe loss does not fall anywhere: other rates (--low, --high), more --steps")
    else:
        print(f"{ended}\nthe loss falls fastest at {found.steepest:.2g}: --lr {found.steepest / found.scale:.2g}")
