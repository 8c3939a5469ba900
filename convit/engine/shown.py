"""What is shown: TensorBoard, Weights & Biases, a progress bar; what is not. Imports no framework unless the recipe asks for its board."""

import dataclasses
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convit.engine.recipe import Recipe


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """What these loggers have to say below an error is not said meanwhile."""
    levels = {each: each.level for each in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


class Boards:
    """TensorBoard and Weights & Biases, as far as the recipe asks for them."""

    def __init__(self, recipe: Recipe, output: Path, epoch: int) -> None:
        self.events = self.wandb = None
        if recipe.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(output / "tensorboard"), purge_step=epoch)
        if recipe.wandb:
            import wandb

            about = {"project": recipe.wandb, "name": output.name, "dir": str(output), "config": dataclasses.asdict(recipe)}
            self.wandb = wandb.init(**about, resume="auto")

    def write(self, record: dict[str, Any]) -> None:
        if self.events:
            for name in ("train_loss", "val_loss", "top1", "top5", "lr", "images_per_second"):
                if name in record:
                    self.events.add_scalar(name, record[name], record["epoch"])
            self.events.flush()
        if self.wandb:
            numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
            self.wandb.log(numbers, step=record["update"])

    def close(self) -> None:
        if self.events:
            self.events.close()
        if self.wandb:
            self.wandb.finish()


class Bar:
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
