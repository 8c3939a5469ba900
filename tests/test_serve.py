"""``convit serve``: real requests to a real process, many at once, hostile ones, a signal in mid-request, and the page in a browser."""

import asyncio
import base64
import concurrent.futures
import contextlib
import http.client
import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import convit

for package in ("fastapi", "uvicorn", "multipart", "prometheus_client", "PIL"):
    pytest.importorskip(package)

from PIL import Image  # noqa: E402

from convit.cli import main  # noqa: E402
from convit.engine.preparation import Preparation  # noqa: E402
from convit.engine.pytorch.trained import trained_model  # noqa: E402
from convit.serve import create_app  # noqa: E402
from convit.serve.classifier import Classifier  # noqa: E402

NAMES = ["<b>bold</b>", "Käfer", "tench", "x" * 60]
LIMITS = ["--max-upload", "0.2", "--max-pixels", "0.5", "--timeout", "2", "--max-waiting", "16", "--threads", "1", "--precision", "float32"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as the Hub has it: weights, and a config with a preparation of its own and class names that a page must not interpret."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = convit.ConViT(img_size=32, patch_size=8, embed_dim=32, num_heads=4, depth=3, local_up_to_layer=2, num_classes=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    config = {
        "pretrained_cfg": {"mean": [127.5] * 3, "std": [51.0] * 3, "crop_pct": 0.9, "interpolation": "bilinear"},
        "label_names": NAMES,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def image(seed=0, size=(50, 40), kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(file, kind, **options)
    return file.getvalue()


def expected(model, data):
    """By hand: timm's transform, and the model itself."""
    array = Preparation((32, 32), (0.5,) * 3, (0.2,) * 3, 0.9, "bilinear")(Image.open(io.BytesIO(data)).convert("RGB"))
    with torch.no_grad():
        return model(torch.from_numpy(array)[None])[0].softmax(0).numpy()


class Service:
    """A process that runs ``convit serve``."""

    def __init__(self, checkpoint):
        command = [sys.executable, "-m", "convit", "serve", str(checkpoint), "--port", "0", *LIMITS]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log = []
        threading.Thread(target=self._read, daemon=True).start()
        deadline = time.monotonic() + 120
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", "".join(self.log))):
            assert self.process.poll() is None and time.monotonic() < deadline, "".join(self.log)
            time.sleep(0.05)
        self.port = int(found[1])

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line)

    def ask(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            data = answer.read()
            return answer.status, json.loads(data) if "json" in answer.headers["Content-Type"] else data.decode()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def service(checkpoint):
    service = Service(checkpoint)
    yield service
    service.process.kill()
    service.process.wait()


@pytest.fixture(scope="module")
def model(checkpoint):
    return trained_model(checkpoint)


def form(data):
    return b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + data + b"\r\n--x--\r\n"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "form", "chunked"])
def test_predict(service, model, kind):
    data = image(1, kind=kind if kind.isupper() else "PNG")
    body, headers = data, {}
    if kind == "form":
        body, headers = form(data), {"Content-Type": "multipart/form-data; boundary=x"}
    if kind == "chunked":
        body = iter([data[:100], data[100:]])
    status, answer = service.ask("POST", "/predict?topk=3", body, headers)
    assert status == 200 and len(answer["classes"]) == 3
    truth = expected(model, data)
    assert [one["index"] for one in answer["classes"]] == np.argsort(-truth)[:3].tolist()
    for one in answer["classes"]:
        assert one["name"] == NAMES[one["index"]] and one["probability"] == pytest.approx(float(truth[one["index"]]), abs=1e-5)


def test_a_picture_is_turned_as_its_exif_says(service):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = image(2)
    turned = io.BytesIO()
    Image.open(io.BytesIO(data)).transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    assert service.ask("POST", "/predict", turned.getvalue()) == service.ask("POST", "/predict", data)


