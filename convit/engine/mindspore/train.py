"""Training in MindSpore with MindCV's data, losses and optimisers; the loop, recipe and files are those of PyTorch.

The data of a step follows from its number, and so does stochastic depth, whose draws are handed to the graph before each step. So
on CPU a run that is killed and resumed repeats, bit for bit, what the unbroken run does (with ``drop_rate`` 0: the state
of MindSpore's dropout cannot be saved).

Where a device is fed a whole epoch at a time (``dataset_sink_mode``, not on CPU) MindSpore's own loop runs the whole step as one graph:
such a run resumes after its last whole epoch, and stops for too many skipped steps at the end of one.
"""

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from convit.engine.mindspore import checkpoint
from convit.engine.mindspore.build import build_model, build_step, check_precision, check_recipe, first_scale, own_generators, sinks, start
from convit.engine.mindspore.data import Data, EvalData
from convit.engine.mindspore.steps import Average, Gradients, LossScale, Mean, Norm, Sum, Update, WholeStep
from convit.engine.mindspore.validate import evaluate, total
from convit.engine.recipe import Recipe, load_recipe
from convit.engine.run import Interrupted, Plan, Result, Run
from convit.engine.schedule import average_decay, rates
from convit.engine.sources import tell_replaced
from convit.mindspore.layers import DropPath

logger = logging.getLogger("convit")


