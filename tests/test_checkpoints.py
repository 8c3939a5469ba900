"""Reading, converting, fitting and loading checkpoints. tests/data/make_mindcv.py says how the MindSpore files were made."""

import argparse
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tolerances
from checkpoints import DATA, FORMATS, randomised, same_bits, snapshot, tiny, torch, unchanged

from convit.architecture import resample
from convit.weights import files, load
from convit.weights.files import BFLOAT16
from convit.weights.load import Checkpoint, fit, load_checkpoint, read, read_file, write, write_file
from convit.weights.names import from_mindcv, to_mindcv

# MindCV files that MindSpore wrote


def test_mindcv_file_gives_mindcvs_logits():
    expected = np.load(DATA / "mindcv_tiny.npz")
    images = torch.tensor(expected["images"].astype(np.float32))
    model = load_checkpoint(tiny(), DATA / "mindcv_tiny.ckpt")
    with torch.no_grad():
        assert np.abs(model(images).numpy() - expected["logits"]).max() < tolerances.LOGITS * np.abs(expected["logits"]).max()
        # the settings are what it takes: with the exact GELU the same weights miss by two orders more
        for module in model.modules():
            if isinstance(module, torch.nn.GELU):
                assert module.approximate == "tanh"
                module.approximate = "none"
            elif isinstance(module, torch.nn.LayerNorm):
                assert module.eps == 1e-7
        assert np.abs(model(images).numpy() - expected["logits"]).max() > 1e-4


def test_mindspore_types():
    tensors, settings = read_file(DATA / "mindspore_types.ckpt")
    assert settings is None
    assert {name: (array.shape, array.dtype) for name, array in tensors.items()} == {
        "scalar": ((), np.float32),
        "bf16": ((1, 3), BFLOAT16),
        "fp16": ((2,), np.float16),
        "int8": ((2,), np.int8),
        "bool": ((2,), np.bool_),
    }
    assert tensors["scalar"] == 3.5 and list(tensors["int8"]) == [-1, 2] and list(tensors["bool"]) == [True, False]
    assert load.to_float32(tensors["bf16"]).tolist() == [[1.0, -2.5, 3.0]]


def test_mindspore_crc(tmp_path):
    tensors, _ = read_file(DATA / "mindcv_crc.ckpt")
    whole, _ = read_file(DATA / "mindcv_tiny.ckpt")
    assert all(tensors[name].tobytes() == whole[name].tobytes() for name in ("norm.gamma", "classifier.weight"))
    damaged = bytearray((DATA / "mindcv_crc.ckpt").read_bytes())
    damaged[60] ^= 1
    (tmp_path / "damaged.ckpt").write_bytes(damaged)
    with pytest.raises(ValueError, match="CRC-32"):
        read_file(tmp_path / "damaged.ckpt")


def test_tensor_split_over_messages():
    tensors, _ = read_file(DATA / "mindcv_sliced.ckpt")
    whole, _ = read_file(DATA / "mindcv_tiny.ckpt")
    assert (DATA / "mindcv_sliced.ckpt").read_bytes().count(b"fc1.weight") > 1
    assert tensors["blocks.0.mlp.fc1.weight"].tobytes() == whole["blocks.0.mlp.fc1.weight"].tobytes()


@pytest.mark.parametrize("mode", ["aes-gcm", "aes-cbc", "sm4-cbc"])
def test_encrypted_is_said(mode):
    with pytest.raises(ValueError, match="encrypted"):
        read(DATA / f"mindcv_{mode}.ckpt")


def test_written_as_mindspore_writes(tmp_path):
    """A MindCV checkpoint that went through timm's names and back is the very file that MindSpore wrote."""
    write(tmp_path / "back.ckpt", read(DATA / "mindcv_tiny.ckpt"))
    back, settings = read_file(tmp_path / "back.ckpt")
    original, _ = read_file(DATA / "mindcv_tiny.ckpt")
    assert settings is None
    assert same_bits(dict(sorted(back.items())), dict(sorted(original.items())))
    assert len((tmp_path / "back.ckpt").read_bytes()) == (DATA / "mindcv_tiny.ckpt").stat().st_size


