"""``convit plot RUN``: the pictures of a training run.

history     loss and accuracy per epoch
gates       every gate over the epochs, and before and after
locality    how far each layer and head looks, over the epochs and at the end
attention   where heads look from one patch of an image, layer by layer
"""

import argparse
from pathlib import Path

import numpy as np

from convit import figures
from convit.engine.images import read_named
from convit.engine.preparation import Preparation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Draws what the run's log.jsonl holds; with a trained model in RUN also where its heads look."
    parser.add_argument("folder", metavar="RUN", type=Path, help="the folder of a training run")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="folder for the pictures [RUN/plots]")
    parser.add_argument("--image", metavar="FILE", type=Path, help="draw where heads look on this image")
    parser.add_argument("--query", metavar="Y,X", type=_point, help="the patch they look from, row and column [the middle]")
    parser.add_argument("--format", default="png", choices=("png", "pdf", "svg"), help="file type [png]")


def run(args: argparse.Namespace) -> None:
    records = figures.read_log(args.folder)
    output = args.output or args.folder / "plots"
    output.mkdir(parents=True, exist_ok=True)

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
        import torch

        from convit.engine.pytorch.trained import trained_model

        model = trained_model(args.folder)
        preparation = Preparation.of(model)
        crop = preparation.crop(read_named(args.image, model.in_chans))
        image = torch.from_numpy(preparation.normalise(crop))
        drawn.append(figures.plot_attention(model, image, path("attention"), query=args.query, picture=np.asarray(crop)))
    for one in drawn:
        print(one)


def _point(text: str) -> tuple[int, int]:
    try:
        row, column = text.split(",")
        return int(row), int(column)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ROW,COLUMN, got {text!r}") from None
