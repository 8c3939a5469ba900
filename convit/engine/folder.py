"""The folder of a run: files that are whole or not there, where the run stands, its log. Imports no framework."""

import dataclasses
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from convit.weights.files import BadFile, mapped, parse_json, partials, read_text, replacing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("convit")


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
        way = "Free some space and go on" if path.parent.is_dir() else f"{path.parent} is gone: put it back and go on"
        raise OSError(f"cannot write {path}: {reason}{intact}. {way} with --resume") from error


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


class Folder:
    """A run's folder: one holder at a time, a list of what the run has written, and nothing else in it ever removed or replaced.

    The lock is the system's, on the folder itself: it ends with the process that holds it, however that ends. ``run.json`` lists the files
    of the run and says who works on it.
    """

    def __init__(self, path: Path, last: str, resume: bool, overwrite: bool) -> None:
        """Take the folder for a run whose state is in the file ``last``.

        Raises:
            FileExistsError: It holds files that the run would replace, and ``overwrite`` is not set; or a run, and neither is ``resume``.
            BlockingIOError: Another process works in it; the message says which.
            OSError: It cannot be made.
        """
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _hold(path)
        try:
            self._take(last, resume, overwrite)
        except BaseException:
            self.release()
            raise

    def _take(self, last: str, resume: bool, overwrite: bool) -> None:
        listed, saved = _manifest(self.path)
        found = {entry.name for entry in self.path.iterdir() if _OURS.fullmatch(entry.name)}
        resumed = resume and last in found
        if overwrite and not resumed:
            for name in found:
                (self.path / name).unlink()
            found, listed, saved = set(), set(), False
        elif resumed and not listed:  # of a version that kept no list, or copied without it
            listed = set(found)
        strange = sorted(found - listed, key=_natural) if resume else sorted(found, key=_natural)
        if last in found and not resume:
            raise FileExistsError(f"{self.path} already holds a run: --resume continues it, --overwrite starts over")
        if strange or (found and saved and not resumed):
            what = ", ".join((strange or sorted(found, key=_natural))[:8])
            why = "which this run did not write" if resumed else f"but no {last} to go on from"
            raise FileExistsError(
                f"{self.path} holds {what}, {why}: nothing there is replaced. Move them away, choose another folder, "
                "or start over with --overwrite, which deletes them"
            )
        for partial in partials(self.path):  # of a run that was killed while it wrote: whoever holds the lock is alone
            name = partial.name[1:].split(".partial")[0].rpartition(".")[0]
            if name == MANIFEST or _OURS.fullmatch(name):
                partial.unlink()
        self.files, self.saved = listed & found, saved or resumed
        self._write()

    def claim(self, name: str) -> Path:
        """The path of one of the run's files, to be written or replaced now.

        Raises:
            FileExistsError: Something has been put there that the run did not write.
        """
        if name not in self.files:
            if (self.path / name).exists():
                raise FileExistsError(f"{self.path / name} is not of this run: move it away and go on with --resume")
            self.files.add(name)  # before it is there, so that a kill leaves no file that nobody owns
            self._write()
        return self.path / name

    def drop(self, name: str) -> None:
        """Remove one of the run's files."""
        if name in self.files:
            (self.path / name).unlink(missing_ok=True)
            self.files.discard(name)

    def resumable(self) -> None:
        """Note that there is something to go on from now."""
        if not self.saved:
            self.saved = True
            self._write()

    def release(self) -> None:
        if self._lock is not None:
            _held.discard(self._lock)
            os.close(self._lock)
            self._lock = None

    def _write(self) -> None:
        manifest = {"files": sorted(self.files, key=_natural), "resumable": self.saved}
        manifest |= {"process": os.getpid(), "host": socket.gethostname()}
        with writing(self.path / MANIFEST) as file:
            file.write((json.dumps(manifest, indent=1) + "\n").encode())


MANIFEST = "run.json"
MAX_RECORD = 1 << 20  # bytes of a line of the log
_OURS = re.compile(r"(last|best|epoch_\d+)\.(pth|ckpt)|log\.jsonl|recipe\.yaml")
_held: set[int] = set()  # the locks of this process


def _natural(name: str) -> tuple[str, int]:
    digits = "".join(filter(str.isdigit, name))
    return re.sub(r"\d+", "", name), int(digits or 0)


def _manifest(folder: Path) -> tuple[set[str], bool]:
    """The files that the list of a folder names, and whether the run had anything to go on from."""
    path = folder / MANIFEST
    if not path.exists():
        return set(), False
    found = parse_json(path, read_text(path, 1 << 20), "the list of the run's files,")
    names = found.get("files") if isinstance(found, dict) else None
    if not isinstance(names, list):
        raise BadFile(path, "is no list of a run's files: it must be an object with files")
    return {name for name in names if isinstance(name, str) and _OURS.fullmatch(name)}, found.get("resumable") is True


def _hold(folder: Path) -> int | None:
    """Lock a folder, or where only what is open for writing can be locked (NFS) a file in it; None where there are no locks (Windows)."""
    if fcntl is None:
        return None
    for path, flags in ((folder, os.O_RDONLY), (folder / ".lock", os.O_RDWR | os.O_CREAT)):
        lock = os.open(path, flags, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise BlockingIOError(f"{folder} is in use by {_holder(folder)}: wait until it has ended, or choose another folder") from None
        except OSError:
            os.close(lock)
        else:
            _held.add(lock)
            return lock
    logger.warning("%s: its file system has no locks, so that no other run is kept out of it", folder)
    return None


def _holder(folder: Path) -> str:
    try:
        found = json.loads(read_text(folder / MANIFEST, 1 << 20))
        return f"another run, process {int(found['process'])} on {str(found['host'])[:80]}"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun
        return "another run"


def _let_go_in_child() -> None:
    """A forked data worker must not hold the folder of a run that was killed."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


class Log:
    """``log.jsonl``: one record per line, flushed and synced with each epoch."""

    def __init__(self, path: Path, progress: Progress) -> None:
        """Open for appending, without the records that a resumed run will write again."""
        self.path = path
        if path.exists():
            with writing(path) as file:
                file.writelines(line for line in log_lines(path) if _is_past(line, progress))
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


def log_lines(path: Path) -> Iterator[bytes]:
    """The lines of a log, one by one.

    Raises:
        OSError: It cannot be opened.
        BadFile: It is no regular file, or has a line that is too long for a record.
    """
    mapped(path)
    with open(path, "rb") as file:
        for number in count(1):
            line = file.readline(MAX_RECORD)
            if len(line) == MAX_RECORD and not line.endswith(b"\n"):
                raise BadFile(path, f"has more than {MAX_RECORD:,} bytes, which is no record of a run", f"line {number}")
            if not line:
                return
            yield line


def _is_past(line: bytes, progress: Progress) -> bool:
    """Whether a resumed run will not write this line again; one that is no record of a run is kept as it is."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return line.endswith(b"\n")  # else it is the line that a kill cut short
    if isinstance(record, dict) and record.get("kind") == "step":
        return not isinstance(record.get("update"), int) or bool(record["update"] <= progress.updates)
    if isinstance(record, dict) and record.get("kind") == "epoch":
        return not isinstance(record.get("epoch"), int) or bool(record["epoch"] < progress.epoch)
    return line.endswith(b"\n")


def last_epoch(path: Path) -> dict[str, Any]:
    """The last epoch record of a log: what a run that was complete already gives. Lines that are no records are passed over."""
    last: dict[str, Any] = {}
    for line in log_lines(path) if path.exists() else []:
        if b'"kind": "step"' in line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and record.get("kind") == "epoch":
            last = record
    return last