@pytest.mark.mindspore
def test_mindspore_reads_ours(tmp_path):
    """MindSpore loads our .ckpt, with and without recorded settings, into MindCV's model."""
    pytest.importorskip("mindspore")
    model = randomised()
    load.save_checkpoint(model, tmp_path / "exact.ckpt")
    write(tmp_path / "plain.ckpt", read(DATA / "mindcv_tiny.ckpt"))
    for name in ("exact.ckpt", "plain.ckpt"):
        check_in_mindspore(tmp_path / name)


def check_in_mindspore(path):
    import mindspore as ms
    from mindcv.models.convit import ConViT

    model = ConViT(image_size=56, patch_size=4, embed_dim=16, num_heads=4, depth=3, local_up_to_layer=2, num_classes=10)
    missing, unused = ms.load_param_into_net(model, ms.load_checkpoint(str(path)), strict_load=True)
    assert not missing
    expected, _ = read_file(path)
    for parameter in model.get_parameters():
        assert parameter.asnumpy().tobytes() == expected[parameter.name].tobytes()


# conversion


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("settings", [("gelu", 1e-6), ("gelu_tanh", 1e-7), ("gelu_tanh", 1e-5)])
def test_round_trip_bit_for_bit(tmp_path, first, second, settings):
    tensors = {name: files.from_torch(t) for name, t in randomised(qkv_bias=True).state_dict().items()}
    tensors["norm.weight"] = tensors["norm.weight"].astype(np.float16)
    tensors["head.weight"] = files.from_torch(torch.tensor([[1.5, float("nan"), -0.0, 1e38]]).bfloat16())
    original = Checkpoint(tensors, *settings, grid=(7, 28))
    write(tmp_path / first, original)
    write(tmp_path / f"second{second}", read(tmp_path / first))
    back = read(tmp_path / f"second{second}")
    assert same_bits(back.tensors, tensors)
    assert (back.act, back.norm_eps, back.grid) == (*settings, (7, 28))


@pytest.mark.parametrize("name", FORMATS)
def test_mindcv_settings_survive_conversion(tmp_path, name):
    write(tmp_path / name, read(DATA / "mindcv_tiny.ckpt"))
    expected = np.load(DATA / "mindcv_tiny.npz")
    model = load_checkpoint(tiny(), tmp_path / name)
    with torch.no_grad():
        logits = model(torch.tensor(expected["images"].astype(np.float32))).numpy()
    assert np.abs(logits - expected["logits"]).max() < tolerances.LOGITS * np.abs(expected["logits"]).max()


def test_names_are_a_bijection():
    tensors = {name: files.from_torch(t) for name, t in randomised(qkv_bias=True).state_dict().items()}
    theirs = to_mindcv(tensors)
    assert same_bits(from_mindcv(theirs), tensors)
    assert {"blocks.0.attn.q.bias", "blocks.2.attn.v.weight", "blocks.1.norm2.gamma", "norm.beta", "classifier.bias"} <= set(theirs)
    assert not [name for name in theirs if "qk" in name or name.startswith("head")]
    np.testing.assert_array_equal(theirs["blocks.0.attn.k.weight"], tensors["blocks.0.attn.qk.weight"][16:])
    np.testing.assert_array_equal(theirs["blocks.2.attn.v.weight"], tensors["blocks.2.attn.qkv.weight"][32:])


def test_incomplete_projections_are_named():
    theirs = to_mindcv({name: files.from_torch(t) for name, t in tiny().state_dict().items()})
    del theirs["blocks.2.attn.k.weight"]
    with pytest.raises(ValueError, match=r"blocks\.2\.attn\.q\.weight needs blocks\.2\.attn\.k\.weight"):
        from_mindcv(theirs)


