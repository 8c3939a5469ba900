"""``convit export``: a model for another runtime."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convit.export.check import FORMATS, OPSETS, check_request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "The file is checked in its runtime on real images before it is written; a failed export leaves no file."
    parser.add_argument("model", metavar="MODEL", help="a variant (convit_tiny) or the folder of a PyTorch training run")
    parser.add_argument("--format", required=True, help=", ".join(FORMATS))
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="the file to write [MODEL with the suffix of the format]")
    parser.add_argument("--checkpoint", metavar="FILE", type=Path, help="weights: timm or FAIR .pth, .safetensors, MindCV .ckpt")
    parser.add_argument("--pretrained", action="store_true", help="published ImageNet-1K weights")
    parser.add_argument("--img-size", metavar="H[,W]", type=_size, help="image size the file is made for [the model's]")
    parser.add_argument("--num-classes", type=int, help="classes of the checkpoint [1000]")
    parser.add_argument("--dynamic-size", action="store_true", help="take images of any multiple of the patch size")
    parser.add_argument("--opset", type=int, default=OPSETS[0], help=f"ONNX opset, {OPSETS[0]} to {OPSETS[1]} [{OPSETS[0]}]")
    parser.add_argument("--images", metavar="FILE", type=Path, nargs="+", help="images to check with [the photographs in scikit-learn]")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def run(args: argparse.Namespace) -> None:
    form = check_request(args.format, args.output, args.opset, args.dynamic_size)
    output = args.output or Path(Path(args.model).name + form.suffix)
    if output.exists() and not args.force:
        raise ValueError(f"{output} exists; --force replaces it")
    if args.format == "mindir":
        if Path(args.model).is_dir():
            raise ValueError("mindir needs a variant's name and --checkpoint, got a run folder")
        from convit.export.mindir import export_mindir

        given = {"img_size": args.img_size, "num_classes": args.num_classes}
        report = export_mindir(args.model, output, weights=args.checkpoint or args.pretrained, images=args.images, **given)
    else:
        from convit.export import export

        model, mean, std = _model(args)
        options = {"images": args.images, "mean": mean, "std": std, "dynamic_size": args.dynamic_size, "opset": args.opset}
        report = export(model, output, args.format, **options)
    sizes = " and ".join(f"{h} x {w}" for h, w in report.sizes)
    megabytes = sum(file.stat().st_size for file in report.files) / 1e6
    print(
        f"{', '.join(map(str, report.files))}: {megabytes:.1f} MB\n"
        f"checked in its runtime, batch {' and '.join(map(str, report.batches))}, {sizes}: "
        f"largest difference to the eager model {report.difference:.1e} of the largest logit"
    )


def _model(args: argparse.Namespace) -> tuple[Any, Sequence[float], Sequence[float]]:
    import convit

    if Path(args.model).is_dir():
        if args.checkpoint or args.pretrained or args.num_classes is not None:
            raise ValueError("a run folder has its own weights: leave out --checkpoint, --pretrained and --num-classes")
        from convit.engine.pytorch.trained import trained_model

        model, recipe = trained_model(Path(args.model))
        if args.img_size:
            model.set_input_size(args.img_size)
        return model, recipe.mean, recipe.std
    if args.checkpoint and args.pretrained:
        raise ValueError("choose --checkpoint or --pretrained")
    given = {} if args.num_classes is None else {"num_classes": args.num_classes}
    given |= {} if args.img_size is None else {"img_size": args.img_size}
    model = convit.create_model(args.model, pretrained=args.pretrained, **given)
    if args.checkpoint:
        convit.load_checkpoint(model, args.checkpoint)
    elif not args.pretrained:
        print("convit export: neither --checkpoint nor --pretrained: the weights are the initial ones")
    return model, model.pretrained_cfg["mean"], model.pretrained_cfg["std"]


def _size(text: str) -> tuple[int, int]:
    try:
        height, _, width = text.partition(",")
        return int(height), int(width or height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected H or H,W, got {text!r}") from None