def test_the_pages_commands(service, tmp_path):
    """docs/serve.md's, with curl."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl here")
    (tmp_path / "cat.jpg").write_bytes(image(9, kind="JPEG"))
    page = (Path(__file__).parents[1] / "docs" / "serve.md").read_text(encoding="utf-8")
    told = []
    for line in re.findall("^curl .*", page, re.M):
        words = [word.replace(":8000", f":{service.port}") for word in shlex.split(line)]
        told.append(json.loads(subprocess.run([curl, "-s", *words[1:]], cwd=tmp_path, capture_output=True, check=True).stdout)["classes"])
    assert [len(classes) for classes in told] == [4, 3] and told[0][:3] == told[1]


def test_attention(service, model):
    status, answer = service.ask("POST", "/attention?query=1,3", image(3))
    assert status == 200 and answer["grid"] == [4, 4] and answer["query"] == [1, 3]
    assert [layer["kind"] for layer in answer["layers"]] == ["GPSA", "GPSA", "MHSA"]
    inputs = []
    hook = model.blocks[1].attn.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    expected(model, image(3))
    hook.remove()
    attention = model.blocks[1].attn.get_attention(inputs[0]).detach()[0, :, 7]
    found = np.array([head["map"] for head in answer["layers"][1]["heads"]])
    np.testing.assert_allclose(found, attention.numpy(), atol=2e-5)
    gates = [head["gate"] for head in answer["layers"][1]["heads"]]
    assert gates == pytest.approx(model.blocks[1].attn.gating_param.sigmoid().tolist(), abs=1e-4)
    kind, _, encoded = answer["picture"].partition(",")
    seen = Preparation((32, 32), crop_pct=0.9, interpolation="bilinear").crop(Image.open(io.BytesIO(image(3))))
    assert kind == "data:image/png;base64" and Image.open(io.BytesIO(base64.b64decode(encoded))).tobytes() == seen.tobytes()
    assert service.ask("POST", "/attention?query=4,0", image(3))[0] == 400
    assert service.ask("POST", "/attention?query=a", image(3))[0] == 422


def test_eight_clients_at_once_share_batches(service, model):
    def client(number):
        answers = []
        for turn in range(6):
            data = image(100 * number + turn)
            answers.append((data, service.ask("POST", "/predict?topk=4", data)))
        return answers

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [answer for answers in pool.map(client, range(8)) for answer in answers]
    assert len(answers) == 48
    for data, (status, answer) in answers:
        assert status == 200
        truth = expected(model, data)
        assert [one["probability"] for one in answer["classes"]] == pytest.approx(sorted(truth.tolist(), reverse=True), abs=1e-5)
    text = service.ask("GET", "/metrics")[1]
    count, total = (float(re.search(rf"^convit_batch_size_{name} (\S+)", text, re.M)[1]) for name in ("count", "sum"))
    assert total >= 48 and count < total
    assert 'convit_requests_total{route="/predict",status="200"}' in text
    assert service.ask("GET", "/healthz")[1] == {
        "status": "ok",
        "model": "convit",
        "classes": 4,
        "image_size": [32, 32],
        "device": "cpu",
        "precision": "float32",
        "version": convit.__version__,
    }


def test_the_service_by_default_and_at_its_limits():
    """In this process, in grey, on a picture that is no square: the five most probable classes, equals by number, the middle patch, exact
    limits."""
    testclient = pytest.importorskip("starlette.testclient")
    torch.manual_seed(0)
    shape = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 16, "num_heads": 2, "depth": 2, "local_up_to_layer": 1, "num_classes": 8}
    served = convit.ConViT(in_chans=1, **shape).eval()
    torch.nn.init.zeros_(served.head.weight)
    with torch.no_grad():
        served.head.bias.copy_(torch.tensor([0.0, 2.0, 0.0, 1.0, 2.0, 0.0, 0.0, -1.0]))
    with testclient.TestClient(create_app(served, max_pixels=2000, precision="float32")) as client:
        began, data = time.perf_counter(), image()  # of 2,000 pixels
        for route in ("/predict", "/attention"):
            answers = {topk: client.post(f"{route}{topk}", content=data).json() for topk in ("", "?topk=2", "?topk=100")}
            assert [[one["index"] for one in answers[topk]["classes"]] for topk in answers] == [
                [1, 4, 3, 0, 2],
                [1, 4],
                [1, 4, 3, 0, 2, 5, 6, 7],
            ]
            assert client.post(f"{route}?topk=0", content=data).status_code == 422
        assert (answers[""]["grid"], answers[""]["query"]) == ([3, 5], [1, 2])
        assert client.get("/healthz").json()["image_size"] == [24, 40]
        assert client.post("/predict", content=image(size=(23, 87))).status_code == 400  # 2,001 pixels
        assert client.get("/of/nobody").status_code == client.get("/nor/this").status_code == 404
        text = client.get("/metrics").text
        passed = time.perf_counter() - began
    for route, status, count in (
        ("/predict", 200, 3),
        ("/predict", 400, 1),
        ("/predict", 422, 1),
        ("/attention", 200, 3),
        ("other", 404, 2),
    ):
        assert f'convit_requests_total{{route="{route}",status="{status}"}} {count}.0' in text
    assert "/of/nobody" not in text  # or whoever asks for anything makes the service remember it
    assert 0 < float(re.search(r'^convit_request_seconds_sum{route="/predict"} (\S+)', text, re.M)[1]) < passed


def test_batches_are_bounded_and_a_failure_is_everyones_of_its_batch(model):
    """Five images, at most two at a time; and after a failed batch the next ones are computed."""
    sizes, images = [], [image(seed) for seed in range(5)]
    classifier = Classifier(model, 2, 10_000, "float32", sizes.append)
    prepared, forward = [classifier.prepare(data) for data in images], classifier.fast

    async def ask():
        return await asyncio.wait_for(asyncio.gather(*map(classifier.probabilities, prepared), return_exceptions=True), 20)

    def failing(batch):
        classifier.fast = forward
        raise RuntimeError(f"no room for {len(batch)}")

    for fast in (forward, failing):
        classifier.fast = fast
        sizes.clear()
        answers = asyncio.run(ask())
        failed = [str(each) for each in answers if isinstance(each, Exception)]
        assert (failed, sizes) == (([], [2, 2, 1]) if fast is forward else (["no room for 2"] * 2, [2, 1]))
        for data, answer in list(zip(images, answers, strict=True))[len(failed) :]:
            np.testing.assert_allclose(answer, expected(model, data), atol=1e-5)
    classifier.close()


def bomb():
    """A PNG of 40,000 x 40,000 pixels in a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def strip():
    """A PNG of 400,000 x 1 pixels: scaled to the model's height it would be 14 million pixels wide."""
    file = io.BytesIO()
    Image.new("L", (400_000, 1), 85).save(file, "PNG")
    return file.getvalue()


