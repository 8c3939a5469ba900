"""What a recipe describes, in MindSpore: the device, the model, and from MindCV the optimiser, loss and train step."""

import os
from typing import Any

import mindspore as ms
from mindspore import nn

import convit.mindspore
from convit.engine.recipe import FIELDS, Recipe
from convit.engine.world import World, find_world

# keys that this engine cannot honour, with the only value it takes
ONLY = {
    "amp_dtype": "auto",
    "channels_last": False,
    "class_balanced": False,
    "compile": False,
    "fsdp": False,
    "grad_checkpointing": False,
    "mixup_off_epoch": 0,
    "sampling_ratio": 1.0,
    "tensorboard": False,
    "shift": 0,
}


def check_recipe(recipe: Recipe) -> None:
    """Raise ``ValueError`` for what this engine cannot do, ``ImportError`` without MindCV."""
    for name, only in ONLY.items():
        if getattr(recipe, name) != only and not (name == "shift" and recipe.dataset == "digits"):
            raise ValueError(f"{name} can only be {only!r} with framework mindspore, got {getattr(recipe, name)!r}")
    if recipe.interpolation == "random":
        raise ValueError("interpolation can only be 'bilinear' or 'bicubic' with framework mindspore, got 'random'")
    if recipe.dataset not in ("imagenet", "folder", "digits"):
        raise ValueError(f"dataset must be imagenet, folder or digits with framework mindspore, got {recipe.dataset!r}")
    try:
        import mindcv  # noqa: F401
    except ImportError as error:
        raise ImportError(f"training in MindSpore uses MindCV's engine: pip install mindcv 'numpy<2' ({error})") from None


def start(recipe: Recipe) -> World:
    """Choose the device and mode, and join the other processes if a launcher (msrun, mpirun) started several."""
    ms.set_context(mode=recipe.mode)
    if recipe.device != "auto":
        ms.set_device({"cpu": "CPU", "gpu": "GPU", "cuda": "GPU", "ascend": "Ascend"}.get(recipe.device.lower(), recipe.device))
    if recipe.mode == ms.PYNATIVE_MODE and ms.get_context("device_target") == "CPU":
        ms.runtime.launch_blocking()  # otherwise MindSpore's dispatching threads wait for one another on few cores
    world = find_world()
    # msrun on several machines lets MindSpore give out the ranks
    if recipe.distribute is False or (world.size == 1 and int(os.environ.get("MS_WORKER_NUM", "1")) == 1):
        return World()
    from mindspore.communication import get_group_size, get_rank, init

    init()
    world = world._replace(rank=get_rank(), size=get_group_size(), launcher=world.launcher or "msrun")
    ms.set_auto_parallel_context(device_num=world.size, parallel_mode="data_parallel", gradients_mean=True)
    return world


def build_model(recipe: Recipe, num_classes: int, strict_head: bool = True) -> nn.Cell:
    """The model that ``recipe`` describes; see ``convit.engine.pytorch.build.build_model``."""
    names = ("patch_size", "embed_dim", "depth", "num_heads", "local_up_to_layer", "locality_strength")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(recipe, name)) is not None}
    given |= {"image_size": recipe.image_resize, "in_channels": recipe.in_channels, "num_classes": num_classes}
    given |= {"drop_rate": recipe.drop_rate, "drop_path_rate": recipe.drop_path_rate}
    ms.set_seed(recipe.seed)
    if recipe.model == "convit":
        model = convit.mindspore.ConViT(**given)
    else:
        model = convit.mindspore.create_model(recipe.model, pretrained=recipe.pretrained, **given)
    if recipe.ckpt_path:
        convit.mindspore.load_checkpoint(model, recipe.ckpt_path, strict_head=strict_head)
    return model


def sinks(recipe: Recipe) -> bool:
    """Whether the device is fed a whole epoch at a time, by MindSpore's own loop; a CPU cannot be."""
    return recipe.dataset_sink_mode and ms.get_context("device_target") != "CPU"


def build_trainer(recipe: Recipe, model: nn.Cell, schedule: list[float], sink: bool) -> Any:
    """MindCV's trainer, a ``mindspore.Model`` whose ``train_network`` holds network, loss, optimiser and loss scale."""
    from mindcv.loss import create_loss
    from mindcv.optim import create_optimizer
    from mindcv.utils import create_trainer
    from mindcv.utils.trainer_factory import require_customized_train_step

    extras = {
        "ema": recipe.ema,
        "ema_decay": recipe.ema_decay,
        "clip_grad": recipe.clip_grad,
        "clip_value": recipe.clip_value,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
    }
    # MindCV's step with extras undoes the loss scale itself, as ours does; MindSpore's plain one leaves it to the optimiser
    plain = sink and not require_customized_train_step(recipe.ema, recipe.clip_grad, recipe.gradient_accumulation_steps)
    optimizer = create_optimizer(
        model if recipe.layer_decay is not None else model.trainable_params(),
        opt=recipe.opt,
        lr=schedule,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        nesterov=recipe.use_nesterov,
        weight_decay_filter="norm_and_bias" if recipe.filter_bias_and_bn else "disable",
        layer_decay=recipe.layer_decay,
        loss_scale=1.0 if recipe.dynamic_loss_scale or not plain else recipe.loss_scale,
        eps=recipe.eps,
    )
    return create_trainer(
        model,
        create_loss(recipe.loss, label_smoothing=recipe.label_smoothing),
        optimizer,
        None,
        recipe.amp_level,
        None,
        "dynamic" if recipe.dynamic_loss_scale else "fixed",
        recipe.loss_scale,
        drop_overflow_update=recipe.dynamic_loss_scale,
        **(extras if sink else {}),
    )


assert set(ONLY) <= set(FIELDS)
