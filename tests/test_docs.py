"""The Python snippets of docs/serve.md run, one after the other, and agree."""

import re
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
