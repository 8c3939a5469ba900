"""The model that a PyTorch run trained, for those that use it: pictures, exports, services."""

from pathlib import Path
from typing import Any

from convit.engine.pytorch.build import build_model
from convit.engine.recipe import Recipe, load_recipe
from convit.weights.load import load_checkpoint, read


def trained_model(run: Path) -> tuple[Any, Recipe]:
    """The best model of a PyTorch run, in evaluation mode, and the run's recipe.

    Raises:
        FileNotFoundError: ``run`` has no recipe.yaml, or neither best.pth nor last.pth.
    """
    weights = next((run / name for name in ("best.pth", "last.pth") if (run / name).exists()), None)
    if weights is None or not (run / "recipe.yaml").exists():
        raise FileNotFoundError(f"{run} must hold recipe.yaml and best.pth or last.pth of a PyTorch training run")
    recipe = load_recipe(run / "recipe.yaml", {"pretrained": False, "ckpt_path": ""})
    classes = read(weights).tensors["head.weight"].shape[0]
    return load_checkpoint(build_model(recipe, classes), weights).eval(), recipe
