"""One training run, whatever the framework: its folder, recipe, log, checkpoints to keep, resumption, faults, signals and progress.

An engine derives from ``Run`` and supplies what computes: devices, data and model, one step, the state to save, evaluation.
Everything random follows from the seed and ``Progress``, so a run that is killed at any moment and resumed from its last
checkpoint repeats what the unbroken run does. Imports no framework.
"""

import dataclasses
import logging
import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from convit.engine.folder import Folder, Log, Progress, last_epoch, writing
from convit.engine.recipe import FIELDS, FREE, Recipe, changed_keys, dump_recipe
from convit.engine.shown import Bar, Boards
from convit.engine.world import World, find_world
from convit.weights.files import shown

logger = logging.getLogger("convit")


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signum: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; saved {path}; go on with --resume {path.parent}")
        self.signum = signum


class StopSignals:
    """SIGTERM and SIGINT are noted, so that the current step can end; a second one ends the program at once."""

    def __init__(self) -> None:
        self.noted = 0
        self._old_handlers: dict[int, Any] = {}

    def catch(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._old_handlers[signum] = signal.signal(signum, self._note)

    def release(self) -> None:
        for signum, handler in self._old_handlers.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: Any) -> None:
        if self.noted:
            raise KeyboardInterrupt
        self.noted = signum


@dataclasses.dataclass
class Result:
    """What a finished run gives: the trained model (the moving average if the recipe keeps one), scores in percent, the epoch records."""

    model: Any
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


class Plan(NamedTuple):
    """What an engine has built: the names of the classes, images, steps and global batch of an epoch, the learning rate and that of every
    step, and a line about device and precision."""

    classes: list[str]
    samples: int
    steps: int
    global_batch: int
    lr: float
    rates: list[float]
    about: str


