"""The folder of a run: files that are whole or not there, where the run stands, its log. Imports no framework."""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from convit.weights.files import replacing


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """``replacing``, for a run: whoever resumes it sees the old file or the new one, and a full disk is a message.

    Raises:
        OSError: It cannot be written; ``path`` is as it was.
    """
    try:
        with replacing(path) as file:
            yield file
    except (OSError, RuntimeError) as error:  # torch and MindSpore report a full disk as RuntimeError
        intact = f"; the {path.name} written before is intact" if path.exists() else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"cannot write {path}: {reason}{intact}. Free some space and go on with --resume") from error


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
            with writing(path) as file:
                file.writelines(kept)
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
        return bool(record["update"] <= progress.updates)
    return bool(record.get("epoch", -1) < progress.epoch)


def last_epoch(path: Path) -> dict[str, Any]:
    """The last epoch record of a log: what a run that was complete already gives."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return next((record for record in reversed(records) if record["kind"] == "epoch"), {})
