"""What the tests of training share: a run that takes a second, its pictures, processes as a launcher starts them, states compared."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import fork
from PIL import Image

from convit.engine.pytorch.checkpoint import load
from convit.engine.pytorch.train import train
from convit.engine.recipe import load_recipe

# a model and a schedule that take about a second: 3 epochs of 11 steps
SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "local_up_to_layer": 1, "patch_size": 8, "batch_size": 32, "num_samples": 352}
SMALL |= {"epoch_size": 3, "warmup_epochs": 1, "decay_epochs": 2, "log_interval": 1, "drop_rate": 0.1, "drop_path_rate": 0.1}
CPU = {**os.environ, "OMP_NUM_THREADS": "1"}


def small(**keys):
    return load_recipe("digits", {**SMALL, **keys})


def command(output, *words, **keys):
    pairs = [word for name, value in {**SMALL, **keys}.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "convit", "train", "-c", "digits", "--output", str(output), *pairs, *words]


def records(output, kind):
    return [record for line in (Path(output) / "log.jsonl").read_text().splitlines() if (record := json.loads(line))["kind"] == kind]


def losses(output):
    return [record["loss"] for record in records(output, "step")]


def assert_same_state(a, b):
    a, b = load(Path(a) / "last.pth"), load(Path(b) / "last.pth")
    for name in ("state_dict", "state_dict_ema", "optimizer", "progress", "scaler"):
        left, right = flatten(a.get(name)), flatten(b.get(name))
        assert left.keys() == right.keys()
        for key, value in left.items():
            same = torch.equal(value, right[key]) if torch.is_tensor(value) else value == right[key]
            assert same, f"{name}.{key}: {value} and {right[key]}"


def flatten(tree, prefix=""):
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flatten(value, f"{prefix}.{key}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for key, value in enumerate(tree) for k, v in flatten(value, f"{prefix}.{key}").items()}
    return {prefix: tree}


WHOLE = {"ema": "true", "mixup": 0.2, "cutmix": 1.0, "ckpt_save_steps": 4, "keep_checkpoint_max": 2}
SHARED = {"drop_rate": 0.0, "drop_path_rate": 0.0, "epoch_size": 2}  # dropout draws differ between processes, as they must


def assert_same_curve(alone, together):
    assert len(losses(together)) == len(losses(alone)) == 22
    assert np.abs(np.array(losses(together)) - losses(alone)).max() < 1e-4
    assert records(together, "epoch")[-1]["top1"] == pytest.approx(records(alone, "epoch")[-1]["top1"], abs=0.3)


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(size, work, timeout=120):
    """Run ``work`` in ``size`` processes that a launcher seems to have started; their exit statuses, all within ``timeout`` seconds."""
    port = str(free_port())

    def start(rank):
        os.environ.update({"SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": port})
        os.environ.update({"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        torch.set_num_threads(1)
        work(rank)

    left, found, deadline = {fork(lambda rank=rank: start(rank)): rank for rank in range(size)}, {}, time.monotonic() + timeout
    while left and time.monotonic() < deadline:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in left:
            found[left.pop(child)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [found.get(rank, "hangs") for rank in range(size)]


PICTURES = {
    "image_resize": 32,
    "in_channels": 3,
    "mean": "0.5,0.5,0.5",
    "std": "0.25,0.25,0.25",
    "num_samples": "null",
    "num_classes": "null",
}
PICTURES |= {"batch_size": 4, "dataset": "imagenet", "epoch_size": 2, "warmup_epochs": 0, "decay_epochs": 2, "clip_grad": "false"}
PICTURES |= {"re_prob": 0.25, "auto_augment": "randaug-m7-mstd0.5", "mixup": 0.2, "cutmix": 1.0, "interpolation": "bicubic"}


def pictures(root, **keys):
    return small(**{**PICTURES, "data_dir": str(root), **keys})


def finished(output, **keys):
    """The folder of a small run that has been trained to its end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(small(**keys), output, progress=False)
    torch.set_num_threads(threads)
    return output


def paint(root):
    """Folders of pictures in two classes that colour tells apart."""
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for label, name in enumerate(("blue", "red")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 90, (40 + i, 48, 3), dtype=np.uint8)
                pixels[..., 2 - 2 * label] += 150
                Image.fromarray(pixels).save(root / split / name / f"{i:02}.jpg")
    return root
