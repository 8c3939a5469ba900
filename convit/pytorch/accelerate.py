"""``convit.accelerate``: the attention modules and MLPs of an existing model run through ConViT's kernels.

A module is swapped only if its class is known to compute what ours does: timm's own, untouched, or a copy of it (FAIR's) that has no
methods but those that the paper's code has and gives our numbers on a trial of the class. Everything else is left as it is, and said so.
"""

import inspect
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from convit import ops
from convit.dispatch import use_backend
from convit.kernels.eager import know
from convit.kernels.gpsa import reference
from convit.pytorch.gpsa import GPSA, MHSA
from convit.pytorch.grid import ImageGrid, is_square
from convit.pytorch.layers import Mlp

logger = logging.getLogger("convit")

Model = TypeVar("Model", bound=nn.Module)


class _NoNormMlp(nn.Module):
    """A copy of timm's MLP from before it had a place for a norm."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))
        else:
            return self.drop2(ops.linear(self.fc2, self.drop1(ops.linear(self.fc1, x, self.act))))


class _OneDropMlp(nn.Module):
    """FAIR's MLP: one dropout module serves both places."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        else:
            return self.drop(ops.linear(self.fc2, self.drop(ops.linear(self.fc1, x, self.act))))


know(_NoNormMlp, _OneDropMlp)

_ATTENTION = {"num_heads", "scale", "attn_drop", "proj", "proj_drop"}
_GPSA = _ATTENTION | {"locality_strength", "qk", "v", "pos_proj", "gating_param"}

# Name of a module's class, ours, all that an instance must hold, and what else it may hold without being another module.
_COUNTERPARTS: list[tuple[str, type[nn.Module], set[str], set[str]]] = [
    ("GPSA", GPSA, _GPSA, {"dim", "rel_indices", "current_grid_size", "default_grid"}),
    ("MHSA", MHSA, _ATTENTION | {"qkv"}, set()),
    ("Mlp", _NoNormMlp, {"fc1", "act", "drop1", "fc2", "drop2"}, set()),
    ("Mlp", Mlp, {"fc1", "act", "drop1", "norm", "fc2", "drop2"}, set()),
    ("Mlp", _OneDropMlp, {"fc1", "act", "drop", "fc2"}, set()),
]
_OURS = (GPSA, MHSA, Mlp, _NoNormMlp, _OneDropMlp)

# where timm keeps the originals
_TIMM = {"GPSA": "timm.models.convit", "MHSA": "timm.models.convit", "Mlp": "timm.layers.mlp"}
_METHODS = {"__init__", "_init_weights", "forward", "get_attention", "get_attention_map", "local_init", "get_rel_indices"}
_METHODS |= {"init_non_persistent_buffers"}

_THEIRS = "_accelerated_from"  # on a swapped module: the class that it had
_MODULE_ATTRIBUTES = set(nn.Module().__dict__)


class Accelerated(NamedTuple):
    """What ``accelerate`` did to a model: by module name, the class that was swapped, or why it was left."""

    model: nn.Module
    swapped: dict[str, str]
    left: dict[str, str]

    def undo(self) -> None:
        """Give every swapped module that the model still has its own class back.

        Raises:
            RuntimeError: One has been given another class since (parametrised, sharded): undo that first. Nothing is changed.
        """
        swapped = {name: module for name, module in self.model.named_modules() if _THEIRS in module.__dict__}
        for name, module in swapped.items():
            if (cls := type(module)) not in _OURS:
                raise RuntimeError(
                    f"{name} has become a {cls.__name__} since: first remove what made it that (a parametrization, sharding)"
                )
        for module in swapped.values():
            _restore(module)

    def __str__(self) -> str:
        def classes(found: dict[str, str]) -> str:
            return ", ".join(f"{list(found.values()).count(each)} {each}" for each in dict.fromkeys(found.values())) or "none"

        return f"{type(self.model).__name__}: swapped {classes(self.swapped)}; left {classes(self.left)}"

    def __repr__(self) -> str:
        return f"<{self}>"


