"""Checkpoints that are damaged, wrong or hostile: a message that names the file, in no time, and an untouched model."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from checkpoints import DATA, randomised, snapshot, tiny, torch, unchanged

from convit.engine.pytorch import checkpoint
from convit.weights import files, load, mindspore_file, torch_file
from convit.weights.load import load_checkpoint, read, read_file, write_file


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def bad_files(folder):
    state = randomised().state_dict()
    load.save_checkpoint(randomised(), folder / "good.safetensors")
    load.save_checkpoint(randomised(), folder / "good.pth")
    torch.save({"model": state, "extra": Malicious(str(folder / "ran"))}, folder / "malicious.pth")
    (folder / "malicious.pkl").write_bytes(pickle.dumps(Malicious(str(folder / "ran")), protocol=2))
    (folder / "protocol4.pkl").write_bytes(pickle.dumps(Malicious(str(folder / "ran")), protocol=4))
    (folder / "empty.pth").write_bytes(b"")
    (folder / "page.pth").write_bytes(b"<!DOCTYPE html><html></html>")
    (folder / "lfs.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (folder / "noise.ckpt").write_bytes(np.random.default_rng(0).bytes(500))
    (folder / "noise2.ckpt").write_bytes(b"\x0a\x7f" + b"\xff" * 200)
    torch.save([1, 2], folder / "list.pth")
    torch.save({"model": {"a": 1}}, folder / "numbers.pth")
    torch.save({"conv1.weight": torch.zeros(2)}, folder / "resnet.pth")
    torch.save(state | {"head.weight": torch.zeros(10, 16, dtype=torch.complex64)}, folder / "complex.pth")
    torch.save({"model": state, "convit": {"act": "relu"}}, folder / "settings.pth")
    for name in ("good.safetensors", "good.pth"):
        data = (folder / name).read_bytes()
        for share in (0.001, 0.5, 0.99):
            (folder / f"cut{share}-{name}").write_bytes(data[: int(len(data) * share)])
    (folder / "long.safetensors").write_bytes((folder / "good.safetensors").read_bytes() + b"more")
    data = (DATA / "mindcv_tiny.ckpt").read_bytes()
    for share in (0.001, 0.5, 0.99):
        (folder / f"cut{share}.ckpt").write_bytes(data[: int(len(data) * share)])
    header = {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}}
    overlap = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}
    negative = {"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}
    minus = {"a": {"dtype": "F32", "shape": [2, -1, -1], "data_offsets": [0, 8]}}
    for name, entry in (("huge", header), ("overlap", overlap), ("negative", negative), ("minus", minus), ("odd", {"a": [1]})):
        text = json.dumps(entry).encode()
        (folder / f"{name}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("good"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bad_files_leave_the_model_alone(tmp_path):
    model = randomised(5)
    before = snapshot(model)
    files = bad_files(tmp_path)
    assert len(files) > 25
    for path in files:
        with pytest.raises(ValueError) as error:
            load_checkpoint(model, path)
        message = str(error.value)
        assert path.name in message and len(message) < 700 and "weights_only" not in message, (path, message)
        for word in {
            "malicious": ["refused", "mkdir"],
            "cut": ["truncated"],
            "page": ["web page"],
            "lfs": ["git-lfs"],
            "minus": ["numbers from 0"],
        }.get(path.name.split(".")[0].rstrip("0"), []):
            assert word in message, (path, message)
        assert unchanged(model, before), path
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError):
        load_checkpoint(model, tmp_path / "absent.pth")
    assert unchanged(model, before)


def test_damaged_bytes_never_crash(tmp_path):
    """Any byte of a file changed: it loads, or it is a ValueError; nothing else escapes the readers."""
    rng = np.random.default_rng(0)
    small = {"blocks.0.attn.qk.weight": np.ones((2, 1), np.float32), "patch_embed.proj.weight": np.ones((1, 1), np.float32)}
    for name in ("a.safetensors", "a.ckpt"):
        write_file(tmp_path / name, small, {"act": "gelu", "norm_eps": 1e-6})
        data = (tmp_path / name).read_bytes()
        for at in range(len(data)):
            damaged = bytearray(data)
            damaged[at] = int(rng.integers(256))
            (tmp_path / "damaged").write_bytes(damaged)
            try:
                read(tmp_path / "damaged")
            except ValueError as error:
                assert "damaged" in str(error)


HEADER = b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}'


def pickled(folder, name, code, **records):
    """An archive as torch.save makes it, around a pickle of one's own."""
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + code + b".")
        for record, data in records.items():
            archive.writestr(f"a/data/{record}", data)