def test_plain_files_are_what_others_expect(tmp_path):
    """Exact GELU and 1e-6: a .pth is a bare state_dict and timm loads it strictly; safetensors' own library reads ours."""
    model = randomised()
    load.save_checkpoint(model, tmp_path / "a.pth")
    tiny().load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True), strict=True)
    library = pytest.importorskip("safetensors.torch")
    load.save_checkpoint(load_checkpoint(model, DATA / "mindcv_tiny.ckpt"), tmp_path / "a.safetensors")
    tiny().load_state_dict(library.load_file(tmp_path / "a.safetensors"), strict=True)
    library.save_file({n: t.bfloat16() for n, t in model.state_dict().items()}, tmp_path / "b.safetensors")
    loaded = load_checkpoint(tiny(), tmp_path / "b.safetensors")
    assert torch.equal(loaded.head.weight, model.head.weight.bfloat16().float())


def test_convert_command(tmp_path, capsys):
    from convit.cli import main

    for name in ("x.safetensors", "x.pth", "y.ckpt"):
        assert main(["convert", str(DATA / "mindcv_tiny.ckpt"), str(tmp_path / name)]) == 0
    assert "tanh GELU, LayerNorm eps 1e-07" in capsys.readouterr().out
    assert main(["convert", str(DATA / "mindcv_tiny.ckpt"), str(tmp_path / "x.pth")]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "z.onnx")]) == 1
    assert "suffix" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none.pth"), str(tmp_path / "z.pth")]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pth", "x.safetensors", "y.ckpt"]
    model, other = randomised(0), randomised(1)
    torch.save({"state_dict": other.state_dict(), "state_dict_ema": model.state_dict()}, tmp_path / "ema.pth")
    for words, expected in (([], model), (["--key", "state_dict"], other)):
        assert main(["convert", str(tmp_path / "ema.pth"), str(tmp_path / "y.ckpt"), "--force", *words]) == 0
        assert torch.equal(load_checkpoint(tiny(), tmp_path / "y.ckpt").head.weight, expected.head.weight)


def test_no_framework_is_needed(tmp_path):
    """MindSpore's side reads and writes with numpy alone."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['mindspore'] = None\n"
        "from convit.weights.load import *\n"
        f"c = read({str(DATA / 'mindcv_tiny.ckpt')!r}); write({str(tmp_path / 'a.safetensors')!r}, c)\n"
        f"d = read({str(tmp_path / 'a.safetensors')!r}); write({str(tmp_path / 'b.ckpt')!r}, d); assert d.act == 'gelu_tanh'\n"
        "theirs = to_mindcv(d.tensors); fit(theirs, {n: a.shape for n, a in theirs.items()})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# PyTorch files in the wild


def test_training_checkpoints(tmp_path):
    model, other = randomised(0), randomised(1)
    fair = {"model": model.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=1e-3), "optimizer": {"state": {}}}
    torch.save(fair, tmp_path / "fair.pth")
    ddp = {"state_dict": {f"module._orig_mod.{n}": t for n, t in model.state_dict().items()}, "arch": "convit"}
    torch.save(ddp, tmp_path / "ddp.pth")
    torch.save({"state_dict": other.state_dict(), "state_dict_ema": model.state_dict()}, tmp_path / "ema.pth")
    torch.save(model.state_dict(), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for name in ("fair.pth", "ddp.pth", "ema.pth", "legacy.pth"):
        assert torch.equal(load_checkpoint(tiny(), tmp_path / name).head.weight, model.head.weight)
    loaded = load_checkpoint(tiny(), tmp_path / "ema.pth", key="state_dict")
    assert torch.equal(loaded.head.weight, other.head.weight)
    with pytest.raises(ValueError, match="key must name.*state_dict_ema"):
        read(tmp_path / "ema.pth", key="ema")
    torch.save({"model": model.state_dict(), "convit": {"act": "gelu_tanh", "norm_eps": 1e-5}}, tmp_path / "ours.pth")
    assert load.settings_of(load_checkpoint(tiny(), tmp_path / "ours.pth")) == {"act": "gelu_tanh", "norm_eps": 1e-5}


def test_tensors_of_a_safetensors_file_are_aligned(tmp_path):
    """Whatever their types and order: readers map them where they lie."""
    kinds = {"a": np.float16, "b": np.float64, "c": np.uint8, "d": np.float32, "e": np.int64}
    write_file(tmp_path / "a.safetensors", {name: np.ones(3, kind) for name, kind in kinds.items()}, None)
    data = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % np.dtype(kind).itemsize == 0 for name, kind in kinds.items())


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickle(tmp_path, protocol):
    model = randomised()
    beside = {"args": argparse.Namespace(lr=1e-3, betas=(0.9, 0.99)), "kinds": {"a", "b"}, "frozen": frozenset({1})}
    torch.save(beside | {"model": model.state_dict(), "epoch": 3}, tmp_path / "a.pth", pickle_protocol=protocol)
    assert torch.equal(load_checkpoint(tiny(), tmp_path / "a.pth").head.weight, model.head.weight)


def test_settings_are_set_back():
    """A timm checkpoint on a model that held MindCV's weights restores the exact GELU and 1e-6."""
    model = load_checkpoint(tiny(), DATA / "mindcv_tiny.ckpt")
    assert load.settings_of(model) == {"act": "gelu_tanh", "norm_eps": 1e-7}
    tensors = {name: files.from_torch(t) for name, t in tiny().state_dict().items()}
    load._load(model, Checkpoint(tensors), "x", True)
    assert load.settings_of(model) == {"act": "gelu", "norm_eps": 1e-6}


