"""``convit plot RUN``: the pictures of a training run; of several runs, one that compares them; of any checkpoint, where its heads look.

history     loss and accuracy per epoch
gates       every gate over the epochs, and before and after
locality    how far each layer and head looks, over the epochs and at the end
attention   where heads look from one patch of an image, layer by layer
comparison  loss and accuracy of several runs, and which keys of their recipes differ
"""

import argparse
from pathlib import Path

import numpy as np

from convit import figures
from convit.engine.images import read_named
from convit.engine.preparation import Preparation
from convit.engine.recipe import load_recipe
from convit.engine.trained import WEIGHTS
from convit.weights.files import SUFFIXES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  convit plot RUN --image cat.jpg                              losses, gates, distances, and where the heads look on a picture
  convit plot RUN RUN2                                         two runs in one picture, and which keys of their recipes differ
  convit plot weights.safetensors --image cat.jpg              where the heads of any checkpoint look"""
    parser.add_argument("folders", metavar="RUN", type=Path, nargs="+", help="a run's folder; several are compared; or a checkpoint")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="folder for the pictures [RUN/plots; else ./plots]")
    parser.add_argument("--image", metavar="FILE", type=Path, help="draw where heads look on this image")
    parser.add_argument("--query", metavar="Y,X", type=_point, help="the patch they look from, row and column [the middle]")
    parser.add_argument("--format", default="png", choices=("png", "pdf", "svg"), help="file type [png]")


def run(args: argparse.Namespace) -> None:
    if len(args.folders) > 1:
        return compare(args)
    (place,) = args.folders
    if place.exists() and _without_log(place):
        if args.image is None:
            raise ValueError(f"{place} has no log of a run: --image FILE draws where its heads look")
        print(attention(args, place, (args.output or Path("plots")) / f"attention.{args.format}"))
        return
    records = figures.read_log(place)
    output = args.output or place / "plots"

    def path(name: str) -> Path:
        return Path(output, f"{name}.{args.format}")

    drawn = [figures.plot_history(records, path("history"))]
    with_gates = [record["gate"] for record in records if record.get("gate")]
    if with_gates:
        drawn.append(figures.plot_gates_over_time(records, path("gates_over_time")))
        drawn.append(figures.plot_gates(with_gates[0], with_gates[-1], path("gates"), names=("after the first epoch", "at the end")))
    if any(record.get("distance") for record in records):
        drawn.append(figures.plot_locality(records, path("locality")))
    if args.image is not None:
        drawn.append(attention(args, place, path("attention")))
    for one in drawn:
        print(one)


def attention(args: argparse.Namespace, place: Path, path: Path) -> Path:
    """Where the heads of the model at ``place`` look on the image."""
    import torch

    from convit.engine.pytorch.trained import trained_model

    model = trained_model(place)
    preparation = Preparation.of(model)
    crop = preparation.crop(read_named(args.image, model.in_chans))
    image = torch.from_numpy(preparation.normalise(crop))
    return figures.plot_attention(model, image, path, query=args.query, picture=np.asarray(crop))


def _without_log(place: Path) -> bool:
    """Whether it is a checkpoint, or a folder of the Hub: they have no log."""
    if place.is_dir():
        return not (place / "log.jsonl").exists() and any((place / name).exists() for name in WEIGHTS)
    return place.suffix in SUFFIXES


def compare(args: argparse.Namespace) -> None:
    """One picture of several runs, a line for each, and the keys in which their recipes differ."""
    if args.image is not None or args.query is not None:
        raise ValueError("--image and --query are about one run")
    names = _names(args.folders)
    runs = {name: figures.read_log(folder) for name, folder in zip(names, args.folders, strict=True)}
    drawn = figures.plot_comparison(runs, (args.output or Path("plots")) / f"comparison.{args.format}")
    width = max(map(len, names))
    for name, records in runs.items():
        last = records[-1]
        scores = [(record["top1"], record["epoch"] + 1) for record in records if "top1" in record]
        best = max(scores, key=lambda each: each[0]) if scores else None
        accuracy = f"best top-1 {best[0]:.2f} % (epoch {best[1]})" if best else "not validated"
        print(f"{name:<{width}}  {last['epoch'] + 1} epochs  training loss {last['train_loss']:.4f}  {accuracy}")
    recipes = [folder / "recipe.yaml" for folder in args.folders]
    if all(recipe.exists() for recipe in recipes):
        loaded = [vars(load_recipe(recipe)) for recipe in recipes]
        for key in loaded[0]:
            values = [recipe[key] for recipe in loaded]
            if key != "ckpt_save_dir" and any(value != values[0] for value in values):
                print(f"{key}: {' / '.join(map(str, values))}")
    print(drawn)


def _names(folders: list[Path]) -> list[str]:
    """Names that tell the runs apart: of their folders, or the paths as they were given."""
    for names in ([folder.resolve().name for folder in folders], [str(folder) for folder in folders]):
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same run twice: {', '.join(map(str, folders))}")


def _point(text: str) -> tuple[int, int]:
    try:
        row, column = text.split(",")
        return int(row), int(column)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ROW,COLUMN, got {text!r}") from None
