"""Training in PyTorch on timm's engine: optimisers, schedules, moving average, mixing and losses are timm's; the loop is here.

The loop is stateless but for ``Progress``: before every forward pass the generator is seeded from (seed, epoch, step, rank,
pass), and its data follows from (seed, epoch, step). So a run that is killed at any moment and resumed from its last checkpoint
repeats, bit for bit on one CPU process, what the unbroken run does.
"""

import dataclasses
import logging
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from convit.engine.pytorch.checkpoint import States, load, save
from convit.engine.pytorch.data import EvalData, TrainData, mix_seed, seeded
from convit.engine.pytorch.distributed import World, choose_device, find_world, start, total
from convit.engine.pytorch.validate import Scores, evaluate
from convit.engine.recipe import FREE, Recipe, changed_keys, dump_recipe, load_recipe
from convit.engine.run import Interrupted, Log, Progress, StopSignals, last_epoch, write_atomic
from convit.pytorch.diagnostics import diagnose
from convit.weights.load import settings_of

logger = logging.getLogger("convit")


@dataclass
class Result:
    """What a finished run gives: the trained model (the moving average if the recipe keeps one), scores in percent, the epoch records."""

    model: nn.Module
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
    torch.manual_seed(recipe.seed)
    if recipe.model == "convit":
        if recipe.pretrained:
            raise ValueError("pretrained needs the name of a variant in model, not 'convit'")
        model = convit.ConViT(**given)
    else:
        model = convit.create_model(recipe.model, pretrained=recipe.pretrained, **given)
    if recipe.ckpt_path:
        convit.load_checkpoint(model, recipe.ckpt_path, strict_head=strict_head)
    return model


