"""Training: exact resumption after SIGKILL, one loss curve for one or two processes, and a defined answer to every fault."""

import importlib.machinery
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")
np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from PIL import Image  # noqa: E402

from convit import cli  # noqa: E402
from convit.engine import run as run_module  # noqa: E402
from convit.engine.folder import Log, Progress, writing  # noqa: E402
from convit.engine.pytorch import data as data_module  # noqa: E402
from convit.engine.pytorch.checkpoint import load, save  # noqa: E402
from convit.engine.pytorch.data import TrainData, timm_policy  # noqa: E402
from convit.engine.pytorch.train import TorchRun, train  # noqa: E402
from convit.engine.recipe import load_recipe  # noqa: E402
from convit.engine.sources import choose_samples, open_source, read_sample  # noqa: E402
from convit.engine.world import World, find_world, first_host, rendezvous  # noqa: E402

# a model and a schedule that take about a second: 3 epochs of 11 steps
SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "local_up_to_layer": 1, "patch_size": 8, "batch_size": 32, "num_samples": 352}
SMALL |= {"epoch_size": 3, "warmup_epochs": 1, "decay_epochs": 2, "log_interval": 1, "drop_rate": 0.1, "drop_path_rate": 0.1}
CPU = {**os.environ, "OMP_NUM_THREADS": "1"}


def small(**keys):
    return load_recipe("digits", {**SMALL, **keys})


def command(output, *words, **keys):
    pairs = [word for name, value in {**SMALL, **keys}.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "convit", "train", "-c", "digits", "--output", str(output), *pairs, *words]


def fork(work):
    """Run ``work`` in a child process, which needs no new start of Python; returns its id. A message of failure goes to stderr."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    return child


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


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts, with everything on that could go astray: dropout, stochastic depth, mixing, a moving average."""
    output = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    train(small(ema=True, mixup=0.2, cutmix=1.0, ckpt_save_steps=4, keep_checkpoint_max=2), output, progress=False)
    return output


WHOLE = {"ema": "true", "mixup": 0.2, "cutmix": 1.0, "ckpt_save_steps": 4, "keep_checkpoint_max": 2}


# --- resuming ---


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["step", "after step", "best", "epoch", "last", "mid-epoch save"])
def test_resume_is_bit_exact_wherever_it_stops(whole, tmp_path, monkeypatch, moment):
    """Stop the loop without any clean-up between any two of its writes; the resumed run equals the whole one in every bit."""
    count = {"apply": 0, "save": 0}
    apply, write = TorchRun.apply, TorchRun.save

    def dying_apply(self):
        count["apply"] += 1
        if moment == "step" and count["apply"] == 17:
            raise Killed
        norm = apply(self)
        if moment == "after step" and count["apply"] == 18:
            raise Killed
        return norm

    def dying_save(path, tensors, facts):
        kind = path.stem.split("_")[0]
        inside = kind == "last" and facts["progress"]["step"] > 0
        if moment == ("mid-epoch save" if inside else kind) and count["apply"] >= 11:
            raise Killed
        write(path, tensors, facts)

    with monkeypatch.context() as patch:
        patch.setattr(TorchRun, "apply", dying_apply)
        patch.setattr(TorchRun, "save", staticmethod(dying_save))
        with pytest.raises(Killed):
            train(small(**WHOLE), tmp_path / "run", progress=False)
    assert load(tmp_path / "run" / "last.pth")["progress"]["updates"] < 33
    train(small(**WHOLE), tmp_path / "run", resume=True, progress=False)
    assert_same_state(whole, tmp_path / "run")
    assert losses(whole) == losses(tmp_path / "run")
    drop = {"seconds", "data_seconds", "images_per_second"}
    epochs = [[{k: v for k, v in r.items() if k not in drop} for r in records(o, "epoch")] for o in (whole, tmp_path / "run")]
    assert epochs[0] == epochs[1]
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in (tmp_path / "run").iterdir())


