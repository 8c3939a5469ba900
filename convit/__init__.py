"""ConViT with fused kernels for its gated positional self-attention. Importing this package imports no framework."""

import importlib
from typing import Any

# These names are functions; `backends` shadows the module of that name on purpose: inside, write `from convit.backends import ...`.
from convit.backends import backends, use_backend, why_not

__version__ = "0.1.0"

# public name -> module that owns it; imported on first use
_HOMES = {
    "gpsa": "convit.ops",
    "GPSA": "convit.pytorch.gpsa",
    "MHSA": "convit.pytorch.gpsa",
    "accelerate": "convit.pytorch.accelerate",
    "ConViT": "convit.pytorch.model",
    "create_model": "convit.pytorch.model",
    "list_models": "convit.pytorch.model",
    "load_checkpoint": "convit.checkpoints",
}

__all__ = [*_HOMES, "backends", "use_backend", "why_not"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'convit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
