"""Training in MindSpore with MindCV's data, losses, optimisers, schedules and train step; the recipe and the run's files are those of the
PyTorch engine.

As there, everything random follows from the seed and ``Progress``: the data of an epoch from its number, and stochastic depth, whose draws
are handed to the graph before each step. So on one CPU process a run that is killed at any moment and resumed from its last checkpoint
repeats, bit for bit, what the unbroken run does (with ``drop_rate`` 0: the state of MindSpore's dropout cannot be saved).

The step is two graphs, gradients and update, so that a loss that is not finite leaves the weights as they are. Where a device is fed a
whole epoch at a time (``dataset_sink_mode``, not on CPU) MindSpore's own loop runs: such a run resumes after its last whole epoch, and
stops at the first loss seen that is not finite; its moving average, if it keeps one, stays in last.ckpt.
"""

import dataclasses
import json
import logging
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

import convit.mindspore
from convit.engine.mindspore.data import Data
from convit.engine.mindspore.validate import evaluate, total
from convit.engine.recipe import FIELDS, FREE, Recipe, changed_keys, dump_recipe, load_recipe
from convit.engine.run import Interrupted, Log, Progress, StopSignals, last_epoch, write_atomic
from convit.mindspore.layers import DropPath

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
    "wandb": "",
    "warmup_prefix": True,
    "shift": 0,
}


@dataclass
class Result:
    """What a finished run gives; scores in percent. The model holds the moving average of the weights if the recipe keeps one."""

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
    if recipe.mode == ms.PYNATIVE_MODE and ms.get_context("device_target") == "CPU":
        ms.runtime.launch_blocking()  # otherwise MindSpore's dispatching threads wait for one another on few cores
    launched = max(int(os.environ.get(name, "1")) for name in ("MS_WORKER_NUM", "OMPI_COMM_WORLD_SIZE", "RANK_SIZE"))
    if recipe.distribute is False or launched == 1:
        return 0, 1
    from mindspore.communication import get_group_size, get_rank, init

    init()
    rank, size = get_rank(), get_group_size()
    ms.set_auto_parallel_context(device_num=size, parallel_mode="data_parallel", gradients_mean=True)
    return rank, size


def build_model(recipe: Recipe, num_classes: int, strict_head: bool = True) -> nn.Cell:
    """The model that ``recipe`` describes; see ``convit.engine.pytorch.train.build_model``."""
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


def save(path: Path, parameters: Any, state: dict[str, Any] | None = None) -> None:
    """Write a MindSpore checkpoint through a temporary file that is synced and renamed."""
    temporary = path.with_name(f".{path.stem}.tmp.ckpt")
    try:
        ms.save_checkpoint([{"name": p.name, "data": p} for p in parameters], str(temporary), append_dict=state)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, ValueError) as error:
        for part in (temporary, temporary.with_suffix(".tmp")):  # the second is MindSpore's own
            part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}. Free some space and go on with --resume") from error


