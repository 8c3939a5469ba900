"""Training in MindSpore on MindCV's engine: data, loss, optimiser, schedule and trainer are its builders; the recipe and the run's files
are those of the PyTorch engine.

Differences from it, each of them refused or said rather than ignored: a run is resumed at the end of its last complete epoch, with the
data in another order; a loss that is not finite stops the run at once, because MindSpore has already applied the step.
"""

import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

import convit.mindspore
from convit.config import FIELDS, Recipe, dump_recipe, load_recipe

logger = logging.getLogger("convit")

# keys that this engine cannot honour, with the only value it takes
ONLY = {
    "amp_dtype": "auto",
    "channels_last": False,
    "compile": False,
    "fsdp": False,
    "grad_checkpointing": False,
    "sampling_ratio": 1.0,
    "tensorboard": False,
    "warmup_prefix": True,
    "shift": 0,
}


class Interrupted(Exception):
    """A signal asked the run to stop; the last complete epoch is saved."""

    def __init__(self, signum: int, path: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name}; {path} holds the last complete epoch; go on with --resume {path.parent}"
        )
        self.signum = signum


@dataclass
class Result:
    """What a finished run gives; scores in percent."""

    model: nn.Cell
    output: Path
    top1: float
    top5: float
    val_loss: float
    best_top1: float
    best_epoch: int
    train_loss: float
    epochs: int
    seconds: float
    history: list[dict[str, Any]]


def check_recipe(recipe: Recipe) -> None:
    """Raise ``ValueError`` for what this engine cannot do, ``ImportError`` without MindCV."""
    for name, only in ONLY.items():
        if getattr(recipe, name) != only and not (name == "shift" and recipe.dataset == "digits"):
            raise ValueError(f"{name} can only be {only!r} with framework mindspore, got {getattr(recipe, name)!r}")
    if recipe.dataset not in ("imagenet", "folder", "digits"):
        raise ValueError(f"dataset must be imagenet, folder or digits with framework mindspore, got {recipe.dataset!r}")
    try:
        import mindcv  # noqa: F401
    except ImportError as error:
        raise ImportError(f"training in MindSpore uses MindCV's engine: pip install mindcv 'numpy<2' ({error})") from None


def start(recipe: Recipe) -> tuple[int, int]:
    """Choose the device and mode, and join the other processes if a launcher (msrun, mpirun) started several: (rank, size)."""
    ms.set_context(mode=recipe.mode)
    if recipe.device != "auto":
        ms.set_device({"cpu": "CPU", "gpu": "GPU", "cuda": "GPU", "ascend": "Ascend"}.get(recipe.device.lower(), recipe.device))
    launched = max(int(os.environ.get(name, "1")) for name in ("MS_WORKER_NUM", "OMPI_COMM_WORLD_SIZE", "RANK_SIZE"))
    if recipe.distribute is False or launched == 1:
        return 0, 1
    from mindspore.communication import get_group_size, get_rank, init

    init()
    rank, size = get_rank(), get_group_size()
    ms.set_auto_parallel_context(device_num=size, parallel_mode="data_parallel", gradients_mean=True)
    return rank, size


def normalisation(recipe: Recipe) -> tuple[list[float], list[float]]:
    """``mean`` and ``std`` of images in 0 to 255, as MindCV takes them."""
    by = 1.0 if max(recipe.mean) > 1 else 255.0
    return [value * by for value in recipe.mean], [value * by for value in recipe.std]


class _Digits:
    """scikit-learn's digits for a GeneratorDataset, the split of the PyTorch engine: ([1, s, s] float32, label)."""

    def __init__(self, recipe: Recipe, train: bool) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError:
            raise ImportError("the digits need scikit-learn: pip install scikit-learn") from None
        from PIL import Image

        pixels, labels = load_digits(return_X_y=True)
        parts = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0)
        size = recipe.image_resize
        mean, std = (value[0] / 255 for value in normalisation(recipe))
        small = (parts[0] if train else parts[1]).reshape(-1, 8, 8).astype(np.float32) / 16
        large = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in small]
        self.images = (np.stack(large)[:, None] - mean) / std
        self.labels = (parts[2] if train else parts[3]).astype(np.int32)
        self.blank, self.reach = -mean / std, recipe.shift if train else 0
        self.random = np.random.default_rng(recipe.seed)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int32]:
        image = self.images[index].astype(np.float32)
        if self.reach:
            size = image.shape[-1]
            y, x = self.random.integers(0, 2 * self.reach + 1, 2)
            wide = np.pad(image[0], self.reach, constant_values=self.blank)
            image = np.ascontiguousarray(wide[y : y + size, x : x + size][None])
        return image, self.labels[index]


