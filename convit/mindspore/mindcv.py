"""The six variants in MindCV's registry, as ``convit_tiny_kernel`` and so on: for ``mindcv.create_model`` and MindCV's training tools.

``python -m convit.mindspore.mindcv SCRIPT ARGUMENTS`` runs a script of MindCV's, such as its train.py, with them.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convit.mindspore.model import ConViT, create_model, list_models


def _entry(variant: str) -> Callable[..., ConViT]:
    def build(pretrained: bool = False, num_classes: int = 1000, in_channels: int = 3, **kwargs: Any) -> ConViT:
        return create_model(variant, pretrained, num_classes=num_classes, in_channels=in_channels, **kwargs)

    build.__name__ = build.__qualname__ = f"{variant}_kernel"
    build.__doc__ = f"``{variant}`` with fused kernels: ``convit.mindspore.create_model({variant!r})``."
    return build


def register() -> None:
    """Enter the variants into MindCV's registry; again is no different from once."""
    from mindcv.models.registry import register_model

    for variant in list_models():
        register_model(_entry(variant))


def main() -> None:
    """Run the script that the first argument names as if Python had been called with it."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m convit.mindspore.mindcv SCRIPT ARGUMENTS (a script of MindCV's, such as train.py)")
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    register()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
