"""ConViT with fused kernels for its gated positional self-attention. Importing this package imports no framework."""

import importlib
from typing import TYPE_CHECKING, Any

from convit.dispatch import Problem, backends, use_backend, why_not

if TYPE_CHECKING:
    from convit.engine.pytorch.trained import from_pretrained as from_pretrained
    from convit.engine.pytorch.trained import push_to_hub as push_to_hub
    from convit.engine.pytorch.trained import save_pretrained as save_pretrained
    from convit.ops import gpsa as gpsa
    from convit.pytorch.accelerate import accelerate as accelerate
    from convit.pytorch.accelerate import accelerated as accelerated
    from convit.pytorch.gpsa import GPSA as GPSA
    from convit.pytorch.gpsa import MHSA as MHSA
    from convit.pytorch.model import ConViT as ConViT
    from convit.pytorch.model import create_model as create_model
    from convit.pytorch.model import list_models as list_models
    from convit.pytorch.optimize import optimize as optimize
    from convit.weights.load import load_checkpoint as load_checkpoint
    from convit.weights.load import load_pretrained as load_pretrained

__version__ = "0.1.0"

# public name -> module that owns it; imported on first use
_HOMES = {
    "gpsa": "convit.ops",
    "GPSA": "convit.pytorch.gpsa",
    "MHSA": "convit.pytorch.gpsa",
    "accelerate": "convit.pytorch.accelerate",
    "accelerated": "convit.pytorch.accelerate",
    "ConViT": "convit.pytorch.model",
    "create_model": "convit.pytorch.model",
    "list_models": "convit.pytorch.model",
    "optimize": "convit.pytorch.optimize",
    "load_checkpoint": "convit.weights.load",
    "load_pretrained": "convit.weights.load",
    "from_pretrained": "convit.engine.pytorch.trained",
    "save_pretrained": "convit.engine.pytorch.trained",
    "push_to_hub": "convit.engine.pytorch.trained",
}

__all__ = [*_HOMES, "Problem", "backends", "use_backend", "why_not"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'convit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