def make_data(recipe: Recipe, train: bool, rank: int, size: int) -> tuple[Any, int, int]:
    """(loader of (images, targets) batches, classes, samples) of a split."""
    import mindspore.dataset as ds
    from mindcv.data import create_dataset, create_loader, create_transforms

    shards: dict[str, Any] = {"num_shards": size, "shard_id": rank} if size > 1 else {}
    workers = max(recipe.num_parallel_workers, 1)
    if recipe.dataset == "digits":
        source = _Digits(recipe, train)
        data = ds.GeneratorDataset(source, ["image", "label"], shuffle=train and recipe.shuffle, **shards)
        return data.batch(recipe.batch_size, drop_remainder=train and recipe.drop_remainder), 10, len(source)
    split = recipe.train_split if train else recipe.val_split
    if not recipe.data_dir:
        raise ValueError(f"data_dir must name the folder of the data set ({recipe.dataset}); --config digits needs none")
    root = Path(recipe.data_dir).expanduser()
    if not (root / split).is_dir():
        raise FileNotFoundError(f"data_dir {root} has no folder {split!r}; --{'train' if train else 'val'}_split names another")
    classes = sum(entry.is_dir() for entry in (root / split).iterdir())
    more = {"num_samples": recipe.num_samples, "num_aug_repeats": recipe.aug_repeats} if train else {}
    data = create_dataset(
        "imagenet",
        root=str(root),
        split=split,
        shuffle=train and recipe.shuffle,
        num_parallel_workers=workers,
        **{name: value for name, value in {**shards, **more}.items() if value},
    )
    samples = data.get_dataset_size() * size
    mean, std = normalisation(recipe)
    options: dict[str, Any] = {"image_resize": recipe.image_resize, "interpolation": recipe.interpolation, "mean": mean, "std": std}
    if train:
        jitter = recipe.color_jitter
        options |= {
            "scale": tuple(recipe.scale),
            "ratio": tuple(recipe.ratio),
            "hflip": recipe.hflip,
            "vflip": recipe.vflip,
            "color_jitter": jitter,
            "auto_augment": mindcv_policy(recipe.auto_augment),
            "re_prob": recipe.re_prob,
            "re_scale": tuple(recipe.re_scale),
            "re_ratio": tuple(recipe.re_ratio),
            "re_value": "random" if recipe.re_value == "random" else int(recipe.re_value),
        }
        loader = create_loader(
            data,
            recipe.batch_size,
            drop_remainder=recipe.drop_remainder,
            is_training=True,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
            cutmix_prob=recipe.cutmix_prob,
            num_classes=recipe.num_classes or classes,
            transform=create_transforms("imagenet", is_training=True, **options),
            num_parallel_workers=workers,
        )
    else:
        transform = create_transforms("imagenet", is_training=False, crop_pct=recipe.crop_pct, **options)
        loader = create_loader(data, recipe.batch_size, transform=transform, num_parallel_workers=workers)
    return loader, classes, samples


def mindcv_policy(policy: str | None) -> str | None:
    """timm's name of an augmentation policy in MindCV's words."""
    if policy is None:
        return None
    head, dash, rest = policy.partition("-")
    return {"original": "autoaug", "originalr": "autoaugr", "rand": "randaug"}.get(head, head) + dash + rest


def build_model(recipe: Recipe, num_classes: int, strict_head: bool = True) -> nn.Cell:
    """The model that ``recipe`` describes; see ``convit.pytorch.train.build_model``."""
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


