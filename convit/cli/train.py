"""``convit train``: a recipe, a folder for the run, and an engine."""

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

from convit.cli.validate import engine
from convit.engine.fit import fit
from convit.engine.recipe import Recipe, add_recipe_arguments, dump_recipe, load_recipe, recipe_from, recipe_overrides
from convit.engine.run import Interrupted
from convit.engine.trained import find_trained, weights_at
from convit.engine.world import find_world

# recipe keys that finetune takes from its checkpoint
OF_THE_WEIGHTS = (
    "model",
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "local_up_to_layer",
    "in_channels",
    "image_resize",
    "mean",
    "std",
)


# recipe keys that --help shows: what a run is about; how it is done comes with --help-all
COMMON = {
    *("framework", "device", "seed", "num_parallel_workers", "data_dir", "val_share", "batch_size", "image_resize"),
    *("model", "num_classes", "local_up_to_layer", "locality_strength", "pretrained", "ckpt_path"),
    *("epoch_size", "lr", "opt", "weight_decay", "amp_level", "mixup", "ema"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  convit train --data_dir PICS                                 your own pictures, a folder per class
  convit train --data_dir PICS --pretrained                    the same from published weights
  torchrun --nproc-per-node 8 -m convit train -c convit_tiny --data_dir IMAGENET"""
    run = parser.add_argument_group("run")
    run.add_argument(
        "--output", metavar="RUN", help="folder of the run: last.*, best.*, log.jsonl, recipe.yaml [the recipe's ckpt_save_dir]"
    )
    run.add_argument(
        "--resume", metavar="RUN", nargs="?", const="", help="continue the run in RUN (or in --output); start it if there is none"
    )
    run.add_argument("--overwrite", action="store_true", help="start over in a folder that holds a run")
    run.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no messages")
    add_recipe_arguments(parser, COMMON)


def run(args: argparse.Namespace) -> int | None:
    if args.resume and args.output and Path(args.resume) != Path(args.output):
        raise ValueError(f"--resume {args.resume} and --output {args.output} name two runs")
    recipe, about = chosen_recipe(args, args.output, args.resume)
    first = find_world().rank == 0
    if args.print_config:
        print(dump_recipe(recipe) if first else "", end="")
        return None
    _show_messages(args.quiet)
    if about and first:
        logging.getLogger("convit").info(about)
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
    if first and not args.quiet:
        scores = f": training loss {result.train_loss:.4f}"
        if result.best_epoch >= 0:
            best = f"best top-1 {result.best_top1:.2f} % (epoch {result.best_epoch + 1})"
            scores = f": top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %; {best}"
        print(f"{result.epochs} epochs in {result.seconds:.0f} s{scores}; {result.output}", file=sys.stderr)
    return None


def chosen_recipe(args: argparse.Namespace, output: str | None, resume: str | None) -> tuple[Recipe, str]:
    """Of ``--config``; without one, of the run to resume; else, for pictures, finetune if there are weights and small if not; else the
    digits. A new run on pictures is fitted to them, and the second part says how.
    """
    overrides = recipe_overrides(args)
    output = resume or output or overrides.get("ckpt_save_dir")
    config = args.config
    if config is None:
        folder = Path(output) if output and resume is not None else None
        states = {kind: folder / f"last.{suffix}" for kind, suffix in (("pytorch", "pth"), ("mindspore", "ckpt"))} if folder else {}
        if folder and (folder / "recipe.yaml").exists():
            return load_recipe(folder / "recipe.yaml", overrides | {"ckpt_save_dir": output}), ""
        if found := next((kind for kind, last in states.items() if last.exists()), None):
            facts = engine(found, "checkpoint").facts_of(str(states[found]))
            return recipe_from({**facts.get("recipe", {}), **overrides, "ckpt_save_dir": output}, source=str(states[found])), ""
    own = config is None and bool(overrides.get("data_dir"))
    if own:
        config = "finetune" if overrides.get("ckpt_path") or overrides.get("pretrained", "false") != "false" else "small"
        output = output or f"runs/{Path(overrides['data_dir']).resolve().name}"
    keys = overrides | ({"ckpt_save_dir": output} if output else {})
    if config == "finetune" and overrides.get("ckpt_path"):
        trained = find_trained(overrides["ckpt_path"], engine(overrides.get("framework", "pytorch"), "checkpoint").facts_of)
        keys = {name: value for name, value in trained.recipe().items() if name in OF_THE_WEIGHTS} | keys
    recipe = load_recipe(config or "digits", keys)
    if recipe.ckpt_path:
        recipe = replace(recipe, ckpt_path=str(weights_at(Path(recipe.ckpt_path))))
    if config == "finetune" and not (recipe.ckpt_path or recipe.pretrained):
        raise ValueError("finetune starts from weights: --pretrained for the published ones, or --ckpt_path RUN or FILE")
    if recipe.dataset == "digits":
        return recipe, ""
    return fit(recipe, overrides, find_world().size, free=own and config == "small")


class _Messages(logging.Handler):
    """To what is sys.stderr now: a progress bar puts its own there, so that a message does not land in the bar's line."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _show_messages(quiet: bool) -> None:
    logging.basicConfig(format="%(message)s", handlers=[_Messages()])
    logging.getLogger("convit").setLevel(logging.WARNING if quiet else logging.INFO)