def test_resume_after_sigkill_is_bit_exact(whole, tmp_path):
    """The real thing: the process is killed three times, at moments that the machine chooses, once between two steps 5 and 25."""
    output = tmp_path / "run"
    for wanted in (5, 14, 25):
        child = fork(lambda: train(small(**WHOLE), output, resume=True, progress=False))
        log, deadline = output / "log.jsonl", time.monotonic() + 60
        while time.monotonic() < deadline and not (log.exists() and log.read_bytes().count(b'"step"') >= wanted):
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    train(small(**WHOLE), output, resume=True, progress=False)
    assert_same_state(whole, output)
    assert losses(whole) == losses(output)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit(whole, tmp_path, signum, monkeypatch):
    apply, seen = TorchRun.apply, []

    def signalling_apply(self):
        norm = apply(self)
        seen.append(1)
        if len(seen) == 15:
            os.kill(os.getpid(), signum)
        return norm

    monkeypatch.setattr(TorchRun, "apply", signalling_apply)
    before = signal.getsignal(signum)
    words = command(tmp_path / "run", "-q", **WHOLE)[3:]
    assert cli.main(words) == 128 + signum
    assert signal.getsignal(signum) is before
    at = load(tmp_path / "run" / "last.pth")["progress"]
    assert (at["epoch"], at["step"]) == (1, 4)
    train(small(**WHOLE), tmp_path / "run", resume=True, progress=False)
    assert_same_state(whole, tmp_path / "run")


def test_a_run_is_not_overwritten_by_accident(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(FileExistsError, match="already holds a run: --resume continues it, --overwrite starts over"):
        train(small(), tmp_path / "run", progress=False)
    result = train(small(epoch_size=1), tmp_path / "run", overwrite=True, progress=False)
    assert result.epochs == 1 and len(records(tmp_path / "run", "epoch")) == 1


def test_resuming_a_finished_run_returns_its_scores(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    result = train(small(**WHOLE), tmp_path / "run", resume=True, progress=False)
    assert result.top1 == records(whole, "epoch")[-1]["top1"] and result.history == []


def test_resume_takes_the_recipe_of_the_run(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--print-config", "--epoch_size", "4"]) == 0
    printed = capsys.readouterr().out
    assert "embed_dim: 16" in printed and "epoch_size: 4" in printed


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_damaged_checkpoint_is_named(whole, tmp_path, content):
    shutil.copytree(whole, tmp_path / "run")
    last = tmp_path / "run" / "last.pth"
    last.write_bytes(last.read_bytes()[:20000] if content is None else content)
    with pytest.raises(ValueError, match=r"last\.pth is damaged or no checkpoint"):
        train(small(), tmp_path / "run", resume=True, progress=False)


def test_resuming_with_another_model_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ValueError, match=r"last\.pth holds another model or optimiser"):
        train(small(embed_dim=32), tmp_path / "run", resume=True, progress=False)


# --- several processes ---


def torchrun(output, processes, *words, **keys):
    head = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port())]
    return subprocess.run([*head, *command(output, *words, **keys)[1:]], capture_output=True, text=True, env=CPU, timeout=600)


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


SHARED = {"drop_rate": 0.0, "drop_path_rate": 0.0, "epoch_size": 2}  # dropout draws differ between processes, as they must


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "run"
    torch.set_num_threads(1)
    train(small(**SHARED), output, progress=False)
    return output


def assert_same_curve(alone, together):
    assert len(losses(together)) == len(losses(alone)) == 22
    assert np.abs(np.array(losses(together)) - losses(alone)).max() < 1e-4
    assert records(together, "epoch")[-1]["top1"] == pytest.approx(records(alone, "epoch")[-1]["top1"], abs=0.3)


def test_two_processes_by_torchrun_give_the_curve_of_one(alone, tmp_path):
    done = torchrun(tmp_path / "run", 2, **SHARED | {"batch_size": 16})
    assert done.returncode == 0, done.stderr
    assert "2 processes (torchrun)" in done.stderr
    assert_same_curve(alone, tmp_path / "run")