def evaluate(model: nn.Cell, batches: Any, size: int) -> dict[str, float]:
    """samples, top1 and top5 (percent) and loss (mean cross entropy), in float64 over all processes."""
    model.set_train(False)
    sums = np.zeros(4)
    for images, targets in batches.create_tuple_iterator(num_epochs=1):
        logits = model(images).asnumpy().astype(np.float64)
        labels = targets.asnumpy().astype(np.int64)
        top = np.argsort(-logits, axis=1, kind="stable")[:, :5] == labels[:, None]
        shifted = logits - logits.max(axis=1, keepdims=True)
        loss = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
        sums += len(labels), top[:, 0].sum(), top.any(axis=1).sum(), loss.sum()
    if size > 1:
        from mindcv.utils import AllReduceSum

        sums = AllReduceSum()(Tensor(sums.astype(np.float32))).asnumpy().astype(np.float64)
    count, top1, top5, loss_sum = (float(value) for value in sums)
    if not count:
        raise ValueError("no validation image could be read")
    return {"samples": count, "top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss_sum / count}


def save(path: Path, parameters: Any, state: dict[str, Any] | None = None) -> None:
    """Write a MindSpore checkpoint through a temporary file that is synced and renamed."""
    temporary = path.with_name(f".{path.stem}.tmp.ckpt")
    try:
        ms.save_checkpoint([{"name": p.name, "data": p} for p in parameters], str(temporary), append_dict=state)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, ValueError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}. Free some space and go on with --resume") from error


