"""A trained model in MindSpore, from wherever it lies."""

from pathlib import Path

from convit.engine.mindspore.checkpoint import facts_of
from convit.engine.trained import Trained, find_trained
from convit.mindspore.model import ConViT, load_checkpoint

# argument of the PyTorch model -> of this one
_NAMES = {"img_size": "image_size", "in_chans": "in_channels"}


def trained_model(place: str | Path) -> tuple[ConViT, Trained]:
    """The model in evaluation mode, and what its files say; see ``convit.engine.trained.find_trained``.

    Raises:
        ValueError: The weights are of a ConViT that MindSpore's cannot be: with register tokens, or patches that are no square.
    """
    found = find_trained(place, facts_of)
    shape = {_NAMES.get(name, name): value for name, value in found.shape.items()}
    if shape.pop("reg_tokens", 0) or shape.pop("global_pool", "token") != "token":
        raise ValueError(f"{found.path} has register tokens or pools its patches, which the MindSpore model does not")
    shape["image_size"] = found.preparation.size
    return load_checkpoint(ConViT(**shape), found.path).set_train(False), found
