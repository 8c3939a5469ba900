"""Published weights: fetching, checksums, what goes on after a break."""

import hashlib
import http.server
import os
import threading
from functools import partial

import pytest
from checkpoints import DATA, randomised, tiny
from training import fork

from convit.weights import load, published
from convit.weights.load import load_checkpoint, read

torch = pytest.importorskip("torch")
import convit  # noqa: E402


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine in place of the public ones; it counts what it is asked for."""
    (tmp_path / "site").mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path.startswith("/timm/"):  # the hub: a redirect that states the checksum
                self.send_response(302)
                self.send_header("Location", "/blob")
                digest = hashlib.sha256((tmp_path / "site/blob").read_bytes()).hexdigest()
                self.send_header("X-Linked-ETag", f'"{digest if "tiny" in self.path else "0" * 64}"')
                self.end_headers()
            elif self.path.startswith("/cut-"):  # the first connection breaks after a third; the rest comes by ranges
                data = (tmp_path / "site" / self.path[1:]).read_bytes()
                begin = int((self.headers["Range"] or "bytes=0-")[6:-1])
                asked[-1] += f" from {begin}"
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", str(len(data) - begin))
                self.end_headers()
                self.wfile.write(data[: len(data) // 3] if len(asked) == 1 else data[begin:])
            elif self.path == "/ftp":
                self.send_response(302)
                self.send_header("Location", "ftp://127.0.0.1/weights.pth")
                self.end_headers()
            elif self.path.startswith("/plain/"):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"anything")
            elif self.path == "/short.ckpt":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"few")
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "site")))
    threading.Thread(target=site.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{site.server_port}"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(published, "_hub_cache", lambda name: None)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    yield tmp_path / "site", address, asked
    site.shutdown()
    site.server_close()


def test_fetch_from_the_hub(server, tmp_path):
    site, _, asked = server
    load.save_checkpoint(randomised(), site / "a.safetensors")
    (site / "a.safetensors").rename(site / "blob")
    path = published.fetch("convit_tiny")
    assert path == tmp_path / "cache/hub/checkpoints/convit/convit_tiny.fb_in1k.safetensors"
    assert path.read_bytes() == (site / "blob").read_bytes()
    assert published.fetch("convit_tiny") == path and len(asked) == 2
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged.*delete it"):
        published.fetch("convit_tiny")
    with pytest.raises(ValueError, match="expected 0000"):
        published.fetch("convit_small")
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, path.name + ".sha256"]


def test_fetch_checks_mindcvs_name(server, tmp_path, monkeypatch):
    site, address, _ = server
    data = (DATA / "mindcv_tiny.ckpt").read_bytes()
    good = f"convit_tiny-{hashlib.sha256(data).hexdigest()[:8]}.ckpt"
    for name in (good, "convit_base-01234567.ckpt"):
        (site / name).write_bytes(data)
    links = {"convit_tiny": good, "convit_base": "convit_base-01234567.ckpt", "convit_small": "short.ckpt"}
    monkeypatch.setitem(published.ADDRESSES, "mindcv", {name: f"{address}/{file}" for name, file in links.items()})
    assert load_checkpoint(tiny(), published.fetch("convit_tiny", "mindcv"))
    with pytest.raises(ValueError, match="SHA-256"):
        published.fetch("convit_base", "mindcv")
    with pytest.raises(OSError, match="after 3 of 1000 bytes"):
        published.fetch("convit_small", "mindcv")
    assert sorted(p.name for p in published.cache_folder().iterdir()) == [".short.ckpt.part", good, good + ".sha256"]


def test_what_came_first_from_fair_is_said_and_expected_ever_after(server, monkeypatch, caplog):
    site, address, _ = server
    (site / "convit_tiny.pth").write_bytes((DATA / "mindcv_tiny.ckpt").read_bytes())
    monkeypatch.setitem(published.ADDRESSES, "fair", {"convit_tiny": f"{address}/convit_tiny.pth"})
    path = published.fetch("convit_tiny", "fair")
    assert f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()} is what came now" in caplog.text
    caplog.clear()
    assert published.fetch("convit_tiny", "fair") == path and not caplog.text
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(ValueError, match="damaged.*delete it"):
        published.fetch("convit_tiny", "fair")


def test_download_goes_on_where_it_broke(server, tmp_path, monkeypatch):
    site, address, asked = server
    data = (DATA / "mindcv_tiny.ckpt").read_bytes()
    name = f"cut-{hashlib.sha256(data).hexdigest()[:8]}.ckpt"
    (site / name).write_bytes(data)
    monkeypatch.setitem(published.ADDRESSES, "mindcv", {"convit_tiny": f"{address}/{name}"})
    with pytest.raises(OSError, match="what came is kept"):
        published.fetch("convit_tiny", "mindcv")
    path = published.fetch("convit_tiny", "mindcv")
    assert path.read_bytes() == data and asked == [f"/{name} from 0", f"/{name} from {len(data) // 3}"]
    assert sorted(p.name for p in path.parent.iterdir()) == [name, name + ".sha256"]
    os.chmod(path.parent, 0o500)  # a cache that only its owner may write
    (site / name).unlink()
    assert published.fetch("convit_tiny", "mindcv") == path
    path.unlink()
    (path.parent / f".{name}.part").write_bytes(b"the beginning of another file")
    (site / name).write_bytes(data)
    published.fetch("convit_tiny", "mindcv")
    assert path.read_bytes() == data


def test_only_https_and_stated_checksums(server, monkeypatch):
    _, address, _ = server
    monkeypatch.setitem(published.ADDRESSES, "fair", {"convit_tiny": f"{address}/ftp", "convit_base": "http://example.org/a.pth"})
    for name in published.ADDRESSES["fair"]:
        with pytest.raises(OSError, match="neither https nor on this machine"):
            published.fetch(name, "fair")
    monkeypatch.setenv("HF_ENDPOINT", f"{address}/plain")  # a mirror that does not say what it serves
    with pytest.raises(OSError, match="states no checksum.*pretrained="):
        published.fetch("convit_tiny")


def test_offline_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(published.ADDRESSES, "fair", {"convit_tiny": "http://127.0.0.1:9/convit_tiny.pth"})
    with pytest.raises(OSError) as error:
        published.fetch("convit_tiny", "fair")
    assert all(text in str(error.value) for text in ("http://127.0.0.1:9/convit_tiny.pth", "pretrained='/path/to/convit_tiny.pth'"))
    with pytest.raises(ValueError, match="no weights for 'convit_tiny_plus'"):
        published.fetch("convit_tiny_plus", "timm")
    with pytest.raises(ValueError, match="source must be one of timm, mindcv, fair"):
        published.fetch("convit_tiny", "hub")


def test_load_pretrained(monkeypatch):
    asked = []
    monkeypatch.setattr(load, "fetch", lambda name, source: asked.append(name) or DATA / "mindcv_tiny.ckpt")
    weight = torch.tensor(read(DATA / "mindcv_tiny.ckpt").tensors["patch_embed.proj.weight"])
    model = load.load_pretrained(randomised(num_classes=3, in_chans=1), "convit_tiny", strict_head=False)
    torch.testing.assert_close(model.patch_embed.proj.weight.detach(), weight.sum(1, keepdim=True))
    assert torch.equal(model.head.weight, randomised(num_classes=3, in_chans=1).head.weight)
    model = load.load_pretrained(tiny(in_chans=5), "convit_base_plus")
    torch.testing.assert_close(model.patch_embed.proj.weight.detach(), weight[:, [0, 1, 2, 0, 1]] * 3 / 5)
    assert asked == ["convit_tiny", "convit_base_plus"]
    monkeypatch.setattr(
        "convit.create_model", lambda name, pretrained: convit.ConViT(embed_dim=16, depth=2, num_heads=2, local_up_to_layer=1)
    )
    assert not convit.from_pretrained("convit_tiny").training  # ready to use, as from a folder
    with pytest.raises(ValueError, match="strict_head=False"):
        load.load_pretrained(tiny(num_classes=3), DATA / "mindcv_tiny.ckpt")


def test_a_proxy_is_honoured(server, monkeypatch):
    """What http_proxy names is asked for the whole address; for https a tunnel is asked of it, and what it refuses is a message."""
    site, address, asked = server
    proxied = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            proxied.append(self.path)
            data = (site / self.path.rsplit("/", 1)[1]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_CONNECT(self):
            proxied.append(f"CONNECT {self.path}")
            self.send_error(403)

        def log_message(self, *args):
            pass

    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    data = (DATA / "mindcv_tiny.ckpt").read_bytes()
    file = f"convit_tiny-{hashlib.sha256(data).hexdigest()[:8]}.ckpt"
    (site / file).write_bytes(data)
    far = {"convit_tiny": f"{address}/{file}", "convit_base": "https://weights.invalid/convit_base-01234567.ckpt"}
    monkeypatch.setitem(published.ADDRESSES, "mindcv", far)
    assert published.fetch("convit_tiny", "mindcv").read_bytes() == data
    with pytest.raises(OSError, match="weights.invalid.*403"):
        published.fetch("convit_base", "mindcv")
    assert proxied == [f"{address}/{file}", "CONNECT weights.invalid:443"] and not asked
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    published.cache_folder().joinpath(file).unlink()
    published.fetch("convit_tiny", "mindcv")
    assert asked == [f"/{file}"] and len(proxied) == 2
    proxy.shutdown()
    proxy.server_close()


def test_a_checksum_that_is_none_is_not_believed(server, tmp_path):
    cache = published.cache_folder()
    cache.mkdir(parents=True)
    (cache / "convit_tiny.pth").write_bytes(b"anything")
    (cache / "convit_tiny.pth.sha256").write_text("")
    with pytest.raises(ValueError, match=r"convit_tiny\.pth\.sha256 holds no SHA-256"):
        published.fetch("convit_tiny", "fair")


@pytest.mark.parametrize("recorded", [True, False])
def test_a_cache_that_can_only_be_read(tmp_path, recorded):
    """Shared by all users of a machine: what is there is checked and used, what is not is a message that names the place."""
    data = (DATA / "mindcv_tiny.ckpt").read_bytes()
    file = f"convit_tiny-{hashlib.sha256(data).hexdigest()[:8]}.ckpt"
    cache = tmp_path / "cache/hub/checkpoints/convit"
    cache.mkdir(parents=True)
    (cache / file).write_bytes(data)
    if recorded:
        (cache / f"{file}.sha256").write_text(hashlib.sha256(data).hexdigest())
    for path in (*cache.iterdir(), cache):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def work():
        for path in (tmp_path, *tmp_path.parents):  # pytest's own folders are its user's
            os.chmod(path, os.stat(path).st_mode | 0o111) if os.stat(path).st_uid == os.getuid() else None
        if os.getuid() == 0:  # whom no permission stops
            os.setuid(65534)
        os.environ["TORCH_HOME"] = str(tmp_path / "cache")
        published.ADDRESSES["mindcv"] = {
            "convit_tiny": f"https://weights.invalid/{file}",
            "convit_base": "https://weights.invalid/b-01234567.ckpt",
        }
        torch.hub._hub_dir = None
        assert published.fetch("convit_tiny", "mindcv").read_bytes() == data
        with pytest.raises(OSError, match="Permission denied.*pretrained='/path/to/b-01234567.ckpt'"):
            published.fetch("convit_base", "mindcv")

    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert os.waitpid(fork(work), 0)[1] == 0
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == before
