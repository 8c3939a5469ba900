"""Several processes: the curve of one, uneven rests, processes that die, every launcher."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")
np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from training import (  # noqa: E402
    CPU,
    SHARED,
    assert_same_curve,
    command,
    fork,
    free_port,
    losses,
    pictures,
    records,
    small,
    together,
)

from convit.engine import sources  # noqa: E402
from convit.engine.images import BadImage  # noqa: E402
from convit.engine.pytorch import train as train_module  # noqa: E402
from convit.engine.pytorch.build import build_model  # noqa: E402
from convit.engine.pytorch.checkpoint import load  # noqa: E402
from convit.engine.pytorch.data import EvalData, TrainData  # noqa: E402
from convit.engine.pytorch.distributed import choose_device  # noqa: E402
from convit.engine.pytorch.train import TorchRun, train  # noqa: E402
from convit.engine.world import World, find_world, first_host, rendezvous  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"


def test_each_process_of_a_machine_takes_a_device_of_its_own(monkeypatch):
    """Two devices are stood in for."""
    taken = []
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", taken.append)
    assert [choose_device("cuda", World(rank, 6, rank % 3)) for rank in (0, 4)] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(ValueError, match="process 2 of this machine has no cuda device: there are 2"):
        choose_device("cuda", World(5, 6, 2))
    assert taken == [0, 1] and choose_device("cuda:1", World(2, 3, 2)) == torch.device("cuda", 1)


def torchrun(number, output, **changes):
    """The command of the guide's torchrun line of this number, with options changed, that trains a small run."""
    lines = re.findall("^torchrun (.*) -m convit train ", GUIDE.read_text(encoding="utf-8"), re.M)
    words = lines[number].split()
    options = dict(zip(words[::2], words[1::2], strict=True)) | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    head = [sys.executable, "-m", "torch.distributed.run", *(word for pair in options.items() for word in pair)]
    return [*head, *command(output, **SHARED | {"batch_size": 16})[1:]]