def hostile_files(folder):
    """Small files that once cost minutes, gigabytes or a traceback."""
    for name, header in {
        "nested": b'{"a":' + b"[" * 40_000 + b"]" * 40_000 + b"}",
        "metadata": b'{"__metadata__":[1],"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "infinite": HEADER % b"1e999",
        "digits": HEADER % (b"9" * 4000),
        "more_digits": HEADER % (b"9" * 5000),
        "twice": HEADER[:-1] % b"2" + b"," + HEADER[1:] % b"2",
        "empty": b'{"a":{"dtype":"F32","shape":[0,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8],"data_offsets":[0,0]}}',
        "settings": b'{"__metadata__":{"convit":"' + b"[" * 20_000 + b'"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    }.items():
        (folder / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    for name, head in {"sparse.pth": b"PK\x03\x04", "sparse_old.pth": b"\x80\x02", "sparse.ckpt": b"\x0a\x10"}.items():
        with open(folder / name, "wb") as file:
            file.write(head)
            file.truncate(1 << 40)
    entry = {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}
    header = json.dumps({"blocks.0.attn.qk.weight": entry}).encode()
    with open(folder / "sparse.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 40))
    torch.save({"a": torch.zeros(1).expand(1 << 31)}, folder / "expanded.pth")
    base = torch.zeros(100, 100)
    torch.save({f"a{i}": base.t() for i in range(300)}, folder / "aliases.pth")
    nested = []
    for _ in range(60):
        nested = [nested] * 10
    many = [[0] * 90_000] * 90_000
    torch.save({"recipe": many, "classes": many}, folder / "product.pth")
    torch.save({"a": {"b": torch.zeros(2)}, "model": {"b": torch.zeros(2)}, "convit": {"act": nested}}, folder / "lists.pth")
    tuples = b")q\x01" + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(1, 200))
    pickled(folder, "tuples.pth", b"}q\x00(" + b")q\x01" + tuples + b"K\x01u")
    pickled(folder, "memo.pth", b"]r\xff\xff\xff\x7f")
    pickled(folder, "long.pth", b"\x8d" + (1 << 62).to_bytes(8, "little"))
    pickled(folder, "instructions.pth", b"N0" * 600_000)
    numbers = [(key * ((1 << 61) - 1)).to_bytes(10, "little") for key in range(1, 60_000)]  # all with the same hash
    pickled(folder, "collisions.pth", b"}(" + b"".join(b"\x8a\x0a" + key + b"N" for key in numbers) + b"u")
    wide = b"(" + b"K\x00" * 50_000 + b"tq\x00"
    pickled(folder, "wide_key.pth", wide + b"0}(" + b"h\x00N" * 50_000 + b"u")
    pairs = b"](" + b"(X\x01\x00\x00\x00aNt" * 30_000 + b"eq\x00\x85q\x01"
    again = b"ccollections\nOrderedDict\nq\x02" + b"h\x02h\x01R0" * 50_000
    pickled(folder, "copies.pth", pairs + again)
    sizes = b"](" + b"K\x00" * 50_000 + b"eq\x00\x85q\x01ctorch\nSize\nq\x02" + b"h\x02h\x01R" * 50_000
    pickled(folder, "sizes.pth", sizes)
    inner = b"](" + b"K\x00" * 100 + b"eq\x00"
    outer = b"](" + b"h\x00" * 90_000 + b"eq\x01"
    names = b"".join(b"X\x05\x00\x00\x00%05dh\x01" % i for i in range(2000))
    pickled(folder, "shared_lists.pth", b"}(X\x01\x00\x00\x00a" + inner + b"X\x01\x00\x00\x00b" + outer + names + b"u")
    numel = b"\x8a\x05" + (1 << 32).to_bytes(5, "little")
    identity = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + numel + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + identity + b"K\x00" + numel + b"\x85K\x01\x85\x89}tR"
    pickled(folder, "storage.pth", b"}X\x01\x00\x00\x00a" + tensor + b"s", **{"0": bytes(8)})
    with zipfile.ZipFile(folder / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10_000_000))
    os.mkfifo(folder / "pipe.pth")
    (folder / "folder.pth").mkdir()
    return sorted(folder.iterdir())


def test_hostile_files_cost_nothing(tmp_path):
    """Each is a ValueError that names the file, within two seconds and 300 MB."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom convit.weights.load import read\n"
        "from convit.weights.torch_file import check, facts\n"
        "for path in sys.argv[1:]:\n    began = time.process_time()\n"
        "    for one in (facts, check):\n        try: one(Path(path))\n        except ValueError: pass\n"
        "    try:\n        read(path)\n        print(path, 'was read')\n    except ValueError as error:\n"
        "        if path not in str(error) or len(str(error)) > 600: print(path, repr(error))\n"
        "    if time.process_time() - began > 2: print(path, 'is slow')\n"
        "    peak = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "    if peak > 300_000: print(path, 'takes', peak, 'kB')\n"
    )
    files = hostile_files(tmp_path)
    assert len(files) > 20
    told = subprocess.run([sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, timeout=120)
    assert told.stdout + told.stderr == ""


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_weights_are_floating_point(tmp_path, dtype):
    state = tiny().state_dict()
    torch.save(state | {"head.weight": state["head.weight"].to(dtype)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="floating-point weights, got (int64|bool) at head.weight"):
        read(tmp_path / "a.pth")


def test_nan_weights_are_named(tmp_path, caplog):
    weights, _ = read_file(DATA / "mindcv_tiny.ckpt")
    write_file(tmp_path / "a.ckpt", weights | {"norm.gamma": weights["norm.gamma"] * np.float32("nan")}, None)
    load_checkpoint(tiny(), tmp_path / "a.ckpt")
    assert "NaN or infinite values in 1 of" in caplog.text and "norm.weight" in caplog.text


def test_flipped_bits_are_found(tmp_path):
    """In an archive's weights, which torch.load takes as other numbers: the CRC-32 that torch.save wrote is compared."""
    model = randomised()
    load.save_checkpoint(model, tmp_path / "a.pth")
    data, weight = (tmp_path / "a.pth").read_bytes(), model.head.weight.detach().numpy().tobytes()
    flipped = bytearray(data)
    flipped[data.index(weight) + 7] ^= 1
    (tmp_path / "a.pth").write_bytes(flipped)
    torch.load(tmp_path / "a.pth", weights_only=True)
    with pytest.raises(ValueError, match=r"a\.pth, 'head\.weight' is damaged: its CRC-32"):
        read(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth.* is damaged"):
        checkpoint.load(tmp_path / "a.pth")


def test_an_archive_without_sums_is_read(tmp_path):
    model = randomised()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model.state_dict(), tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_checkpoint(tiny(), tmp_path / "a.pth").head.weight, model.head.weight)


def test_what_costs_a_file_nothing_makes_no_model(tmp_path):
    """A number in a name, or a size beside a 0: no bytes stand behind them, but a model would be made of them."""
    from convit.engine.pytorch.trained import trained_model

    state = dict(tiny().state_dict())
    far = {"blocks.200000000.norm1.weight": torch.ones(16)}
    wrong = {
        "far": (state | far, "blocks must be numbered from 0, the file has '0', '1', '2', '200000000'"),
        "wide": (state | {"head.weight": torch.empty(1 << 31, 0)}, r"must hold weights, got the shape \[2147483648, 0\] at head.weight"),
        "flat": (state | {"pos_embed": torch.zeros(5)}, r"pos_embed must have 3 dimensions, it has the shape \[5\]"),
        "less": ({name: value for name, value in state.items() if "fc1" not in name}, "blocks.0.mlp.fc1.weight .* it is missing"),
        "heads": (state | {"blocks.0.attn.gating_param": torch.zeros(7)}, "number of heads must divide the width 16, got 7"),
        "classes": ({"state_dict": state, "recipe": {}, "classes": 5}, "the classes must be a list of names, got 5"),
        "name": (state | {"\x1b[31m\n": torch.zeros(1)}, r"not in the model: '\\x1b\[31m\\n'"),
    }
    for name, (content, message) in wrong.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=rf"(?s){name}\.pth.*{message}"):
            trained_model(tmp_path / f"{name}.pth")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"shape": [4]}, "config.json, shape must be an object"),
        ({"pretrained_cfg": "x"}, "config.json, pretrained_cfg must be an object"),
        ({"label_names": 7}, "config.json, label_names must be"),
        ({"label_names": [[1]]}, "the classes must be a list of names"),
        ({"global_pool": {"a": 1}}, "config.json, global_pool must be a text"),
        ({"shape": {"num_heads": "x"}}, None),  # the gates tell it
        ({"pretrained_cfg": {"std": [0, 0, 0]}}, r"std must be from 1e-06 to 1e\+06"),
        ({"pretrained_cfg": {"mean": [float("nan")] * 3, "std": [1, 1, 1]}}, "mean must be from"),
        ({"pretrained_cfg": {"mean": "abc", "std": [1, 1, 1]}}, "mean must be from"),
        ({"pretrained_cfg": {"crop_pct": 1e-300}}, "crop_pct must be from 0.01 to 2, got 1e-300"),
        ({"pretrained_cfg": {"interpolation": ["bicubic"]}}, "interpolation must be one of"),
    ],
)
def test_a_strangers_config_is_checked(tmp_path, config, message):
    from convit.engine.pytorch.trained import trained_model

    torch.save(tiny().state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    if message is None:
        assert trained_model(tmp_path).blocks[0].attn.num_heads == 4
        return
    with pytest.raises(ValueError, match=message) as error:
        trained_model(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_record_is_there_once(tmp_path):
    """Two records of one name: readers differ in which they take."""
    torch.save(tiny().state_dict(), tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data/0", bytes(len(archive.read("a/data/0"))))
    with pytest.raises(ValueError, match=r"a\.pth, 'a/data/0' is there twice"):
        read(tmp_path / "a.pth")


def test_archives_of_other_things_are_told_apart(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "program.pth"))
    with zipfile.ZipFile(tmp_path / "texts.pth", "w") as file:
        file.writestr("a/b.txt", "text")
    for name, what in (("program", r"a TorchScript program \(torch.jit.load runs it\)"), ("texts", "an archive without data.pkl")):
        with pytest.raises(ValueError, match=rf"{name}.pth is no PyTorch checkpoint: it is {what}"):
            read(tmp_path / f"{name}.pth")


def test_dimensions_are_read_in_either_of_protobufs_ways(tmp_path):
    """One by one, as MindSpore writes them, and packed, as a reader of protobuf must take them too."""
    array = np.arange(600, dtype=np.float32).reshape(3, 200)
    field = mindspore_file._field
    for dims in (b"\x08\x03\x08\xc8\x01", field(1, b"\x03\xc8\x01")):
        tensor = dims + field(2, b"Float32") + field(3, array.tobytes())
        (tmp_path / "a.ckpt").write_bytes(field(1, field(1, b"a") + field(2, tensor)))
        np.testing.assert_array_equal(read_file(tmp_path / "a.ckpt")[0]["a"], array)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_as_many_tensors_as_said_and_no_more(tmp_path, monkeypatch, suffix):
    write_file(tmp_path / f"a.{suffix}", {name: np.ones(2, np.float32) for name in "abc"}, None)
    for most in (3, 2):
        for module in (mindspore_file, files):
            monkeypatch.setattr(module, "MAX_TENSORS", most)
        if most == 3:
            assert len(read_file(tmp_path / f"a.{suffix}")[0]) == 3
        else:
            with pytest.raises(ValueError, match=rf"a\.{suffix}.*(at most 2 tensors|tensor after 2 others)"):
                read_file(tmp_path / f"a.{suffix}")


def test_what_a_message_shows_of_a_number_is_short():
    assert files.shown((1 << 128) - 1) == str((1 << 128) - 1) and files.shown(1 << 128) == "a number of 129 bits"
    assert files.shown(-(1 << 200)) == "a number of 201 bits" and files.shown(True) == "True"


def test_facts_of_mindspores_files_are_read_within_bounds(tmp_path):
    """Without MindSpore, whose reader believes what a file says of its sizes."""
    write_file(tmp_path / "a.ckpt", {"a": np.ones(2, np.float32)}, {"act": "gelu", "norm_eps": 1e-6})
    assert mindspore_file.facts(tmp_path / "a.ckpt", "convit") == {"act": "gelu", "norm_eps": 1e-6}
    assert mindspore_file.facts(tmp_path / "a.ckpt", "convit_run") == {} == mindspore_file.facts(tmp_path / "a.ckpt", "a")
    (tmp_path / "a.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:-20])
    os.mkfifo(tmp_path / "pipe.ckpt")
    for name in ("a.ckpt", "pipe.ckpt"):
        with pytest.raises(ValueError, match=name):
            mindspore_file.facts(tmp_path / name, "convit")


def test_paths_of_every_python_are_values(tmp_path):
    """Training scripts store their arguments; Python 3.13 calls the class of paths by another name."""
    for module in (b"pathlib", b"pathlib._local"):
        path = b"c" + module + b"\nPosixPath\n(X\x03\x00\x00\x00runtR"
        pickled(tmp_path, "a.pth", b"}(X\x03\x00\x00\x00out" + path + b"X\x05\x00\x00\x00epochK\x05u")
        assert torch_file.facts(tmp_path / "a.pth") == {"epoch": 5}


class _Stored:
    def __init__(self, *identity):
        self.identity = identity


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.identity if isinstance(value, _Stored) else None


class _Rebuilt:
    def __init__(self, stored, *layout):
        self.stored, self.layout = stored, layout or (0, (4,), (1,))

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (self.stored, *self.layout, False, {})


def _archive(path, content):
    text = io.BytesIO()
    _Pickler(text, 2).dump(content)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", text.getvalue())
        file.writestr("a/data/0", np.arange(4, dtype="<f4").tobytes())


@pytest.mark.parametrize(
    "identity",
    [("0", "cpu", -4), ("0", "cpu", True), (0, "cpu", 4), ("0", "cpu", 4, ("view", 1, 2)), ("0", "cpu", 8), ("1", "cpu", 4), ("0", "cpu")],
    ids=str,
)
def test_a_storage_is_what_torch_writes_or_refused(tmp_path, identity):
    _archive(tmp_path / "good.pth", {"head.weight": _Rebuilt(_Stored("storage", torch.FloatStorage, "0", "cpu", 4))})
    torch_file.check(tmp_path / "good.pth")
    _archive(tmp_path / "bad.pth", {"head.weight": _Rebuilt(_Stored("storage", torch.FloatStorage, *identity))})
    with pytest.raises(ValueError, match=r"bad\.pth"):
        torch_file.check(tmp_path / "bad.pth")


@pytest.mark.parametrize(
    "layout",
    [
        *((0, (4,), 1), (0, 4, (1,)), (0, (4,), (1, 1)), (0, (4,), [1]), (0, (2, 2), (2,)), (0, (-4,), (1,)), (-1, (4,), (1,))),
        *((1, (4,), (1,)), (0, (4,), (2,)), (0, (4,), (-1,)), (0, (True,), (1,)), (0.0, (4,), (1,)), (0, (1,) * 33, (1,) * 33)),
        *((0, (0, -1), (1, 1)), (0, (0, 1 << 41), (1, 1))),
    ],
    ids=str,
)
def test_a_layout_lies_in_its_storage_or_is_refused(tmp_path, layout):
    """Offset, shape and strides; what fits is taken."""
    stored = _Stored("storage", torch.FloatStorage, "0", "cpu", 4)
    for fits, values in (((3, (1,), (7,)), [3.0]), ((0, (2, 2), (1, 2)), [[0, 2], [1, 3]]), ((1, (3,), (1,)), [1, 2, 3])):
        _archive(tmp_path / "good.pth", {"head.weight": _Rebuilt(stored, *fits)})
        np.testing.assert_array_equal(read_file(tmp_path / "good.pth")[0]["head.weight"], values)
    _archive(tmp_path / "bad.pth", {"head.weight": _Rebuilt(stored, *layout)})
    with pytest.raises(ValueError, match=r"bad\.pth, 'head\.weight' is "):
        read_file(tmp_path / "bad.pth")


def test_a_key_that_may_take_for_ever_to_hash_is_refused(tmp_path):
    _archive(tmp_path / "bad.pth", {"recipe": {(("a", "b"), 1): 1}})
    with pytest.raises(ValueError, match="a key must be a name or a number"):
        torch_file.check(tmp_path / "bad.pth")