def accelerate(model: Model, grid: Literal["square", "image"] = "square") -> Model:
    """Make every GPSA and MHSA of a timm, FAIR or ConViT model ours, and the MLPs beside them, in place.

    The module objects stay: their parameters, hooks, mode, device and dtype are untouched, and optimisers or wrappers that hold
    them keep working; only their class changes, and the relative-position cache shrinks. State dicts stay the same. Modules that are not
    exactly theirs are left alone; ``accelerated`` says which, and undoes it all.

    Args:
        model: Any module that contains attention modules named GPSA or MHSA with timm's attributes, also inside wrappers.
        grid: How N patches lie where the model does not say, as timm's does not. "square" is what timm does wherever N is a square,
            and what weights trained so need: numbers stay the same. "image" takes the grid of the ``patch_embed`` that the model around the
            blocks has at that moment, which is right for images that are not square, and is what "square" falls back to where N is none.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: It contains no such attention module, ``grid`` is neither, or is "image" where no ``patch_embed`` knows the image's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if grid not in ("square", "image"):
        raise ValueError(f"grid must be 'square' or 'image', got {grid!r}")
    verdicts = [(name, module, _counterpart(module)) for name, module in model.named_modules()]
    candidates = [(name, module, ours) for name, module, ours in verdicts if ours is not None]
    if not any(type(module).__name__ in ("GPSA", "MHSA") for _, module, _ in candidates):
        raise ValueError(f"{type(model).__name__} contains no GPSA or MHSA module of a ConViT: nothing to accelerate")
    grids = {name: _image_grid(model, name, grid) for name, _, ours in candidates if ours is GPSA}
    for name, module, ours in candidates:
        if not isinstance(ours, str) and type(module) is not ours:
            _swap(module, ours)
        if isinstance(module, GPSA) and hasattr(module, _THEIRS):
            module.image_grid = grids[name]
    _register_with_timm()
    _warn_of_other_grids(grids[name] for name, module, ours in candidates if ours is GPSA and hasattr(module, _THEIRS))
    done = accelerated(model)
    logger.log(logging.WARNING if done.left else logging.INFO, "accelerate: %s", str(done))  # what keeps the record keeps no model
    return model


def accelerated(model: nn.Module) -> Accelerated:
    """Which modules of ``model`` run through ConViT's kernels since ``accelerate``, and which were left, and why."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    swapped, left = {}, {}
    for name, module in model.named_modules():
        theirs = module.__dict__.get(_THEIRS)
        if theirs is not None:
            swapped[name] = f"{theirs.__module__}.{theirs.__qualname__}"
        elif isinstance(reason := _counterpart(module), str):
            left[name] = reason
    return Accelerated(model, swapped, left)


def _swap(module: nn.Module, ours: type[nn.Module]) -> None:
    module.__dict__[_THEIRS] = type(module)
    module.__class__ = ours
    _forget_indices(module)


def _restore(module: nn.Module) -> None:
    theirs = module.__dict__.pop(_THEIRS)
    module.__class__ = theirs
    module.__dict__.pop("image_grid", None)
    if "gating_param" in module._parameters and "rel_indices" not in module._buffers:
        gating = module._parameters["gating_param"]
        module.__dict__["rel_indices"] = torch.zeros(1, 1, 1, 3, dtype=gating.dtype, device=gating.device)  # type: ignore[union-attr]


def _forget_indices(module: nn.Module) -> None:
    """Shrink their cache of relative positions to that of one patch: they make it anew for others. A buffer stays, for who lists them."""
    if isinstance(kept := module._buffers.get("rel_indices"), Tensor):
        module._buffers["rel_indices"] = kept.new_zeros(1, 1, 1, 3)
    module.__dict__.pop("rel_indices", None)


def _indices_are_the_grids(module: nn.Module) -> bool:
    """Whether their cache is empty, or of a square grid as they make it, but for the rounding of a type that it has been through."""
    kept = module._buffers.get("rel_indices", module.__dict__.get("rel_indices"))
    if not isinstance(kept, Tensor) or kept.is_meta or kept.numel() == 3:
        return kept is None or kept.is_meta or not kept.any()
    side = round(kept.shape[1] ** 0.5) if kept.ndim == 4 else 0
    if kept.shape != (1, side * side, side * side, 3):
        return False
    exact = reference.relative_positions((side, side), kept.device).double()
    return torch.allclose(kept[0].double(), exact, rtol=2**-8, atol=0)