def test_two_processes_by_torchrun_give_the_curve_of_one(alone, tmp_path):
    words = torchrun(0, tmp_path / "run", rdzv_backend="c10d", rdzv_endpoint=f"127.0.0.1:{free_port()}")
    done = subprocess.run(words, capture_output=True, text=True, env=CPU, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "2 processes (torchrun)" in done.stderr
    assert_same_curve(alone, tmp_path / "run")


def test_two_machines_by_torchrun_give_the_curve_of_one(alone, tmp_path):
    """Two agents, one per machine; here both are on this one."""
    logs, port = [tmp_path / f"agent{i}.txt" for i in range(2)], str(free_port())
    commands = [torchrun(1, tmp_path / "run", node_rank=str(i), master_port=port) for i in range(2)]
    started = zip(commands, logs, strict=True)
    agents = [subprocess.Popen(words, stdout=log.open("w"), stderr=subprocess.STDOUT, env=CPU) for words, log in started]
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


@pytest.fixture
def float64(monkeypatch):
    """Runs compute in float64, where rounding does not grow into another curve: what is left is what processes do otherwise than one."""

    def build_double(*args, **kwargs):
        model = build_model(*args, **kwargs).double()
        model.register_forward_pre_hook(lambda module, args: (args[0].double(),))
        return model

    monkeypatch.setattr(train_module, "build_model", build_double)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize(("processes", "keys"), [(4, {"fsdp": True}), (3, {"fsdp": True, "gradient_accumulation_steps": 2}), (3, {})])
def test_processes_with_uneven_rests_compute_what_one_does(float64, tmp_path, processes, keys):
    """Rests that do not divide, in training and validation (289): losses, weights and scores of one process, to float64's rounding."""
    shared = SHARED | {"num_classes": 8, "drop_remainder": False, "num_samples": 158, "epoch_size": 1, "lr": 0.01, "clip_value": 0.1}
    several = small(**shared | keys | {"batch_size": 24 // processes // keys.get("gradient_accumulation_steps", 1)})
    train(small(**shared | {"batch_size": 24}), tmp_path / "one", progress=False)
    assert together(processes, lambda rank: train(several, tmp_path / "several", progress=False)) == [0] * processes
    np.testing.assert_allclose(losses(tmp_path / "several"), losses(tmp_path / "one"), rtol=1e-13)
    one, other = (records(tmp_path / name, "epoch")[-1] for name in ("one", "several"))
    assert other["top1"] == one["top1"] and other["val_loss"] == pytest.approx(one["val_loss"], rel=1e-13)
    weights, others = (load(tmp_path / name / "last.pth")["state_dict"] for name in ("one", "several"))
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-12, msg=name)


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
    read = sources.read_sample

    def failing(rank, how):
        def failing_read(source, index, channels):
            if int(os.environ["SLURM_PROCID"]) == 1 and (bad := how()):
                return bad
            return read(source, index, channels)

        sources.read_sample = failing_read
        train(pictures(folder, num_parallel_workers=0, val_while_train=False), tmp_path / "run", overwrite=True, progress=False)

    def broken():
        raise RuntimeError("the disk is gone")

    assert together(2, lambda rank: failing(rank, broken), 60) == [1, 1]
    said = capfd.readouterr().err
    assert "the disk is gone" in said and "another process cannot read its data" in said
    assert together(2, lambda rank: failing(rank, lambda: BadImage("cat.jpg", "broken")), 60) == [1, 1]
    said = capfd.readouterr().err
    assert "images in a row cannot be read, from cat.jpg (broken)" in said and "another process cannot read its data" in said
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


# --- kills, and another number of processes ---


def test_a_killed_process_and_a_resume_with_another_number(alone, tmp_path, capfd):
    """One of two is killed inside an epoch: the other ends with a message; then four, or one, go on inside it, with the curve of one."""
    step = TorchRun.apply

    def work(rank):
        def dying(self):
            if rank == 1 and self.progress.updates == 17:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self)

        TorchRun.apply = dying
        train(small(**SHARED | {"batch_size": 16, "ckpt_save_steps": 4}), tmp_path / "two", progress=False)

    assert together(2, work, 60) == [1, -signal.SIGKILL]
    assert "Error" in capfd.readouterr().err
    assert load(tmp_path / "two" / "last.pth")["progress"]["updates"] == 15
    for size, keys in ((4, {"batch_size": 8, "fsdp": True}), (3, {"batch_size": 16}), (1, {})):
        shutil.copytree(tmp_path / "two", tmp_path / str(size))
        recipe, run = small(**SHARED | keys), tmp_path / str(size)
        ended = together(size, lambda rank, recipe=recipe, run=run: train(recipe, run, resume=True, progress=False))
        if size == 3:  # another global batch, inside an epoch
            assert ended == [1, 1, 1] and "global batch of 32" in capfd.readouterr().err
        else:
            assert ended == [0] * size
            assert_same_curve(alone, tmp_path / str(size))


def test_the_order_between_epochs_does_not_depend_on_the_number_of_processes(alone, tmp_path):
    """The first epoch by two, the second by one: the curve of one."""
    first = small(**SHARED | {"batch_size": 16, "epoch_size": 1})
    assert together(2, lambda rank: train(first, tmp_path / "run", progress=False)) == [0, 0]
    train(small(**SHARED), tmp_path / "run", resume=True, progress=False)
    assert_same_curve(alone, tmp_path / "run")


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (3, 1), (4, 1), (2, 2), (3, 2)])
def test_every_step_has_the_samples_of_one_process(processes, accumulation):
    """With rests that do not divide: each sample once, in the same step, whoever takes it; a step's shares add up to one."""
    keys = {"batch_size": 12, "drop_remainder": False, "num_samples": 107}
    one = TrainData(small(**keys), World(), torch.device("cpu"))
    several = keys | {"batch_size": 12 // processes // accumulation, "gradient_accumulation_steps": accumulation}
    ranks = [TrainData(small(**several), World(rank, processes), torch.device("cpu")) for rank in range(processes)]
    for epoch in (0, 3):
        for step in range(one.order.steps):
            parts = [part for data in ranks for part in data.order.parts(step)]
            assert sorted(np.concatenate(parts).tolist()) == one.order.parts(step)[0].tolist()
            assert all(np.array_equal(data.order.of(epoch), one.order.of(epoch)) for data in ranks)
        for whole, *mine in zip(one.batches(epoch), *(grouped(data.batches(epoch), accumulation) for data in ranks), strict=True):
            assert sum(share for group in mine for _, share in group) == pytest.approx(1)
            assert sum(len(images) for group in mine for images, _ in group) == len(whole.images)


def grouped(batches, size):
    made = [(batch.images, batch.share) for batch in batches]
    return [made[i : i + size] for i in range(0, len(made), size)]


@pytest.mark.parametrize("fault", ["never starts", "has no data", "dies in validation", "dies in validation, sharded"])
def test_one_of_three_processes_fails_and_all_end_with_a_message(tmp_path, monkeypatch, capfd, fault):
    monkeypatch.setenv("CONVIT_JOIN_SECONDS", "8")
    keys = SHARED | {"epoch_size": 1, "num_samples": 96, "batch_size": 8, "fsdp": fault.endswith("sharded")}

    def work(rank):
        if fault == "never starts" and rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.startswith("dies") and rank == 2:
            EvalData.__iter__ = lambda self: os.kill(os.getpid(), signal.SIGKILL)
        if fault == "has no data" and rank == 2:
            train_module.TrainData = lambda *args: open(tmp_path / "nowhere")  # noqa: SIM115
        try:
            train(small(**keys), tmp_path / "run", progress=False)
        except (RuntimeError, OSError, ValueError) as error:
            print(f"process {rank} says: {str(error)[:300]}", file=sys.stderr, flush=True)
            raise

    died = -signal.SIGKILL if fault != "has no data" else 1
    assert together(3, work, 60) == [1, 1, died]
    said = capfd.readouterr().err
    assert all(f"process {rank} says: " in said for rank in range(2 if died < 0 else 3)), said
    if fault == "never starts":
        assert "did not meet" in said and "CONVIT_JOIN_SECONDS" in said