def train(
    recipe: Recipe | str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Result:
    """Train the model of a recipe; arguments and files as ``convit.pytorch.train.train``, the checkpoints being ``.ckpt``."""
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    check_recipe(recipe)
    from mindcv.loss import create_loss
    from mindcv.optim import create_optimizer
    from mindcv.scheduler import create_scheduler
    from mindcv.utils import create_trainer

    run = Path(output or recipe.ckpt_save_dir)
    last = run / "last.ckpt"
    if last.exists() and not (resume or overwrite):
        raise FileExistsError(f"{run} already holds a run: --resume continues it, --overwrite starts over")
    rank, size = start(recipe)
    ms.set_seed(recipe.seed + rank)
    loader, classes, samples = make_data(recipe, True, rank, size)
    num_classes = recipe.num_classes or classes
    steps = loader.get_dataset_size()
    if not steps:
        raise ValueError(f"the global batch of {recipe.batch_size * size} exceeds the {samples} samples of an epoch")
    model = build_model(recipe, num_classes, strict_head=False)
    lr = recipe.lr
    if recipe.scale_lr:
        lr *= recipe.batch_size * size * recipe.gradient_accumulation_steps / recipe.scale_lr_batch
    schedule = create_scheduler(
        steps,
        scheduler=recipe.scheduler.replace("warmup_", ""),
        lr=lr,
        min_lr=recipe.min_lr,
        warmup_epochs=recipe.warmup_epochs,
        warmup_factor=recipe.warmup_factor,
        decay_epochs=recipe.decay_epochs,
        decay_rate=recipe.decay_rate,
        milestones=recipe.multi_step_decay_milestones,
        num_epochs=recipe.epoch_size,
        num_cycles=recipe.num_cycles,
        cycle_decay=recipe.cycle_decay,
        lr_epoch_stair=recipe.lr_epoch_stair,
    )
    optimizer = create_optimizer(
        model if recipe.layer_decay is not None else model.trainable_params(),
        opt=recipe.opt,
        lr=schedule,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        nesterov=recipe.use_nesterov,
        weight_decay_filter="norm_and_bias" if recipe.filter_bias_and_bn else "disable",
        layer_decay=recipe.layer_decay,
        loss_scale=1.0 if recipe.dynamic_loss_scale else recipe.loss_scale,
        eps=recipe.eps,
    )
    trainer = create_trainer(
        model,
        create_loss(recipe.loss, label_smoothing=recipe.label_smoothing),
        optimizer,
        None,
        recipe.amp_level,
        None,
        "dynamic" if recipe.dynamic_loss_scale else "fixed",
        recipe.loss_scale,
        drop_overflow_update=recipe.dynamic_loss_scale,
        ema=recipe.ema,
        ema_decay=recipe.ema_decay,
        clip_grad=recipe.clip_grad,
        clip_value=recipe.clip_value,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
    )
    keeper = _Keeper(recipe, run, trainer, model, rank, size, steps, progress and rank == 0)
    keeper.eval_data = make_data(recipe, False, rank, size)[0] if recipe.val_while_train else None
    if resume and last.exists():
        keeper.restore(last)
    elif rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        for old in [*run.glob("epoch_*.ckpt"), run / "best.ckpt", run / "log.jsonl", last]:
            old.unlink(missing_ok=True)
    if rank == 0:
        (run / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        logger.info(
            "%s, %d classes; %d training samples, %d epochs of %d steps\nMindSpore %s on %s, %d processes, amp %s; learning rate %g",
            *(recipe.model, num_classes, samples, recipe.epoch_size, steps),
            *(ms.__version__, ms.get_context("device_target"), size, recipe.amp_level, lr),
        )
    began = time.perf_counter()
    sink = recipe.dataset_sink_mode and ms.get_context("device_target") != "CPU"  # CPU has no sink
    if keeper.epoch < recipe.epoch_size:
        with keeper.signals():
            epochs, first = recipe.epoch_size, keeper.epoch
            trainer.train(epochs, loader, callbacks=[keeper.callback()], dataset_sink_mode=sink, initial_epoch=first)
        if keeper.stop:
            raise Interrupted(keeper.stop, last)
    record = keeper.history[-1] if keeper.history else keeper.last_record()
    return Result(
        model=model,
        output=run,
        top1=record.get("top1", math.nan),
        top5=record.get("top5", math.nan),
        val_loss=record.get("val_loss", math.nan),
        best_top1=keeper.best,
        best_epoch=keeper.best_epoch,
        train_loss=record.get("train_loss", math.nan),
        epochs=keeper.epoch,
        seconds=time.perf_counter() - began,
        history=keeper.history,
    )


class _Keeper:
    """Watches a run through MindSpore's callbacks: scores, log and checkpoints at the end of each epoch, signals and NaN between steps."""

    def __init__(
        self, recipe: Recipe, output: Path, trainer: Any, model: nn.Cell, rank: int, size: int, steps: int, progress: bool
    ) -> None:
        self.recipe, self.output, self.trainer, self.model = recipe, output, trainer, model
        self.rank, self.size, self.steps, self.progress = rank, size, steps, progress
        self.eval_data: Any = None
        self.epoch, self.best, self.best_epoch, self.stop = 0, -1.0, -1, 0
        self.kept: list[list[Any]] = []
        self.history: list[dict[str, Any]] = []

    def parameters(self) -> list[Any]:
        return list(self.trainer.train_network.get_parameters())

    def restore(self, path: Path) -> None:
        try:
            saved = ms.load_checkpoint(str(path))
            state = json.loads(str(saved.pop("convit_run")))
            saved.pop("learning_rate", None)  # the whole schedule, which the recipe gives anew
            missing, _ = ms.load_param_into_net(self.trainer.train_network, saved)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged, or of another model or optimiser: {str(error).splitlines()[0]}") from None
        missing = [name for name in missing if name != "learning_rate"]
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} parameters of this model and optimiser, the first is {missing[0]}")
        self.epoch, self.best, self.best_epoch, self.kept = (state[name] for name in ("epoch", "best", "best_epoch", "kept"))
        logger.info("resumed %s: epoch %d", path, self.epoch)

    def signals(self) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def caught() -> Iterator[None]:
            def handler(signum: int, frame: Any) -> None:
                if self.stop:
                    raise KeyboardInterrupt
                self.stop = signum

            old = {signum: signal.signal(signum, handler) for signum in (signal.SIGTERM, signal.SIGINT)}
            try:
                yield
            finally:
                for signum, before in old.items():
                    signal.signal(signum, before)

        return caught()

    def callback(self) -> Any:
        keeper = self

        class Watch(ms.train.Callback):
            losses: list[float]

            def on_train_epoch_begin(self, run_context: Any) -> None:
                self.began, self.losses = time.perf_counter(), []

            def on_train_step_end(self, run_context: Any) -> None:
                at = run_context.original_args()
                loss = at.net_outputs[0] if isinstance(at.net_outputs, (tuple, list)) else at.net_outputs
                self.losses.append(float(loss.asnumpy().mean()))
                if not math.isfinite(self.losses[-1]):
                    raise FloatingPointError(
                        f"the loss is {self.losses[-1]} in epoch {keeper.epoch}; {keeper.output / 'last.ckpt'} is from before. "
                        "Lower lr, clip the gradient (--clip_grad), or use --amp_level O0"
                    )
                # MindSpore counts from the start of this process
                update = keeper.epoch * keeper.steps + (at.cur_step_num - 1) % keeper.steps + 1
                if keeper.rank == 0 and update % keeper.recipe.log_interval == 0:
                    keeper.write({"kind": "step", "epoch": keeper.epoch, "update": update, "loss": self.losses[-1]})
                if keeper.stop:
                    run_context.request_stop()

            def on_train_epoch_end(self, run_context: Any) -> None:
                if not keeper.stop:
                    keeper.finish_epoch(self.losses, time.perf_counter() - self.began)

        return Watch()

    def finish_epoch(self, losses: list[float], seconds: float) -> None:
        recipe, epoch = self.recipe, self.epoch
        record: dict[str, Any] = {
            "kind": "epoch",
            "epoch": epoch,
            "train_loss": sum(losses) / max(len(losses), 1),
            "images_per_second": round(self.steps * recipe.batch_size * self.size / seconds, 2),
            "seconds": round(seconds, 3),
        }
        if self.eval_data is not None and ((epoch + 1) % recipe.val_interval == 0 or epoch + 1 == recipe.epoch_size):
            scores = evaluate(self.model, self.eval_data, self.size)
            self.trainer.train_network.set_train(True)
            record |= {"val_loss": scores["loss"], "top1": scores["top1"], "top5": scores["top5"]}
        gates = [p.asnumpy() for p in self.model.get_parameters() if p.name.endswith("gating_param")]
        record["gating"] = [[round(float(1 / (1 + np.exp(-value))), 5) for value in gate] for gate in gates]
        self.history.append(record)
        if self.progress:
            shown = f"  top-1 {record['top1']:.2f} %  val loss {record['val_loss']:.4f}" if "top1" in record else ""
            speed = f"{record['images_per_second']:.0f} images/s"
            print(f"epoch {epoch + 1}/{recipe.epoch_size}  loss {record['train_loss']:.4f}{shown}  {speed}", file=sys.stderr, flush=True)
        self.epoch += 1
        better = record.get("top1", -1.0) > self.best
        if better:
            self.best, self.best_epoch = record["top1"], epoch
        if self.rank:
            return
        self.write(record)
        weights = list(self.model.get_parameters())
        if better:
            save(self.output / "best.ckpt", weights)
        if recipe.keep_checkpoint_max > 0 and (epoch + 1) % recipe.ckpt_save_interval == 0:
            name = f"epoch_{epoch + 1}.ckpt"
            save(self.output / name, weights)
            self.kept = [one for one in self.kept if one[0] != name] + [[name, record.get("top1", -1.0)]]
            if recipe.ckpt_save_policy == "top_k":
                self.kept.sort(key=lambda one: one[1])
            for old, _ in self.kept[: -recipe.keep_checkpoint_max]:
                (self.output / old).unlink(missing_ok=True)
            self.kept = self.kept[-recipe.keep_checkpoint_max :]
        state = {"epoch": self.epoch, "best": self.best, "best_epoch": self.best_epoch, "kept": self.kept}
        save(self.output / "last.ckpt", self.parameters(), {"convit_run": json.dumps(state)})

    def write(self, record: dict[str, Any]) -> None:
        with open(self.output / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def last_record(self) -> dict[str, Any]:
        path = self.output / "log.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return next((record for record in reversed(records) if record["kind"] == "epoch"), {})


assert set(ONLY) <= set(FIELDS)