def test_load_keeps_device_dtype_and_wrapping(tmp_path):
    model = randomised()
    load.save_checkpoint(model, tmp_path / "a.safetensors")
    half = tiny().to(torch.bfloat16)
    assert load_checkpoint(half, tmp_path / "a.safetensors") is half
    assert half.head.weight.dtype == torch.bfloat16
    assert torch.equal(half.head.weight, model.head.weight.bfloat16())
    wrapped = torch.nn.DataParallel(tiny())
    assert load_checkpoint(wrapped, tmp_path / "a.safetensors") is wrapped
    assert torch.equal(wrapped.module.head.weight, model.head.weight)


def test_wrapped_models_load(tmp_path):
    """Moving averages, inner compilation and activation checkpointing change the names of what they wrap; the weights are the same."""
    model = randomised()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save(averaged.state_dict(), tmp_path / "averaged.pth")
    state = {n.replace("blocks.1.", "blocks.1._orig_mod.").replace("blocks.2.", "blocks.2._checkpoint_wrapped_module.")
             .replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): t
             for n, t in model.state_dict().items()}  # fmt: skip
    torch.save({"module." + name: tensor for name, tensor in state.items()}, tmp_path / "inner.pth")
    torch.save({"ema_model." + name: tensor for name, tensor in model.state_dict().items()}, tmp_path / "ema.pth")  # ema_pytorch's
    for name in ("averaged.pth", "inner.pth", "ema.pth"):
        loaded = load_checkpoint(tiny(), tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))
    torch.save(model.state_dict() | {"module.head.weight": model.head.weight + 1}, tmp_path / "twice.pth")
    with pytest.raises(ValueError, match=r"holds head\.weight twice"):
        read(tmp_path / "twice.pth")


def test_optimisers_state_is_left_out(tmp_path):
    """A file of MindCV's train.py: moments, summed gradients, a moving average, counters and a schedule beside the weights."""
    weights, _ = read_file(DATA / "mindcv_tiny.ckpt")
    extra = {f"{prefix}.{name}": array + 1 for prefix in ("adam_m", "moments", "accu_grads", "ema") for name, array in weights.items()}
    counters = {"global_step": np.zeros(1, np.int32), "beta1_power": np.float32(0.9).reshape(()), "learning_rate": np.zeros(90, np.float32)}
    write_file(tmp_path / "a.ckpt", weights | extra | counters, None)
    assert same_bits(read(tmp_path / "a.ckpt").tensors, read(DATA / "mindcv_tiny.ckpt").tensors)
    averaged = to_mindcv(read(tmp_path / "a.ckpt", key="ema").tensors)
    assert all(np.array_equal(averaged[name], array + 1) for name, array in weights.items())
    with pytest.raises(ValueError, match=r"no moving average avg\.\*; beside the weights there is accu_grads, adam_m, "):
        read(tmp_path / "a.ckpt", key="avg")
    # of a run with gradient accumulation
    held = {f"optimizer.{name}": array for name, array in (weights | counters).items()}
    held |= {f"optimizer.adam_m.{name}": array for name, array in weights.items()}
    held |= {f"{prefix}.{name}": array + 1 for prefix in ("ema", "grad_accumulation.optimizer") for name, array in weights.items()}
    write_file(tmp_path / "held.ckpt", held | {"accumulation_step": np.zeros((), np.int32)}, None)
    for key in (None, "ema"):
        assert same_bits(read(tmp_path / "held.ckpt", key=key).tensors, read(tmp_path / "a.ckpt", key=key).tensors)
    # weights beside an optimiser's copies of them
    write_file(tmp_path / "both.ckpt", weights | {f"optimizer.{name}": array + 1 for name, array in weights.items()}, None)
    assert same_bits(read(tmp_path / "both.ckpt").tensors, read(tmp_path / "a.ckpt").tensors)
    write_file(tmp_path / "b.ckpt", weights | {"blocks.0.attn.extra.weight": np.ones(3, np.float32)}, None)
    with pytest.raises(ValueError, match="not in the model: blocks.0.attn.extra.weight"):
        load_checkpoint(tiny(), tmp_path / "b.ckpt")


