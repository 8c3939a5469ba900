"""Recipes, shards, logs and pictures of strangers that once hung or took all memory: refused by name within 2 seconds and 300 MB."""

import os
import struct
import subprocess
import sys
import tarfile
import zlib

import pytest

pytest.importorskip("torch")
pytest.importorskip("yaml")
pytest.importorskip("PIL")

READERS = """
import logging, sys, time
from pathlib import Path
from convit.engine.folder import Log, Progress, last_epoch
from convit.engine.images import read_named
from convit.engine.recipe import load_recipe
from convit.engine.sources import TarSource
from convit.figures import read_log

logging.disable()
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


def blank(side):
    """A PNG of one bit a pixel, as small as it gets."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = zlib.compress(bytes((1 + side // 8) * side))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


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
    for kind, text in {"digits": b"1" * 2_000_000, "records": b"1 hdrcharset=" * 200_000}.items():  # tarfile's time is their square
        member = tarfile.TarInfo("a.jpg")
        member.type, member.size = b"x", len(text)
        (tmp_path / f"pax_{kind}.tar").write_bytes(member.tobuf() + text + bytes(-len(text) % 512))
    (tmp_path / "bomb.jpg").write_bytes(blank(13_200))  # 176 million pixels, just within Pillow's own bound
    (tmp_path / "members.tar").write_bytes(b"".join(tarfile.TarInfo(f"{i}.jpg").tobuf() for i in range(20_000)))
    for suffix in ("yaml", "tar", "jpg", "jsonl"):
        os.mkfifo(tmp_path / f"pipe.{suffix}")
        with open(tmp_path / f"sparse.{suffix}", "wb") as file:
            file.truncate(1 << 40)
    files = sorted(map(str, tmp_path.iterdir()))
    told = subprocess.run([sys.executable, "-W", "ignore", "-c", READERS, *files], capture_output=True, text=True, timeout=120)
    assert told.stdout + told.stderr == ""


def test_a_pipe_among_the_pictures_is_a_bad_image(tmp_path):
    """It would block its reader for ever."""
    from convit.engine.images import BadImage
    from convit.engine.sources import FolderSource, read_sample

    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a/0.jpg")
    sample = read_sample(FolderSource(tmp_path), 0, 3)
    assert isinstance(sample, BadImage) and "named pipe" in sample.reason


def test_no_other_program_reads_a_picture(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever the file is called: a stranger's program would run."""
    from convit.engine.images import read_image

    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ValueError, match="cannot identify"):
        read_image(tmp_path / "a.jpg")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch_size: 1\nlr: 1\nepoch_size: 100\n", "line 3 gives 'epoch_size' a second value"),
        ("device: cpu\ndevice_target: GPU\n", "line 2 gives 'device' a second value"),
        ("batch_size: 1:30\n", "line 1 has '1:30', which yaml takes for another number"),
        ("scale: [0.1, 1:30.5]\n", "line 1 has '1:30.5', which yaml"),
        ("batch_size: 010\n", "line 1 has '010', which yaml"),
        ("wandb: no\n", "wandb: expected a text, got False: put it in quotes"),
        ("val_split: 1.10\n", "val_split: expected a text, got 1.1: put it in quotes"),
        ("data_dir: [a]\n", r"data_dir: expected a text, got \['a'\]"),
    ],
)
def test_a_recipe_says_what_it_seems_to_say(tmp_path, text, message):
    from convit.engine.recipe import load_recipe

    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"a.yaml.*{message}"):
        load_recipe(tmp_path / "a.yaml")
