"""The files of a run: written whole or not at all, and what a resumed run needs to continue as if it had never stopped."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn


def write_atomic(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let ``write`` fill ``path``, through a temporary file that is synced and renamed: a reader sees the old file or the new one.

    Raises:
        OSError: It cannot be written; ``path`` is as it was, and the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        intact = f"; the {path.name} written before is intact" if path.exists() else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"cannot write {path}: {reason}{intact}. Free some space and go on with --resume") from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path: Path, state: dict[str, Any]) -> None:
    """``torch.save``, atomically."""
    write_atomic(path, lambda file: torch.save(state, file))


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote, to CPU, tensors and plain values only.

    Raises:
        ValueError: The file is no such checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # of the archive, of pickle, or the refusal of weights_only
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged or no checkpoint: {reason}") from None
    if not isinstance(state, dict) or "progress" not in state:
        raise ValueError(f"{path} is no checkpoint of a training run (last.pth is); to start from its weights use --ckpt_path")
    return state


@dataclasses.dataclass
class Progress:
    """Where a run stands between two optimiser steps. Everything random follows from it and the seed."""

    epoch: int = 0  # current epoch
    step: int = 0  # steps done in it
    updates: int = 0  # steps done in all
    ema_updates: int = 0  # of them, those that changed the weights
    loss_sum: float = 0.0  # over the steps of this epoch that counted
    loss_steps: int = 0
    skipped: int = 0  # steps of this epoch skipped for their loss
    skipped_in_row: int = 0
    bad_images: int = 0  # in this epoch
    best: float = -1.0  # top-1, percent
    best_epoch: int = -1
    kept: list[list[Any]] = dataclasses.field(default_factory=list)  # [file name, top-1] of the checkpoints kept beside last and best


class Log:
    """``log.jsonl``: one record per line, flushed and synced with each epoch."""

    def __init__(self, path: Path, progress: Progress) -> None:
        """Open for appending, without the records that a resumed run will write again."""
        self.path = path
        if path.exists():
            kept = [line for line in path.read_bytes().splitlines(keepends=True) if _is_past(line, progress)]
            write_atomic(path, lambda file: file.writelines(kept))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, record: dict[str, Any], sync: bool = False) -> None:
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
            if sync:
                os.fsync(self.file.fileno())
        except OSError as error:
            raise OSError(
                f"cannot write {self.path}: {error}. The checkpoints are intact: free some space and go on with --resume"
            ) from error

    def close(self) -> None:
        self.file.close()


def _is_past(line: bytes, progress: Progress) -> bool:
    try:
        record = json.loads(line)
    except ValueError:  # the line that a kill cut short
        return False
    if record.get("kind") == "step":
        return record["update"] <= progress.updates
    return record.get("epoch", -1) < progress.epoch


class States:
    """Model and optimiser state as one process would save it, whether they are whole, replicated or sharded."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, sharded: bool) -> None:
        self.model, self.optimizer, self.sharded = model, optimizer, sharded

    def get(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both states; if sharded, a collective call whose result is complete on rank 0."""
        if not self.sharded:
            return self.model.state_dict(), self.optimizer.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        return get_state_dict(self.model, self.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def set(self, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
        if not self.sharded:
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict(optimizer)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        options = StateDictOptions(full_state_dict=True)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=options)
