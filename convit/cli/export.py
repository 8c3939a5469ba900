"""``convit export``: a model for another runtime."""

import argparse
import os
from pathlib import Path
from typing import Any

from convit.architecture import VARIANTS
from convit.cli import spellings
from convit.dispatch import nearest
from convit.export.check import FORMATS, OPSETS, check_request
from convit.export.int8 import check_int8
from convit.weights.files import SUFFIXES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """The file is checked in its runtime on real images before it is written; a failed export leaves no file.

examples:
  convit export RUN --format onnx                              the best model of a training run
  convit export weights.safetensors --format openvino -o model.xml --dynamic_size
  convit export RUN --format openvino --int8 --data_dir PICS   eight bits, kept only where that is faster here"""
    parser.add_argument("model", metavar="MODEL", help="a run folder, any checkpoint, or a variant (convit_tiny)")
    parser.add_argument("--format", required=True, help=", ".join(FORMATS))
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="the file to write [MODEL's name with the suffix of the format]")
    parser.add_argument(*spellings("ckpt_path"), metavar="FILE", type=Path, help="weights for a variant: any checkpoint")
    parser.add_argument("--pretrained", action="store_true", help="published ImageNet-1K weights for a variant")
    parser.add_argument(*spellings("image_resize"), metavar="H[,W]", type=_size, help="image size the file is made for [the model's]")
    parser.add_argument(*spellings("num_classes"), type=int, metavar="N", help="classes of a variant [those of its weights]")
    parser.add_argument(*spellings("dynamic_size"), action="store_true", help="take images of any multiple of the patch size")
    parser.add_argument("--opset", type=int, default=OPSETS[0], help=f"ONNX opset, {OPSETS[0]} to {OPSETS[1]} [{OPSETS[0]}]")
    parser.add_argument("--images", metavar="FILE", type=Path, nargs="+", help="images to check with [the photographs in scikit-learn]")
    parser.add_argument(
        "--int8", action="store_true", help="quantise an onnx or openvino file on images; refused where it is not faster here"
    )
    parser.add_argument(*spellings("data_dir"), metavar="DIR", type=Path, help="of --int8: images to calibrate and to compare on")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def run(args: argparse.Namespace) -> None:
    form = check_request(args.format, args.output, args.opset, args.dynamic_size)
    if args.int8:
        check_int8(args.format, args.data_dir)
    elif args.data_dir:
        raise ValueError("--data_dir is of --int8; --images names files to check with")
    output = args.output or Path(file_name(args.model, form.suffix))
    if output.exists() and not args.force:
        raise ValueError(f"{output} exists; --force replaces it")
    if args.format == "mindir":
        from convit.export.mindir import export_mindir

        given = {"img_size": args.image_resize, "num_classes": args.num_classes}
        report = export_mindir(_place(args), output, pretrained=args.pretrained, images=args.images, **given)
    else:
        from convit.export import export

        options = {"images": args.images, "dynamic_size": args.dynamic_size, "opset": args.opset, "int8_data": args.data_dir}
        report = export(_model(args), output, args.format, **options)
    sizes = " and ".join(f"{h} x {w}" for h, w in report.sizes)
    megabytes = sum(file.stat().st_size for file in report.files) / 1e6
    print(
        f"{', '.join(map(str, report.files))}: {megabytes:.1f} MB\n"
        f"checked in its runtime, batch {' and '.join(map(str, report.batches))}, {sizes}: "
        f"largest difference to the eager model {report.difference:.1e} of the largest logit"
    )
    if report.int8:
        print(report.int8)


def file_name(model: str, suffix: str) -> str:
    """By the name of the model's folder, of its variant, or of its file without a checkpoint's suffix; never the model's own."""
    path = Path(model)
    if path.is_dir():
        return os.path.basename(os.path.abspath(path)) + suffix
    return (path.stem if path.suffix in SUFFIXES and path.suffix != suffix else path.name) + suffix


def _place(args: argparse.Namespace) -> str | Path:
    """Where the weights lie, or the name of a variant."""
    variant = args.model in VARIANTS and not Path(args.model).exists()
    if not variant and not Path(args.model).exists():
        raise ValueError(f"{args.model} is no file, folder or variant{nearest(args.model, VARIANTS)}")
    if not variant and (args.ckpt_path or args.pretrained or args.num_classes is not None):
        raise ValueError(f"{args.model} has its own weights: leave out --ckpt_path, --pretrained and --num_classes")
    if args.ckpt_path and args.pretrained:
        raise ValueError("choose --ckpt_path or --pretrained")
    return Path(args.ckpt_path or args.model) if not variant or args.ckpt_path else str(args.model)


def _model(args: argparse.Namespace) -> Any:
    import convit
    from convit.engine.pytorch.trained import trained_model

    place = _place(args)
    if isinstance(place, Path) or args.pretrained:
        model = trained_model(place)
    else:
        model = convit.create_model(place, **({} if args.num_classes is None else {"num_classes": args.num_classes}))
        print("convit export: neither --ckpt_path nor --pretrained: the weights are the initial ones")
    if args.image_resize:
        model.set_input_size(args.image_resize)
    return model


def _size(text: str) -> tuple[int, int]:
    try:
        height, _, width = text.partition(",")
        return int(height), int(width or height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected H or H,W, got {text!r}") from None
