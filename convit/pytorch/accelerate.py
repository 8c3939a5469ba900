"""``convit.accelerate``: the attention modules and perceptrons of an existing model run through ConViT's kernels."""

from typing import TypeVar

from torch import Tensor, nn

from convit import ops
from convit.pytorch.gpsa import GPSA, MHSA
from convit.pytorch.model import Mlp


class _OneDropMlp(Mlp):
    """FAIR's perceptron: one dropout module serves both places."""

    drop: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(ops.linear(self.fc2, self.drop(ops.linear(self.fc1, x, self.act))))


# Name of a module's class, ours, and all that ours needs: what timm's, FAIR's and our modules have in common, so that ours can take
# over such an instance as it is.
_COUNTERPARTS: list[tuple[str, type[nn.Module], set[str]]] = [
    ("GPSA", GPSA, {"num_heads", "scale", "locality_strength", "qk", "v", "attn_drop", "proj", "pos_proj", "proj_drop", "gating_param"}),
    ("MHSA", MHSA, {"num_heads", "scale", "qkv", "attn_drop", "proj", "proj_drop"}),
    ("Mlp", Mlp, {"fc1", "act", "drop1", "fc2", "drop2"}),
    ("Mlp", _OneDropMlp, {"fc1", "act", "drop", "fc2"}),
]

_NO_NORM = (nn.Identity, type(None))

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Make every GPSA and MHSA of a timm, FAIR or ConViT model ours, and the perceptrons beside them, in place.

    The module objects stay: their parameters, hooks, mode, device and dtype are untouched, and optimisers or wrappers that hold
    them keep working; only their class changes, and the relative-position cache goes. State dicts stay the same. If the model has a
    ``patch_embed.grid_size``, GPSA takes its geometry from there, so that models built for non-square images are right too.

    Args:
        model: Any module that contains attention modules named GPSA or MHSA with timm's attributes.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: It contains no such attention module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = [(module, ours) for module in model.modules() if (ours := _counterpart(module))]
    if not any(ours in (GPSA, MHSA) for _, ours in found):
        raise ValueError(f"{type(model).__name__} contains no GPSA or MHSA module of a ConViT: nothing to accelerate")
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    for module, ours in found:
        module.__class__ = ours
        module._buffers.pop("rel_indices", None)
        module._non_persistent_buffers_set.discard("rel_indices")
        module.__dict__.pop("rel_indices", None)
        if isinstance(module, GPSA) and grid is not None:
            module.default_grid = tuple(grid)
    return model


def _counterpart(module: nn.Module) -> type[nn.Module] | None:
    for name, ours, needs in _COUNTERPARTS:
        # timm's Mlp may hold a norm between its layers, which ours has not
        if type(module).__name__ == name and all(hasattr(module, n) for n in needs) and isinstance(getattr(module, "norm", None), _NO_NORM):
            return ours
    return None