def two_faces():
    """A TIFF of one pixel, and in another of Pillow's formats, IM, another of 810,000."""
    text = b"II*\0\0\2\0\0:x\nFile type: L image\nImage type: L image\nImage size (x*y): 900*900\n\0\0\x1a"
    tags = ((256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 1))
    return (
        text.ljust(512, b"\0") + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in tags) + b"\0" * 4
    )


@pytest.mark.filterwarnings("ignore:IM image format:DeprecationWarning")
def test_only_the_formats_that_are_meant_are_read(service):
    Image.init()
    assert Image.open(io.BytesIO(two_faces()), formats=["TIFF"]).size == (1, 1)
    assert "IM" not in Image.OPEN or Image.open(io.BytesIO(two_faces())).size == (900, 900)
    assert service.ask("POST", "/predict", two_faces())[0] == 200


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_strip_is_answered_in_bounded_memory(service):
    with open(f"/proc/{service.process.pid}/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew

    def kilobytes(name):
        with open(f"/proc/{service.process.pid}/status") as file:
            return int(re.search(rf"{name}:\s+(\d+)", file.read())[1])

    before = kilobytes("VmRSS")
    assert service.ask("POST", "/predict", strip())[0] == 200
    assert kilobytes("VmHWM") - before < 200_000


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "no image"),
        (b"not an image", 400, "no image of JPEG, PNG"),
        (image(4)[:900], 400, "truncated"),
        (image(4)[:20], 400, "no image"),
        (bomb(), 400, "pixels"),
        (image(4, (900, 600), "JPEG", quality=5), 400, "900 x 600 pixels, more than the 500000"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", 400, "no image"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 300_000, 413, "200000 bytes"),
        (form(b"x" * 300_000), 413, "200000 bytes"),
        (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n', 400, "no image"),
        (b"--x\r\nbroken", 400, ""),
    ],
)
def test_hostile_uploads(service, body, status, words):
    headers = {"Content-Type": "multipart/form-data; boundary=x"} if body.startswith(b"--x") else {}
    # with its length stated, and in chunks without
    for sent in (body, iter([body[:1000], body[1000:]])):
        try:
            found = service.ask("POST", "/predict", sent, headers)
        except (ConnectionError, BrokenPipeError):  # the service stopped reading while we still sent
            assert status == 413
            continue
        assert found[0] == status and words in str(found[1]["detail"])
    assert service.ask("POST", "/predict", image(5))[0] == 200


