"""What a recipe describes, in MindSpore: the device, the model, and from MindCV the optimiser, loss and train step."""

import importlib
import os
import random
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
from mindspore import Tensor, nn

import convit.mindspore
from convit.engine.mindspore.steps import EachMean
from convit.engine.recipe import FIELDS, Recipe
from convit.engine.schedule import share_and_decay
from convit.engine.shown import quiet
from convit.engine.world import World, find_world, rendezvous

# keys that this engine cannot honour, with the only value it takes
ONLY = {
    "amp_dtype": "auto",
    "channels_last": False,
    "compile": False,
    "fsdp": False,
    "grad_checkpointing": False,
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
    if recipe.device not in ("auto", "cpu", "cuda", "npu"):
        raise ValueError(f"device must be auto, CPU, GPU or Ascend with framework mindspore, got {recipe.device!r}")
    if recipe.opt == "lamb" and (recipe.device == "cpu" or (recipe.device == "auto" and ms.get_context("device_target") == "CPU")):
        raise ValueError("opt lamb has no kernel in MindSpore on CPU: use opt adamw, another device, or framework pytorch")
    try:
        import mindcv  # noqa: F401
    except ImportError as error:
        raise ImportError(f"training in MindSpore uses MindCV's engine: pip install mindcv 'numpy<2' ({error})") from None


def check_precision(level: str, cast_list: str | None) -> None:
    """Raise ``ValueError`` for mixed precision that does not work: MindSpore rewrites the code of cells for O1, and fails on ConViT's."""
    if level == "O1" and cast_list is None:
        raise ValueError("amp_level O1 fails in MindSpore, which would rewrite the model's code for it: use amp_level O2 or O3, or O0")
    if level in ("O1", "O2") and "nn.Dense" in (cast_list or ""):
        raise ValueError("amp_cast_list cannot name nn.Dense: the attention takes the weights of its dense layers, which MindCV would hide")


def start(recipe: Recipe) -> World:
    """Choose the device and mode, and join the other processes if a launcher (msrun, mpirun) started several."""
    ms.set_context(mode=recipe.mode)
    target = {"cpu": "CPU", "cuda": "GPU", "npu": "Ascend"}.get(recipe.device)
    if target not in (None, ms.get_context("device_target")):
        ms.set_device(target)  # MindSpore refuses it once it has computed, even if nothing changes
    if recipe.mode == ms.PYNATIVE_MODE and ms.get_context("device_target") == "CPU":
        ms.runtime.launch_blocking()  # otherwise MindSpore's dispatching threads wait for one another on few cores
    world = find_world()
    # msrun on several machines lets MindSpore give out the ranks
    if recipe.distribute is False or (world.size == 1 and int(os.environ.get("MS_WORKER_NUM", "1")) == 1):
        return World()
    from mindspore.communication import get_group_size, get_rank, init

    if ms.get_context("device_target") == "CPU" and world.launcher in ("Open MPI", "MPICH", "srun"):
        _play_msrun(world)
    init()
    world = world._replace(rank=get_rank(), size=get_group_size(), launcher=world.launcher or "msrun")
    ms.set_auto_parallel_context(device_num=world.size, parallel_mode="data_parallel", gradients_mean=True)
    return world


def _play_msrun(world: World) -> None:
    """Set what MindSpore's processes on CPU expect of msrun, and start its scheduler beside the first of them."""
    host, port = rendezvous(world)
    known = {"MS_WORKER_NUM": world.size, "MS_SCHED_HOST": socket.gethostbyname(host), "MS_SCHED_PORT": port}
    os.environ.update({name: str(value) for name, value in known.items()}, MS_NODE_ID=str(world.rank), MS_ROLE="MS_WORKER")
    if world.rank == 0:
        code = "from mindspore.communication import init; init('mccl')"
        own: dict[str, Any] = {"env": {**os.environ, "MS_ROLE": "MS_SCHED"}, "stdout": subprocess.DEVNULL, "start_new_session": True}
        subprocess.Popen([sys.executable, "-c", code], **own)  # it ends when all processes have left, which may be after this one


@contextmanager
def own_generators() -> Iterator[None]:
    """Inside, Python, NumPy and MindSpore are seeded at will; afterwards they draw what the caller would have drawn."""
    states, drawn, pipelines, seed = (random.getstate(), np.random.get_state()), ms.get_rng_state(), ds.config.get_seed(), ms.get_seed()
    try:
        yield
    finally:
        ms.set_seed(seed or 0)
        if seed is None:  # which set_seed does not take
            vars(importlib.import_module("mindspore.common.seed"))["_GLOBAL_SEED"] = None
        ms.set_rng_state(drawn)
        ds.config.set_seed(pipelines)
        random.setstate(states[0])
        np.random.set_state(states[1])


def build_model(recipe: Recipe, num_classes: int, strict_head: bool = True) -> nn.Cell:
    """The model that ``recipe`` describes; see ``convit.engine.pytorch.build.build_model``."""
    names = ("patch_size", "embed_dim", "depth", "num_heads", "local_up_to_layer", "locality_strength")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(recipe, name)) is not None}
    given |= {"image_size": recipe.image_resize, "in_channels": recipe.in_channels, "num_classes": num_classes}
    given |= {"drop_rate": recipe.drop_rate, "drop_path_rate": recipe.drop_path_rate}
    ms.set_seed(recipe.seed)
    if recipe.model == "convit":
        if recipe.pretrained:
            raise ValueError("pretrained needs the name of a variant in model, not 'convit'")
        model = convit.mindspore.ConViT(**given)
    else:
        model = convit.mindspore.create_model(recipe.model, pretrained=recipe.pretrained, **given)
    if recipe.ckpt_path:
        convit.mindspore.load_checkpoint(model, recipe.ckpt_path, strict_head=strict_head)
    return model


