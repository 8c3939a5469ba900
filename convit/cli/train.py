"""``convit train``: a recipe, a folder for the run, and an engine."""

import argparse
import logging
import sys
from pathlib import Path

from convit.cli.validate import engine
from convit.engine.recipe import Recipe, add_recipe_arguments, dump_recipe, load_recipe, recipe_from, recipe_overrides
from convit.engine.run import Interrupted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    run.add_argument(
        "--output", metavar="RUN", help="folder of the run: last.*, best.*, log.jsonl, recipe.yaml [the recipe's ckpt_save_dir]"
    )
    run.add_argument(
        "--resume", metavar="RUN", nargs="?", const="", help="continue the run in RUN (or in --output); start it if there is none"
    )
    run.add_argument("--overwrite", action="store_true", help="start over in a folder that holds a run")
    run.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no messages")
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int | None:
    recipe = _recipe(args)
    if args.print_config:
        print(dump_recipe(recipe), end="")
        return None
    _show_messages(args.quiet)
    try:
        result = engine(recipe.framework, "train").train(
            recipe, recipe.ckpt_save_dir, resume=args.resume is not None, overwrite=args.overwrite, progress=not args.quiet
        )
    except Interrupted as stopped:
        print(f"convit train: {stopped}", file=sys.stderr)
        return 128 + stopped.signum
    except FloatingPointError as error:
        print(f"convit train: {error}", file=sys.stderr)
        return 1
    if not args.quiet:
        scores = f": training loss {result.train_loss:.4f}"
        if result.best_epoch >= 0:
            best = f"best top-1 {result.best_top1:.2f} % (epoch {result.best_epoch + 1})"
            scores = f": top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %; {best}"
        print(
            f"{result.epochs} epochs in {result.seconds:.0f} s{scores}; {result.output}",
            file=sys.stderr,
        )
    return None


def _recipe(args: argparse.Namespace) -> Recipe:
    """Of ``--config``; without one, of the run to resume; without either, the digits."""
    overrides = recipe_overrides(args)
    if args.resume and args.output and Path(args.resume) != Path(args.output):
        raise ValueError(f"--resume {args.resume} and --output {args.output} name two runs")
    output = args.resume or args.output or overrides.get("ckpt_save_dir")
    config = args.config
    if config is None:
        folder = Path(output) if output and args.resume is not None else None
        states = {kind: folder / f"last.{suffix}" for kind, suffix in (("pytorch", "pth"), ("mindspore", "ckpt"))} if folder else {}
        if folder and (folder / "recipe.yaml").exists():
            config = folder / "recipe.yaml"
        elif found := next((kind for kind, last in states.items() if last.exists()), None):
            facts = engine(found, "checkpoint").facts_of(str(states[found]))
            return recipe_from({**facts.get("recipe", {}), **overrides, "ckpt_save_dir": output}, source=str(states[found]))
        else:
            config = "digits"
    return load_recipe(config, overrides | ({"ckpt_save_dir": output} if output else {}))


def _show_messages(quiet: bool) -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("convit").setLevel(logging.WARNING if quiet else logging.INFO)
