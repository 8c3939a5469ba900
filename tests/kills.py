"""Kills at random moments, and as many resumes that must end in the same bits: ``pytest`` does a few, ``python tests/kills.py 200`` many.

Each round trains a small run, sends it SIGKILL up to ten times at moments drawn at random, of its start and of its steps, lets the last
resume end, and compares every bit of last.* and every loss with a run that nothing interrupts. Meanwhile readers open last.* as fast as
they can: it must be whole whenever it is there. ``--engine mindspore`` does so in an environment that has MindSpore.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from forks import fork

from convit.weights import mindspore_file


class PyTorch:
    """What the rounds need of an engine: to start or resume the run, to read its state, to compare two runs."""

    last = "last.pth"

    def __init__(self):
        import training

        self.training = training

    def work(self, output):
        self.training.torch.set_num_threads(1)
        self.training.train(self.training.small(**self.training.WHOLE), output, resume=True, progress=False)

    def read(self, path):
        self.training.load(path)

    def assert_same(self, whole, other):
        self.training.assert_same_state(whole, other)
        assert self.training.losses(whole) == self.training.losses(other)


class MindSpore:
    """In graph mode: a start takes seconds, so there are epochs enough to be killed in after it."""

    last = "last.ckpt"
    keys = {"embed_dim": 16, "depth": 2, "num_heads": 2, "local_up_to_layer": 1, "patch_size": 8, "batch_size": 32, "num_samples": 352}
    keys |= {"epoch_size": 12, "warmup_epochs": 1, "decay_epochs": 11, "log_interval": 1, "drop_path_rate": 0.3, "ema": True}
    keys |= {"mixup": 0.2, "cutmix": 1.0, "ckpt_save_steps": 4, "keep_checkpoint_max": 2, "framework": "mindspore"}

    def __init__(self):
        from convit.engine.mindspore.train import train
        from convit.engine.recipe import load_recipe

        self.train, self.recipe = train, load_recipe("digits", self.keys)

    def work(self, output):
        self.train(self.recipe, output, resume=True, progress=False)

    def read(self, path):
        mindspore_file.read(path, memoryview(path.read_bytes()))

    def assert_same(self, whole, other):
        """Every byte of the state; the losses but for their last bit, which MindSpore leaves to its allocator."""
        assert (whole / self.last).read_bytes() == (other / self.last).read_bytes()
        mine, others = ([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (whole, other))
        assert len(mine) == len(others) == 12 * 12
        for one, two in zip(mine, others, strict=True):
            loss = "loss" if one["kind"] == "step" else "train_loss"
            assert abs(one[loss] - two[loss]) <= 3e-7 * one[loss], (one, two)


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def read_always(engine, path):
    """Open a state as fast as possible, for ever; a file that is not whole ends it with a message."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            engine.read(path)
        time.sleep(0.03)


def wait_for_step(child, log, before):
    """Until ``child`` has taken a step, or has ended: it opens its log as a new file, and writes."""
    size = None
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        with contextlib.suppress(FileNotFoundError):
            now = log.stat()
            if size is not None and now.st_size > size:
                return
            if now.st_ino != before and size is None:
                size = now.st_size
        time.sleep(0.01)


def killed_round(whole, output, kills, start, steps, draw, engine=None, readers=2):
    """Train ``output`` as ``whole`` was, killed ``kills`` times: within ``start`` seconds of its start, or ``steps`` seconds of a step.

    Returns:
        How many kills met a living process.
    """
    engine = engine or PyTorch()
    watching = [fork(lambda: read_always(engine, output / engine.last)) for _ in range(readers)]
    met = 0
    for _ in range(kills):
        log = output / "log.jsonl"
        before = log.stat().st_ino if log.exists() else None
        child = fork(lambda: engine.work(output))
        if draw.random() < 0.5:
            time.sleep(draw.uniform(0.02, start))
        else:
            wait_for_step(child, log, before)
            time.sleep(draw.uniform(0, steps))
        os.kill(child, signal.SIGKILL)
        met += wait(child) == -signal.SIGKILL
    assert wait(fork(lambda: engine.work(output))) == 0
    for child in watching:
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL, "a reader met a file that is not whole"
    engine.assert_same(whole, output)
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    return met


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int, nargs="?", default=200)
    parser.add_argument("--engine", choices=("pytorch", "mindspore"), default="pytorch")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, folder, done, rounds = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="convit-kills-")), 0, 0
    engine = PyTorch() if args.engine == "pytorch" else MindSpore()
    began = time.monotonic()
    child = fork(lambda: engine.work(folder / "whole"))
    wait_for_step(child, folder / "whole/log.jsonl", None)
    start = time.monotonic() - began
    assert wait(child) == 0
    steps = time.monotonic() - began - start
    while done < args.kills:
        done += killed_round(folder / "whole", folder / "again", min(10, args.kills - done), start, steps / 6, draw, engine)
        rounds += 1
        shutil.rmtree(folder / "again")
        print(f"{done} kills, {rounds} runs equal to the bit", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
