"""The folder of a run: one holder, nothing of others touched, and what resuming says where something is not as it was."""

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import time
import types
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")
torch = pytest.importorskip("torch")

from training import WHOLE, command, fork, records, small  # noqa: E402

from convit import cli  # noqa: E402
from convit.engine.folder import Folder  # noqa: E402
from convit.engine.pytorch.checkpoint import load  # noqa: E402
from convit.engine.pytorch.train import TorchRun, train  # noqa: E402
from convit.engine.world import World  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(whole, tmp_path):
    """A copy of a finished run."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def tree(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# what is there


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_nothing_in_a_folder_is_replaced_unasked(run, resume, listed):
    """best.pth, epoch_N.pth and the log without last.pth: somebody keeps them. They stay, whoever wrote them, unless told otherwise."""
    (run / "last.pth").unlink()
    (run / "notes.txt").write_text("mine")
    if not listed:
        (run / "run.json").unlink()
    before = tree(run)
    with pytest.raises(FileExistsError, match="holds best.pth, epoch_2.pth, epoch_3.pth, log.jsonl, recipe.yaml, but no last.pth"):
        train(small(), run, resume=resume, progress=False)
    assert tree(run) == before
    train(small(epoch_size=1, keep_checkpoint_max=0), run, overwrite=True, progress=False)
    assert sorted(tree(run)) == ["best.pth", "last.pth", "log.jsonl", "notes.txt", "recipe.yaml", "run.json"]


def test_a_file_that_others_put_there_stays(run):
    (run / "epoch_7.pth").write_bytes(b"of another run")
    with pytest.raises(FileExistsError, match="holds epoch_7.pth, which this run did not write"):
        train(small(**WHOLE), run, resume=True, progress=False)
    (run / "run.json").unlink()  # a folder of a version that kept no list resumes
    assert train(small(**WHOLE), run, resume=True, progress=False).epochs == 3


def test_a_list_names_only_files_of_runs(tmp_path):
    (tmp_path / "last.pth").write_bytes(b"")
    (tmp_path / "run.json").write_text(json.dumps({"files": ["../other/last.pth", "notes.txt", 3, "last.pth"], "resumable": True}))
    folder = Folder(tmp_path, "last.pth", True, False)
    assert folder.files == {"last.pth"}
    (tmp_path / "best.pth").write_bytes(b"of somebody")
    with pytest.raises(FileExistsError, match="best.pth is not of this run"):
        folder.claim("best.pth")
    folder.release()
    for damaged in ("[]", "{", "[" * 100_000, '{"files": 1}'):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(ValueError, match="run.json"):
            Folder(tmp_path, "last.pth", True, False)


# one at a time


def test_one_run_at_a_time(tmp_path):
    """A second run is refused and told who holds the folder; the lock ends with its holder, and no worker of that one keeps it."""
    ready, release = os.pipe(), os.pipe()

    def work():
        folder = Folder(tmp_path, "last.pth", False, False)
        if os.fork() == 0:
            os.read(release[0], 1)  # a data worker that is slow to see that it is alone
            os._exit(0)
        for name in (".last.pth.1-0123abcd.partial.pth", ".run.json.1-0123abcd.partial.json", ".log.jsonl.1-0123abcd.partial.jsonl"):
            (folder.path / name).write_bytes(b"half")
        os.write(ready[1], b"x")
        time.sleep(60)

    child = fork(work)
    os.read(ready[0], 1)
    for overwrite in (False, True):
        with pytest.raises(BlockingIOError, match=f"in use by another run, process {child} on "):
            Folder(tmp_path, "last.pth", True, overwrite)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    Folder(tmp_path, "last.pth", True, False).release()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]  # what the killed one left half written is gone
    os.write(release[1], b"x")


@pytest.mark.parametrize("files", [True, False])
def test_file_systems_that_lock_no_folder(tmp_path, monkeypatch, caplog, files):
    """NFS locks only what is open for writing: a file in the folder then. Where there are no locks at all, that is said."""
    flock = fcntl.flock

    def limited(lock, how):
        if not files or stat.S_ISDIR(os.fstat(lock).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", limited)
    first = Folder(tmp_path, "last.pth", True, False)
    if files:
        with pytest.raises(BlockingIOError, match=f"in use by another run, process {os.getpid()} on "):
            Folder(tmp_path, "last.pth", True, False)
    first.release()
    Folder(tmp_path, "last.pth", True, False).release()
    assert ("its file system has no locks" in caplog.text) is not files


def test_pairs_of_runs_damage_nothing(tmp_path):
    """Two processes at once on one folder: one trains, the other is refused or comes after, and what is there is whole."""
    words = command(tmp_path / "run", "--overwrite", "-q", epoch_size=1, num_samples=64, val_while_train="false")[3:]
    for _ in range(3):
        children = [fork(lambda: os._exit(cli.main(words))) for _ in range(2)]
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert codes in ([0, 0], [0, 1])
        assert load(tmp_path / "run" / "last.pth")["progress"]["epoch"] == 1
        assert [record["epoch"] for record in records(tmp_path / "run", "epoch")] == [0]


# what resuming finds


@pytest.mark.parametrize("key", ["recipe", "progress", "global_batch", "optimizer", "scaler"])
def test_a_state_without_a_key_is_refused(run, key):
    state = torch.load(run / "last.pth", weights_only=True)
    torch.save({name: value for name, value in state.items() if name != key}, run / "last.pth")
    with pytest.raises(ValueError, match=r"last\.pth (is no (state|checkpoint) of a|holds another)"):
        train(small(**WHOLE), run, resume=True, progress=False)


@pytest.mark.parametrize("wrong", [{"epoch": "3"}, {"step": -1}, {"best": float("nan")}, {"kept": 5}, {"updates": 1.5}])
def test_a_state_of_odd_numbers_is_refused(run, wrong):
    state = torch.load(run / "last.pth", weights_only=True)
    state["progress"] |= wrong
    torch.save(state, run / "last.pth")
    with pytest.raises(ValueError, match=rf"last\.pth is no state of a run: its {next(iter(wrong))} cannot be"):
        train(small(**WHOLE), run, resume=True, progress=False)


def test_without_its_recipe_a_run_takes_the_states_own(run, capsys):
    (run / "recipe.yaml").unlink()
    assert cli.main(["train", "--resume", str(run), "--print-config"]) == 0
    assert "embed_dim: 16" in capsys.readouterr().out


def test_lines_that_are_no_records_stay(run, whole):
    log = run / "log.jsonl"
    log.write_bytes(b'[1]\nnull\nwords\n{"kind": "epoch"}\n' + log.read_bytes() + b'{"kind": "st')
    result = train(small(**WHOLE), run, resume=True, progress=False)
    assert log.read_bytes().startswith(b"[1]\nnull\nwords\n") and log.read_bytes().endswith(b"}\n")
    assert result.top1 == records(whole, "epoch")[-1]["top1"]


def test_what_differs_is_said(caplog):
    run = TorchRun.__new__(TorchRun)
    run.last, run.world = Path("last.pth"), World()
    run.plan = types.SimpleNamespace(classes=["cat", "cow"], samples=8)
    with pytest.raises(ValueError, match="trained on other classes than the data has now: 2 and 2; gone: dog; new: cow"):
        run._compare({"classes": ["cat", "dog"]})
    with pytest.raises(ValueError, match="trained on other classes"):  # the same ones, with each other's numbers
        run._compare({"classes": ["cow", "cat"]})
    with caplog.at_level("INFO", "convit"):
        run._compare({"classes": ["cat", "cow"], "samples": 9, "processes": 2})
    assert "has 8 samples, and had 9" in caplog.text and "2 process(es) trained so far, 1 from here" in caplog.text


def test_a_line_that_is_too_long_is_named_by_its_number(tmp_path):
    from convit.engine.folder import MAX_RECORD, log_lines

    (tmp_path / "log.jsonl").write_bytes(b"{}\n{}\n" + b"x" * (2 * MAX_RECORD))
    lines = log_lines(tmp_path / "log.jsonl")
    assert [next(lines), next(lines)] == [b"{}\n"] * 2
    with pytest.raises(ValueError, match="line 3.* has more than 1,048,576 bytes"):
        next(lines)
