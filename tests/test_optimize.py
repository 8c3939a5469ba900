"""convit.optimize: the snapshot is as accurate as promised, follows nothing, and refuses what it does not know."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import convit
from convit.pytorch.optimize import Optimized

SHAPE = {"img_size": 64, "num_classes": 7, "embed_dim": 48, "depth": 4, "local_up_to_layer": 3, "num_heads": 4}


def randomised(model, std=0.1):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval()


def ours(**kwargs):
    return randomised(convit.ConViT(**{**SHAPE, **kwargs}))


def theirs(**kwargs):
    timm = pytest.importorskip("timm")
    return randomised(timm.models.convit.ConVit(**{**SHAPE, "embed_dim": 12, **kwargs}))


class VisionTransformer(nn.Module):
    """FAIR's model: its modules have timm's names and numbers, its Mlp one dropout, its forward no head_drop and no pooling."""

    def __init__(self):
        super().__init__()
        like = theirs()
        self.local_up_to_layer = like.local_up_to_layer
        self.patch_embed = PatchEmbed()
        self.cls_token, self.pos_embed = like.cls_token, like.pos_embed
        self.pos_drop, self.blocks, self.norm, self.head = nn.Dropout(0.0), like.blocks, nn.LayerNorm(48, eps=1e-6), like.head
        for block in self.blocks:
            block.mlp.__class__ = Mlp
            block.mlp.drop = block.mlp.drop1
            del block.mlp.drop1, block.mlp.drop2, block.mlp.norm

    def forward(self, x):
        x = self.patch_embed(x) + self.pos_embed
        for u, blk in enumerate(self.blocks):
            if u == self.local_up_to_layer:
                x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
            x = blk(x)
        return self.head(self.norm(x)[:, 0])


class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.img_size, self.patch_size, self.num_patches = (64, 64), (16, 16), 16
        self.proj = nn.Conv2d(3, 48, 16, 16)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def with_scales(model):
    for block, scale in zip(model.blocks, (0.9, 0.05, -0.3, 0.7), strict=True):
        block.attn.scale = scale
    return model


def of_its_own(model):
    """Every layer with an epsilon and a GELU that no other has."""
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    for i, norm in enumerate(norms):
        norm.eps = 0.02 * (i + 1)
    for i, block in enumerate(model.blocks):
        block.mlp.act.approximate = ("none", "tanh")[i % 2]
    return model


MODELS = {
    "ours": ours,
    "timm": theirs,
    "accelerated": lambda: convit.accelerate(theirs()),
    "timm not square": lambda: convit.accelerate(theirs(img_size=(32, 128)), grid="image"),
    "fair": lambda: randomised(VisionTransformer()),
    "fair accelerated": lambda: convit.accelerate(randomised(VisionTransformer())),
    "average, registers, biases": lambda: ours(global_pool="avg", reg_tokens=2, qkv_bias=True, img_size=(48, 80)),
    "class token before registers": lambda: ours(reg_tokens=3),
    "tokens": lambda: ours(global_pool="", num_classes=0, use_pos_embed=False),
    "many tokens": lambda: ours(global_pool="", img_size=(128, 104), patch_size=8, depth=2, local_up_to_layer=1),
    "all GPSA": lambda: ours(local_up_to_layer=4, global_pool="avg"),
    "all MHSA": lambda: ours(local_up_to_layer=0, patch_size=(8, 32)),
    "scales of its own": lambda: with_scales(ours()),
    "epsilons and GELUs of its own": lambda: of_its_own(ours()),
    "wide MLPs, odd patches": lambda: ours(mlp_ratio=20, patch_size=5, img_size=20, depth=2, local_up_to_layer=1),  # in parts of 768
    "one block": lambda: ours(depth=1, local_up_to_layer=0, num_heads=1, in_chans=1),
    "odd widths": lambda: ours(embed_dim=33, num_heads=3, mlp_ratio=1.7, act_layer=lambda: nn.GELU("tanh"), img_size=32),
}


def images(model, batch=2, size=None):
    size = size or model.patch_embed.img_size
    return torch.randn(batch, model.patch_embed.proj.in_channels, *size, generator=torch.Generator().manual_seed(1))


def error(actual, exact):
    assert actual.shape == exact.shape
    return ((actual.double() - exact).norm() / exact.norm()).item()


def float64(model, x):
    with torch.no_grad():
        return copy.deepcopy(model).double()(x.double())


@pytest.mark.parametrize("name", MODELS)
def test_accuracy(name):
    """float32 at most twice as wrong as the eager model, bfloat16 at most 1.2 times as wrong as autocast."""
    model = MODELS[name]()
    x = images(model, batch=3)
    exact = float64(model, x)
    with torch.no_grad():
        eager = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(x)
    wide, narrow = convit.optimize(model, torch.float32), convit.optimize(model, "bfloat16")
    assert wide(x).dtype == narrow(x).dtype == torch.float32
    assert error(wide(x), exact) <= max(2 * error(eager, exact), 2e-7)
    assert error(narrow(x), exact) <= max(1.2 * error(autocast, exact), 3e-3)
    torch.testing.assert_close(wide(x)[1:2], wide(x[1:2]), rtol=1e-5, atol=1e-5)


def test_any_size_and_batch():
    model = ours(dynamic_img_size=True)
    snapshot = convit.optimize(model, torch.float32)
    for batch, size in ((1, (64, 64)), (5, (32, 96)), (2, (16, 16)), (1, (160, 64)), (3, (64, 64))):
        x = images(model, batch, size)
        with torch.no_grad():
            torch.testing.assert_close(snapshot(x), model(x), rtol=1e-4, atol=1e-5)
    assert snapshot(images(model, 0)).shape == (0, 7)
    for side in range(32, 32 + 16 * 9, 16):
        snapshot(images(model, 1, (side, 16)))
    assert len(snapshot._network.positions) == 8  # grids of which it keeps the embedding
    x = images(model, 2)
    for wrong in ((64, 72), (72, 64), (8, 64), (64, 8)):
        with pytest.raises(ValueError, match="must be a multiple of the patch size 16 x 16"):
            snapshot(images(model, 1, wrong))
    for other in (
        torch._neg_view(-x),
        x.to(memory_format=torch.channels_last),
        x.flip(3).contiguous().flip(3),
        x.repeat(2, 1, 1, 1)[::2],
        x.double(),
    ):
        torch.testing.assert_close(snapshot(other)[0], snapshot(x)[0])


def test_a_snapshot_follows_nothing():
    model = ours().train()
    with torch.no_grad():
        model.blocks[1].drop_path.drop_prob = 0.5  # of training alone
    snapshot = convit.optimize(model, torch.float32)
    assert model.training and model.blocks[1].attn.training
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    convit.optimize(model, torch.float32)
    assert [module.training for module in model.modules()] == modes  # each its own
    x = images(model)
    before = snapshot(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(snapshot(x), before)
    for tensor in snapshot.state_dict().values():
        tensor.zero_()
    assert torch.equal(snapshot(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_and_it_pickles(dtype):
    model = MODELS["average, registers, biases"]()
    model.pretrained_cfg = {"label_names": ["a"] * model.num_classes}
    snapshot = convit.optimize(model, dtype)
    state = snapshot.state_dict()
    assert set(state) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor) or torch.equal(state[name], tensor.to(dtype).float())
    model.load_state_dict(state)
    x = images(model)
    for other in (pickle.loads(pickle.dumps(snapshot)), copy.deepcopy(snapshot), convit.optimize(model, dtype)):
        assert torch.equal(other(x), snapshot(x)) and other.pretrained_cfg == model.pretrained_cfg
    assert set(torch.nn.ModuleDict({"net": snapshot}).state_dict()) == {f"net.{name}" for name in state}
    assert str(dtype)[6:] in repr(snapshot) and not list(snapshot.parameters())


def test_the_type_follows_the_chip(monkeypatch):
    native = any(getattr(torch.cpu, name)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    assert convit.optimize(ours()).dtype == (torch.bfloat16 if native else torch.float32)
    for wrong in (torch.float16, "float64", "bf16"):
        with pytest.raises(TypeError, match="must be torch.float32 or torch.bfloat16"):
            convit.optimize(ours(), wrong)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)  # as versions of torch lack it
    assert convit.optimize(ours()).dtype == torch.float32


def test_what_is_forced_and_what_is_set_around_it():
    """PyTorch's operators where their backend is forced, and float32 is float32 in a region of autocast, in either form."""
    model = ours()
    x, own = images(model), convit.optimize(model, torch.float32)
    with convit.use_backend("sdpa"):
        torchs = convit.optimize(model, torch.float32)
        assert "products=PyTorch" in repr(torchs)
        with torch.autocast("cpu", torch.bfloat16):
            inside = torchs(x)
        assert torch.equal(inside, torchs(x)) and inside.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = own(x)
    assert torch.equal(inside, own(x))


