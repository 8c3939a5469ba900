"""``convit infer``: the most probable classes of images."""

import argparse
import json
import sys

from convit.cli.validate import EVALUATION, add_precision, engine, evaluation_recipe, precision
from convit.engine.recipe import add_recipe_arguments, dump_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  convit infer PICS --ckpt_path RUN                            images and folders of them, with a run's best model
  convit infer cat.jpg --pretrained --topk 3                   with published weights"""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="classes to show [5]")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    add_precision(parser)
    add_recipe_arguments(parser, EVALUATION)


def run(args: argparse.Namespace) -> int | None:
    if args.topk < 1:
        raise ValueError(f"--topk must be at least 1, got {args.topk}")
    recipe = evaluation_recipe(args)
    if args.print_config:
        print(dump_recipe(recipe), end="")
        return None
    failed, options = 0, precision(args, recipe)
    results = engine(recipe.framework, "infer").infer(
        recipe, args.images, args.topk, progress=not args.quiet and sys.stderr.isatty(), **options
    )
    for result in results:
        if "error" in result:
            failed += 1
            print(f"convit infer: {result['image']}: {result['error']}", file=sys.stderr)
        elif args.json:
            print(json.dumps(result))
        else:
            print(result["image"])
            for one in result["classes"]:
                print(f"  {100 * one['probability']:6.2f} %  {one['index']:4d}  {one['name']}")
    return 1 if failed else None
