"""``import convit.timm`` registers our models with timm, by the names in ``convit.list_models()``.

timm's ``create_model`` and its train, validate, inference and benchmark scripts then build ours by those names, in place of its own three,
with the same state dicts, pretrained weights and default configurations. ``features_only=True`` and feature extraction by graph work too.
"""

import warnings
from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module

from convit.architecture import IMAGENET_MEAN, IMAGENET_STD, VARIANTS
from convit.pytorch.accelerate import _OURS
from convit.pytorch.layers import DropPath, PatchEmbed
from convit.pytorch.model import ConViT

for _module in (*_OURS, DropPath, PatchEmbed):
    register_notrace_module(_module)


def _config(name: str) -> dict[str, Any]:
    published = name in ("convit_tiny", "convit_small", "convit_base")
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **({"hf_hub_id": "timm/"} if published else {}),
    }


def _tag(name: str) -> str:
    return name if name.endswith("_plus") else f"{name}.fb_in1k"


default_cfgs = generate_default_cfgs({_tag(name): _config(name) for name in VARIANTS})
__all__ = list(VARIANTS)


def _entry(name: str) -> Callable[..., ConViT]:
    def build(pretrained: bool = False, **kwargs: Any) -> ConViT:
        out_indices = kwargs.pop("out_indices", 3)
        features = {"out_indices": out_indices, "feature_cls": "getter"}
        arguments = {**VARIANTS[name], **kwargs}
        model: ConViT = build_model_with_cfg(ConViT, name, pretrained, feature_cfg=features, **arguments)
        getattr(model, "model", model).every_token = True  # timm compares a model with its graph bit by bit
        return model

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    build.__doc__ = f"``convit.create_model({name!r})`` in timm's manner."
    return build


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Overwriting convit_", UserWarning)  # it is what importing this module asks for
    for _name in VARIANTS:
        globals()[_name] = register_model(_entry(_name))