def sinks(recipe: Recipe) -> bool:
    """Whether the device is fed a whole epoch at a time, by MindSpore's own loop; a CPU cannot be, nor are batches summed there."""
    return recipe.dataset_sink_mode and recipe.gradient_accumulation_steps == 1 and ms.get_context("device_target") != "CPU"


def first_scale(recipe: Recipe) -> tuple[float, bool]:
    """The loss scale of the first step, and whether it adapts; with ``auto`` MindSpore's own choice."""
    if recipe.loss_scale_type == "auto":
        return (2.0**24, True) if recipe.amp_level == "O2" else (1.0, False)
    return recipe.loss_scale, recipe.loss_scale_type == "dynamic"


def build_step(recipe: Recipe, model: nn.Cell, schedule: list[float]) -> Any:
    """MindCV's train step, of which ``network`` with the loss, ``grad``, ``weights``, ``grad_reducer`` and ``optimizer`` are used."""
    from mindcv.loss import create_loss
    from mindcv.optim import create_optimizer
    from mindcv.utils import create_trainer

    groups: dict[tuple[float, float], list[Any]] = {}
    for parameter in model.trainable_params():
        groups.setdefault(share_and_decay(recipe, parameter.name, parameter.ndim, len(model.blocks)), []).append(parameter)
    trained: list[dict[str, Any]] = [{"params": group, "weight_decay": decay} for (_, decay), group in groups.items()]
    if recipe.layer_decay is not None:
        for (share, _), group in zip(groups, trained, strict=True):
            group["lr"] = [rate * share for rate in schedule]
    trained.append({"order_params": model.trainable_params()})
    with quiet("mindcv.optim.optim_factory"):  # it warns that nobody says what has no weight decay
        optimizer = create_optimizer(
            trained,
            opt=recipe.opt,
            lr=schedule,
            momentum=recipe.momentum,
            nesterov=recipe.use_nesterov,
            weight_decay_filter="auto",  # the groups say
            eps=recipe.eps,
        )
    if recipe.opt in ("adam", "adamw", "nadam", "lamb"):  # MindCV hands eps to rmsprop alone
        optimizer.eps = Tensor(np.full(optimizer.eps.shape, recipe.eps, np.float32))
    plain = getattr(type(optimizer).construct, "__wrapped__", None)
    if plain and ms.get_context("mode") == ms.PYNATIVE_MODE and ms.get_context("device_target") == "CPU":
        # compiled, as some of MindCV's are, it would leave every operator after it to MindSpore's threads: see start()
        optimizer.construct = types.MethodType(plain, optimizer)
    loss = create_loss(recipe.loss, label_smoothing=recipe.label_smoothing)
    if recipe.loss == "BCE":
        loss = EachMean(loss)
    return create_trainer(model, loss, optimizer, None, recipe.amp_level, recipe.amp_cast_list, "fixed").train_network


assert set(ONLY) <= set(FIELDS)
