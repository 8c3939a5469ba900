"""Faults while training, and what happens: full disks, losses that are no numbers, broken images, dead workers."""

import os
import shutil
import signal

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")
np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from training import WHOLE, assert_same_state, command, fork, pictures, small  # noqa: E402

from convit import cli  # noqa: E402
from convit.engine import sources  # noqa: E402
from convit.engine.folder import writing  # noqa: E402
from convit.engine.pytorch import data as data_module  # noqa: E402
from convit.engine.pytorch.checkpoint import load  # noqa: E402
from convit.engine.pytorch.train import train  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_corrupt_image_is_replaced_and_counted(folder, tmp_path, caplog):
    root = tmp_path / "data"
    shutil.copytree(folder, root)
    good = (root / "train/blue/03.jpg").read_bytes()
    (root / "train/blue/03.jpg").write_bytes(good[: len(good) // 2])
    (root / "train/red/05.jpg").write_bytes(b"not an image")
    (root / "val/red/01.jpg").write_bytes(b"")
    result = train(pictures(root, max_bad_images=2), tmp_path / "run", progress=False)
    assert [record["bad_images"] for record in result.history] == [2, 2]
    assert "blue/03.jpg" in caplog.text and "red/05.jpg" in caplog.text and "left out the unreadable validation image" in caplog.text
    with pytest.raises(ValueError, match="unreadable images in epoch 0; max_bad_images allows 1"):
        train(pictures(root, max_bad_images=1), tmp_path / "strict", progress=False)


def test_a_dead_worker_is_replaced_and_changes_nothing(folder, tmp_path, monkeypatch, caplog):
    expected = train(pictures(folder, num_parallel_workers=1), tmp_path / "whole", progress=False)
    mark = tmp_path / "mark"
    read = sources.read_sample

    def dying_read(source, index, mode):
        if torch.utils.data.get_worker_info() is not None and not mark.exists() and index == 7:
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(source, index, mode)

    monkeypatch.setattr(sources, "read_sample", dying_read)
    train(pictures(folder, num_parallel_workers=1), tmp_path / "run", progress=False)
    assert mark.exists() and "a data-loading worker died" in caplog.text
    assert_same_state(tmp_path / "whole", tmp_path / "run")
    assert len(expected.history) == 2


def test_workers_that_always_die_stop_the_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "read_sample", lambda *a: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(data_module, "WORKER_RESTARTS", 0)
    with pytest.raises(RuntimeError, match="data-loading workers died 1 times"):
        train(pictures(folder, num_parallel_workers=1), tmp_path / "run", progress=False)
