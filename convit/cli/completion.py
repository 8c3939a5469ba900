"""``convit completion SHELL``: the script that completes commands, options, recipes and files, made by shtab."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  eval "$(convit completion bash)"                             in ~/.bashrc
  convit completion zsh > "${fpath[1]}/_convit"                for zsh"""
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "tcsh"), help="bash, zsh or tcsh")


def run(args: argparse.Namespace) -> None:
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("shell completion needs shtab: pip install shtab") from error
    from convit.cli import COMMANDS, build_parser
    from convit.engine.recipe import FIELDS

    parser, parsers = build_parser(COMMANDS)
    for command in parsers.values():
        for action in command._actions:
            action.help = getattr(action, "full_help", action.help)  # what --help leaves out is completed too
            key = FIELDS.get(action.dest.removeprefix("key_")) if action.dest.startswith("key_") else None
            if action.nargs == 0 or action.choices:
                continue
            if key and key.metadata["choices"]:
                action.choices = [str(each) for each in key.metadata["choices"] if each is not None]
            elif action.metavar in PLACES or action.dest in PLACES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell))


# what stands for a file or folder in the help
PLACES = ("RUN", "FILE", "DIR", "CHECKPOINT", "MODEL", "IMAGE", "IN", "OUT", "RECIPE", "key_data_dir", "key_ckpt_path", "key_class_map")
