"""Models in folders and on the Hub: saved, pushed to a local server, read back; the same folders with timm, both ways."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

import convit

pytest.importorskip("huggingface_hub")

NAMES = ["äpfel", "b", "c", "d", "e"]


def model_of(**kwargs):
    torch.manual_seed(0)
    shape = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "num_heads": 4, "depth": 3, "local_up_to_layer": 2, "num_classes": 5}
    model = convit.ConViT(**shape | kwargs).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 0.9, "interpolation": "bilinear", "label_names": NAMES}
    return model


def same(a, b):
    images = torch.randn(2, 3, *a.patch_embed.img_size)
    with torch.no_grad():
        return torch.equal(a.eval()(images), b.eval()(images))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"img_size": 32, "global_pool": "avg", "reg_tokens": 2},
        {"local_up_to_layer": 0, "qkv_bias": True, "mlp_ratio": 2.0},
        {"use_pos_embed": False, "img_size": 224},
        {"patch_size": (8, 16), "img_size": (32, 64)},  # a square of patches, no square of pixels
        {"act_layer": lambda: torch.nn.GELU("tanh"), "norm_layer": lambda dim, **where: torch.nn.LayerNorm(dim, 1e-5, **where)},
    ],
)
def test_a_folder_gives_the_model_back(tmp_path, kwargs):
    model = model_of(**kwargs)
    model.save_pretrained(tmp_path / "m", results={"top1": 81.25})
    back = convit.ConViT.from_pretrained(tmp_path / "m")
    assert not back.training and same(model, back)
    for name, value in model.pretrained_cfg.items():
        assert back.pretrained_cfg[name] == value
    assert back.pretrained_cfg["results"] == {"top1": 81.25}
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| top1 | 81.25 |" in card and "äpfel, b, c, d, e" in card and "value: 81.25" in card


def test_infer_and_validate_call_the_classes_by_the_folders_names(tmp_path, capsys):
    """``config.json`` names them: descriptions are shown, and validation data is matched by the names themselves."""
    pytest.importorskip("timm")
    from PIL import Image

    from convit.cli import main

    model_of(img_size=32).save_pretrained(tmp_path / "m", classes=["n01", "n02", "n03", "n04", "n05"])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"label_descriptions": {"n02": "goldfish"}}))
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    for name in ("n05", "n02"):  # two of the five
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "val" / name / "a.png")
    assert main(["infer", str(tmp_path / "val" / "n02"), "--ckpt_path", str(tmp_path / "m"), "--json"]) == 0
    (answer,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert {one["name"] for one in answer["classes"]} == {"n01", "goldfish", "n03", "n04", "n05"}
    first = ["n01", "n02", "n03", "n04", "n05"][answer["classes"][0]["index"]]
    words = ["validate", str(tmp_path / "m"), "--data_dir", str(tmp_path), "--num_parallel_workers", "0", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == 50 * (first in ("n05", "n02"))
    (tmp_path / "val" / "n05").rename(tmp_path / "val" / "tench")
    assert main(words) == 1
    assert "'tench'" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "patch"), [((32, 48), (8, 8)), ((32, 32), (8, 4))])
def test_what_is_not_square_is_for_serve_and_export(tmp_path, capsys, size, patch):
    from convit.cli import main

    model_of(img_size=size, patch_size=patch).save_pretrained(tmp_path)
    assert main(["infer", str(tmp_path), "--ckpt_path", str(tmp_path)]) == 1
    takes = f"takes images of {size[0]} x {size[1]} in patches of {patch[0]} x {patch[1]}: infer and validate want squares"
    assert takes in capsys.readouterr().err


def test_to_fine_tune(tmp_path):
    model_of().save_pretrained(tmp_path)
    back = convit.ConViT.from_pretrained(tmp_path, num_classes=7, img_size=(40, 64))
    assert back.num_classes == 7 and back.patch_embed.grid_size == (5, 8) and back.pretrained_cfg["label_names"] == list("0123456")
    model_of().save_pretrained(tmp_path, results={"top1": 81.25})
    assert convit.ConViT.from_pretrained(tmp_path, num_classes=7).pretrained_cfg["results"] == {}  # they are of the head that has gone
    kept = convit.ConViT.from_pretrained(tmp_path, num_classes=5)  # as many as it has: nothing to replace
    assert same(model_of(), kept) and kept.pretrained_cfg["label_names"] == NAMES
    with pytest.raises(ValueError, match="classes must name the 5 outputs"):
        model_of().save_pretrained(tmp_path, classes=["a"])


def test_what_is_no_model_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds none of best.pth"):
        convit.ConViT.from_pretrained(tmp_path)
    model_of().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json, as JSON, cannot be read"):
        convit.ConViT.from_pretrained(tmp_path)


@pytest.mark.parametrize(("error", "reason"), [(OSError("401 for me/toy\nlog in"), "401 for me/toy"), (ValueError(), "ValueError")])
def test_why_the_hub_gives_nothing_is_said_in_a_line(monkeypatch, error, reason):
    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr("convit.engine.pytorch.hub.snapshot_download", snapshot_download)
    with pytest.raises(OSError, match=f"^me/toy is no file or folder here, and the Hub does not give it: {reason}$"):
        convit.ConViT.from_pretrained("me/toy")


def test_timm_reads_ours(tmp_path):
    """A variant, with its own classes; and what timm would compute otherwise is stored so that it refuses."""
    timm = pytest.importorskip("timm")
    model = convit.create_model("convit_tiny", num_classes=5, img_size=32)
    model.pretrained_cfg |= {"label_names": NAMES, "mean": (0.5,) * 3, "crop_pct": 0.9}
    model.save_pretrained(tmp_path / "tiny")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'tiny'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model.eval()(images), rtol=1e-4, atol=1e-5)
    data = timm.data.resolve_data_config({}, model=theirs)
    assert tuple(data["mean"]) == (0.5,) * 3 and data["crop_pct"] == 0.9 and tuple(data["input_size"]) == (3, 32, 32)
    for module in model.modules():
        if isinstance(module, torch.nn.GELU):
            module.approximate = "tanh"
    model.save_pretrained(tmp_path / "tanh")
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model(f"local-dir:{tmp_path / 'tanh'}", pretrained=True)


@pytest.mark.parametrize("safe", [True, False])
def test_we_read_timms(tmp_path, safe):
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    theirs = timm.create_model("convit_tiny", num_classes=3, img_size=48).eval()
    save_for_hf(theirs, tmp_path, {"label_names": ["x", "y", "z"], "label_descriptions": {"y": "a y"}}, safe_serialization=safe)
    ours = convit.ConViT.from_pretrained(tmp_path)
    assert ours.pretrained_cfg["label_names"] == ["x", "a y", "z"] and ours.patch_embed.img_size == (48, 48)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server with as much of the Hub's protocol as pushing and fetching need, that keeps files in memory."""
    files, calls = {}, []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status, body=b"", headers=None):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": "c" * 40, **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            calls.append((self.command, self.path))
            here = f"http://127.0.0.1:{self.server.server_port}"
            if self.path == "/api/repos/create":
                return self.answer(200, {"url": f"{here}/me/toy", "id": "me/toy"})
            if not self.path.startswith(("/api/models/me/toy", "/me/toy/", "/api/validate-yaml")):
                return self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
            if "/preupload/" in self.path:
                wanted = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]]
                return self.answer(200, {"files": wanted})
            if "/commit/" in self.path:
                import base64

                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self.answer(200, {"commitUrl": f"{here}/me/toy/commit/c", "commitOid": "c" * 40, "commitMessage": ""})
            if "/resolve/" in self.path:
                name = self.path.rsplit("/", 1)[1]
                if name not in files:
                    return self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
                return self.answer(200, files[name], {"ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"'})
            if self.path.startswith("/api/models/me/toy/tree"):
                return self.answer(200, [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()])
            if self.path.startswith("/api/models/me/toy"):
                siblings = [{"rfilename": name} for name in files]
                return self.answer(
                    200, {"id": "me/toy", "sha": "c" * 40, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
                )
            if self.path.startswith("/api/validate-yaml"):
                return self.answer(200, {"errors": [], "warnings": []})
            return self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})

        do_GET = do_POST = do_HEAD = do_PUT = handle_any

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import constants

    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield files, calls
    server.shutdown()
    server.server_close()


def test_push_and_fetch(hub, tmp_path):
    files, _ = hub
    model = model_of()
    model.push_to_hub("me/toy", token="hf_none", results={"top1": 90.5})
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    back = convit.ConViT.from_pretrained("me/toy", cache_dir=tmp_path / "other")
    assert same(model, back) and back.pretrained_cfg["label_names"] == NAMES and back.pretrained_cfg["results"] == {"top1": 90.5}
    assert np.allclose(back.pretrained_cfg["mean"], 0.5)
    with pytest.raises(OSError, match="me/none is no file or folder here, and the Hub does not give it"):
        convit.ConViT.from_pretrained("me/none", cache_dir=tmp_path / "other")