def _image_grid(model: nn.Module, name: str, layout: Literal["square", "image"]) -> ImageGrid | None:
    """That of the innermost module around ``name`` that has a ``patch_embed``."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        around = model.get_submodule(".".join(parts[:depth]))
        if isinstance(getattr(around, "patch_embed", None), nn.Module):
            found = ImageGrid(around, layout)
            if layout == "square" or found.size() is not None:
                return found
    if layout == "image":
        raise ValueError(
            f"grid='image' needs a patch_embed with grid_size = (gh, gw) around {name or 'the attention'}: set it, or take 'square'"
        )
    return None


def _warn_of_other_grids(grids: Iterable[ImageGrid | None]) -> None:
    for grid in grids:
        size = None if grid is None or grid.layout == "image" else grid.size()
        if size is not None and size[0] != size[1] and is_square(size[0] * size[1]):
            gh, gw, side = *size, math.isqrt(size[0] * size[1])
            warnings.warn(
                f"the image has {gh} x {gw} patches, and this model's attention lays them on {side} x {side}, as it did before "
                "(timm knows square grids only). Keep it for weights trained so; else accelerate(model, grid='image')",
                stacklevel=3,
            )
            return


def _counterpart(module: nn.Module) -> type[nn.Module] | str | None:
    """Our class for ``module``; why there is none, if its name or its parts suggest one; None for every other module."""
    cls = type(module)
    if cls in _OURS:
        return cls if module.__dict__.get(_THEIRS) is not None or cls in (GPSA, MHSA) else None
    if not (cls.__name__ in _TIMM or isinstance(getattr(module, "gating_param", None), Tensor)):
        return None
    named = [entry for entry in _COUNTERPARTS if entry[0] == cls.__name__]
    if not named:
        return f"{_name(cls)} is a class of its own"
    has = (set(module.__dict__) - _MODULE_ATTRIBUTES) | set(module._modules) | set(module._parameters) | set(module._buffers)
    fitting = [(ours, has - needs - may) for _, ours, needs, may in named if needs <= has]
    if not fitting:
        return f"{_name(cls)} lacks {', '.join(sorted(named[-1][2] - has))}"
    ours, more = min(fitting, key=lambda each: len(each[1]))
    if more:
        return f"{_name(cls)} holds more than ours: {', '.join(sorted(more))}"
    if ours is GPSA and not _indices_are_the_grids(module):
        return f"{_name(cls)} has rel_indices of its own"
    reason = _why_not_class(cls, ours)
    return ours if reason is None else f"{_name(cls)} {reason}"


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _why_not_class(cls: type[nn.Module], ours: type[nn.Module]) -> str | None:
    """Why a class named like ours may compute something else; None where it does not."""
    original = getattr(sys.modules.get(_TIMM[cls.__name__]), cls.__name__, None)
    own: list[type] = [each for each in cls.__mro__ if each not in nn.Module.__mro__ and each is not original]
    methods = {name for each in own for name, value in vars(each).items() if callable(value) or isinstance(value, (property, classmethod))}
    if more := methods - _METHODS:
        return f"has methods that ours has not: {', '.join(sorted(more))}"
    if original is not None and issubclass(cls, original):
        if own_methods := methods - {"__init__", "__annotate__"}:
            return f"overrides {', '.join(sorted(own_methods))} of timm's"
        home = vars(sys.modules[original.__module__])  # where its own functions look up names: a wrapper may have taken their __module__
        touched = [name for name, value in vars(original).items() if inspect.isfunction(value) and value.__globals__ is not home]
        if touched:
            return f"has been patched: {', '.join(touched)}"
    return None if _same_numbers(cls, ours) else "computes something else"


def _same_numbers(cls: type[nn.Module], ours: type[nn.Module]) -> bool:
    """Whether a small module of class ``cls`` gives our numbers, in training with dropout and in evaluation."""
    options: dict[str, Any] = {"drop": 0.2} if ours not in (GPSA, MHSA) else {"num_heads": 2, "attn_drop": 0.2, "proj_drop": 0.2}
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            use_backend("reference"),
        ):
            torch.manual_seed(0)
            theirs = cls(8, **options).float()
            for parameter in theirs.parameters():
                nn.init.normal_(parameter)
            x = torch.randn(2, 9, 8, dtype=torch.float32)
            for mode in (True, False):
                theirs.train(mode)
                torch.manual_seed(1)
                expected = theirs(x)
                _swap(theirs, ours)  # without the positions that it has just made: ours would take those
                torch.manual_seed(1)
                found = theirs(x)
                _restore(theirs)
                if not torch.allclose(expected, found, rtol=1e-3, atol=1e-4):
                    return False
            return True
    except Exception:  # a class that cannot even be tried is not known
        return False


def _register_with_timm() -> None:
    """Tell timm's feature extraction, if timm is there, not to trace into ours: as it does for its own."""
    features: Any = sys.modules.get("timm.models._features_fx")
    register: Callable[[type[nn.Module]], Any] | None = getattr(features, "register_notrace_module", None)
    if register is not None:
        for each in _OURS:
            register(each)
