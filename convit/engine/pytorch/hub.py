"""Models on the Hugging Face Hub, and in folders as it has them: ``config.json`` in timm's layout, ``model.safetensors``, a model card.

timm reads the same folders (``local-dir:``, ``hf-hub:``) where its ConViT computes the same; other shapes and settings are stored under
the architecture "convit", which timm does not know, so that it refuses them in place of computing something else.
"""

import json
from pathlib import Path
from typing import Any

try:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData, ModelHubMixin, snapshot_download
except ImportError as error:
    raise ImportError("the Hub needs huggingface_hub: pip install huggingface_hub") from error

from convit.engine.preparation import Preparation
from convit.engine.trained import class_names, variant_of
from convit.weights.load import save_checkpoint, settings_of

FILES = ("config.json", "model.safetensors", "pytorch_model.bin")


def fetch(name: str, **options: Any) -> str:
    """The folder that ``snapshot_download`` brings the repository ``name`` into; ``OSError`` where the Hub does not give it."""
    try:
        return str(snapshot_download(name, allow_patterns=list(FILES), **options))
    except (OSError, ValueError) as error:  # the hub's own are of both kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"{name} is no file or folder here, and the Hub does not give it: {reason}") from error


class Hub(ModelHubMixin):
    """What ``huggingface_hub`` saves and uploads: a model, its classes and its measured figures."""

    def __init__(self, model: Any, names: list[str] | None = None, measured: dict[str, float] | None = None) -> None:
        recorded = model.pretrained_cfg.get("label_names") or []
        self.model, self.results = model, measured or model.pretrained_cfg.get("results") or {}
        if names is not None and len(names) != model.num_classes:
            raise ValueError(f"classes must name the {model.num_classes} outputs of the model, got {len(names)}")
        self.classes = list(names or class_names(list(recorded), model.num_classes))

    def _save_pretrained(self, save_directory: Path) -> None:
        save_checkpoint(self.model, save_directory / "model.safetensors")
        text = json.dumps(config_of(self.model, self.classes, self.results), indent=2, ensure_ascii=False)
        (save_directory / "config.json").write_text(text + "\n", encoding="utf-8")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card: what the model is, its measured figures, its classes, how to use it."""
        model, asked = self.model, Preparation.of(self.model)
        name = model.pretrained_cfg.get("architecture") or "convit"
        data: dict[str, Any] = {"library_name": "convit", "pipeline_tag": "image-classification", "tags": ["convit"]}
        about: dict[str, Any] = {"task_type": "image-classification", "dataset_type": "imagefolder", "dataset_name": "validation split"}
        measured = [
            EvalResult(metric_type="accuracy", metric_name=f"{label} accuracy, percent", metric_value=self.results[each], **about)
            for each, label in (("top1", "top-1"), ("top5", "top-5"))
            if each in self.results
        ]
        data |= {"model_name": name, "eval_results": measured} if measured else {}
        parameters = sum(each.numel() for each in model.parameters()) / 1e6
        figures = "\n".join(f"| {each} | {value:g} |" for each, value in self.results.items())
        names_shown = ", ".join(self.classes[:50]) + (f" and {len(self.classes) - 50} more" if len(self.classes) > 50 else "")
        text = f"""---
{ModelCardData(**data).to_yaml()}
---

# {name}

A [ConViT](https://arxiv.org/abs/2103.10697) of {parameters:.1f} M parameters for images of {asked.size[0]} x {asked.size[1]} pixels
(resized so that the crop keeps {asked.crop_pct:g} of the smaller side, {asked.interpolation}, mean {_listed(asked.mean)},
standard deviation {_listed(asked.std)}).

```python
import convit

model = convit.ConViT.from_pretrained("REPOSITORY_OR_FOLDER")
```

## Measured

{"| figure | value |" + chr(10) + "|---|---|" + chr(10) + figures if figures else "Nothing was recorded."}

## Classes

{names_shown}
"""
        return ModelCard(text)


def config_of(model: Any, classes: list[str], results: dict[str, float]) -> dict[str, Any]:
    """What ``config.json`` says, in timm's layout."""
    asked = Preparation.of(model)
    shape = {
        "img_size": list(asked.size),
        "patch_size": list(model.patch_embed.patch_size),
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
        "local_up_to_layer": model.local_up_to_layer,
        "reg_tokens": model.num_reg_tokens,
    }
    square = asked.size[0] == asked.size[1]
    usual = settings_of(model) == {"act": "gelu", "norm_eps": 1e-6} and model.global_pool == "token" and square
    biased = any(name.endswith((".qk.bias", ".qkv.bias")) for name, _ in model.named_parameters())
    plain = usual and not model.num_reg_tokens and model.pos_embed is not None and not biased
    architecture = variant_of(shape) if plain else None
    return {
        "architecture": architecture or "convit",
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "label_names": classes,
        "results": results,
        "shape": shape,
        "pretrained_cfg": {
            "input_size": [model.in_chans, *asked.size],
            "fixed_input_size": True,
            "interpolation": asked.interpolation,
            "crop_pct": asked.crop_pct,
            "mean": list(asked.mean),
            "std": list(asked.std),
            "num_classes": model.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
