"""What a recipe describes, in PyTorch: the model, its precision, and from timm the optimiser, mixing and loss."""

from typing import Any

import torch
from torch import nn

from convit.engine.recipe import Recipe
from convit.engine.schedule import share_and_decay


def build_model(recipe: Recipe, num_classes: int, strict_head: bool = True) -> nn.Module:
    """The model that ``recipe`` describes, with ``num_classes`` outputs, on CPU, its weights drawn from the seed or loaded.

    ``strict_head`` False keeps a fresh classifier where the weights have another number of classes: to fine-tune.

    Raises:
        ValueError: Unknown name, keys that do not fit together, or weights that do not fit the model.
    """
    import convit

    names = ("patch_size", "embed_dim", "depth", "num_heads", "local_up_to_layer", "locality_strength")
    given = {name: value for name in names if (value := getattr(recipe, name)) is not None}
    given |= {
        "img_size": recipe.image_resize,
        "in_chans": recipe.in_channels,
        "num_classes": num_classes,
        "drop_rate": recipe.drop_rate,
        "drop_path_rate": recipe.drop_path_rate,
    }
    if recipe.model == "convit" and recipe.pretrained:
        raise ValueError("pretrained needs the name of a variant in model, not 'convit'")
    with torch.random.fork_rng([]):  # the caller's draws go on as before
        torch.default_generator.manual_seed(recipe.seed)
        if recipe.model == "convit":
            model = convit.ConViT(**given)
        else:
            model = convit.create_model(recipe.model, pretrained=recipe.pretrained, **given)
    if recipe.ckpt_path:
        convit.load_checkpoint(model, recipe.ckpt_path, strict_head=strict_head)
    return model


def amp_dtype(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision on ``device``; ``None`` for float32."""
    if recipe.amp_level == "O0":
        return None
    if recipe.amp_dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}[recipe.amp_dtype]
    if device.type == "cpu":
        return None
    return torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16


def fastest(model: nn.Module, recipe: Recipe, device: torch.device, precision: str) -> nn.Module:
    """On CPU the model's ``convit.optimize`` in ``precision`` ("auto", "float32" or "bfloat16"); ``model`` itself on another device, or
    where the recipe's ``amp_dtype`` or ``compile`` say how it is to run. An ``amp_level`` alone chooses no type on CPU.

    Raises:
        ValueError: A precision is asked for where it has no say; float32 is what everything runs in that has no ``amp_dtype``.
    """
    import convit

    said = "device" if device.type != "cpu" else "amp_dtype" if amp_dtype(recipe, device) else "compile" if recipe.compile else None
    if said is None:
        return convit.optimize(model, None if precision == "auto" else precision)
    if precision == "bfloat16" or (precision == "float32" and amp_dtype(recipe, device)):
        raise ValueError(f"precision {precision} is of inference on CPU, where the recipe does not choose otherwise: it sets {said}")
    return model


def build_optimizer(recipe: Recipe, model: Any, lr: float) -> torch.optim.Optimizer:
    """timm's optimiser, with its groups for weight decay and layer decay.

    Raises:
        ValueError: Nesterov's momentum for adam, which MindSpore has.
    """
    from timm.optim import create_optimizer_v2

    if recipe.opt == "adam" and recipe.use_nesterov:
        raise ValueError("use_nesterov with opt adam is MindSpore's: use opt nadam, or framework mindspore")
    opt = {"sgd": "sgd" if recipe.use_nesterov else "momentum", "momentum": "sgd" if recipe.use_nesterov else "momentum"}
    more: dict[str, Any] = {} if recipe.opt in (*opt, "lion") else {"eps": recipe.eps}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(share_and_decay(recipe, name, parameter.ndim, len(model.blocks)), []).append(parameter)
    # in timm's order: lamb sums over the groups
    ordered = groups if recipe.layer_decay is not None else sorted(groups, key=lambda group: group[1] > 0)
    trained = [{"params": groups[share, decay], "lr_scale": share, "weight_decay": decay} for share, decay in ordered]
    return create_optimizer_v2(trained, opt.get(recipe.opt, recipe.opt), lr=lr, momentum=recipe.momentum, **more)


def build_loss(recipe: Recipe, num_classes: int) -> tuple[Any, nn.Module]:
    """timm's mixing of images and targets, ``None`` without it, and the loss that takes its targets."""
    from timm.data import Mixup
    from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

    mixup, smoothing = None, recipe.label_smoothing
    if recipe.mixup > 0 or recipe.cutmix > 0:
        mixup = Mixup(recipe.mixup, recipe.cutmix, prob=recipe.cutmix_prob, label_smoothing=smoothing, num_classes=num_classes)
    if recipe.loss == "BCE":
        return mixup, BinaryCrossEntropy(0.0 if mixup else smoothing)
    return mixup, SoftTargetCrossEntropy() if mixup else nn.CrossEntropyLoss(label_smoothing=smoothing)