def test_threads_of_python_and_of_torch():
    model = ours(dynamic_img_size=True)
    snapshot = convit.optimize(model, torch.float32)
    inputs = [images(model, batch, size) for batch in (1, 3) for size in ((64, 64), (32, 48))] * 3
    expected = [snapshot(x) for x in inputs]
    threads = torch.get_num_threads()
    results: dict[int, torch.Tensor] = {}

    def call(i):
        results[i] = snapshot(inputs[i])

    workers = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(results[i], y) for i, y in enumerate(expected))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for x, y in zip(inputs, expected, strict=True):
                torch.testing.assert_close(snapshot(x), y, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_nan_stays_in_its_image_and_large_values_stay_finite():
    snapshot = convit.optimize(ours(), torch.float32)
    x = images(ours(), 3)
    clean = snapshot(x)
    x[1, 0, 0, 0] = float("nan")
    y = snapshot(x)
    assert y[1].isnan().all() and torch.equal(y[0], clean[0]) and torch.equal(y[2], clean[2])
    assert snapshot(x.nan_to_num() * 1e15).isfinite().all()


def test_what_a_snapshot_cannot_do():
    model = ours()
    snapshot = convit.optimize(model, torch.float32)
    x = images(model)
    assert snapshot.eval() is snapshot and snapshot.to("cpu") is snapshot and snapshot.float() is snapshot
    for call in (snapshot.train, snapshot.half, snapshot.double, lambda: snapshot.to("meta"), lambda: snapshot.load_state_dict({})):
        with pytest.raises(RuntimeError, match="snapshot of convit.optimize cannot"):
            call()
    narrow = convit.optimize(model, torch.bfloat16)
    assert narrow.bfloat16() is narrow and (narrow.num_classes, narrow.in_chans) == (7, 3)
    with pytest.raises(RuntimeError, match="has no gradient"):
        snapshot(x.requires_grad_())
    with torch.no_grad():
        assert torch.equal(snapshot(x), snapshot(x.detach()))
        with pytest.raises(RuntimeError, match="runs plain tensors, eagerly"):
            torch.func.vmap(snapshot)(x[None])
    freed = x.detach().clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="storage of images has been freed"):
        snapshot(freed)
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\], got \[2, 1, 64, 64\]"):
        snapshot(torch.zeros(2, 1, 64, 64))
    with pytest.raises(ValueError, match="takes images of 64 x 64, got 32 x 64.*dynamic_img_size"):
        snapshot(torch.zeros(2, 3, 32, 64))
    with pytest.raises(ValueError, match="multiple of the patch size 16 x 16, got 60 x 64"):
        convit.optimize(ours(dynamic_img_size=True), torch.float32)(torch.zeros(1, 3, 60, 64))
    with pytest.raises(TypeError, match="floating-point tensor, got torch.uint8"):
        snapshot(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    for wrong in (x.detach().to_sparse(), x.detach().numpy()):
        with pytest.raises(TypeError, match="floating-point tensor, got (torch.float32, torch.sparse_coo|ndarray)"):
            snapshot(wrong)
    with pytest.raises(ValueError, match="the images are on meta"):
        snapshot(x.to("meta"))
    with pytest.raises(ValueError, match="already a snapshot"):
        convit.optimize(snapshot)
    with pytest.raises(TypeError, match="torch.nn.Module, got str"):
        convit.optimize("convit_tiny")


class Scaled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(model):
    model.blocks[2].attn.proj.register_forward_hook(lambda *args: None)


def replaced(model):
    model.blocks[0].mlp.forward = lambda x: x


def features(model):
    model.forward_features = lambda x: x


def normed(model):
    model.blocks[0].norm1 = Scaled(48)


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.blocks[0].attn.proj)