class Run(ABC):
    """One training run on this process."""

    suffix: ClassVar[str]  # of checkpoints
    hint: ClassVar[str]  # what helps against losses that are not finite
    before: ClassVar[dict[str, Any]] = {}  # what runs did before these keys were
    sharded = False
    whole_epochs = False  # a run that can only be resumed between two epochs
    model: Any

    def __init__(self, recipe: Recipe, output: Path, resume: bool, overwrite: bool, progress: bool) -> None:
        self.recipe, self.output, self.resume, self.overwrite, self.show = recipe, output, resume, overwrite, progress
        self.last = output / f"last{self.suffix}"
        self.progress, self.history = Progress(), list[dict[str, Any]]()
        self.folder: Folder | None = None
        self.log: Log | None = None
        self.boards: Boards | None = None
        self.bar = Bar(False, 0, 0)
        self.signals = StopSignals()

    # --- what an engine supplies ---

    @abstractmethod
    def join(self) -> None:
        """Take the device and meet the other processes of ``world``."""

    @abstractmethod
    def leave(self) -> None:
        """Leave the other processes, if ``join`` has met them."""

    @abstractmethod
    def build(self) -> Plan:
        """Data, ``model``, optimiser, loss."""

    @abstractmethod
    def batches(self, epoch: int, step: int) -> Iterator[Any]:
        """Start training at this point: the batches that ``gradients`` takes."""

    @abstractmethod
    def gradients(self, batches: Iterator[Any]) -> tuple[float, int, float]:
        """Compute the gradients of one step; this process's share of its loss, the unreadable images met, the seconds waited for data."""

    @abstractmethod
    def gradient_norm(self) -> float:
        """The norm of the gradients over all processes, as the optimiser would take them."""

    @abstractmethod
    def apply(self) -> float:
        """Step the optimiser with the gradients, and the moving average; the norm of the new weights."""

    @abstractmethod
    def skip(self) -> bool:
        """Drop the gradients; the schedule goes on. Whether the loss scale could be lowered, so that the next step may do better."""

    @abstractmethod
    def total(self, values: list[float]) -> list[float]:
        """Sum each of ``values`` over the processes; the same on every process."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """val_loss, top1 and top5 (percent) of ``model``, or of its moving average."""

    @abstractmethod
    def diagnose(self) -> dict[str, Any]:
        """What an epoch's record says about the model."""

    @abstractmethod
    def weights(self) -> dict[str, Any]:
        """What best.* and epoch_N.* hold. Every process calls it."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What last.* holds: all that ``restore`` needs. Every process calls it."""

    @abstractmethod
    def restore(self, saved: dict[str, Any], old: Recipe) -> None:
        """Set ``state`` from what ``load`` has read of a run with the recipe ``old``: what the keys say is that of the new recipe."""

    @staticmethod
    @abstractmethod
    def save(path: Path, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write a checkpoint, whole or not at all: what ``weights`` or ``state`` gave, and plain values."""

    @staticmethod
    @abstractmethod
    def load(path: Path) -> dict[str, Any]:
        """Read what ``save`` wrote; ``ValueError`` for a file that is damaged or no run's."""

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, ``model`` holds the weights that are evaluated and kept."""
        return nullcontext()

    # --- set-up ---

    @property
    def chief(self) -> bool:
        return self.world.rank == 0

    def say(self, text: str) -> None:
        if self.chief:
            logger.info(text)

    def _prepare(self) -> None:
        recipe, output = self.recipe, self.output
        if recipe.wandb and find_spec("wandb") is None:
            raise ImportError("the recipe's key wandb needs Weights & Biases: pip install wandb, or --wandb '' to go without")
        self.world = World() if recipe.distribute is False else find_world()
        if recipe.distribute and self.world.size == 1:
            logger.info("distribute is set, but one process was started: torchrun, mpirun, srun or msrun start more")
        refusal: Exception | None = None
        if self.chief:
            try:
                self.folder = Folder(output, self.last.name, self.resume, self.overwrite)
            except (OSError, ValueError) as error:
                refusal = error
            if refusal and self.world.size == 1:
                raise refusal
        self.join()
        if self.total([float(refusal is not None)])[0]:
            raise refusal or FileExistsError(f"{output} cannot be used: see what the first process says")
        saved = self.load(self.last) if self.resume and self.last.exists() else None
        self.plan = self.build()
        if saved:
            self._resume(saved)
        elif self.resume:
            self.say(f"nothing to resume in {output}: starting")
        if self.folder:
            with writing(self.folder.claim("recipe.yaml")) as file:
                file.write(dump_recipe(recipe).encode())
            self.log = Log(self.folder.claim("log.jsonl"), self.progress)
            self.boards = Boards(recipe, output, self.progress.epoch)
        self.bar = Bar(self.show and self.chief, recipe.epoch_size * self.plan.steps, self.progress.updates)
        several = f"{self.world.size} processes ({self.world.launcher}{', FSDP' if self.sharded else ''})"
        self.say(
            f"{recipe.model}, {len(self.plan.classes)} classes; {self.plan.samples} training samples, "
            f"{recipe.epoch_size} epochs of {self.plan.steps} steps\n"
            f"{self.plan.about}, {several if self.world.size > 1 else '1 process'}; "
            f"global batch {self.plan.global_batch}; learning rate {self.plan.lr:g}"
        )

    def _resume(self, saved: dict[str, Any]) -> None:
        missing = [name for name in ("recipe", "progress", "global_batch") if name not in saved]
        if missing or not isinstance(saved["recipe"], dict) or not isinstance(saved["progress"], dict):
            raise ValueError(f"{self.last} is no state of a run: it has no {' and no '.join(missing) or 'recipe or progress'}")
        old = Recipe(**{name: value for name, value in (self.before | saved["recipe"]).items() if name in FIELDS})
        changed = {name: pair for name, pair in changed_keys(old, self.recipe).items() if name not in FREE}
        if changed:
            keys = ", ".join(f"{name} {before!r} -> {after!r}" for name, (before, after) in changed.items())
            self.say(f"resuming with other keys: {keys}")
        try:
            at = self.progress = Progress(**saved["progress"])
        except TypeError as error:
            raise ValueError(f"{self.last} is no state of a run: {error}") from None
        wrong = [name for name, value in vars(at).items() if not _is_like(value, getattr(Progress(), name))]
        if wrong:
            raise ValueError(f"{self.last} is no state of a run: its {wrong[0]} cannot be {shown(getattr(at, wrong[0]))}")
        self._compare(saved)
        if at.step and (self.whole_epochs or saved["global_batch"] != self.plan.global_batch):
            raise ValueError(
                f"{self.last} stands inside an epoch with a global batch of {saved['global_batch']}, and this run has "
                f"{self.plan.global_batch}{' and dataset_sink_mode' * self.whole_epochs}: "
                "start as many processes as before, or change batch_size or gradient_accumulation_steps to match"
            )
        try:
            self.restore(saved, old)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.last} holds another model or optimiser than the recipe: {str(error).splitlines()[0]}") from None
        self.say(f"resumed {self.last}: epoch {at.epoch}, step {at.step} of {self.plan.steps}")

    def rate(self) -> float:
        """The learning rate of the step at ``progress``."""
        return self.plan.rates[min(self.progress.epoch * self.plan.steps + self.progress.step, len(self.plan.rates) - 1)]

    def _compare(self, saved: dict[str, Any]) -> None:
        """Say what else is not as it was when the run stopped."""
        classes, processes, samples = (saved.get(name) for name in ("classes", "processes", "samples"))
        if isinstance(classes, list) and classes != list(self.plan.classes):
            gone, new = ([one for one in a if one not in b] for a, b in ((classes, self.plan.classes), (self.plan.classes, classes)))
            raise ValueError(
                f"{self.last} was trained on other classes than the data has now: {len(classes)} and {len(self.plan.classes)}; "
                f"gone: {', '.join(map(str, gone[:5])) or 'none'}; new: {', '.join(new[:5]) or 'none'}"
            )
        if samples not in (None, self.plan.samples):
            self.say(f"the training data has {self.plan.samples} samples, and had {samples}: from here their order is another one")
        if processes not in (None, self.world.size):
            self.say(f"{processes} process(es) trained so far, {self.world.size} from here: the same images a step, other rounding")

    # --- loop ---

    def train(self) -> Result:
        """Train to the end. What the run holds open is closed in any case."""
        try:
            self._prepare()
            self.signals.catch()
            began = time.perf_counter()
            self.loop()
            record = self.history[-1] if self.history else last_epoch(self.output / "log.jsonl")
            scores = {name: record.get(name, math.nan) for name in ("top1", "top5", "val_loss", "train_loss")}
            at, seconds = self.progress, time.perf_counter() - began
            return Result(
                self.finished(), self.output, **scores, best_top1=at.best, best_epoch=at.best_epoch, epochs=at.epoch, seconds=seconds,
                history=self.history,
            )  # fmt: skip
        finally:
            self.signals.release()
            self.bar.close()
            if self.log:
                self.log.close()
            if self.boards:
                self.boards.close()
            try:
                self.leave()
            finally:
                if self.folder:
                    self.folder.release()

    def finished(self) -> Any:
        """The model of the result."""
        return self.model

    def loop(self) -> None:
        at = self.progress
        while at.epoch < self.recipe.epoch_size:
            if self.stale:
                self.say(f"stopped after {at.epoch} epochs: no better top-1 in the last {self.recipe.early_stop}")
                return
            self._epoch()

    @property
    def stale(self) -> bool:
        """Whether ``early_stop`` ends the run here."""
        at, patience = self.progress, self.recipe.early_stop
        return patience is not None and at.epoch - 1 - max(at.best_epoch, 0) >= patience

    def _epoch(self) -> None:
        at, recipe, steps = self.progress, self.recipe, self.plan.steps
        began, waited, first, lr = time.perf_counter(), 0.0, at.step, self.plan.lr
        batches = self.batches(at.epoch, at.step)
        while at.step < steps:
            loss, seconds = self._step(batches)
            lr = self.rate()
            waited += seconds
            at.step += 1
            at.updates += 1
            if (at.updates % recipe.log_interval == 0 or at.step == steps) and self.log:
                self.log.write({"kind": "step", "epoch": at.epoch, "update": at.updates, "loss": loss, "lr": lr})
            self.bar.update(at.updates, at.epoch, loss)
            if self.signals.noted:
                self.save_last()
                raise Interrupted(self.signals.noted, self.last)
            if recipe.ckpt_save_steps and at.step % recipe.ckpt_save_steps == 0 and at.step < steps and not at.skipped_in_row:
                self.save_last()
        getattr(batches, "close", lambda: None)()
        self.finish_epoch(at.step - first, time.perf_counter() - began, lr=lr, data_seconds=round(waited, 3))

    def _step(self, batches: Iterator[Any]) -> tuple[float, float]:
        """One optimiser step, skipped and counted if its loss or gradient is not finite: its loss, the seconds waited for data."""
        at, recipe = self.progress, self.recipe
        loss, bad, waited = self.gradients(batches)
        loss, stop, bad_total = self.total([loss, float(self.signals.noted), float(bad)])
        if stop and not self.signals.noted:
            self.signals.noted = signal.SIGTERM
        at.bad_images += int(bad_total)
        if at.bad_images > recipe.max_bad_images:
            raise ValueError(f"{at.bad_images} unreadable images in epoch {at.epoch}; max_bad_images allows {recipe.max_bad_images}")
        norm = self.gradient_norm() if math.isfinite(loss) else math.nan
        if math.isfinite(loss) and math.isfinite(norm):
            at.skipped_in_row = 0
            at.loss_sum += loss
            at.loss_steps += 1
            if not math.isfinite(self.apply()):
                raise self.diverged("the weights are not finite after this step")
            return loss, waited
        at.skipped += 1
        at.skipped_in_row += not self.skip()
        wrong = "loss" if not math.isfinite(loss) else "norm of the gradient"
        logger.warning("epoch %d, step %d: the %s is %s; skipped this step", at.epoch, at.step, wrong, norm if wrong[0] == "n" else loss)
        if at.skipped_in_row > recipe.max_skipped_steps:
            raise self.diverged(f"the {wrong} was not finite in {at.skipped_in_row} steps in a row")
        return loss, waited

    def diverged(self, what: str) -> FloatingPointError:
        """The error that ends a run whose numbers went astray; last.* holds the last state before."""
        at = self.progress
        saved = f"{self.last} is from before" if self.last.exists() else "no checkpoint had been written"
        return FloatingPointError(
            f"{what} (epoch {at.epoch}, step {at.step}); {saved}. Lower lr, clip the gradient (--clip_grad), or {self.hint}"
        )

    # --- end of an epoch ---

    def finish_epoch(self, steps: int, seconds: float, **more: Any) -> None:
        """Validate, log, then best and kept weights, then last.*: a kill in between repeats the epoch and writes the same again."""
        at, recipe = self.progress, self.recipe
        record: dict[str, Any] = {
            "kind": "epoch",
            "epoch": at.epoch,
            "update": at.updates,
            "train_loss": at.loss_sum / max(at.loss_steps, 1),
            "skipped_steps": at.skipped,
            "bad_images": at.bad_images,
            "images_per_second": round(steps * self.plan.global_batch / seconds, 2),
            "seconds": round(seconds, 3),
            **more,
        }
        due = (at.epoch + 1) % recipe.val_interval == 0 or at.epoch + 1 == recipe.epoch_size
        with self.averaged():
            if recipe.val_while_train and due:
                record |= self.evaluate()
            record |= self.diagnose()
            self.history.append(record)
            self.bar.epoch(record, recipe.epoch_size)
            if self.log:
                self.log.write(record, sync=True)
            if self.boards:
                self.boards.write(record)
            dropped = self._keep(record)
        at.epoch += 1
        at.step = at.loss_steps = at.skipped = at.bad_images = 0
        at.loss_sum = 0.0
        # a state that is about to diverge does not take the place of a good one
        if math.isfinite(record.get("val_loss", 0.0)) and not at.skipped_in_row:
            self.save_last()
            if self.folder:
                for name in dropped:
                    self.folder.drop(name)

    def _keep(self, record: dict[str, Any]) -> list[str]:
        """Write best.* and epoch_N.* where they are due; the names of those that are no longer kept."""
        at, recipe = self.progress, self.recipe
        better = record.get("top1", -1.0) > at.best and math.isfinite(record["val_loss"])
        keep = recipe.keep_checkpoint_max > 0 and (at.epoch + 1) % recipe.ckpt_save_interval == 0
        if better:
            at.best, at.best_epoch = record["top1"], at.epoch
        if not (better or keep):
            return []
        name = f"epoch_{at.epoch + 1}{self.suffix}"
        tensors, facts = self.weights(), self._facts() | {"epoch": at.epoch, "top1": record.get("top1", math.nan)}
        if self.folder:
            for file in [f"best{self.suffix}"] * better + [name] * keep:
                self.save(self.folder.claim(file), tensors, facts)
        if not keep:
            return []
        at.kept = [one for one in at.kept if one[0] != name] + [[name, record.get("top1", -1.0)]]
        if recipe.ckpt_save_policy == "top_k":
            at.kept.sort(key=lambda one: one[1])  # stable: of equals the older goes first
        if recipe.ckpt_save_policy is None:
            return []
        dropped = [one[0] for one in at.kept[: -recipe.keep_checkpoint_max]]
        at.kept = at.kept[-recipe.keep_checkpoint_max :]
        return dropped

    def save_last(self) -> None:
        tensors = self.state()
        if self.folder:
            more = {"progress": dataclasses.asdict(self.progress), "global_batch": self.plan.global_batch}
            more |= {"processes": self.world.size, "samples": self.plan.samples}
            self.save(self.folder.claim(self.last.name), tensors, self._facts() | more)
            self.folder.resumable()

    def _facts(self) -> dict[str, Any]:
        return {"recipe": dataclasses.asdict(self.recipe), "classes": list(self.plan.classes)}


def _is_like(value: Any, usual: Any) -> bool:
    """Whether it may stand where a new run has ``usual``."""
    if isinstance(usual, list):
        return isinstance(value, list)
    return isinstance(value, (int, float) if isinstance(usual, float) else int) and value >= min(usual, 0) and value != math.inf