# files that are fine but do not fit


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"local_up_to_layer": 1}, ["missing in the file: blocks.1.attn.qkv.weight", "not in the model: blocks.1.attn.gating_param, "]),
        ({"depth": 4}, ["missing in the file: blocks.3.norm1.weight", "blocks.3.attn.proj.weight and 7 more"]),
        ({"embed_dim": 5}, ["cls_token is [1, 1, 16] in the file, [1, 1, 20] in the model"]),
        ({"num_classes": 7}, ["head.weight is [10, 16] in the file, [7, 16] in the model", "strict_head=False"]),
        ({"num_classes": 0}, ["not in the model: head.weight, head.bias", "strict_head=False"]),
        (
            {"in_chans": 1},
            ["patch_embed.proj.weight is [16, 3, 4, 4] in the file, [16, 1, 4, 4] in the model", "create_model(..., pretrained="],
        ),
        ({"qkv_bias": True}, ["missing in the file: blocks.0.attn.qk.bias"]),
    ],
)
def test_mismatch_is_listed(kwargs, expected):
    model = randomised(**kwargs)
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        load_checkpoint(model, DATA / "mindcv_tiny.ckpt")
    assert not [text for text in expected if text not in str(error.value)], error.value
    assert unchanged(model, before)


@pytest.mark.parametrize("classes", [7, 0])
def test_own_head_on_request(classes):
    model = randomised(num_classes=classes)
    before = snapshot(model)[0]
    load_checkpoint(model, DATA / "mindcv_tiny.ckpt", strict_head=False)
    assert all(torch.equal(before[name], tensor) == name.startswith("head") for name, tensor in model.state_dict().items())


def test_a_classifier_is_taken_whole_or_not_at_all(tmp_path):
    model, tensors = randomised(), read(DATA / "mindcv_tiny.ckpt").tensors
    before = snapshot(model)[0]
    write_file(tmp_path / "a.safetensors", {name: array for name, array in tensors.items() if name != "head.bias"}, None)
    load_checkpoint(model, tmp_path / "a.safetensors", strict_head=False)
    assert all(torch.equal(before[name], tensor) == name.startswith("head") for name, tensor in model.state_dict().items())


def test_the_average_comes_first_and_a_part_of_one_is_filled_up(tmp_path):
    """In the order that the manual gives, whatever stands beside it; and what has no average, such as frozen layers, has its weights."""
    keys = ("state_dict_ema", "model_ema", "state_dict", "model")
    states = {key: {name: tensor + i for name, tensor in randomised().state_dict().items()} for i, key in enumerate(keys)}
    for i, key in enumerate(keys):
        torch.save({each: states[each] for each in reversed(keys[i:])}, tmp_path / "a.pth")
        assert np.array_equal(read(tmp_path / "a.pth").tensors["head.bias"], states[key]["head.bias"].numpy()), key
    weights, _ = read_file(DATA / "mindcv_tiny.ckpt")
    write_file(tmp_path / "a.ckpt", weights | {"ema.classifier.bias": weights["classifier.bias"] + 1}, None)
    found = to_mindcv(read(tmp_path / "a.ckpt", key="ema").tensors)
    assert all(np.array_equal(found[name], array + (name == "classifier.bias")) for name, array in weights.items())