def train(
    recipe: Recipe | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Result:
    """Train the model of a recipe; arguments, errors and files as the PyTorch engine's ``train``, with ``.ckpt`` checkpoints."""
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    check_recipe(recipe)
    check_precision(recipe.amp_level, recipe.amp_cast_list)
    return MindSporeRun(recipe, Path(output or recipe.ckpt_save_dir), resume, overwrite, progress).train()


class MindSporeRun(Run):
    """A run on MindCV's parts."""

    suffix = ".ckpt"
    hint = "use --amp_level O0"
    save = staticmethod(checkpoint.save)
    load = staticmethod(checkpoint.load)
    closing = ExitStack()

    # --- set-up ---

    def join(self) -> None:
        self.closing = ExitStack()
        self.closing.enter_context(own_generators())
        self.world = start(self.recipe)
        self.sink = self.whole_epochs = sinks(self.recipe)

    def leave(self) -> None:
        self.closing.close()  # MindSpore ends its communication with the process

    def build(self) -> Plan:
        recipe, world = self.recipe, self.world
        self.data = Data(recipe, world)
        classes, order = self.data.classes, self.data.order
        self.eval_data = EvalData(recipe, world, classes, self.data.num_classes) if recipe.val_while_train else None
        self.model: Any = build_model(recipe, self.data.num_classes, strict_head=False)
        lr = recipe.lr * (order.global_batch / recipe.scale_lr_batch if recipe.scale_lr else 1.0)
        schedule = rates(recipe, lr, order.steps)
        self.step = build_step(recipe, self.model, schedule)
        self.scale = LossScale(*first_scale(recipe))
        self.average = Average(self.model.get_parameters()) if recipe.ema else None
        self.trained, self.norm = list(self.model.trainable_params()), Norm()
        self.paths: list[DropPath] = []
        clip = recipe.clip_value if recipe.clip_grad else None
        if self.sink:
            self.network: Any = WholeStep(self.step, self.scale, clip, self.average, recipe.ema_decay, recipe.ema_warmup)
        else:
            self.network = self.step
            self.step_gradients, self.sum = Gradients(self.step, self.scale), Sum()
            self.mean, self.update = Mean(self.step, recipe.gradient_accumulation_steps), Update(self.step, clip)
            self.paths = [cell for _, cell in self.model.cells_and_names() if isinstance(cell, DropPath) and cell.p > 0]
            for i, cell in enumerate(self.paths):
                cell.take_draws(recipe.batch_size, f"drop_path_{i}")
        about = f"MindSpore {ms.__version__} on {ms.get_context('device_target')}, amp {recipe.amp_level}"
        return Plan(classes, order.samples, order.steps, order.global_batch, lr, schedule, about)

    def state(self) -> dict[str, Any]:
        known = [*self.network.get_parameters(), *self.scale.get_parameters(), *(self.average.average if self.average else ())]
        draws = self._draws()  # the recipe gives the schedule anew, gradients() the draws
        return {p.name: p for p in known if not p.name.startswith("learning_rate") and p.name not in draws}

    def restore(self, saved: dict[str, Any], old: Recipe) -> None:
        own, found = self.state(), saved["parameters"]
        if old.opt != self.recipe.opt:
            self.say(f"the state of {old.opt} is of no use to {self.recipe.opt}: it starts anew")
            kept = {*self.weights(), "global_step", *(p.name for p in (self.average.average if self.average else ()))}
            own, found = ({name: value for name, value in all_.items() if name in kept} for all_ in (own, found))
        if (old.loss_scale, old.loss_scale_type) != (self.recipe.loss_scale, self.recipe.loss_scale_type):
            for parameter in self.scale.get_parameters():
                own.pop(parameter.name)
                found.pop(parameter.name, None)
        missing = [name for name in own if name not in found]
        if missing:
            raise ValueError(f"it lacks {len(missing)} parameters of this model and optimiser, the first is {missing[0]}")
        for name, value in found.items():
            ops.assign(own[name], Tensor(value.asnumpy()))

    def weights(self) -> dict[str, Any]:
        draws = self._draws()
        return {p.name: p for p in self.model.get_parameters() if p.name not in draws}

    def _draws(self) -> set[str]:
        return {cell.drawn.name for cell in self.paths}

    # --- loop ---

    def loop(self) -> None:
        at, recipe = self.progress, self.recipe
        if self.sink and at.epoch < recipe.epoch_size and not self.stale:
            pipeline = self.data.pipeline(at.epoch)
            self.network.set_train(True)
            ms.Model(self.network).train(recipe.epoch_size, pipeline, [_watch(self)], dataset_sink_mode=True, initial_epoch=at.epoch)
            if self.signals.noted:
                raise Interrupted(self.signals.noted, self.last)
        super().loop()

    def batches(self, epoch: int, step: int) -> Iterator[Any]:
        self.network.set_train(True)
        return self.data.batches(epoch, step)

    def total(self, values: list[float]) -> list[float]:
        return total(values, self.world.size)

    def gradients(self, batches: Iterator[Any]) -> tuple[float, int, float]:
        at, count = self.progress, self.recipe.gradient_accumulation_steps
        asked = time.perf_counter()
        parts = [next(batches) for _ in range(count)]
        waited = time.perf_counter() - asked
        value, unreadable, whole = 0.0, 0, self.data.order.size(at.step)
        self.summed: Any = None
        for part, (images, targets, bad) in enumerate(parts):
            tell_replaced(bad)
            unreadable += len(bad)
            share = len(images) / whole
            draws = np.random.default_rng([self.recipe.seed, at.epoch, at.step, self.world.rank, part])
            for cell in self.paths:
                cell.draw(draws)
            loss, more = self.step_gradients(images, targets, Tensor(share * self.data.order.shares, ms.float32))
            self.summed = more if self.summed is None else self.sum(*self.summed, *more)
            value += float(loss.asnumpy()) * share
        return value, unreadable, waited

    def gradient_norm(self) -> float:
        self.summed = self.mean(*self.summed)
        return float(self.norm(*self.summed).asnumpy())

    def apply(self) -> float:
        self.update(*self.summed)
        self.scale(Tensor(True))
        if self.average:
            self.progress.ema_updates += 1
            self.average(Tensor(average_decay(self.recipe, self.progress.ema_updates), ms.float32))
        return float(self.norm(*self.trained).asnumpy())

    def skip(self) -> bool:
        counter = self.step.optimizer.global_step  # the schedule follows it
        ops.assign(counter, Tensor(counter.asnumpy() + 1, counter.dtype))
        before = float(self.scale.value.asnumpy())
        self.scale(Tensor(False))
        return float(self.scale.value.asnumpy()) < before

    # --- end of an epoch ---

    @contextmanager
    def averaged(self) -> Iterator[None]:
        if self.average:
            self.average.swap()
        try:
            yield
        finally:
            if self.average:
                self.average.swap()

    def evaluate(self) -> dict[str, float]:
        assert self.eval_data is not None
        scores = evaluate(self.model, self.eval_data, self.world.size)
        for image in self.eval_data.bad:
            logger.warning("left out the unreadable validation image %s (%s)", image.name, image.reason)
        return {"val_loss": scores["loss"], "top1": scores["top1"], "top5": scores["top5"]}

    def diagnose(self) -> dict[str, Any]:
        gates = [p.asnumpy() for p in self.model.get_parameters() if p.name.endswith("gating_param")]
        return {"gate": [[round(float(1 / (1 + np.exp(-value))), 5) for value in gate] for gate in gates]}

    def finished(self) -> nn.Cell:
        """The model, with the moving average of its weights if the recipe keeps one."""
        if self.average:
            self.average.swap()
        return self.model


def _watch(run: MindSporeRun) -> Any:
    """A callback that watches over MindSpore's own loop: it sees the losses that this loop shows it, and ends what it should end."""

    class Watch(ms.train.Callback):
        def on_train_epoch_begin(self, run_context: Any) -> None:
            self.began = time.perf_counter()

        def on_train_step_end(self, run_context: Any) -> None:
            at, outputs = run.progress, run_context.original_args().net_outputs
            loss = float((outputs[0] if isinstance(outputs, (tuple, list)) else outputs).asnumpy().mean())
            if math.isfinite(loss):
                at.loss_sum += loss
                at.loss_steps += 1

        def on_train_epoch_end(self, run_context: Any) -> None:
            at, network = run.progress, run.network
            at.updates += run.plan.steps
            at.skipped, at.skipped_in_row = int(network.skipped.asnumpy()), int(network.skipped_in_row.asnumpy())
            longest = int(network.longest_row.asnumpy())
            for counter in (network.skipped, network.longest_row):
                ops.assign(counter, Tensor(0, ms.int32))
            if longest > run.recipe.max_skipped_steps:
                raise run.diverged(f"the norm of the gradient was not finite in {longest} steps in a row")
            if not math.isfinite(float(run.norm(*run.trained).asnumpy())):
                raise run.diverged("the weights are not finite")
            run.finish_epoch(run.plan.steps, time.perf_counter() - self.began)
            network.set_train(True)
            if run.signals.noted or run.stale:
                run_context.request_stop()

    return Watch()
