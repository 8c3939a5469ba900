"""Recipes, shards, logs and pictures of strangers that once hung or took all memory: refused by name within 2 seconds and 300 MB."""

import os
import subprocess
import sys
import tarfile

import pytest

pytest.importorskip("torch")
pytest.importorskip("yaml")
pytest.importorskip("PIL")

READERS = """
import sys, time
from pathlib import Path
from convit.engine.folder import Log, Progress, last_epoch
from convit.engine.images import read_named
from convit.engine.recipe import load_recipe
from convit.engine.sources import TarSource
from convit.figures import read_log

readers = {".yaml": [load_recipe], ".tar": [lambda path: TarSource([path])], ".jpg": [read_named]}
readers[".jsonl"] = [read_log, last_epoch, lambda path: Log(path, Progress()).close()]
for path in map(Path, sys.argv[1:]):
    for read in readers[path.suffix]:
        began = time.process_time()
        try:
            read(path)
            print(path.name, "was read")
        except ValueError as error:
            if str(path) not in str(error) or len(str(error)) > 600: print(path.name, repr(error))
        if time.process_time() - began > 2: print(path.name, "is slow")
        peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
        if peak > 300_000: print(path.name, "takes", peak, "kB")
"""


def test_hostile_files_cost_nothing(tmp_path):
    for name, text in {
        "flow": "[" * 30_000,
        "braces": "{a: " * 15_000,
        "dashes": "- " * 30_000,
        "questions": "? " * 30_000,
        "lines": "[" + "\n[" * 20_000,
        "number": "seed: " + "9" * 60_000,
        "base60": "seed: " + ":".join(["59"] * 8000),
        "list": "seed: [" + "1," * 20_000 + "]",
        "key": "1: 2",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    for kind in (b"x", b"g", b"L", b"K"):  # headers that say how long the next name is
        member = tarfile.TarInfo("a.jpg")
        member.type, member.size = kind, 1 << 33
        (tmp_path / f"names_{kind.decode()}.tar").write_bytes(member.tobuf() + bytes(512))
    (tmp_path / "members.tar").write_bytes(b"".join(tarfile.TarInfo(f"{i}.jpg").tobuf() for i in range(20_000)))
    for suffix in ("yaml", "tar", "jpg", "jsonl"):
        os.mkfifo(tmp_path / f"pipe.{suffix}")
        with open(tmp_path / f"sparse.{suffix}", "wb") as file:
            file.truncate(1 << 40)
    files = sorted(map(str, tmp_path.iterdir()))
    told = subprocess.run([sys.executable, "-c", READERS, *files], capture_output=True, text=True, timeout=120)
    assert told.stdout + told.stderr == ""


def test_a_pipe_among_the_pictures_is_a_bad_image(tmp_path):
    """It would block its reader for ever."""
    from convit.engine.images import BadImage
    from convit.engine.sources import FolderSource, read_sample

    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a/0.jpg")
    sample = read_sample(FolderSource(tmp_path), 0, 3)
    assert isinstance(sample, BadImage) and "named pipe" in sample.reason
