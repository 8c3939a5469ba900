"""The six variants in MindCV's registry, as ``convit_tiny_kernel`` and so on: for ``mindcv.create_model`` and MindCV's training tools."""

from collections.abc import Callable
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
