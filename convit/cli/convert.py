"""``convit convert IN OUT``: a checkpoint in another format, without loss."""

import argparse
from pathlib import Path

from convit.weights.files import SUFFIXES
from convit.weights.load import read, write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The suffix of OUT chooses the format: .pth and .safetensors with the names of timm and FAIR, .ckpt with MindCV's. "
        "Every bit of the weights is kept, and the settings that change the logits (GELU, LayerNorm eps) travel with them."
    )
    parser.add_argument("input", metavar="IN", type=Path, help="a timm or FAIR .pth, a .safetensors or a MindCV .ckpt")
    parser.add_argument("output", metavar="OUT", type=Path, help=f"the file to write: {', '.join(SUFFIXES)}")
    parser.add_argument("--key", help="the dictionary of weights to take from a training checkpoint, such as model or model_ema")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> None:
    if args.output.exists() and not args.force:
        raise ValueError(f"{args.output} exists; --force replaces it")
    checkpoint = read(args.input, key=args.key)
    write(args.output, checkpoint)
    numbers = sum(array.size for array in checkpoint.tensors.values())
    size = args.output.stat().st_size
    print(
        f"{args.output}: {numbers:,} numbers in {len(checkpoint.tensors)} tensors, {size / 1e6:.1f} MB, "
        f"{'exact' if checkpoint.act == 'gelu' else 'tanh'} GELU, LayerNorm eps {checkpoint.norm_eps:g}"
    )
