"""How the patches of an image lie: on a square, on the image's own grid; and how a module is told."""

import copy
import inspect
import weakref
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import nn

Grid = tuple[int, int]
Layout = Literal["square", "image", "either"]
Ways = tuple[str, ...]
WAYS: Ways = ("keyword", "position")


def is_square(tokens: int) -> bool:
    """Whether so many patches form a square grid."""
    return int(tokens**0.5) ** 2 == tokens  # exact for a square; math.isqrt is none of what torch.compile knows


def square_grid(tokens: int) -> Grid:
    """The square grid of ``tokens`` patches; ``ValueError`` if there is none."""
    if not is_square(tokens):
        raise ValueError(f"N = {tokens} patches form no square grid: pass grid=(gh, gw) with gh * gw == {tokens}")
    side = int(tokens**0.5)
    return side, side


def grid_of(embed: nn.Module | None) -> Grid | None:
    """The ``grid_size`` of a patch embedding, or of what it wraps; None if it knows none, or several."""
    if embed is None:
        return None
    size = getattr(embed, "grid_size", None)
    sizes = {tuple(size)} if size else {tuple(found) for m in embed.modules() if (found := getattr(m, "grid_size", None))}
    return cast(Grid, sizes.pop()) if len(sizes) == 1 else None


class ImageGrid:
    """How the patches of a model's images lie, for an attention that is not told: asks the ``patch_embed`` that the model has now.

    The model is held weakly: it is no part of its attention. An attention that has lost its model, or was copied without it, keeps the
    ``patch_embed`` that it knew, or the copy of that.

    Args:
        model: It has a ``patch_embed``.
        layout: "square" is timm's wherever N is one, and the image's grid else; "image" nothing but the image's grid; "either" the
            image's grid where that has N patches, and a square else.
    """

    _model: weakref.ref[nn.Module] | None
    _embed: nn.Module | None

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model, self._embed, self.layout = weakref.ref(model), cast(nn.Module, model.patch_embed), layout

    def size(self) -> Grid | None:
        """(gh, gw), where the ``patch_embed`` knows."""
        return grid_of(self._patch_embed())

    def of(self, tokens: int) -> Grid:
        """The grid of ``tokens`` patches; ``ValueError`` if they have none."""
        if self.layout == "square" and is_square(tokens):
            return square_grid(tokens)
        size = self.size()
        if size is not None and size[0] * size[1] == tokens and tokens:
            return size
        if self.layout == "image" and tokens:
            knows = "none" if size is None else f"{size[0]} x {size[1]}"
            name = type(self._patch_embed()).__name__
            raise ValueError(f"there are N = {tokens} patches, and the patch_embed, {name}, has grid_size {knows}: pass grid=(gh, gw)")
        return square_grid(tokens)

    def _patch_embed(self) -> nn.Module | None:
        model = None if self._model is None else self._model()
        if model is None:
            return self._embed
        embed = getattr(model, "patch_embed", None)
        if not torch.compiler.is_compiling():
            self._embed = embed
        return embed

    def __getstate__(self) -> dict[str, Any]:
        return {"model": None if self._model is None else self._model(), "embed": self._patch_embed(), "layout": self.layout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = None if state["model"] is None else weakref.ref(state["model"])
        self._embed, self.layout = state["embed"], state["layout"]

    def __deepcopy__(self, memo: dict[int, Any]) -> "ImageGrid":
        state = self.__getstate__()
        copied = ImageGrid.__new__(ImageGrid)
        copied.__setstate__(state | {"model": memo.get(id(state["model"])), "embed": copy.deepcopy(state["embed"], memo)})
        return copied


def takes_grid(function: Callable[..., Any], inner: Callable[[], Ways] = lambda: WAYS) -> Ways:
    """How ``function`` takes a grid beside x: "keyword", "position", both or neither. ``inner`` is asked where it hands on what it gets.

    Not every second argument is one: only what is named ``grid``, or has to be given.
    """
    try:
        if torch.compiler.is_compiling():  # which knows no options of it
            parameters = list(inspect.signature(function).parameters.values())
        else:
            parameters = list(inspect.signature(function, follow_wrapped=False).parameters.values())
    except (TypeError, ValueError):  # in C
        return ()
    kinds = [each.kind for each in parameters]
    ordered = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    keyword = any(each.name == "grid" and each.kind is not each.POSITIONAL_ONLY for each in parameters)
    keyword = keyword or (inspect.Parameter.VAR_KEYWORD in kinds and "keyword" in inner())
    if len(ordered) > 1:
        position = ordered[1].name == "grid" or ordered[1].default is inspect.Parameter.empty
    else:
        position = inspect.Parameter.VAR_POSITIONAL in kinds and "position" in inner()
    return tuple(way for way, holds in zip(WAYS, (keyword, position), strict=True) if holds)