def train(
    recipe: Recipe | str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Result:
    """Train the model of a recipe; arguments, errors and files as the PyTorch engine's ``train``, with ``.ckpt`` checkpoints."""
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    check_recipe(recipe)
    run = _Run(recipe, Path(output or recipe.ckpt_save_dir), resume, overwrite, progress)
    try:
        return run.train()
    finally:
        run.close()


def sinks(recipe: Recipe) -> bool:
    """Whether the device is fed a whole epoch at a time, by MindSpore's own loop; a CPU cannot be."""
    return recipe.dataset_sink_mode and ms.get_context("device_target") != "CPU"


class _Gradients(nn.Cell):
    """Images and targets to the loss and its gradients, with the network and weights of a train step of MindCV's."""

    def __init__(self, step: Any, scale: float) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.grad, self.weights, self.scale = step.network, step.grad, step.weights, scale

    def construct(self, images: Tensor, targets: Tensor) -> tuple:
        loss = self.network(images, targets)
        gradients = self.grad(self.network, self.weights)(images, targets, ops.ones_like(loss) * self.scale)
        if self.scale != 1.0:
            gradients = _times(gradients, 1 / self.scale)
        return loss, gradients


# gradients are handed over one by one: a graph takes a tuple for a constant, and is compiled anew for each


class _Sum(nn.Cell):
    """Gradients of one batch, then of another, to their sums."""

    def construct(self, *gradients: Tensor) -> tuple:
        half = len(gradients) // 2
        sums: tuple = ()
        for i in range(half):
            sums = sums + (gradients[i] + gradients[half + i],)
        return sums


class _Update(nn.Cell):
    """Gradients, summed over ``count`` batches, to new weights."""

    def __init__(self, step: Any, count: int, clip: float | None) -> None:
        super().__init__(auto_prefix=False)
        self.reduce, self.optimizer, self.count, self.clip = step.grad_reducer, step.optimizer, count, clip

    def construct(self, *gradients: Tensor) -> Any:
        if self.count > 1:
            gradients = _times(gradients, 1 / self.count)
        gradients = self.reduce(gradients)
        if self.clip is not None:
            gradients = ops.clip_by_global_norm(gradients, self.clip)
        return self.optimizer(gradients)


class _Average(nn.Cell):
    """The moving average of the weights: each call moves it towards them."""

    def __init__(self, weights: Any) -> None:
        super().__init__(auto_prefix=False)
        self.weights = ms.ParameterTuple(weights)
        self.average = self.weights.clone("ema", init="same")

    def construct(self, decay: Tensor) -> Tensor:
        for i in range(len(self.weights)):
            ops.assign(self.average[i], self.average[i] * decay + self.weights[i] * (1 - decay))
        return decay

    def swap(self) -> None:
        """Exchange the weights with their average."""
        for weight, average in zip(self.weights, self.average, strict=True):
            mine, other = weight.asnumpy().copy(), average.asnumpy().copy()
            ops.assign(weight, Tensor(other))
            ops.assign(average, Tensor(mine))


def _times(gradients: tuple, factor: float) -> tuple:
    scaled: tuple = ()
    for gradient in gradients:
        scaled = scaled + (gradient * factor,)
    return scaled


class _Run:
    """One training run on this process."""

    def __init__(self, recipe: Recipe, output: Path, resume: bool, overwrite: bool, progress: bool) -> None:
        self.recipe, self.output = recipe, output
        self.last = output / "last.ckpt"
        if self.last.exists() and not (resume or overwrite):
            raise FileExistsError(f"{output} already holds a run: --resume continues it, --overwrite starts over")
        self.rank, self.size = start(recipe)
        self.chief = self.rank == 0
        self.log: Log | None = None
        self.signals = StopSignals()
        self.history: list[dict[str, Any]] = []
        self.show = progress and self.chief
        self.sink = sinks(recipe)

        self.data = Data(recipe, True, self.rank, self.size)
        self.eval_data = Data(recipe, False, self.rank, self.size) if recipe.val_while_train else None
        self._build()
        self.progress = Progress()
        if resume and self.last.exists():
            self._restore()
        elif self.chief:
            output.mkdir(parents=True, exist_ok=True)
            for old in [*output.glob("epoch_*.ckpt"), output / "best.ckpt", output / "log.jsonl", self.last]:
                old.unlink(missing_ok=True)
        if self.chief:
            write_atomic(output / "recipe.yaml", lambda file: file.write(dump_recipe(recipe).encode()))
            self.log = Log(output / "log.jsonl", self.progress)
            logger.info(
                "%s, %d classes; %d training samples, %d epochs of %d steps\nMindSpore %s on %s, %d processes, amp %s; learning rate %g",
                *(recipe.model, self.num_classes, self.data.samples, recipe.epoch_size, self.steps),
                *(ms.__version__, ms.get_context("device_target"), self.size, recipe.amp_level, self.lr),
            )

    # --- set-up ---

    def _build(self) -> None:
        from mindcv.loss import create_loss
        from mindcv.optim import create_optimizer
        from mindcv.scheduler import create_scheduler
        from mindcv.utils import create_trainer
        from mindcv.utils.trainer_factory import require_customized_train_step

        recipe = self.recipe
        self.num_classes = recipe.num_classes or self.data.classes
        self.model: Any = build_model(recipe, self.num_classes, strict_head=False)
        self.lr = recipe.lr
        if recipe.scale_lr:
            self.lr *= recipe.batch_size * self.size * recipe.gradient_accumulation_steps / recipe.scale_lr_batch
        self.steps = self.data.steps // (1 if self.sink else recipe.gradient_accumulation_steps)
        if not self.steps:
            raise ValueError(f"gradient_accumulation_steps must be at most the {self.data.steps} batches of an epoch")
        self.schedule = create_scheduler(
            self.steps,
            scheduler=recipe.scheduler.replace("warmup_", ""),
            lr=self.lr,
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
        extras = {
            "ema": recipe.ema,
            "ema_decay": recipe.ema_decay,
            "clip_grad": recipe.clip_grad,
            "clip_value": recipe.clip_value,
            "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        }
        # MindCV's step with extras undoes the loss scale itself, as ours does; MindSpore's plain one leaves it to the optimiser
        plain = self.sink and not require_customized_train_step(recipe.ema, recipe.clip_grad, recipe.gradient_accumulation_steps)
        optimizer = create_optimizer(
            self.model if recipe.layer_decay is not None else self.model.trainable_params(),
            opt=recipe.opt,
            lr=self.schedule,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            nesterov=recipe.use_nesterov,
            weight_decay_filter="norm_and_bias" if recipe.filter_bias_and_bn else "disable",
            layer_decay=recipe.layer_decay,
            loss_scale=1.0 if recipe.dynamic_loss_scale or not plain else recipe.loss_scale,
            eps=recipe.eps,
        )
        self.trainer = create_trainer(
            self.model,
            create_loss(recipe.loss, label_smoothing=recipe.label_smoothing),
            optimizer,
            None,
            recipe.amp_level,
            None,
            "dynamic" if recipe.dynamic_loss_scale else "fixed",
            recipe.loss_scale,
            drop_overflow_update=recipe.dynamic_loss_scale,
            **(extras if self.sink else {}),
        )
        self.network = self.trainer.train_network
        self.average: _Average | None = None
        self.paths: list[DropPath] = []
        if self.sink:
            return
        self.gradients = _Gradients(self.network, recipe.loss_scale)
        self.sum = _Sum()
        self.update = _Update(self.network, recipe.gradient_accumulation_steps, recipe.clip_value if recipe.clip_grad else None)
        if recipe.ema:
            self.average = _Average(self.model.get_parameters())
        self.paths = [cell for _, cell in self.model.cells_and_names() if isinstance(cell, DropPath) and cell.p > 0]
        for i, cell in enumerate(self.paths):
            cell.take_draws(recipe.batch_size, f"drop_path_{i}")

    def _restore(self) -> None:
        path, state = self.last, {}
        try:
            saved = ms.load_checkpoint(str(path))
            state = json.loads(str(saved.pop("convit_run")))
            own = self._parameters()
            missing = [name for name in own if name not in saved]
            for name, value in saved.items():
                ops.assign(own[name], Tensor(value.asnumpy()))
            self.progress, old = Progress(**state["progress"]), Recipe(**state["recipe"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged, or of another model or optimiser: {str(error).splitlines()[0]}") from None
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} parameters of this model and optimiser, the first is {missing[0]}")
        at = self.progress
        if at.step and (self.sink or state["global_batch"] != self.global_batch):
            raise ValueError(
                f"{path} stands inside an epoch with a global batch of {state['global_batch']}, and this run has {self.global_batch}"
                f"{' and dataset_sink_mode' * self.sink}: start as many processes as before, or change batch_size to match"
            )
        changed = {name: pair for name, pair in changed_keys(old, self.recipe).items() if name not in FREE}
        if changed and self.chief:
            keys = ", ".join(f"{name} {before!r} -> {after!r}" for name, (before, after) in changed.items())
            logger.info("resuming with other keys: %s", keys)
        logger.info("resumed %s: epoch %d, step %d of %d", path, at.epoch, at.step, self.steps)

    def _parameters(self) -> dict[str, Any]:
        """What a resumed run needs of the model, the optimiser and the moving average."""
        known = [*self.network.get_parameters(), *(self.average.average if self.average else ())]
        left_out = {"learning_rate", *(cell.drawn.name for cell in self.paths)}  # the recipe gives the schedule anew, _step the draws
        return {p.name: p for p in known if p.name not in left_out}

    @property
    def global_batch(self) -> int:
        return self.recipe.batch_size * self.size * self.recipe.gradient_accumulation_steps

    # --- loop ---

    def train(self) -> Result:
        self.signals.catch()
        began = time.perf_counter()
        at, recipe = self.progress, self.recipe
        if self.sink and at.epoch < recipe.epoch_size:
            pipeline = self.data.pipeline(at.epoch)
            self.trainer.train(recipe.epoch_size, pipeline, callbacks=[_watch(self)], dataset_sink_mode=True, initial_epoch=at.epoch)
            if self.signals.noted:
                raise Interrupted(self.signals.noted, self.last)
        while at.epoch < recipe.epoch_size:
            self._epoch()
        if self.average:
            self.average.swap()
        record = self.history[-1] if self.history else last_epoch(self.output / "log.jsonl")
        return Result(
            model=self.model,
            output=self.output,
            top1=record.get("top1", math.nan),
            top5=record.get("top5", math.nan),
            val_loss=record.get("val_loss", math.nan),
            best_top1=at.best,
            best_epoch=at.best_epoch,
            train_loss=record.get("train_loss", math.nan),
            epochs=at.epoch,
            seconds=time.perf_counter() - began,
            history=self.history,
        )

    def _epoch(self) -> None:
        at, recipe = self.progress, self.recipe
        began, waited, first = time.perf_counter(), 0.0, at.step
        self.network.set_train(True)
        batches = self.data.batches(at.epoch, at.step * recipe.gradient_accumulation_steps)
        while at.step < self.steps:
            asked = time.perf_counter()
            parts = [next(batches) for _ in range(recipe.gradient_accumulation_steps)]
            waited += time.perf_counter() - asked
            self._step(parts)
            if self.signals.noted:
                self._save_last()
                raise Interrupted(self.signals.noted, self.last)
            if recipe.ckpt_save_steps and at.step % recipe.ckpt_save_steps == 0 and at.step < self.steps:
                self._save_last()
        self.finish_epoch(at.step - first, time.perf_counter() - began, data_seconds=round(waited, 3), skipped_steps=at.skipped)

    def _step(self, parts: list[Any]) -> None:
        """One optimiser step over ``parts``, batches of (images, targets)."""
        at, recipe = self.progress, self.recipe
        value, gradients = 0.0, None
        for part, (images, targets) in enumerate(parts):
            draws = np.random.default_rng([recipe.seed, at.epoch, at.step, self.rank, part])
            for cell in self.paths:
                cell.draw(draws)
            loss, more = self.gradients(images, targets)
            gradients = more if gradients is None else self.sum(*gradients, *more)
            value += float(loss.asnumpy()) / len(parts)
        value, stop = total([value / self.size, float(self.signals.noted)], self.size)
        if stop and not self.signals.noted:
            self.signals.noted = signal.SIGTERM
        if math.isfinite(value):
            self._apply(gradients, value)
        else:
            self._skip(value)
        at.step += 1
        at.updates += 1
        if (at.updates % recipe.log_interval == 0 or at.step == self.steps) and self.log:
            lr = float(self.schedule[min(at.updates, len(self.schedule)) - 1])
            self.log.write({"kind": "step", "epoch": at.epoch, "update": at.updates, "loss": value, "lr": lr})

    def _apply(self, gradients: Any, loss: float) -> None:
        at, recipe = self.progress, self.recipe
        self.update(*gradients)
        at.loss_sum += loss
        at.loss_steps += 1
        at.skipped_in_row = 0
        if self.average:
            at.ema_updates += 1
            self.average(Tensor(recipe.ema_decay * (1 - math.exp(-at.ema_updates / 2000)), ms.float32))  # as MindCV

    def _skip(self, loss: float) -> None:
        """Count a step whose loss is not finite; the schedule, which follows the optimiser's count of steps, goes on."""
        at, counter = self.progress, self.network.optimizer.global_step
        ops.assign(counter, Tensor(counter.asnumpy() + 1, counter.dtype))
        at.skipped += 1
        at.skipped_in_row += 1
        logger.warning("epoch %d, step %d: the loss is %s; skipped this step", at.epoch, at.step, loss)
        if at.skipped_in_row > self.recipe.max_skipped_steps:
            raise FloatingPointError(
                f"the loss was not finite in {at.skipped_in_row} steps in a row (epoch {at.epoch}, step {at.step}); "
                f"{self.last} is from before. Lower lr, clip the gradient (--clip_grad), or use --amp_level O0"
            )

    # --- end of an epoch ---

    def finish_epoch(self, steps: int, seconds: float, **more: Any) -> None:
        """Validate, log, then best and kept weights, then last.ckpt: a kill in between repeats the epoch and writes the same again."""
        at, recipe = self.progress, self.recipe
        record: dict[str, Any] = {
            "kind": "epoch",
            "epoch": at.epoch,
            "update": at.updates,
            "train_loss": at.loss_sum / max(at.loss_steps, 1),
            **more,
            "images_per_second": round(steps * self.global_batch / seconds, 2),
            "seconds": round(seconds, 3),
        }
        if self.average:
            self.average.swap()
        if self.eval_data is not None and ((at.epoch + 1) % recipe.val_interval == 0 or at.epoch + 1 == recipe.epoch_size):
            scores = evaluate(self.model, self.eval_data.pipeline(0), self.size)
            record |= {"val_loss": scores["loss"], "top1": scores["top1"], "top5": scores["top5"]}
        gates = [p.asnumpy() for p in self.model.get_parameters() if p.name.endswith("gating_param")]
        record["gating"] = [[round(float(1 / (1 + np.exp(-value))), 5) for value in gate] for gate in gates]
        self.history.append(record)
        if self.show:
            shown = f"  top-1 {record['top1']:.2f} %  val loss {record['val_loss']:.4f}" if "top1" in record else ""
            speed = f"{record['images_per_second']:.0f} images/s"
            line = f"epoch {at.epoch + 1}/{recipe.epoch_size}  loss {record['train_loss']:.4f}{shown}  {speed}"
            print(line, file=sys.stderr, flush=True)
        if self.log:
            self.log.write(record, sync=True)
        self._keep_weights(record)
        if self.average:
            self.average.swap()
        at.epoch += 1
        at.step = at.loss_steps = at.skipped = 0
        at.loss_sum = 0.0
        self._save_last()

    def _keep_weights(self, record: dict[str, Any]) -> None:
        at, recipe = self.progress, self.recipe
        draws = {cell.drawn.name for cell in self.paths}
        weights = [p for p in self.model.get_parameters() if p.name not in draws]
        if record.get("top1", -1.0) > at.best:
            at.best, at.best_epoch = record["top1"], at.epoch
            if self.chief:
                save(self.output / "best.ckpt", weights)
        if recipe.keep_checkpoint_max == 0 or (at.epoch + 1) % recipe.ckpt_save_interval:
            return
        name = f"epoch_{at.epoch + 1}.ckpt"
        if self.chief:
            save(self.output / name, weights)
        at.kept = [one for one in at.kept if one[0] != name] + [[name, record.get("top1", -1.0)]]
        if recipe.ckpt_save_policy == "top_k":
            at.kept.sort(key=lambda one: one[1])
        if self.chief:
            for old, _ in at.kept[: -recipe.keep_checkpoint_max]:
                (self.output / old).unlink(missing_ok=True)
        at.kept = at.kept[-recipe.keep_checkpoint_max :]

    def _save_last(self) -> None:
        if not self.chief:
            return
        state = {
            "progress": dataclasses.asdict(self.progress),
            "recipe": dataclasses.asdict(self.recipe),
            "global_batch": self.global_batch,
        }
        save(self.last, self._parameters().values(), {"convit_run": json.dumps(state)})

    # --- end ---

    def close(self) -> None:
        self.signals.release()
        if self.log:
            self.log.close()


def _watch(run: _Run) -> Any:
    """A callback that watches over MindSpore's own loop: it sees the losses that this loop shows it, and ends what it should end."""

    class Watch(ms.train.Callback):
        def on_train_epoch_begin(self, run_context: Any) -> None:
            self.began = time.perf_counter()

        def on_train_step_end(self, run_context: Any) -> None:
            at, outputs = run.progress, run_context.original_args().net_outputs
            loss = float((outputs[0] if isinstance(outputs, (tuple, list)) else outputs).asnumpy().mean())
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} in epoch {at.epoch}; {run.last} is from before. "
                    "Lower lr, clip the gradient (--clip_grad), or use --amp_level O0"
                )
            at.loss_sum += loss
            at.loss_steps += 1

        def on_train_epoch_end(self, run_context: Any) -> None:
            run.progress.updates += run.steps
            run.finish_epoch(run.steps, time.perf_counter() - self.began)
            run.network.set_train(True)
            if run.signals.noted:
                run_context.request_stop()

    return Watch()


assert set(ONLY) <= set(FIELDS)