def activated(model):
    model.blocks[0].mlp.act = nn.ReLU()


def padded(model):
    model.patch_embed.pad = True


def overlapping(model):
    model.patch_embed.proj.padding = (1, 1)


def bare(model):
    model.blocks[0].norm2 = nn.LayerNorm(48, elementwise_affine=False)


def half_biased(model):
    model.blocks[0].attn.qk.bias = nn.Parameter(torch.zeros(96))


def extended(model):
    model.blocks[0].attn.lora = nn.Linear(48, 48)


def grown(model):
    model.head = nn.Sequential(nn.Linear(48, 7))


def subclassed(model):
    model.__class__ = type("Subclass", (convit.ConViT,), {})


class Other(torch.Tensor):
    pass


def of_another_class(model):
    model.head.weight = nn.Parameter(model.head.weight.detach().as_subclass(Other))


def reordered(model):
    model.local_up_to_layer = 2


REFUSED = {
    hooked: "blocks.2.attn.proj has hooks",
    replaced: "blocks.0.mlp has hooks or a forward of its own",
    features: "the model has forward_features replaced",
    normed: "blocks.0.norm1 is a Scaled",
    parametrised: "blocks.0.attn.proj is a ParametrizedLinear",
    activated: "blocks.0.mlp.act is a ReLU",
    padded: "it pads images",
    overlapping: "patch_embed.proj is no plain patch embedding",
    bare: "blocks.0.norm2 has no weight",
    half_biased: "of blocks.0.attn.qk and blocks.0.attn.v only one has a bias",
    of_another_class: "head.weight is a Other of torch.float32",
    lambda model: model.to("meta"): "is on the meta device",
    reordered: "local_up_to_layer is 2 where 3 blocks are GPSA",
    extended: "blocks.0.attn.lora is a Linear",
    grown: "head is a Sequential",
    subclassed: "this is a Subclass",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_is_not_exactly_known_is_refused_by_name(change):
    model = ours()
    change(model)
    with pytest.raises(ValueError, match=f"convit.optimize takes ConViTs.*{REFUSED[change]}.*run the model itself"):
        convit.optimize(model)


def test_timms_gpsa_on_an_image_that_is_no_square_is_refused_with_the_way_out():
    timm = pytest.importorskip("timm.models.convit")
    model = timm.ConVit(img_size=(32, 96), patch_size=16, embed_dim=32, depth=2, num_heads=4, local_up_to_layer=1, num_classes=3).eval()
    with pytest.raises(ValueError, match=r"takes its 2 x 6 grid for a square: convit.accelerate\(model, grid='image'\)"):
        convit.optimize(model, torch.float32)
    x = torch.randn(2, 3, 32, 96)
    convit.accelerate(model, grid="image")
    torch.testing.assert_close(convit.optimize(model, torch.float32)(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_the_default_device_does_not_matter():
    model, x = convit.ConViT(img_size=32, embed_dim=32, depth=2, num_heads=4, local_up_to_layer=1).eval(), torch.randn(1, 3, 32, 32)
    with torch.device("meta"):
        found = convit.optimize(model, torch.float32)(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_a_class_changed_underneath_is_refused(monkeypatch):
    """Whatever is not seen in the parts is seen in the output."""
    model = theirs()
    monkeypatch.setattr(type(model.blocks[0].mlp), "forward", lambda self, x: self.fc2(self.act(self.fc1(x))) * 1.02)
    with pytest.raises(ValueError, match="its output is not what its parts say"):
        convit.optimize(model)
    with pytest.raises(ValueError, match="convit.accelerate"):
        convit.optimize(theirs(img_size=(32, 128)))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"on \(4, 4\), not on the image's \(2, 8\): convit.accelerate"):
        convit.optimize(convit.accelerate(theirs(img_size=(32, 128))))
    with pytest.raises(ValueError, match="never joins"):
        convit.optimize(theirs(local_up_to_layer=4))


@pytest.mark.parametrize(("name", "value"), [("blocks.1.attn.gating_param", float("nan")), ("head.weight", float("inf"))])
def test_weights_that_are_no_numbers_are_named(name, value):
    model = ours()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite values") as error:
        convit.optimize(model)
    assert error.type is ValueError


def test_a_model_of_another_type_or_mode():
    model = ours()
    x = images(model)
    with torch.no_grad():
        expected = model(x)
    for other in (copy.deepcopy(model).double(), copy.deepcopy(model).requires_grad_(False).train()):
        assert error(convit.optimize(other, torch.float32)(x), expected.double()) < 1e-6
    assert error(convit.optimize(copy.deepcopy(model).bfloat16(), torch.float32)(x), expected.double()) < 2e-2
    assert isinstance(convit.optimize(model), Optimized)


MEMORY = """
import ctypes, json, torch, convit
heap = ctypes.CDLL(None)
for name in ("calls", "bytes", "peak"):
    getattr(heap, f"allocations_{name}").restype = ctypes.c_long
torch.set_num_threads(2)
model = convit.create_model("convit_tiny").eval()
inputs = [torch.zeros(batch, 3, 224, 224) for batch in (1, 8)]
heap.allocations_reset()
with torch.inference_mode():
    for x in inputs * 2:
        model(x)
found = {"eager": heap.allocations_peak(), "weights": sum(p.nbytes for p in model.parameters())}
snapshot = convit.optimize(model, TYPE)
for x in inputs:
    snapshot(x)
found["optimized"] = heap.allocations_peak()
for x in inputs * 2:  # in turn
    heap.allocations_reset()
    y = snapshot(x)
    found.setdefault("calls", []).append([heap.allocations_calls(), heap.allocations_bytes() - y.nbytes])
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("cc"), reason="allocations are counted by a preloaded library")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory(tmp_path, dtype):
    """Model and snapshot together need the eager model's peak and one copy of its weights; a known shape costs its result alone."""
    if not str(convit.optimize(ours(), dtype)).count("products=own"):
        pytest.skip("PyTorch's operators allocate their results")
    library = tmp_path / "allocations.so"
    source = Path(__file__).with_name("csrc") / "allocations.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
    env = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run([sys.executable, "-c", MEMORY.replace("TYPE", repr(dtype))], env=env, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["optimized"] <= found["eager"] + found["weights"]
    for calls, size in found["calls"]:
        assert calls < 20 and size < 2000, found  # the objects of PyTorch around it