def test_one_broken_tensor_is_warned_of(caplog):
    model = randomised()
    tensors = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    tensors["norm.bias"][3] = np.nan
    load.fit(tensors, {name: array.shape for name, array in tensors.items()}, what="a.pth")
    assert "a.pth has NaN or infinite values in 1 of" in caplog.text and "norm.bias" in caplog.text


def test_position_embedding_is_resampled():
    source = read(DATA / "mindcv_tiny.ckpt").tensors
    model = load_checkpoint(tiny(img_size=64), DATA / "mindcv_tiny.ckpt")
    table = torch.tensor(source["pos_embed"]).view(1, 14, 14, 16).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(table, size=(16, 16), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed.detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [(7, 7), (12, 16), (24, 9), (1, 30), (5, 14)])
def test_resample_equals_torch(grid):
    table = np.random.default_rng(0).standard_normal((1, 12 * 14, 8)).astype(np.float32)
    image = torch.tensor(table, dtype=torch.float64).view(1, 12, 14, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, size=grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    np.testing.assert_allclose(resample(table, (12, 14), grid), expected, rtol=0, atol=1e-6)


def test_grid_that_is_unknown_is_an_error():
    shapes = {"pos_embed": (1, 16, 8)}
    with pytest.raises(ValueError, match=r"pos_embed is \[1, 12, 8\]"):
        fit({"pos_embed": np.zeros((1, 12, 8), np.float32)}, shapes)
    fitted = fit({"pos_embed": np.zeros((1, 12, 8), np.float32)}, shapes, source_grid=(3, 4), grid=(2, 8))
    assert fitted["pos_embed"].shape == (1, 16, 8)


def ours(**kwargs):
    import convit

    shape = {"img_size": 56, "patch_size": 4, "embed_dim": 16, "num_heads": 4, "depth": 3, "local_up_to_layer": 2, "num_classes": 10}
    return convit.ConViT(**shape | kwargs).eval()


def test_our_model_gives_mindcvs_logits():
    expected = np.load(DATA / "mindcv_tiny.npz")
    model = load_checkpoint(ours(), DATA / "mindcv_tiny.ckpt")
    with torch.no_grad():
        logits = model(torch.tensor(expected["images"].astype(np.float32))).numpy()
    assert np.abs(logits - expected["logits"]).max() < tolerances.LOGITS * np.abs(expected["logits"]).max()


def test_grid_that_is_no_square_is_recorded(tmp_path):
    """16 x 9 and 9 x 16 have as many patches: only the record tells them apart."""
    wide = ours(img_size=(36, 64))
    for name in FORMATS:
        load.save_checkpoint(wide, tmp_path / name)
        assert read(tmp_path / name).grid == (9, 16)
        tall = load_checkpoint(ours(img_size=(64, 36)), tmp_path / name)
        expected = resample(wide.pos_embed.detach().numpy(), (9, 16), (16, 9))
        np.testing.assert_array_equal(tall.pos_embed.detach().numpy(), expected)


def test_create_model_from_a_file(tmp_path):
    import convit

    model = convit.create_model("convit_tiny", depth=2, local_up_to_layer=1)
    load.save_checkpoint(model, tmp_path / "a.safetensors")
    again = convit.create_model("convit_tiny", pretrained=tmp_path / "a.safetensors", depth=2, local_up_to_layer=1)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    other = convit.create_model("convit_tiny", pretrained=tmp_path / "a.safetensors", depth=2, local_up_to_layer=1, num_classes=3)
    assert other.head.weight.shape == (3, 192) and torch.equal(other.norm.weight, model.norm.weight)
    with pytest.raises(ValueError, match="does not fit"):
        convit.create_model("convit_tiny_plus", pretrained=tmp_path / "a.safetensors", depth=2, local_up_to_layer=1)
