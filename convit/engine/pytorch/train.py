"""Training in PyTorch: optimisers, moving average, mixing and losses are timm's; the loop is that of ``convit.engine.run``.

Before every forward pass the generator is seeded from (seed, epoch, step, rank, pass), and its data follows from (seed, epoch,
step). So a run that is killed and resumed repeats, bit for bit on one CPU process, what the unbroken run does.
"""

import logging
import os
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from convit.engine.order import mix_seed
from convit.engine.pytorch import checkpoint
from convit.engine.pytorch.build import amp_dtype, build_loss, build_model, build_optimizer
from convit.engine.pytorch.checkpoint import States
from convit.engine.pytorch.data import Batch, EvalData, TrainData, seeded
from convit.engine.pytorch.distributed import BACKENDS, choose_device, start, total
from convit.engine.pytorch.validate import evaluate
from convit.engine.recipe import Recipe, load_recipe
from convit.engine.run import Plan, Result, Run
from convit.engine.schedule import average_decay, rates
from convit.engine.sources import tell_replaced
from convit.pytorch.diagnostics import diagnose
from convit.weights.load import settings_of

logger = logging.getLogger("convit")


def train(
    recipe: Recipe | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
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
    return TorchRun(recipe, Path(output or recipe.ckpt_save_dir), resume, overwrite, progress).train()


class TorchRun(Run):
    """A run on timm's parts, on one process or in DDP or FSDP."""

    suffix = ".pth"
    hint = "use bfloat16 or float32"
    before: ClassVar = {"ema_warmup": False}
    save = staticmethod(checkpoint.save)
    load = staticmethod(checkpoint.load)
    closing = ExitStack()

    # --- set-up ---

    def join(self) -> None:
        self.device = choose_device(self.recipe.device, self.world)
        self.closing = ExitStack()
        self.closing.enter_context(_own_generators(self.device))
        start(self.world, self.device)
        if self.world.size > 1:
            self.closing.callback(dist.destroy_process_group)

    def leave(self) -> None:
        self.closing.close()

    def build(self) -> Plan:
        from timm.utils import ModelEmaV3

        recipe, world = self.recipe, self.world
        self.data = data = TrainData(recipe, world, self.device)
        self.closing.callback(data.close)
        self.eval_data = None
        if recipe.val_while_train:
            self.eval_data = EvalData(recipe, world, self.device, data.classes, data.num_classes)
            self.closing.callback(self.eval_data.close)
        model: Any = build_model(recipe, data.num_classes, strict_head=False).to(self.device)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
        model.set_grad_checkpointing(recipe.grad_checkpointing)
        self.model = model
        self.probe: Tensor | None = None
        self.norm: Tensor | None = None
        self.ema = ModelEmaV3(model, decay=recipe.ema_decay) if recipe.ema else None
        self.sharded = recipe.fsdp and world.size > 1
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)

        lr = recipe.lr * (data.order.global_batch / recipe.scale_lr_batch if recipe.scale_lr else 1.0)
        self.optimizer = build_optimizer(recipe, model, lr)
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
        self.mixup, self.criterion = build_loss(recipe, data.num_classes)

        precision = "float32" if self.dtype is None else str(self.dtype)[6:]
        if self.dtype is None and recipe.amp_level != "O0":
            precision += f" (amp_level {recipe.amp_level} is for accelerators; --amp_dtype bfloat16 forces it)"
        about = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {self.device.type}, {precision}"
        order, steps = data.order, data.order.steps
        return Plan(list(data.classes), order.samples, steps, order.global_batch, lr, rates(recipe, lr, steps), about)

    def state(self) -> dict[str, Any]:
        model, optimizer = self.states.get()
        state = {"state_dict": model, "optimizer": optimizer, "scaler": self.scaler.state_dict(), "convit": settings_of(self.model)}
        return state | ({"state_dict_ema": self.ema.module.state_dict()} if self.ema is not None else {})

    def restore(self, saved: dict[str, Any], old: Recipe) -> None:
        if old.opt == self.recipe.opt:
            self.states.set(saved["state_dict"], saved["optimizer"], build_optimizer(old, self.model, self.plan.lr))
        else:
            self.say(f"the state of {old.opt} is of no use to {self.recipe.opt}: it starts anew")
            self.states.set(saved["state_dict"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved.get("state_dict_ema") or saved["state_dict"])
        if saved["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])

    def weights(self) -> dict[str, Any]:
        weights = self.ema.module.state_dict() if self.ema is not None else self.states.get()[0]
        return {"state_dict": weights, "convit": settings_of(self.model)}

    # --- loop ---

    def batches(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        self.parallel.train()
        return self.data.batches(epoch, step)

    def total(self, values: list[float]) -> list[float]:
        return total(values, self.world, self.device)

    def gradients(self, batches: Any) -> tuple[float, int, float]:
        at, recipe, world = self.progress, self.recipe, self.world
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate() * group.get("lr_scale", 1.0)
        self.norm = None
        waited, loss_sum, bad = 0.0, 0.0, 0
        for part in range(self.data.accumulation):
            began = time.perf_counter()
            batch = self._next(batches)
            images = batch.images.to(self.device, non_blocking=True)
            targets = batch.targets.to(self.device, non_blocking=True)
            waited += time.perf_counter() - began
            tell_replaced(batch.bad)
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
        return loss_sum, bad, waited

    def _next(self, batches: Any) -> Batch:
        """The next batch; where one process cannot read its data, all of them stop."""
        batch = error = None
        try:
            batch = next(batches)
        except Exception as failed:
            error = failed
        if self.world.size > 1 and self.total([float(error is not None)])[0] and error is None:
            raise RuntimeError("another process cannot read its data; its message says why")
        if error is not None:
            raise error
        return batch  # type: ignore[return-value]

    def gradient_norm(self) -> float:
        self.scaler.unscale_(self.optimizer)
        self.norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return _number(self.norm)

    def apply(self) -> float:
        parameters = list(self.model.parameters())
        if self.recipe.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, self.recipe.clip_value, self.norm)  # type: ignore[arg-type]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.progress.ema_updates += 1
            self.ema.decay = average_decay(self.recipe, self.progress.ema_updates)
            self.ema.update(self.model)
        return _number(nn.utils.get_total_norm(parameters))

    def skip(self) -> bool:
        self.optimizer.zero_grad(set_to_none=True)
        if self.norm is None or not self.scaler.is_enabled():
            return False
        self.scaler.update()  # a smaller scale, if it was that which overflowed
        return self.scaler.get_scale() >= 1

    def _mix(self, images: Tensor, targets: Tensor, part: int) -> tuple[Tensor, Tensor]:
        from timm.data.mixup import mixup_target

        at, recipe = self.progress, self.recipe
        off = 0 < recipe.mixup_off_epoch <= at.epoch
        if off or len(images) % 2:  # pairs are mixed; an odd rest of the data stays as it is
            return images, mixup_target(targets, self.data.num_classes, 1.0, recipe.label_smoothing)
        with seeded(mix_seed(recipe.seed, at.epoch, at.step, self.world.rank, part, 3)):
            mixed: tuple[Tensor, Tensor] = self.mixup(images, targets)
        return mixed

    def _last_part(self, last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients only in the last forward pass of a step."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
        elif self.world.size > 1 and not last:
            return self.parallel.no_sync()
        return nullcontext()

    # --- end of an epoch ---

    def evaluate(self) -> dict[str, float]:
        assert self.eval_data is not None
        scores = evaluate(self.finished(), self.eval_data, self.world, self.device, self.dtype, sharded=self.sharded)
        for image in scores.bad:
            logger.warning("left out the unreadable validation image %s (%s)", image.name, image.reason)
        return {"val_loss": scores.loss, "top1": scores.top1, "top5": scores.top5}

    def diagnose(self) -> dict[str, Any]:
        """Gates, attention distances and non-locality (``convit.pytorch.diagnostics``); only the gates where the model is sharded or
        compiled, or nothing validates."""
        if self.eval_data is None or self.sharded or self.recipe.compile:
            return {"gate": self._gates()}
        if not self.chief:
            return {}
        if self.probe is None:
            self.probe = next((images[:32].to(self.device) for images, _ in self.eval_data if len(images)), None)
        if self.probe is None:
            return {"gate": self._gates()}
        return {name: _rounded(value) for name, value in diagnose(self.model, self.probe).items()}

    def _gates(self) -> list[list[float]]:
        """sigmoid(gating_param) per GPSA block and head: 1 is all position, 0 all content."""
        gates = []
        for block in self.model.blocks:
            gate = getattr(block.attn, "gating_param", None)
            if gate is not None:
                gate = gate.full_tensor() if hasattr(gate, "full_tensor") else gate
                gates.append([round(value, 5) for value in gate.detach().float().sigmoid().tolist()])
        return gates

    def finished(self) -> nn.Module:
        """The model, or its moving average, in evaluation mode."""
        model: nn.Module = self.ema.module if self.ema is not None else self.model
        return model.eval()


def _number(norm: Any) -> float:
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _own_generators(device: torch.device) -> AbstractContextManager[None]:
    """Inside, torch's generators are seeded at will; afterwards they are as the caller had them."""
    if device.type not in BACKENDS:
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device.index or 0], device_type=device.type)


def _rounded(value: Any) -> Any:
    return [_rounded(one) for one in value] if isinstance(value, list) else round(value, 5)
