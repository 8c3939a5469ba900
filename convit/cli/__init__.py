"""The console script ``convit``; ``python -m convit`` is the same.

Each command is a module with ``add_arguments(parser)`` and ``run(args) -> int | None``, imported only when its command is called.
Exit status: 0 done, 1 a known failure (its message on stderr, no traceback), 2 wrong usage.
"""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Collection

import convit
from convit.dispatch import nearest

COMMANDS = {
    "train": ("train a model from a recipe", "convit.cli.train"),
    "validate": ("measure a checkpoint on a validation set", "convit.cli.validate"),
    "infer": ("classify images", "convit.cli.infer"),
    "lr-find": ("find a learning rate: a range test and its plot", "convit.cli.lr_find"),
    "plot": ("draw the pictures of a training run", "convit.cli.plot"),
    "export": ("write a model for another runtime", "convit.cli.export"),
    "serve": ("serve a model over HTTP, with a page", "convit.cli.serve"),
    "convert": ("convert a checkpoint between timm, FAIR, safetensors and MindCV", "convit.cli.convert"),
    "env": ("print versions, devices and which backend can run what", "convit.cli.env"),
    "demo": ("see a ConViT work on real images", "convit.cli.demo"),
    "completion": ("print the script that completes these commands in a shell", "convit.cli.completion"),
}
# commands whose processes work together; of several that a launcher started, the first alone runs the others
TOGETHER = ("train", "validate")


def _spelt_out(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """``argv`` with ``=true`` behind every boolean option that no boolean follows, so that it does not take the next word for its own."""
    from convit.engine.recipe import FALSE, TRUE

    spelt = []
    for word, after in zip(argv, [*argv[1:], ""], strict=False):
        action = parser._option_string_actions.get(word)
        alone = action is not None and action.nargs == "?" and action.const == "true" and after.lower() not in (*TRUE, *FALSE)
        spelt.append(f"{word}=true" if alone else word)
    return spelt


def spellings(name: str) -> list[str]:
    """``--image_resize`` and ``--image-resize``: as recipe keys are written, and as options usually are."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def build_parser(called: Collection[str]) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of its commands; only those that are ``called`` have their arguments."""
    parser = argparse.ArgumentParser(prog="convit", description="ConViT with fused kernels.")
    parser.add_argument("--version", action="version", version=f"convit {convit.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    parsers = {}
    for name, (summary, home) in COMMANDS.items():
        command = parsers[name] = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in called:
            module = importlib.import_module(home)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser, parsers


def _needs(command: str, error: Exception) -> str:
    extra = command if command in ("export", "serve") else "all" if command == "completion" else "train"
    return f"convit {command} needs {getattr(error, 'name', error)}: pip install '.[{extra}]' in the source folder"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    called = next((word for word in argv if not word.startswith("-")), "")
    try:
        parser, parsers = build_parser([called])
    except ModuleNotFoundError as error:  # of an extra; convit's own are there
        if os.environ.get("CONVIT_TRACEBACK"):
            raise
        print(_needs(called, error), file=sys.stderr)
        return 1
    chosen = parsers.get(called, parser)
    args, unknown = parser.parse_known_args(_spelt_out(argv, chosen))
    if unknown:
        hint = nearest(unknown[0].split("=")[0], chosen._option_string_actions)
        chosen.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    from convit.engine.world import find_world

    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files and classes may have what the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        world = find_world()
        if args.command not in TOGETHER and world.rank:
            print(f"convit {args.command}: process {world.rank} of {world.size} leaves this to process 0", file=sys.stderr)
            return 0
        return args.run(args) or 0
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        if os.environ.get("CONVIT_TRACEBACK"):
            raise
        bare = isinstance(error, ModuleNotFoundError) and "pip install" not in str(error)
        print(_needs(args.command, error) if bare else f"convit {args.command}: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # what a reader of ours, or of a library, did not foresee
        if os.environ.get("CONVIT_TRACEBACK"):
            raise
        given = dict.fromkeys(str(value) for value in vars(args).values() for value in (value if isinstance(value, list) else [value]))
        files = ", ".join(word for word in given if os.sep in word or os.path.exists(word)) or "what was given"
        what = f"{type(error).__name__} {str(error)[:200]}".rstrip()
        print(f"convit {args.command}: {files} cannot be used: {what} (CONVIT_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
