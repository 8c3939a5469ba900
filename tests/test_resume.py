"""Resuming: exact to the bit wherever a run was stopped, and what is said of a state that is not as it should be."""

import itertools
import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")
np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

import kills  # noqa: E402
from training import WHOLE, assert_same_state, command, fork, losses, records, small  # noqa: E402

from convit import cli  # noqa: E402
from convit.engine.folder import Log, Progress  # noqa: E402
from convit.engine.pytorch.checkpoint import load, save  # noqa: E402
from convit.engine.pytorch.train import TorchRun, train  # noqa: E402
from convit.engine.run import Interrupted  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_log_drops_what_a_kill_left_behind(tmp_path):
    lines = [{"kind": "step", "epoch": 0, "update": 1}, {"kind": "step", "epoch": 0, "update": 2}, {"kind": "epoch", "epoch": 0}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "st')
    Log(tmp_path / "log.jsonl", Progress(epoch=0, step=1, updates=1)).close()
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == lines[:1]


def test_checkpoints_load_without_running_code(tmp_path):
    save(tmp_path / "last.pth", {"code": threading.Event}, {"progress": {}})
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        load(tmp_path / "last.pth")


def test_a_checkpoint_takes_no_more_memory_than_its_file(tmp_path):
    save(tmp_path / "last.pth", {"optimizer": {"state": {0: [torch.zeros(1).expand(1 << 31)]}}}, {"progress": {}})
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        load(tmp_path / "last.pth")


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


def test_kills_at_random_moments_while_others_read(whole, tmp_path):
    """tests/kills.py does 200 of them."""
    assert kills.killed_round(whole, tmp_path / "run", 4, 0.4, 0.5, random.Random(0)) > 0


def test_a_clock_that_jumps_changes_nothing(whole, tmp_path, monkeypatch):
    """The time of day goes back and forth by years while a run trains and is resumed: no order depends on it."""
    now = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1e9 * (1 + next(now) % 3))
    train(small(**WHOLE | {"epoch_size": 2}), tmp_path / "run", progress=False)
    for path in (tmp_path / "run").iterdir():
        os.utime(path, (next(now), 4e9 - next(now)))
    train(small(**WHOLE), tmp_path / "run", resume=True, progress=False)
    assert_same_state(whole, tmp_path / "run")


def test_a_slow_disk_only_takes_longer(tmp_path, monkeypatch):
    """Every write waits half a second for the disk: a signal that comes meanwhile is not lost, and what is saved is whole."""
    sync, slept, signalled = os.fsync, [], []

    def slow_sync(descriptor):
        time.sleep(0.5)
        sync(descriptor)
        slept.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if "last.pth" in slept[-1] and signalled.append(1) is None and len(signalled) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(os, "fsync", slow_sync)
    with pytest.raises(Interrupted):
        train(small(**WHOLE), tmp_path / "run", progress=False)
    assert len(signalled) == 2 and load(tmp_path / "run" / "last.pth")["progress"]["updates"] > 0