def test_two_machines_by_torchrun_give_the_curve_of_one(alone, tmp_path):
    """Two agents, one per machine, that meet at a rendezvous; here both are on this one."""
    head = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    head += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "test"]
    words = [*head, *command(tmp_path / "run", **SHARED | {"batch_size": 16})[1:]]
    logs = [tmp_path / f"agent{i}.txt" for i in range(2)]
    agents = [subprocess.Popen(words, stdout=log.open("w"), stderr=subprocess.STDOUT, env=CPU) for log in logs]
    try:
        deadline = time.monotonic() + 600
        while any(agent.poll() is None for agent in agents) and time.monotonic() < deadline:
            if any("2 epochs in" in log.read_text() for log in logs):
                # an agent waits five minutes for another that crashed on its way out, as torch's sometimes do: not for this test
                deadline = min(deadline, time.monotonic() + 30)
            time.sleep(0.2)
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    said = [log.read_text() for log in logs]
    assert sum("2 processes (torchrun)" in text for text in said) == 1, "\n".join(said)
    assert not any("ChildFailedError" in text for text in said), "\n".join(said)
    assert_same_curve(alone, tmp_path / "run")


def test_two_processes_sharded_give_the_curve_of_one(alone, tmp_path):
    """FSDP2 with accumulation, under srun's variables; then a single process goes on from what the two saved."""
    keys = SHARED | {"batch_size": 8, "gradient_accumulation_steps": 2, "fsdp": True}
    environ = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def work(rank):
        os.environ.update(environ | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        train(small(**keys), tmp_path / "run", progress=False)

    children = [fork(lambda rank=rank: work(rank)) for rank in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert_same_curve(alone, tmp_path / "run")
    result = train(small(**SHARED | {"epoch_size": 3}), tmp_path / "run", resume=True, progress=False)
    assert result.epochs == 3 and result.train_loss < records(tmp_path / "run", "epoch")[0]["train_loss"]


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


def test_sharded_processes_with_uneven_rests_score_as_one(tmp_path):
    """289 validation images over four processes, 8 a batch: one of them has a batch more than the others."""
    keys = SHARED | {"num_classes": 8, "drop_remainder": False, "num_samples": 350, "epoch_size": 1}
    train(small(**keys | {"batch_size": 32}), tmp_path / "one", progress=False)
    sharded = small(**keys | {"batch_size": 8, "fsdp": True})
    assert together(4, lambda rank: train(sharded, tmp_path / "four", progress=False)) == [0] * 4
    one, four = (records(tmp_path / name, "epoch")[-1] for name in ("one", "four"))
    assert four["top1"] == pytest.approx(one["top1"], abs=0.3) and four["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)


def test_a_process_without_validation_images_and_one_that_reads_only_broken_ones(folder, tmp_path):
    """One image for two processes; a whole batch that cannot be read, sharded: all end, with the scores of what was read."""
    shutil.copytree(folder, tmp_path / "data")
    for path in sorted((tmp_path / "data/val").rglob("*.jpg"))[1:]:
        path.unlink()
    keys = {"epoch_size": 1, "mixup": 0, "cutmix": 0}
    assert together(2, lambda rank: train(pictures(tmp_path / "data", **keys), tmp_path / "ddp", progress=False)) == [0, 0]
    shutil.rmtree(tmp_path / "data/val")
    shutil.copytree(folder / "val", tmp_path / "data/val")
    for path in (tmp_path / "data/val/blue").iterdir():
        path.write_bytes(b"broken")
    assert together(2, lambda rank: train(pictures(tmp_path / "data", fsdp=True, **keys), tmp_path / "fsdp", progress=False)) == [0, 0]
    assert "top1" in records(tmp_path / "fsdp", "epoch")[0]


def test_a_process_that_dies_or_cannot_read_ends_the_others(folder, tmp_path, monkeypatch, capfd):
    read = data_module.read_sample

    def failing(rank, how):
        def failing_read(source, index, channels):
            if int(os.environ["SLURM_PROCID"]) == 1:
                how()
            return read(source, index, channels)

        data_module.read_sample = failing_read
        train(pictures(folder, num_parallel_workers=0, val_while_train=False), tmp_path / "run", overwrite=True, progress=False)

    def broken():
        raise RuntimeError("the disk is gone")

    assert together(2, lambda rank: failing(rank, broken), 60) == [1, 1]
    said = capfd.readouterr().err
    assert "the disk is gone" in said and "another process cannot read its data" in said
    assert together(2, lambda rank: failing(rank, lambda: os.kill(os.getpid(), signal.SIGKILL)), 60) == [1, -signal.SIGKILL]
    assert "Error" in capfd.readouterr().err


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
def test_two_processes_by_mpirun_give_the_curve_of_one(alone, tmp_path):
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"] if "Open MPI" in version else []
    words = ["mpirun", *options, "-n", "2", *command(tmp_path / "run", **SHARED | {"batch_size": 16})]
    done = subprocess.run(words, capture_output=True, text=True, env=CPU, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"2 processes ({'Open MPI' if options else 'MPICH'})" in done.stderr
    assert_same_curve(alone, tmp_path / "run")


def test_accumulation_gives_the_curve_of_the_whole_batch(alone, tmp_path):
    train(small(**SHARED | {"batch_size": 8, "gradient_accumulation_steps": 4}), tmp_path / "run", progress=False)
    assert_same_curve(alone, tmp_path / "run")


LAUNCHED = {
    "torchrun": {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"},
    "Open MPI": {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
    },
    "MPICH": {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "8"},
    "msrun": {"RANK_ID": "3", "MS_WORKER_NUM": "8", "DEVICE_ID": "1"},
    "srun": {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[03-05,9],login"},
}
ADDRESSES = {"torchrun": "node0", "Open MPI": "127.0.0.1", "MPICH": "127.0.0.1", "msrun": "127.0.0.1", "srun": "gpu03"}


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_the_variables_of_every_launcher(launcher):
    world = find_world(LAUNCHED[launcher])
    assert world == (3, 8, 1, launcher)
    address, port = rendezvous(world, LAUNCHED[launcher])
    assert address == ADDRESSES[launcher]
    assert port == (1234 if launcher == "torchrun" else port) and 1024 < port < 65536


def test_worlds_without_or_with_a_confused_launcher():
    assert find_world({}) == World()
    assert find_world({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == World()  # inside sbatch, without srun
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        rendezvous(World(3, 8, 1, "Open MPI"), {**LAUNCHED["Open MPI"], "OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
    with pytest.raises(ValueError, match="must be whole numbers"):
        find_world({"RANK": "a", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "first"), [("a", "a"), ("a1,b2", "a1"), ("n[7]", "n7"), ("n[001-004].x,m", "n001.x"), ("gpu-[3,5-9]", "gpu-3")]
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


# --- faults ---


def test_a_full_disk_stops_the_run_and_loses_nothing(whole, tmp_path, capfd):
    """The kernel refuses to let a file grow, as on a full disk: the run stops with a message, last.pth stays as it was."""
    resource = pytest.importorskip("resource")
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    before = (output / "last.pth").read_bytes()

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
        os._exit(cli.main(command(output, "--resume", "-q", **WHOLE | {"epoch_size": 4})[3:]))

    status = os.waitpid(fork(work), 0)[1]
    assert os.waitstatus_to_exitcode(status) == 1
    message = capfd.readouterr().err
    assert "cannot write" in message and "go on with --resume" in message and "Traceback" not in message
    assert (output / "last.pth").read_bytes() == before
    assert not list(output.glob(".*"))
    assert train(small(**WHOLE | {"epoch_size": 4}), output, resume=True, progress=False).epochs == 4


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path):
    path = tmp_path / "file"
    with writing(path) as file:
        file.write(b"old")
    with pytest.raises(OSError, match=r"No space left on device; the file written before is intact"), writing(path) as file:
        file.write(b"ne")
        raise OSError(28, "No space left on device")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_nan_loss_skips_the_step_and_stops_after_too_many(tmp_path, monkeypatch):
    forward = torch.nn.CrossEntropyLoss.forward
    calls = []

    def poisoned(self, logits, targets):
        calls.append(1)
        loss = forward(self, logits, targets)
        return loss * float("nan") if len(calls) in bad else loss

    monkeypatch.setattr(torch.nn.CrossEntropyLoss, "forward", poisoned)
    bad = {3, 4, 20}
    result = train(small(max_skipped_steps=2), tmp_path / "some", progress=False)
    assert [record["skipped_steps"] for record in result.history] == [2, 1, 0]
    assert all(torch.isfinite(p).all() for p in result.model.parameters())

    calls.clear()
    bad = set(range(15, 100))
    with pytest.raises(FloatingPointError, match="not finite in 3 steps in a row"):
        train(small(max_skipped_steps=2), tmp_path / "all", progress=False)
    state = load(tmp_path / "all" / "last.pth")
    assert state["progress"]["epoch"] == 1 and all(torch.isfinite(t).all() for t in state["state_dict"].values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes that colour tells apart: 12 + 12 training JPEGs, 4 + 4 for validation, of uneven sizes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for label, name in enumerate(("blue", "red")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 90, (40 + i, 48, 3), dtype=np.uint8)
                pixels[..., 2 - 2 * label] += 150
                Image.fromarray(pixels).save(root / split / name / f"{i:02}.jpg")
    return root


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


def test_the_order_and_augmentation_do_not_depend_on_workers_or_position(folder):
    def take(workers, start, epoch=1):
        data = TrainData(pictures(folder, num_parallel_workers=workers), World(), torch.device("cpu"))
        return [(batch.images, batch.targets) for batch in data.batches(epoch, start)]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    whole, split = take(0, 0), take(2, 2)
    assert torch.equal(before, torch.get_rng_state())
    assert len(whole) == 6 and len(split) == 4
    for (images, targets), (other_images, other_targets) in zip(whole[2:], split, strict=True):
        assert torch.equal(images, other_images) and torch.equal(targets, other_targets)
    assert not torch.equal(whole[0][0], take(0, 0, epoch=2)[0][0])


def test_two_processes_share_the_batches_of_one(folder):
    def take(rank, size, batch):
        data = TrainData(
            pictures(folder, batch_size=batch, drop_remainder=False, mixup=0, cutmix=0), World(rank, size), torch.device("cpu")
        )
        return list(data.batches(0))

    for one, left, right in zip(take(0, 1, 10), take(0, 2, 5), take(1, 2, 5), strict=True):
        assert torch.equal(one.images, torch.cat([left.images, right.images]))
        assert left.share + right.share == one.share == 1.0


def test_repeated_augmentation_repeats_images_with_other_augmentations(folder):
    data = TrainData(pictures(folder, aug_repeats=3, batch_size=24), World(), torch.device("cpu"))
    order = data.order(0)
    assert len(order) == 24 and len(set(order.tolist())) == 8
    images = next(data.batches(0)).images
    same = np.flatnonzero(order == order[0])
    assert not torch.equal(images[same[0]], images[same[1]])


def test_a_corrupt_image_is_replaced_and_counted(folder, tmp_path, caplog):
    root = tmp_path / "data"
    shutil.copytree(folder, root)
    good = (root / "train/blue/03.jpg").read_bytes()
    (root / "train/blue/03.jpg").write_bytes(good[: len(good) // 2])
    (root / "train/red/05.jpg").write_bytes(b"not an image")
    (root / "val/red/01.jpg").write_bytes(b"")
    result = train(pictures(root), tmp_path / "run", progress=False)
    assert [record["bad_images"] for record in result.history] == [2, 2]
    assert "blue/03.jpg" in caplog.text and "red/05.jpg" in caplog.text and "left out the unreadable validation image" in caplog.text
    with pytest.raises(ValueError, match="unreadable images in epoch 0; max_bad_images allows 1"):
        train(pictures(root, max_bad_images=1), tmp_path / "strict", progress=False)


def test_a_dead_worker_is_replaced_and_changes_nothing(folder, tmp_path, monkeypatch, caplog):
    expected = train(pictures(folder, num_parallel_workers=1), tmp_path / "whole", progress=False)
    mark = tmp_path / "mark"
    read = data_module.read_sample

    def dying_read(source, index, mode):
        if torch.utils.data.get_worker_info() is not None and not mark.exists() and index == 7:
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(source, index, mode)

    monkeypatch.setattr(data_module, "read_sample", dying_read)
    train(pictures(folder, num_parallel_workers=1), tmp_path / "run", progress=False)
    assert mark.exists() and "a data-loading worker died" in caplog.text
    assert_same_state(tmp_path / "whole", tmp_path / "run")
    assert len(expected.history) == 2


def test_workers_that_always_die_stop_the_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "read_sample", lambda *a: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(data_module, "WORKER_RESTARTS", 0)
    with pytest.raises(RuntimeError, match="data-loading workers died 1 times"):
        train(pictures(folder, num_parallel_workers=1), tmp_path / "run", progress=False)


# --- data ---


def test_tar_shards_hold_the_images_of_the_folder(folder, tmp_path):
    wds = pytest.importorskip("webdataset")
    tree = open_source(pictures(folder), train=True)
    with wds.ShardWriter(str(tmp_path / "train-%04d.tar"), maxcount=10, verbose=0) as writer:
        for i, target in enumerate(tree.targets):
            writer.write({"__key__": f"{i:06}", "jpg": Path(tree.name(i)).read_bytes(), "cls": str(target)})
    shutil.copy(tmp_path / "train-0000.tar", tmp_path / "val-0000.tar")
    shards = open_source(pictures(tmp_path), train=True)
    assert type(shards).__name__ == "TarSource" and shards.targets == tree.targets
    for i in range(len(tree.targets)):
        assert shards.open(i).read() == tree.open(i).read()
    assert train(pictures(tmp_path, epoch_size=1), tmp_path / "run", progress=False).epochs == 1


@pytest.mark.parametrize("saved", [True, False])
def test_hugging_face_files_hold_the_images_of_the_folder(folder, tmp_path, saved, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tree = open_source(pictures(folder), train=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["blue", "red"])})
    rows = {"image": [tree.name(i) for i in range(len(tree.targets))], "label": tree.targets}
    data = datasets.Dataset.from_dict(rows, features=features)
    root = tmp_path / "hf"
    if saved:
        datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(root))
    else:
        root.mkdir()
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        data.to_parquet(str(root / "train-00000.parquet"))
    source = open_source(pictures(root), train=True)
    assert type(source).__name__ == "HfSource" and source.targets == tree.targets and source.classes == ["blue", "red"]
    image = read_sample(source, 5, 3)
    assert image.tobytes() == read_sample(tree, 5, 3).tobytes()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data_dir": ""}, "data_dir must name the folder"),
        ({"data_dir": "nowhere"}, "data_dir nowhere is no folder"),
        ({"train_split": "holdout"}, "has no folder 'holdout'; --train_split names another"),
        ({"dataset": "wds"}, "no tar shards train"),
        ({"batch_size": 48}, "the global batch of 48 exceeds the 24 samples"),
        ({"sampling_ratio": 0.01}, "no sample left"),
    ],
)
def test_missing_data_is_named(folder, tmp_path, keys, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train(pictures(folder, **keys), tmp_path / "run", progress=False)
    assert message in str(error.value)


def test_choose_samples():
    targets = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert choose_samples(targets, 2) == [0, 1, 2, 3, 4, 5]
    assert choose_samples(targets, None, 0.5) == [0, 3, 6, 7]
    assert choose_samples(targets, 1, 1.0, 2) == [0, 1]


@pytest.mark.parametrize(
    ("mindcv", "timm"),
    [
        ("autoaug-mstd0.5", "original-mstd0.5"),
        ("autoaugr", "originalr"),
        ("randaug-m9-n2", "rand-m9-n2"),
        ("rand-m9", "rand-m9"),
        (None, None),
    ],
)
def test_policies_of_mindcv_in_words_of_timm(mindcv, timm):
    assert timm_policy(mindcv) == timm


# --- schedule, precision, options ---


def rates(tmp_path, **keys):
    train(small(embed_dim=4, **keys), tmp_path / "run", progress=False)
    return [record["lr"] for record in records(tmp_path / "run", "step")]


def test_the_schedule_of_mindcv(tmp_path):
    """Linear warm-up, then the cosine over decay_epochs, then min_lr."""
    lr = rates(tmp_path, epoch_size=4, warmup_epochs=1, decay_epochs=2, lr=0.01, min_lr=0.001)
    t = np.arange(22) / 22
    expected = np.concatenate([0.01 * np.arange(11) / 11, 0.001 + 0.0045 * (1 + np.cos(np.pi * t)), np.full(11, 0.001)])
    np.testing.assert_allclose(lr, expected, rtol=1e-9)


def test_the_schedule_of_fair(tmp_path):
    """Once per epoch, the warm-up inside the cosine, the rate scaled with the batch."""
    keys = {"lr_epoch_stair": True, "warmup_prefix": False, "warmup_factor": 0.5, "scale_lr": True, "scale_lr_batch": 64}
    lr = rates(tmp_path, epoch_size=4, warmup_epochs=2, decay_epochs=4, lr=0.02, min_lr=0.0, **keys)
    expected = [0.005, 0.0075, 0.005, 0.005 * (1 + np.cos(np.pi * 0.75))]
    np.testing.assert_allclose(lr, np.repeat(expected, 11), rtol=1e-9)


def test_exponential_decay_loses_its_factor_every_epoch(tmp_path):
    lr = rates(tmp_path, scheduler="exponential_decay", epoch_size=3, warmup_epochs=0, decay_epochs=2, decay_rate=0.25, lr=0.01)
    np.testing.assert_allclose(lr, 0.01 * 0.25 ** (np.arange(33) / 11), rtol=1e-9)


@pytest.mark.parametrize(
    "keys",
    [
        {"amp_level": "O2", "amp_dtype": "bfloat16"},
        {"amp_level": "O2", "amp_dtype": "float16", "loss_scale": 1024, "clip_grad": True},
        {"grad_checkpointing": True, "channels_last": True},
        {"layer_decay": 0.7, "loss": "BCE", "opt": "sgd", "use_nesterov": True},
        {
            "opt": "lamb",
            "scheduler": "multi_step_decay",
            "multi_step_decay_milestones": "[1, 2]",
            "drop_remainder": False,
            "num_samples": 361,
        },
    ],
    ids=lambda keys: next(iter(keys)) + "=" + str(next(iter(keys.values()))),
)
def test_options_train(tmp_path, keys):
    result = train(small(**keys), tmp_path / "run", progress=False)
    first, last = result.history[0]["train_loss"], result.train_loss
    assert last < first and result.history[-1]["skipped_steps"] == 0


def test_layer_decay_scales_the_rate_by_depth(tmp_path):
    train(small(layer_decay=0.5, epoch_size=1), tmp_path / "run", progress=False)
    scales = {group["lr_scale"] for group in load(tmp_path / "run" / "last.pth")["optimizer"]["param_groups"]}
    assert scales == {1.0, 0.5, 0.25, 0.125}


def test_a_compiled_model_gives_the_same_curve(alone, tmp_path):
    pytest.importorskip("torch._inductor")
    train(small(**SHARED | {"epoch_size": 1}, compile=True, val_while_train=False), tmp_path / "run", progress=False)
    assert np.abs(np.array(losses(tmp_path / "run")) - losses(alone)[:11]).max() < 1e-4


def test_gradient_checkpointing_changes_nothing(alone, tmp_path):
    train(small(**SHARED, grad_checkpointing=True), tmp_path / "run", progress=False)
    assert losses(tmp_path / "run") == losses(alone)


def test_the_best_checkpoints_are_kept(tmp_path):
    train(small(keep_checkpoint_max=1, ckpt_save_policy="top_k", epoch_size=4, decay_epochs=3), tmp_path / "run", progress=False)
    top1 = [record["top1"] for record in records(tmp_path / "run", "epoch")]
    names = [path.name for path in (tmp_path / "run").glob("epoch_*.pth")]
    assert len(names) == 1
    kept = torch.load(tmp_path / "run" / names[0], weights_only=True)
    best = torch.load(tmp_path / "run" / "best.pth", weights_only=True)
    assert kept["top1"] == best["top1"] == max(top1)
    assert best["epoch"] == top1.index(max(top1))


def test_epochs_go_to_weights_and_biases(tmp_path, monkeypatch):
    """Without the package a message and no run folder; with it, here a stand-in that keeps what it is given, each epoch's numbers."""
    monkeypatch.setattr(run_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install wandb"):
        train(small(wandb="digits"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    said = []
    run = types.SimpleNamespace(log=lambda record, step: said.append((step, record)), finish=lambda: said.append("finished"))
    module = types.ModuleType("wandb", None)
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init = lambda **keys: said.append(keys) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    train(small(wandb="digits", epoch_size=2), tmp_path / "run", progress=False)
    assert said[0]["project"] == "digits" and said[0]["config"]["embed_dim"] == 16
    assert [step for step, _ in said[1:3]] == [11, 22] and said[3:] == ["finished"]
    assert said[2][1]["top1"] == records(tmp_path / "run", "epoch")[1]["top1"]


def test_log_drops_what_a_kill_left_behind(tmp_path):
    lines = [{"kind": "step", "epoch": 0, "update": 1}, {"kind": "step", "epoch": 0, "update": 2}, {"kind": "epoch", "epoch": 0}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "st')
    Log(tmp_path / "log.jsonl", Progress(epoch=0, step=1, updates=1)).close()
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == lines[:1]


def test_checkpoints_load_without_running_code(tmp_path):
    save(tmp_path / "last.pth", {"code": threading.Event}, {"progress": {}})
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        load(tmp_path / "last.pth")


def test_digits_learn(tmp_path):
    """A little of the packaged recipe, with a shallower model, lifts the accuracy well above the 10 % of chance."""
    keys = {"epoch_size": 4, "warmup_epochs": 1, "decay_epochs": 3, "depth": 2, "local_up_to_layer": 1}
    result = train(load_recipe("digits", keys), tmp_path / "run", progress=False)
    assert result.top1 > 25
    epoch = result.history[-1]
    assert 0 < epoch["data_seconds"] < epoch["seconds"]
    assert len(epoch["gate"]) == 1 and all(0 < gate < 1 for gate in epoch["gate"][0])


def test_checkpoints_record_the_settings_of_the_model(whole, tmp_path):
    """So that a model of MindCV's kind (tanh GELU, another epsilon), fine-tuned here, is read back as what it is."""
    from convit.weights.load import read as read_checkpoint

    for name in ("best.pth", "last.pth"):
        state = torch.load(Path(whole) / name, weights_only=True)
        assert state["convit"]["act"] == "gelu" and state["convit"]["norm_eps"] == 1e-6
    state["convit"] |= {"act": "gelu_tanh", "norm_eps": 1e-7}
    torch.save(state, tmp_path / "tanh.pth")
    read = read_checkpoint(tmp_path / "tanh.pth")
    assert read.act == "gelu_tanh" and read.norm_eps == 1e-7