def test_an_upload_of_just_the_limit_is_taken(service):
    data = image(4)
    for size, status in ((200_000, 200), (200_001, 413)):
        body = data + bytes(size - len(data))
        for sent in (body, iter([body[:1000], body[1000:]])):  # its length stated, and not
            try:
                assert service.ask("POST", "/predict", sent)[0] == status
            except ConnectionError:  # the service stopped reading while we still sent
                assert status == 413


def test_slow_and_vanishing_clients(service):
    """A body that never arrives is given up; a client that goes away leaves nothing behind."""
    with socket.create_connection(("127.0.0.1", service.port)) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        slow.settimeout(30)
        assert b" 408 " in slow.recv(1000)
    with socket.create_connection(("127.0.0.1", service.port)) as gone:
        gone.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    deadline = time.monotonic() + 30
    while "convit_in_flight 0.0" not in service.ask("GET", "/metrics")[1]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "Traceback" not in "".join(service.log)


def test_more_than_may_wait_is_told_to_come_back(service):
    held = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(16)]
    try:
        for one in held:
            one.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        statuses = set()
        deadline = time.monotonic() + 30
        while 503 not in statuses and time.monotonic() < deadline:
            statuses.add(service.ask("POST", "/predict", image(6))[0])
        assert 503 in statuses and statuses <= {200, 503}
        refused = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
        refused.request("POST", "/predict", image(6))
        with contextlib.closing(refused), refused.getresponse() as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert service.ask("GET", "/healthz")[0] == 200
    finally:
        for one in held:
            one.close()


def stop_in_flight(service, signum):
    """Send the signal once one request is in flight; the service has begun to shut down when this returns."""
    deadline = time.monotonic() + 30
    while "convit_in_flight 1.0" not in service.ask("GET", "/metrics")[1]:
        assert time.monotonic() < deadline
    service.process.send_signal(signum)
    while "Shutting down" not in "".join(service.log):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sigterm_answers_what_is_in_flight(checkpoint):
    service = Service(checkpoint)
    data = image(7)
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data[:100])
        stop_in_flight(service, signal.SIGTERM)
        with pytest.raises(ConnectionError):
            service.ask("GET", "/healthz")
        client.sendall(data[100:])
        client.settimeout(60)
        answer = b""
        while part := client.recv(4096):
            answer += part
    assert answer.startswith(b"HTTP/1.1 200") and b"probability" in answer
    assert service.process.wait(60) == -signal.SIGTERM
    assert "Traceback" not in "".join(service.log)


