"""`convit demo`, shortened."""

import re
import sys

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")


@pytest.mark.parametrize("quick", [True, False])
def test_demo(quick, tmp_path, monkeypatch, capsys):
    from convit.cli import demo, main
    from convit.engine.pytorch import validate
    from convit.engine.recipe import load_recipe
    from convit.weights import load

    assert set(demo._contestants("cpu")) >= {"timm, eager", "cpp", "sdpa", "reference"}

    def offline(*args, **kwargs):
        raise OSError("no network in this test. Pass a file")

    monkeypatch.setattr(load, "fetch", offline)
    read_back, measure = [], validate.validate
    monkeypatch.setattr(validate, "validate", lambda *args, **options: read_back.append(measure(*args, **options)) or read_back[-1])
    monkeypatch.setattr(demo, "ROUNDS", 1)
    monkeypatch.setattr(demo, "_contestants", lambda device: ["timm, eager", "sdpa"])
    monkeypatch.setattr(demo, "DIGITS_EPOCHS", 6)
    if not quick:
        monkeypatch.setattr(demo, "photographs", lambda output: None)
    assert main(["demo", "--output", str(tmp_path), *(["--quick"] if quick else [])]) == 0
    printed = capsys.readouterr().out
    if quick:
        assert "its own initialisation" in printed and re.search(r"attention ran on (cpu_cpp|any_sdpa|reference);", printed)
        for name in ("timm, eager", "sdpa"):  # ms, the ratio to timm's, and megabytes: of the widest activations at least, and no gigabyte
            ms, ratio, peak = (float(x) for x in re.search(rf"{name} +│ +([\d.]+) │ +([\d.]+) │ +([\d.]+)", printed).groups())
            assert ms > 0 and (ratio == 1 or name != "timm, eager") and demo.BATCH * 197 * 4 * 192 * 4 / 1e6 <= peak < 1000
        assert (tmp_path / "attention.png").stat().st_size > 10_000
        assert not (tmp_path / "digits.safetensors").exists()
    else:
        assert "360 digits it has not seen" in printed and read_back[0]["precision"] == "float32"  # as it was trained
        recipe = load_recipe(tmp_path / "digits" / "recipe.yaml")
        assert recipe.warmup_epochs + recipe.decay_epochs == recipe.epoch_size == 6  # the schedule ends with the run
        for name in ("history.png", "gates.png", "digits_attention.png", "digits.safetensors", "digits/log.jsonl"):
            assert (tmp_path / name).stat().st_size > 500


def test_demo_names_what_it_needs(monkeypatch, capsys):
    from convit.cli import main

    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["demo"]) == 1
    assert "pip install '.[train]' in the source folder" in capsys.readouterr().err
