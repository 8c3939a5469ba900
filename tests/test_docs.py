"""The snippets of the pages run: docs/serve.md's Python agrees with the model, README.md and docs/guide.md are whole paths."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import convit

for package in ("onnx", "onnxscript", "onnxruntime", "openvino", "PIL", "huggingface_hub"):
    pytest.importorskip(package)


def test_serving_snippets(tmp_path, monkeypatch, capsys):
    from PIL import Image

    from convit.engine.preparation import Preparation
    from convit.export import export

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = convit.ConViT(img_size=32, patch_size=8, embed_dim=32, num_heads=4, depth=2, local_up_to_layer=1, num_classes=3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.pretrained_cfg = {"label_names": ["cat", "dog", "owl"], "crop_pct": 0.8, "std": (0.2, 0.3, 0.4)}
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)).save("cat.jpg")
    for suffix, format in ((".onnx", "onnx"), (".xml", "openvino"), (".pt2", "torch-export")):
        export(model, f"model{suffix}", format, images=["cat.jpg"])
    model.save_pretrained("model")
    page = (Path(__file__).parents[1] / "docs" / "serve.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(snippets) == 4
    names: dict[str, object] = {}
    logits = []
    for snippet in snippets:
        exec(snippet, names)
        logits.append(np.asarray(torch.as_tensor(names["logits"]).detach()))
    with torch.no_grad():
        expected = model(torch.from_numpy(Preparation.of(model)(Image.open("cat.jpg")))[None]).numpy()
    for found in logits:
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    said = capsys.readouterr().out.split()
    assert said == [["cat", "dog", "owl"][expected.argmax()]] * 3
    assert "| top1 | 93.5 |" in Path("saved/README.md").read_text()


SMALL = ["--epoch_size", "1", "--num_samples", "4", "--batch_size", "2", "--num_parallel_workers", "0"]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with pictures of two classes; published weights are a file, a service is not waited for."""
    for package in ("timm", "matplotlib", "uvicorn", "fastapi", "multipart", "prometheus_client"):
        pytest.importorskip(package)
    import uvicorn
    from PIL import Image

    from convit.weights import load

    def published(name, source=None):
        path = tmp_path / f"{name}.pth"
        if not path.exists():
            torch.save(convit.create_model(name).state_dict(), path)
        return path

    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("cat", "dog") * 5):
        Path("PICS", name).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(Path("PICS", name, f"{number}.png"))
    monkeypatch.setattr(load, "fetch", published)
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: setattr(server, "started", True))
    # it would close what pytest captures, through absl's handler
    monkeypatch.setattr(uvicorn.Config, "configure_logging", lambda config: None)


def snippets_of(page):
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    return re.findall(r"```(sh|python)\n(.*?)```", text, re.S)


def test_readme(desk, monkeypatch):
    """The quick start and the swap, on small pictures; installing and making is not done again."""
    import timm

    from convit.cli import main

    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: make(name))  # its weights are not fetched
    names = dict(zip("qkv", torch.randn(3, 1, 2, 196, 16), strict=True), timm=timm, images=torch.randn(1, 3, 192, 256))
    names |= {"pos_weight": torch.randn(2, 3), "gating": torch.randn(2)}
    ran = []
    for kind, snippet in snippets_of("README.md"):
        if kind == "python":
            exec(snippet, names)
            continue
        for line in snippet.splitlines():
            program, command, *words = shlex.split(line, comments=True)
            if program != "convit":
                assert program in ("pip", "make")
                continue
            words = ["PICS/cat/0.png" if word == "IMAGE..." else word for word in words]
            assert main([command, *words, *(SMALL if command == "train" else [])]) == 0, line
            ran.append(command)
            if command == "train":
                Path("RUN").symlink_to("runs/PICS")
    assert ran == ["env", "train", "validate", "infer", "export", "serve"] and Path("RUN.onnx").exists()
    assert names["logits"].shape == (1, 1000) and names["out"].shape == (1, 2, 196, 16) and len(convit.accelerated(names["model"])) > 0


def test_every_command_of_the_training_page_is_understood(desk, capsys):
    """With ``--print-config``: the recipe and the data are found, and nothing trains."""
    from convit.cli import main

    assert main(["train", "--data_dir", "PICS", "--output", "RUN", *SMALL]) == 0
    Path("DIR").symlink_to("PICS")
    lines = [line for kind, snippet in snippets_of("docs/training.md") if kind == "sh" for line in snippet.splitlines()]
    for line in lines:
        words = shlex.split(line, comments=True)
        words = words[1:] if words[0] == "convit" else words[words.index("convit") + 1 :]
        assert main([*words, "--print-config"]) == 0, line
    assert len(lines) == 9 and capsys.readouterr().out.count("framework: mindspore") == 1


def test_guide(desk, capsys):
    """Every command and every line of Python; training is cut short. What torchrun is asked for, test_processes.py asks it."""
    from convit.cli import main

    ran = 0
    names: dict[str, object] = {}
    for kind, snippet in snippets_of("docs/guide.md"):
        if kind == "python":
            exec(snippet, names)
            continue
        for line in snippet.splitlines():
            program, *words = shlex.split(line)
            ran += 1
            if program == "convit":
                assert main(words + SMALL * (words[0] == "train")) == 0, line
            else:
                started = words.index("-m")
                assert program == "torchrun" and words[started + 1] == "convit"
                tiny = [*SMALL, "--embed_dim", "16", "--num_heads", "4", "--depth", "2", "--local_up_to_layer", "1"]
                assert main([*words[started + 2 :], *tiny]) == 0, line
    assert ran == 10
    for folder in ("RUN", "VIT", "TUNED", "AGAIN", "TWO", "MANY"):
        assert Path(folder, "best.pth").exists(), folder
    assert Path("plots/comparison.png").exists() and names["model"].num_classes == 7
    said = capsys.readouterr().out
    assert "local_up_to_layer: 4 / 0" in said
    distances = [float(number) for number in re.findall(r"locality_strength \S+: (\S+) patches", said)]
    assert distances == sorted(distances, reverse=True) and len(distances) == 4