@pytest.mark.parametrize("times", [1, 2])
def test_sigint_leaves_no_traceback(checkpoint, times):
    """Once: what is in flight gets its time. Twice: the end, at once."""
    service = Service(checkpoint)
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        stop_in_flight(service, signal.SIGINT)
        if times == 2:
            service.process.send_signal(signal.SIGINT)
        assert service.process.wait(60) == 130
        client.settimeout(5)
        with contextlib.suppress(ConnectionError):
            assert (b" 408 " in client.recv(1000)) == (times == 1)
    log = "".join(service.log)
    assert "Traceback" not in log and ("stopped at once" in log) == (times == 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.pth"], "none.pth"),
        (["."], "holds none of best.pth"),
        (["{}", "--device", "tpu9"], "device 'tpu9' cannot be used"),
        (["{}", "--max-batch", "0"], "max_batch must be positive"),
        (["{}", "--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_what_cannot_be_served_is_said(checkpoint, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *(word.format(checkpoint) for word in words)]) == 1
    assert message in capsys.readouterr().err


@pytest.fixture
def in_process(monkeypatch):
    """``convit serve`` in this process: uvicorn leaves its logging, which is pytest's, and ours its signals as they are."""
    import uvicorn

    monkeypatch.setattr(uvicorn.Config, "configure_logging", lambda self: None)
    before = signal.getsignal(signal.SIGINT)
    yield uvicorn
    signal.signal(signal.SIGINT, before)


def test_the_commands_limits_are_the_functions_and_what_help_says(in_process, monkeypatch, checkpoint, capsys):
    asked = {}
    monkeypatch.setattr("convit.serve.create_app", lambda model, **limits: asked.update(limits) or model)
    monkeypatch.setattr(in_process.Server, "run", lambda self: setattr(self, "started", True))
    assert main(["serve", str(checkpoint)]) == 0
    defaults = {name: each.default for name, each in inspect.signature(create_app).parameters.items() if name != "model"}
    assert asked == defaults and (asked["max_upload"], asked["max_pixels"]) == (10_000_000, 50_000_000)
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for said in ("[16]", "[64]", "largest request [10]", "millions of pixels [50]", "may take [30]"):
        assert said in told


def test_a_port_that_is_taken_is_said(in_process, checkpoint, capsys, caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(checkpoint), "--port", str(port)]) == 1
    assert "address already in use" in caplog.text and f"127.0.0.1:{port} cannot be served" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "x.pth"]) == 1
    assert "pip install '.[serve]'" in capsys.readouterr().err


def test_the_page_in_a_browser(model, tmp_path):
    """A real browser loads the page, a picture is dropped on it, and it shows classes and heads; names are text, not markup."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    import uvicorn
    from fastapi import Response

    app = create_app(model)
    drop = """<script>fetch("picture").then(reply => reply.blob()).then(blob => {
        const dropped = new DataTransfer();
        dropped.items.add(new File([blob], "picture.png"));
        document.dispatchEvent(new DragEvent("drop", {dataTransfer: dropped}));
    })</script>"""

    @app.get("/dropped")
    def dropped():
        page = app.state.page
        return Response(page + drop, media_type="text/html")

    @app.get("/picture")
    def picture():
        return Response(image(8), media_type="image/png")

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=15000"]
        command = [browser, *flags, "--dump-dom", f"http://127.0.0.1:{port}/dropped"]
        seen = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)}).stdout
    finally:
        server.should_exit = True
        thread.join()
    assert "convit, 4 classes, 32 × 32 pixels" in seen
    assert "&lt;b&gt;bold&lt;/b&gt;" in seen and "<b>bold</b>" not in seen and "Käfer" in seen
    assert seen.count("<figure>") == 4 and "3 MHSA" in seen and "gate 0." in seen
    assert re.search(r'id="error"[^>]*hidden', seen)
