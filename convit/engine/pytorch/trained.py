"""A trained model in PyTorch, from wherever it lies."""

from pathlib import Path
from typing import Any

from convit.architecture import VARIANTS
from convit.engine.pytorch.checkpoint import facts_of
from convit.engine.trained import Trained, class_names, find_trained
from convit.weights.load import load_checkpoint


def trained_model(place: str | Path) -> Any:
    """A PyTorch ConViT in evaluation mode, on CPU, whose ``pretrained_cfg`` says how to prepare an image and what its classes are called.

    Args:
        place: A run's folder of either framework, a folder with ``config.json`` (timm's or ours), a checkpoint of any kind, or the name
            of a variant, which means its published weights.

    Raises:
        FileNotFoundError, ValueError: See ``convit.engine.trained.find_trained``.
    """
    import convit

    if str(place) in VARIANTS and not Path(place).exists():
        model = convit.create_model(str(place), pretrained=True)
        model.pretrained_cfg["label_names"] = class_names([], model.num_classes)
        return model.eval()
    found = find_trained(place, facts_of)
    model = load_checkpoint(convit.ConViT(**found.shape), found.path).eval()
    model.pretrained_cfg = config_of(found)
    return model


def config_of(found: Trained) -> dict[str, Any]:
    """What a model carries as its ``pretrained_cfg``: timm's keys, ``label_names`` and ``results``."""
    asked = found.preparation._asdict()
    size = asked.pop("size")
    return {
        "architecture": found.variant or "convit",
        "num_classes": found.shape["num_classes"],
        "input_size": (found.shape["in_chans"], *size),
        **asked,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "label_names": found.classes,
        "results": found.results,
    }


def from_pretrained(place: str | Path, *, num_classes: int | None = None, img_size: Any = None, **options: Any) -> Any:
    """A ConViT in evaluation mode from the Hub, or from whatever ``trained_model`` takes.

    Args:
        place: A repository (``owner/name``), a run's folder, a folder of the Hub, a checkpoint of any kind, or a variant.
        num_classes: A fresh head for so many classes, to fine-tune, where it is another number than the weights'.
        img_size: Another image size; the position embedding is resampled.
        **options: Of ``huggingface_hub``: revision, token, cache_dir, force_download, local_files_only.

    Raises:
        OSError: It is neither here nor on the Hub.
        ValueError: It is no ConViT.
    """
    if Path(place).exists() or str(place) in VARIANTS:
        model = trained_model(place)
    else:
        from convit.engine.pytorch.hub import fetch

        model = trained_model(fetch(str(place), **options))
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)
        model.pretrained_cfg |= {"num_classes": num_classes, "label_names": class_names([], num_classes), "results": {}}
    if img_size is not None:
        model.set_input_size(img_size)
    return model


def save_pretrained(
    model: Any, folder: str | Path, *, classes: list[str] | None = None, results: dict[str, float] | None = None, **options: Any
) -> str | None:
    """Write ``config.json``, ``model.safetensors`` and a model card; ``from_pretrained`` and timm's ``local-dir:`` read them.

    Args:
        model: Our ConViT.
        folder: Where to; made if needed.
        classes: Names of the outputs; default those that the model came with.
        results: Measured figures for the card, such as ``{"top1": 81.4}``; default those that the model came with.
        **options: Of huggingface_hub's ``save_pretrained``: repo_id, push_to_hub, ...
    """
    from convit.engine.pytorch.hub import Hub

    return Hub(model, classes, results).save_pretrained(folder, **options)


def push_to_hub(
    model: Any, repo_id: str, *, classes: list[str] | None = None, results: dict[str, float] | None = None, **options: Any
) -> str:
    """Upload what ``save_pretrained`` writes to the repository ``repo_id``, and return the address of the commit.

    Args:
        model, classes, results: See ``save_pretrained``.
        repo_id: ``owner/name``; made if needed.
        **options: Of huggingface_hub's ``push_to_hub``: private, token, branch, commit_message, create_pr, ...
    """
    from convit.engine.pytorch.hub import Hub

    return Hub(model, classes, results).push_to_hub(repo_id, **options)