def train(
    recipe: Recipe | str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Result:
    """Train the model of a recipe.

    Args:
        recipe: A recipe, the name of a packaged one, or the path of a yaml file.
        output: Folder of the run, default the recipe's ``ckpt_save_dir``. It gets ``recipe.yaml``, ``log.jsonl``, ``last.pth``
            (everything, to resume), ``best.pth`` and ``epoch_N.pth`` (weights).
        resume: Continue the run in ``output``; start it if there is none.
        overwrite: Start over in a folder that holds a run.
        progress: Show a progress bar (a line per epoch where stderr is no terminal).

    Returns:
        The trained model and its scores.

    Raises:
        ValueError: The recipe does not fit the data, the model or the device.
        FileExistsError: ``output`` holds a run, and neither ``resume`` nor ``overwrite`` is set.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
        FloatingPointError: The loss was not finite ``max_skipped_steps`` times in a row.
        OSError: Data or run files cannot be read or written.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    run = _Run(recipe, Path(output or recipe.ckpt_save_dir), resume, overwrite, progress)
    try:
        return run.train()
    finally:
        run.close()


class _Run:
    """One training run on this process."""

    def __init__(self, recipe: Recipe, output: Path, resume: bool, overwrite: bool, progress: bool) -> None:
        self.recipe, self.output = recipe, output
        if recipe.wandb and find_spec("wandb") is None:
            raise ImportError("the recipe's key wandb needs Weights & Biases: pip install wandb, or --wandb '' to go without")
        self.world = find_world()
        if recipe.distribute is False and self.world.size > 1:
            self.world = World()
        if recipe.distribute and self.world.size == 1:
            logger.info("distribute is set, but one process was started: torchrun, mpirun or srun start more")
        self.chief = self.world.rank == 0
        self.device = choose_device(recipe.device, self.world)
        last = output / "last.pth"
        if last.exists() and not (resume or overwrite):
            raise FileExistsError(f"{output} already holds a run: --resume continues it, --overwrite starts over")
        start(self.world, self.device)
        self._own_group = self.world.size > 1
        saved = load(last) if resume and last.exists() else None
        self.log: Log | None = None
        self.board: Any = None
        self.wandb: Any = None
        self.probe: Tensor | None = None
        self.signals = StopSignals()

        self.data = TrainData(recipe, self.world, self.device)
        self.eval_data = EvalData(recipe, self.world, self.device, self.data.num_classes) if recipe.val_while_train else None
        self._build()
        self.progress = Progress()
        if saved:
            self._restore(saved, last)
        elif resume and self.chief:
            self.say(f"nothing to resume in {output}: starting")
        if self.chief:
            output.mkdir(parents=True, exist_ok=True)
            if not saved:
                for old in [*output.glob("epoch_*.pth"), output / "best.pth", output / "log.jsonl", last]:
                    old.unlink(missing_ok=True)
            write_atomic(output / "recipe.yaml", lambda file: file.write(dump_recipe(recipe).encode()))
            self.log = Log(output / "log.jsonl", self.progress)
            if recipe.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(output / "tensorboard"), purge_step=self.progress.epoch)
            if recipe.wandb:
                import wandb

                self.wandb = wandb.init(
                    project=recipe.wandb, name=output.name, dir=str(output), config=dataclasses.asdict(recipe), resume="auto"
                )
        self.bar = _Bar(progress and self.chief, recipe.epoch_size * self.data.steps_per_epoch, self.progress.updates)
        self._header()

    # --- set-up ---

    def _build(self) -> None:
        from timm.data import Mixup
        from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
        from timm.optim import create_optimizer_v2
        from timm.utils import ModelEmaV3

        recipe, world = self.recipe, self.world
        model: Any = build_model(recipe, self.data.num_classes, strict_head=False).to(self.device)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
        model.set_grad_checkpointing(recipe.grad_checkpointing)
        self.model: Any = model
        self.ema = ModelEmaV3(model, decay=recipe.ema_decay) if recipe.ema else None
        self.sharded = recipe.fsdp and world.size > 1
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)

        self.lr = recipe.lr * (self.data.global_batch / recipe.scale_lr_batch if recipe.scale_lr else 1.0)
        opt = {"sgd": "sgd" if recipe.use_nesterov else "momentum", "momentum": "sgd" if recipe.use_nesterov else "momentum"}
        more: dict[str, Any] = {} if recipe.opt in opt else {"eps": recipe.eps}
        self.optimizer = create_optimizer_v2(
            model,
            opt.get(recipe.opt, recipe.opt),
            lr=self.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            filter_bias_and_bn=recipe.filter_bias_and_bn,
            layer_decay=recipe.layer_decay,
            **more,
        )
        self.scheduler = _scheduler(recipe, self.optimizer, self.lr, self.data.steps_per_epoch)
        self.states = States(model, self.optimizer, self.sharded)
        if recipe.compile:
            model.compile()
        self.parallel: Any = model
        if world.size > 1 and not self.sharded:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.parallel = nn.parallel.DistributedDataParallel(model, device_ids=ids)

        self.dtype = amp_dtype(recipe, self.device)
        scale = recipe.loss_scale if recipe.loss_scale > 1 else 65536.0
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=scale, enabled=self.dtype is torch.float16)
        self.mixup = None
        if recipe.mixup > 0 or recipe.cutmix > 0:
            self.mixup = Mixup(
                recipe.mixup,
                recipe.cutmix,
                prob=recipe.cutmix_prob,
                label_smoothing=recipe.label_smoothing,
                num_classes=self.data.num_classes,
            )
        if recipe.loss == "BCE":
            self.criterion: nn.Module = BinaryCrossEntropy(0.0 if self.mixup else recipe.label_smoothing)
        elif self.mixup:
            self.criterion = SoftTargetCrossEntropy()
        else:
            self.criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)

    def _restore(self, saved: dict[str, Any], path: Path) -> None:
        old = Recipe(**saved["recipe"])
        changed = {name: pair for name, pair in changed_keys(old, self.recipe).items() if name not in FREE}
        if changed:
            self.say(
                "resuming with other keys: " + ", ".join(f"{name} {before!r} -> {after!r}" for name, (before, after) in changed.items())
            )
        self.progress = Progress(**saved["progress"])
        if self.progress.step and saved["global_batch"] != self.data.global_batch:
            raise ValueError(
                f"{path} stands inside an epoch with a global batch of {saved['global_batch']}, and this run has {self.data.global_batch}: "
                "start as many processes as before, or change batch_size or gradient_accumulation_steps to match"
            )
        try:
            self.states.set(saved["state_dict"], saved["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(saved.get("state_dict_ema") or saved["state_dict"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{path} holds another model or optimiser than the recipe: {str(error).splitlines()[0]}") from None
        self.scaler.load_state_dict(saved["scaler"])
        self.say(f"resumed {path}: epoch {self.progress.epoch}, step {self.progress.step} of {self.data.steps_per_epoch}")

    def _header(self) -> None:
        recipe, world = self.recipe, self.world
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        precision = "float32" if self.dtype is None else str(self.dtype)[6:]
        if self.dtype is None and recipe.amp_level != "O0":
            precision += f" (amp_level {recipe.amp_level} is for accelerators; --amp_dtype bfloat16 forces it)"
        processes = f"{world.size} processes ({world.launcher}{', FSDP' if self.sharded else ''})" if world.size > 1 else "1 process"
        self.say(
            f"{recipe.model}, {parameters:.2f} M parameters, {self.data.num_classes} classes; "
            f"{self.data.samples_per_epoch} training samples, {recipe.epoch_size} epochs of {self.data.steps_per_epoch} steps\n"
            f"{self.device.type}, {processes}, {precision}; global batch {self.data.global_batch}; learning rate {self.lr:g}"
        )

    def say(self, text: str) -> None:
        if self.chief:
            logger.info(text)

    # --- loop ---

    def train(self) -> Result:
        self.signals.catch()
        began = time.perf_counter()
        at, recipe = self.progress, self.recipe
        history: list[dict[str, Any]] = []
        while at.epoch < recipe.epoch_size:
            history.append(self._epoch())
        self.bar.close()
        model = self.ema.module if self.ema is not None else self.model
        record = history[-1] if history else last_epoch(self.output / "log.jsonl")
        return Result(
            model=model.eval(),
            output=self.output,
            top1=record.get("top1", math.nan),
            top5=record.get("top5", math.nan),
            val_loss=record.get("val_loss", math.nan),
            best_top1=at.best,
            best_epoch=at.best_epoch,
            train_loss=record.get("train_loss", math.nan),
            epochs=at.epoch,
            seconds=time.perf_counter() - began,
            history=history,
        )

    def _epoch(self) -> dict[str, Any]:
        at, recipe, data = self.progress, self.recipe, self.data
        began, waited = time.perf_counter(), 0.0
        first, lr = at.step, self.lr
        self.parallel.train()
        batches = data.batches(at.epoch, at.step)
        while at.step < data.steps_per_epoch:
            if recipe.lr_epoch_stair:
                self.scheduler.step(at.epoch)
            else:
                self.scheduler.step_update(at.epoch * data.steps_per_epoch + at.step)
            lr = max(group["lr"] for group in self.optimizer.param_groups)
            loss, seconds = self._step(batches)
            waited += seconds
            if (at.updates % recipe.log_interval == 0 or at.step == data.steps_per_epoch) and self.log:
                self.log.write({"kind": "step", "epoch": at.epoch, "update": at.updates, "loss": loss, "lr": lr})
            self.bar.update(at.updates, at.epoch, loss)
            if self.signals.noted:
                self._save_last()
                raise Interrupted(self.signals.noted, self.output / "last.pth")
            if recipe.ckpt_save_steps and at.step % recipe.ckpt_save_steps == 0 and at.step < data.steps_per_epoch:
                self._save_last()
        batches.close()
        seconds = time.perf_counter() - began
        record: dict[str, Any] = {
            "kind": "epoch",
            "epoch": at.epoch,
            "update": at.updates,
            "lr": lr,
            "train_loss": at.loss_sum / max(at.loss_steps, 1),
            "skipped_steps": at.skipped,
            "bad_images": at.bad_images,
            "images_per_second": round((at.step - first) * data.global_batch / seconds, 2),
            "seconds": round(seconds, 3),
            "data_seconds": round(waited, 3),
        }
        scores = None
        if self.eval_data is not None and ((at.epoch + 1) % recipe.val_interval == 0 or at.epoch + 1 == recipe.epoch_size):
            scores = self._validate()
            record |= {"val_loss": scores.loss, "top1": scores.top1, "top5": scores.top5}
        record |= self._diagnose()
        self._finish_epoch(record, scores)
        return record

    def _step(self, batches: Any) -> tuple[float, float]:
        """One optimiser step. Returns its loss, averaged over the global batch, and the seconds it waited for data."""
        at, recipe, world = self.progress, self.recipe, self.world
        waited, loss_sum, bad = 0.0, 0.0, 0
        for part in range(self.data.accumulation):
            began = time.perf_counter()
            batch = next(batches)
            images = batch.images.to(self.device, non_blocking=True)
            targets = batch.targets.to(self.device, non_blocking=True)
            waited += time.perf_counter() - began
            for image in batch.bad:
                logger.warning("replaced the unreadable image %s (%s)", image.name, image.reason)
            bad += len(batch.bad)
            if self.mixup is not None:
                images, targets = self._mix(images, targets, part)
            if recipe.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            torch.manual_seed(mix_seed(recipe.seed, at.epoch, at.step, world.rank, part, 2))
            with self._last_part(part == self.data.accumulation - 1):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    loss = self.criterion(self.parallel(images).float(), targets)
                # DDP and FSDP average over the processes: times their number, the shares of the step add up to the mean of all
                self.scaler.scale(loss * (batch.share * world.size)).backward()
            loss_sum += loss.item() * batch.share
        loss_sum, stop, bad_total = total([loss_sum, float(self.signals.noted), float(bad)], world, self.device)
        if stop and not self.signals.noted:
            self.signals.noted = signal.SIGTERM
        at.bad_images += int(bad_total)
        if at.bad_images > recipe.max_bad_images:
            raise ValueError(f"{at.bad_images} unreadable images in epoch {at.epoch}; max_bad_images allows {recipe.max_bad_images}")
        self._apply(loss_sum)
        at.step += 1
        at.updates += 1
        return loss_sum, waited

    def _apply(self, loss: float) -> None:
        """Step the optimiser, unless the loss is not finite: then the step is skipped and counted."""
        at, recipe = self.progress, self.recipe
        if not math.isfinite(loss):
            at.skipped += 1
            at.skipped_in_row += 1
            self.optimizer.zero_grad(set_to_none=True)
            logger.warning("epoch %d, step %d: the loss is %s; skipped this step", at.epoch, at.step, loss)
            if at.skipped_in_row > recipe.max_skipped_steps:
                raise FloatingPointError(
                    f"the loss was not finite in {at.skipped_in_row} steps in a row (epoch {at.epoch}, step {at.step}); "
                    f"{self.output / 'last.pth'} is from before. Lower lr, clip the gradient (--clip_grad), or use bfloat16 or float32"
                )
            return
        at.skipped_in_row = 0
        at.loss_sum += loss
        at.loss_steps += 1
        if recipe.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_value)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            at.ema_updates += 1
            self.ema.update(self.model, at.ema_updates)

    def _mix(self, images: Tensor, targets: Tensor, part: int) -> tuple[Tensor, Tensor]:
        from timm.data.mixup import mixup_target

        at, recipe = self.progress, self.recipe
        if len(images) % 2:  # pairs are mixed; an odd rest of the data stays as it is
            return images, mixup_target(targets, self.data.num_classes, 1.0, recipe.label_smoothing)
        with seeded(mix_seed(recipe.seed, at.epoch, at.step, self.world.rank, part, 3)):
            return self.mixup(images, targets)  # type: ignore[misc]

    def _last_part(self, last: bool) -> Any:
        """Exchange gradients only in the last forward pass of a step."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
        elif self.world.size > 1 and not last:
            return self.parallel.no_sync()
        return nullcontext()

    def _validate(self) -> Scores:
        model = self.ema.module if self.ema is not None else self.model
        assert self.eval_data is not None
        scores = evaluate(model, self.eval_data, self.world, self.device, self.dtype)
        for image in scores.bad:
            logger.warning("left out the unreadable validation image %s (%s)", image.name, image.reason)
        return scores

    def _diagnose(self) -> dict[str, Any]:
        """Gates, attention distances and non-locality (``convit.pytorch.diagnostics``); only the gates where the model is sharded or
        compiled, or nothing validates."""
        if self.eval_data is None or self.sharded or self.recipe.compile:
            return {"gating": self._gating()}
        if self.probe is None:
            self.probe = next(iter(self.eval_data))[0][:32].to(self.device)
        found = diagnose(self.model, self.probe) if self.chief else {}
        return {name: _rounded(value) for name, value in found.items()}

    def _gating(self) -> list[list[float]]:
        """sigmoid(gating_param) per GPSA block and head: 1 is all position, 0 all content."""
        gates = []
        for block in self.model.blocks:
            gate = getattr(block.attn, "gating_param", None)
            if gate is not None:
                gate = gate.full_tensor() if hasattr(gate, "full_tensor") else gate
                gates.append([round(value, 5) for value in gate.detach().float().sigmoid().tolist()])
        return gates

    # --- files ---

    def _finish_epoch(self, record: dict[str, Any], scores: Scores | None) -> None:
        """Log, then best and kept weights, then last.pth: a kill in between repeats the epoch and writes the same again."""
        at, recipe = self.progress, self.recipe
        better = scores is not None and scores.top1 > at.best
        if better:
            at.best, at.best_epoch = scores.top1, at.epoch  # type: ignore[union-attr]
        self.bar.epoch(record, recipe.epoch_size)
        if self.log:
            self.log.write(record, sync=True)
        if self.board:
            for name in ("train_loss", "val_loss", "top1", "top5", "lr", "images_per_second"):
                if name in record:
                    self.board.add_scalar(name, record[name], at.epoch)
            self.board.flush()
        if self.wandb:
            self.wandb.log({name: value for name, value in record.items() if isinstance(value, (int, float))}, step=at.updates)
        keep = recipe.keep_checkpoint_max > 0 and (at.epoch + 1) % recipe.ckpt_save_interval == 0
        dropped: list[str] = []
        if better or keep:
            weights = self.ema.module.state_dict() if self.ema is not None else self.states.get()[0]
            slim = {"state_dict": weights, "recipe": dataclasses.asdict(recipe), "epoch": at.epoch, "top1": record.get("top1", math.nan)}
            slim["classes"] = list(self.data.source.classes)
            slim["convit"] = settings_of(self.states.model)
            if better and self.chief:
                save(self.output / "best.pth", slim)
            if keep:
                name = f"epoch_{at.epoch + 1}.pth"
                if self.chief:
                    save(self.output / name, slim)
                at.kept = [one for one in at.kept if one[0] != name] + [[name, record.get("top1", -1.0)]]
                if recipe.ckpt_save_policy == "top_k":
                    at.kept.sort(key=lambda one: one[1])  # stable: of equals the older goes first
                dropped = [one[0] for one in at.kept[: -recipe.keep_checkpoint_max]]
                at.kept = at.kept[-recipe.keep_checkpoint_max :]
        at.epoch += 1
        at.step = at.loss_steps = at.skipped = at.bad_images = 0
        at.loss_sum = 0.0
        self._save_last()
        if self.chief:
            for name in dropped:
                (self.output / name).unlink(missing_ok=True)

    def _save_last(self) -> None:
        model, optimizer = self.states.get()
        if not self.chief:
            return
        state = {
            "state_dict": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "recipe": dataclasses.asdict(self.recipe),
            "global_batch": self.data.global_batch,
            "classes": list(self.data.source.classes),
            "convit": settings_of(self.states.model),
        }
        if self.ema is not None:
            state["state_dict_ema"] = self.ema.module.state_dict()
        save(self.output / "last.pth", state)

    # --- end ---

    def close(self) -> None:
        self.signals.release()
        self.bar.close()
        if self.log:
            self.log.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()
        if self._own_group and dist.is_initialized():
            dist.destroy_process_group()


def _rounded(value: Any) -> Any:
    return [_rounded(one) for one in value] if isinstance(value, list) else round(value, 5)


def _scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, lr: float, steps: int) -> Any:
    """timm's schedule for MindCV's words. Called once per step, or once per epoch with ``lr_epoch_stair``."""
    from timm.scheduler import create_scheduler_v2

    names = {
        "constant": "constant",
        "cosine_decay": "cosine",
        "warmup_cosine_decay": "cosine",
        "step_decay": "step",
        "multi_step_decay": "multistep",
        "exponential_decay": "step",
        "polynomial_decay": "poly",
    }
    decay_rate, decay_epochs, units = recipe.decay_rate, float(recipe.decay_epochs), 1 if recipe.lr_epoch_stair else steps
    if recipe.scheduler == "exponential_decay":  # a small step in every unit
        decay_rate, decay_epochs = recipe.decay_rate ** (1 / (recipe.decay_epochs * units)), 1 / units
    scheduler, _ = create_scheduler_v2(
        optimizer,
        names[recipe.scheduler],
        num_epochs=recipe.decay_epochs,
        decay_epochs=decay_epochs,
        decay_milestones=recipe.multi_step_decay_milestones,
        decay_rate=decay_rate,
        min_lr=recipe.min_lr,
        warmup_lr=lr * recipe.warmup_factor,
        warmup_epochs=recipe.warmup_epochs,
        warmup_prefix=recipe.warmup_prefix and names[recipe.scheduler] in ("cosine", "poly"),
        cycle_limit=recipe.num_cycles,
        cycle_decay=recipe.cycle_decay,
        step_on_epochs=recipe.lr_epoch_stair,
        updates_per_epoch=steps,
    )
    return scheduler


def amp_dtype(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision on ``device``; ``None`` for float32."""
    if recipe.amp_level == "O0":
        return None
    if recipe.amp_dtype != "auto":
        return getattr(torch, recipe.amp_dtype)
    if device.type == "cpu":
        return None
    return torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16


class _Bar:
    """A progress bar on a terminal, a line per epoch elsewhere."""

    def __init__(self, show: bool, steps: int, done: int) -> None:
        self.show, self.bar = show, None
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task("training", total=steps, completed=done)
            self.bar.start()

    def update(self, done: int, epoch: int, loss: float) -> None:
        if self.bar:
            self.bar.update(self.task, completed=done, description=f"epoch {epoch + 1}, loss {loss:.4f}")

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        if self.show:
            scores = f"  top-1 {record['top1']:.2f} %  val loss {record['val_loss']:.4f}" if "top1" in record else ""
            line = (
                f"epoch {record['epoch'] + 1}/{epochs}  loss {record['train_loss']:.4f}{scores}  {record['images_per_second']:.0f} images/s"
            )
            if self.bar:
                self.bar.console.print(line, highlight=False)
            else:
                print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None
