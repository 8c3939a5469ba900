"""Kills at random moments, and as many resumes that must end in the same bits: ``pytest`` does a few, ``python tests/kills.py 200`` many.

Each round trains a small run, sends it SIGKILL up to ten times at moments drawn at random, lets the last resume end, and compares every
bit of last.* and every loss with a run that nothing interrupts. Meanwhile two readers open last.pth as fast as they can: it must be whole
whenever it is there.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from training import WHOLE, assert_same_state, fork, losses, small

from convit.engine.pytorch.checkpoint import load
from convit.engine.pytorch.train import train


def read_always(path):
    """Open a state as fast as possible, for ever; a file that is not whole ends it with a message."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            load(path)
        time.sleep(0.01)


def killed_round(whole, output, kills, seconds, draw, readers=2):
    """Train ``output`` as ``whole`` was, killed ``kills`` times within ``seconds`` of its start; the kills that met a living process."""

    def work():
        torch.set_num_threads(1)
        train(small(**WHOLE), output, resume=True, progress=False)

    watching = [fork(lambda: read_always(output / "last.pth")) for _ in range(readers)]
    met = 0
    for _ in range(kills):
        child = fork(work)
        time.sleep(draw.uniform(0.02, seconds))
        os.kill(child, signal.SIGKILL)
        met += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    work()
    for reader in watching:
        os.kill(reader, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) == -signal.SIGKILL, "a reader met a file that is not whole"
    assert_same_state(whole, output)
    assert losses(whole) == losses(output)
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    return met


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, folder, done = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="convit-kills-")), 0
    torch.set_num_threads(1)
    began = time.monotonic()
    train(small(**WHOLE), folder / "whole", progress=False)
    seconds = time.monotonic() - began
    rounds = 0
    while done < args.kills:
        done += killed_round(folder / "whole", folder / "run", min(10, args.kills - done), seconds / 3, draw)
        rounds += 1
        shutil.rmtree(folder / "run")
        print(f"{done} kills, {rounds} runs equal to the bit", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
