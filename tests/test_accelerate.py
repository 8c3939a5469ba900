"""convit.accelerate on timm's models and on FAIR-like ones."""

import copy
import functools
import inspect
import sys
import warnings

import pytest
import torch
from tolerances import MODEL

import convit
from convit.kernels.gpsa.reference import relative_positions

timm = pytest.importorskip("timm")


def timm_model(**kwargs):
    torch.manual_seed(0)
    shape = {"img_size": 64, "num_classes": 7, "embed_dim": 12, "depth": 4, "local_up_to_layer": 3, "num_heads": 4}
    model = timm.models.convit.ConVit(**{**shape, **kwargs})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def close(a, b):
    assert (a - b).abs().max() <= MODEL[a.dtype] * b.abs().max()


def test_swaps_in_place_and_shares_everything(caplog):
    """And says so where somebody listens: what it left, as a warning, is nothing here."""
    caplog.set_level("INFO", "convit")
    model = timm_model().eval()
    expected, before = model(X), dict(model.named_parameters())
    calls = []
    model.blocks[0].attn.register_forward_hook(lambda *args: calls.append("hook"))
    assert convit.accelerate(model) is model
    assert [type(block.attn) for block in model.blocks] == [convit.GPSA] * 3 + [convit.MHSA]
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not model.blocks[0].attn.training and all(buffer.numel() == 3 for buffer in model.buffers())  # their cache, without its content
    close(model(X), expected)
    assert calls == ["hook"]
    classes = "3 timm.models.convit.GPSA, 4 timm.layers.mlp.Mlp, 1 timm.models.convit.MHSA"
    assert [(each.levelname, each.getMessage()) for each in caplog.records] == [
        ("INFO", f"accelerate: ConVit: swapped {classes}; left none")
    ]
    fresh = timm_model()
    fresh.load_state_dict(model.state_dict(), strict=True)


def test_equal_after_an_optimiser_step():
    theirs = timm_model()
    ours = copy.deepcopy(theirs)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (theirs, ours)]
    convit.accelerate(ours)
    for model, optimiser in zip((theirs, ours), optimisers, strict=True):
        model(X).square().mean().backward()
        optimiser.step()
    close(ours(X), theirs(X))


def test_before_and_after_to():
    theirs = timm_model().double()
    first, then = copy.deepcopy(theirs), copy.deepcopy(theirs).float()
    convit.accelerate(first)
    convit.accelerate(then).double()
    for model in (first, then):
        assert (model(X.double()) - theirs(X.double())).abs().max() <= 1e-6
        assert next(model.parameters()).dtype == torch.float64


def test_positions_that_have_been_rounded_are_still_timms():
    """Those of 16 x 16 patches, of which bfloat16 cannot hold all."""
    model = timm_model(img_size=256, depth=1, local_up_to_layer=1).eval()
    model(torch.zeros(1, 3, 256, 256))
    model.bfloat16().float()
    assert not convit.accelerated(convit.accelerate(model)).left


def test_twice_and_on_ours_is_harmless():
    model = convit.accelerate(convit.accelerate(timm_model().eval()))
    close(model(X), timm_model().eval()(X))
    ours = convit.create_model("convit_tiny")
    assert convit.accelerate(ours) is ours


def nonsquare(image=(32, 128)):
    return timm_model(img_size=image).eval(), torch.randn(1, 3, *image)


@pytest.mark.parametrize(
    "wrap", [lambda m: m, torch.nn.Sequential, timm.utils.ModelEmaV2, torch.nn.DataParallel], ids=["bare", "in", "ema", "dp"]
)
def test_patches_stay_on_timms_square_wherever_the_model_stands(wrap):
    """A model of timm built for 32 x 128 has 2 x 8 patches, which timm lays on 4 x 4: weights trained so need that."""
    model, x = nonsquare()
    expected = model(x)
    wrapped = wrap(model)
    with pytest.warns(UserWarning, match="2 x 8 patches, and this model's attention lays them on 4 x 4") as told:
        convit.accelerate(wrapped)
    assert [each.filename for each in told] == [__file__]  # of the line that called it
    close(next(m for m in wrapped.modules() if isinstance(m, type(model)))(x), expected)


@pytest.mark.parametrize("image, layout", [((32, 128), "image"), ((32, 48), "square")], ids=str)
def test_the_images_own_grid(image, layout):
    """By an argument, or where timm cannot lay a square; also after deepcopy, and after the input size has changed. What a first call
    has laid, a second may lay otherwise, as the warning says."""
    model, x = nonsquare(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if layout == "image" else "error")  # of 2 x 3 patches timm makes no square
        convit.accelerate(model)
    ours = convit.ConViT(img_size=image, num_classes=7, embed_dim=48, depth=4, num_heads=4, local_up_to_layer=3).eval()
    ours.load_state_dict(model.state_dict())
    moved = copy.deepcopy(convit.accelerate(model, grid=layout))
    close(moved(x), ours(x))
    moved.patch_embed.set_input_size((image[1], image[0]))
    ours.set_input_size((image[1], image[0]))
    ours.pos_embed = moved.pos_embed
    close(moved(x.mT), ours(x.mT))
    close(torch.jit.script(moved)(x.mT), ours(x.mT))


def copied(cls, old="", new=""):
    """The class as a repository has it that has copied timm's file, and changed ``old`` to ``new``."""
    source = inspect.getsource(cls)
    assert old in source
    home = {**vars(sys.modules[cls.__module__]), "__name__": "copied"}
    exec(source.replace(old, new) if old else source, home)
    return home[cls.__name__]


def test_copies_of_timms_classes_are_swapped():
    model = timm_model().eval()
    expected = model(X)
    for block in model.blocks:
        block.attn.__class__, block.mlp.__class__ = copied(type(block.attn)), copied(type(block.mlp))
    done = convit.accelerated(convit.accelerate(model))
    assert set(done.swapped.values()) == {"copied.GPSA", "copied.MHSA", "copied.Mlp"} and not done.left
    close(model(X), expected)


def test_a_copy_that_makes_other_positions_is_left():
    """Before it has made any, too."""
    model = timm_model().eval()
    for block in model.blocks[:3]:
        block.attn.__class__ = copied(type(block.attn), "indx ** 2 + indy ** 2", "(indx ** 2 + indy ** 2) / 4")
    expected = copy.deepcopy(model)(X)
    assert len(convit.accelerated(convit.accelerate(model)).left) == 3
    close(model(X), expected)


def test_positions_on_a_rectangle_that_timm_was_given_are_kept():
    model, x = nonsquare((32, 48))
    for block in model.blocks[:3]:
        block.attn.rel_indices = relative_positions((2, 3))[None].float()
    expected = model(x)
    assert list(convit.accelerated(convit.accelerate(model)).left) == [f"blocks.{i}.attn" for i in range(3)]
    close(model(x), expected)


def _changed(part, old, new):
    def change(model):
        module = getattr(model.blocks[0], part)
        module.__class__ = copied(type(module), old, new)

    return change


def _own_method(model):
    model.blocks[0].attn.get_attention = model.blocks[0].attn.get_attention


def _subclass(model):
    class GPSA(timm.models.convit.GPSA):
        def get_attention(self, x):
            return super().get_attention(x) / 2

    model.blocks[0].attn.__class__ = GPSA


def _further_layer(model):
    class Mlp(timm.layers.Mlp):
        def forward(self, x):
            return self.drop2(self.fc2(self.middle(self.act(self.fc1(x)))))

    model.blocks[0].mlp.__class__ = Mlp
    model.blocks[0].mlp.middle = torch.nn.Conv1d(16, 16, 3, padding=1)


def _further_parameter(model):
    model.blocks[0].attn.temperature = torch.nn.Parameter(torch.ones(1))


def _further_indices(model):
    model.blocks[0].attn.rel_indices = model.blocks[0].attn.rel_indices * 2


def _untried(model):
    model.blocks[0].mlp.__class__ = type("Mlp", (torch.nn.Module,), {"forward": timm.layers.Mlp.forward})


def _other_name(model):
    model.blocks[0].attn.__class__ = type("LocalAttention", (timm.models.convit.GPSA,), {})


def _further_method(model):
    model.blocks[0].mlp.__class__ = copied(timm.layers.Mlp)
    type(model.blocks[0].mlp).width = property(lambda self: self.fc1.out_features)


def _patched(model):
    """As instrumentation does it: a wrapper that bears the name and the module of what it wraps."""
    forward = timm.models.convit.MHSA.forward
    timm.models.convit.MHSA.forward = functools.wraps(forward)(lambda self, x: forward(self, x) * 1.0)
    return lambda: setattr(timm.models.convit.MHSA, "forward", forward)


@pytest.mark.parametrize(
    "change, reason",
    [
        (_own_method, "holds more than ours: get_attention"),
        (_subclass, "overrides get_attention of timm's"),
        (_further_layer, "holds more than ours: middle"),
        (_further_parameter, "holds more than ours: temperature"),
        (_further_indices, "has rel_indices of its own"),
        (_untried, "computes something else"),
        (_changed("mlp", "self.fc2(x)", "self.fc2(x * 1.01)"), "copied.Mlp computes something else"),
        (_changed("mlp", "self.fc2(x)", "self.fc2(x * 1.5 if self.training else x)"), "copied.Mlp computes something else"),
        (_changed("mlp", "self.fc2(x)", "self.fc2(x if self.training else x * 1.5)"), "copied.Mlp computes something else"),
        (_changed("mlp", "self.drop2(x)", "x"), "copied.Mlp computes something else"),
        (_changed("attn", "self.gating_param.view", "self.gating_param.flip(0).view"), "copied.GPSA computes something else"),
        (_changed("attn", "self.attn_drop(attn)", "attn"), "copied.GPSA computes something else"),
        (_other_name, "LocalAttention is a class of its own"),
        (_further_method, "has methods that ours has not: width"),
        (_patched, "has been patched: forward"),
    ],
)
def test_what_is_not_exactly_theirs_is_left_and_said(change, reason, caplog):
    model = timm_model().eval()
    model(X)
    restore = change(model) or (lambda: None)
    try:
        expected = model(X)
        convit.accelerate(model)
        close(model(X), expected)
        done = convit.accelerated(model)
    finally:
        restore()
    assert len(done.swapped) == 7 and [reason in why for why in done.left.values()] == [True]
    assert reason in caplog.records[-1].getMessage() and caplog.records[-1].levelname == "WARNING"


def test_what_lacks_a_part_is_left_and_said():
    model = timm_model()
    del model.blocks[0].attn.qk, model.blocks[0].attn.pos_proj
    (why,) = convit.accelerated(convit.accelerate(model)).left.values()
    assert why.endswith("GPSA lacks pos_proj, qk")


def test_undo():
    model = timm_model().eval()
    before = [type(module) for module in model.modules()]
    expected = model(X)
    convit.accelerate(model)
    done = convit.accelerated(model)
    assert done.swapped["blocks.0.attn"] == "timm.models.convit.GPSA" and len(done.swapped) == 8 and not done.left
    done.undo()
    assert [type(module) for module in model.modules()] == before and not convit.accelerated(model).swapped
    assert torch.equal(model(X), expected)
    with pytest.raises(ValueError, match="'square' or 'image', got 'wide'"):
        convit.accelerate(model, grid="wide")


def test_undo_is_refused_where_a_class_would_be_lost():
    model = convit.accelerate(timm_model().eval())
    torch.nn.utils.parametrize.register_parametrization(model.blocks[2].attn, "gating_param", torch.nn.Tanh())
    expected = model(X)
    with pytest.raises(RuntimeError, match="blocks.2.attn has become a ParametrizedGPSA since"):
        convit.accelerated(model).undo()
    assert torch.equal(model(X), expected) and len(convit.accelerated(model).swapped) == 8 and not convit.accelerated(model).left
    torch.nn.utils.parametrize.remove_parametrizations(model.blocks[2].attn, "gating_param")
    convit.accelerated(model).undo()
    close(model(X), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_set_around_it_changes_no_verdict(dtype):
    model = timm_model()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            done = convit.accelerated(convit.accelerate(model))
    finally:
        torch.set_default_dtype(default)
    assert len(done.swapped) == 8 and not done.left


def test_the_trial_of_a_class_leaves_nothing_behind():
    """Neither the numbers drawn afterwards nor the default device have a part in it, and undone, a module holds what it held."""
    model = timm_model().eval()
    model.blocks[0].mlp.__class__ = type("Mlp", (timm.layers.Mlp,), {"__module__": "elsewhere"})  # no class of timm's own: tried
    held = [set(vars(module)) for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.device("meta"):
        done = convit.accelerated(convit.accelerate(model))
    assert torch.equal(torch.rand(3), expected) and len(done.swapped) == 8 and not done.left
    done.undo()
    assert [set(vars(module)) for module in model.modules()] == held


def test_the_grid_is_that_of_the_innermost_patch_embed():
    inner, x = nonsquare()
    around = torch.nn.Module()
    around.patch_embed, around.inner = torch.nn.Identity(), inner
    around.patch_embed.grid_size = (8, 2)
    convit.accelerate(around, grid="image")
    ours, _ = nonsquare()
    expected = convit.accelerate(ours, grid="image")(x)
    close(inner(x), expected)
    knows_none, _ = nonsquare()
    del knows_none.patch_embed.grid_size
    around.patch_embed.grid_size, around.inner = (2, 8), knows_none
    convit.accelerate(around, grid="image")
    close(knows_none(x), expected)


def test_norms_and_hooks_inside_an_mlp_act():
    model = timm_model().eval()
    norm = torch.nn.LayerNorm(model.blocks[0].mlp.fc1.out_features)
    torch.nn.init.normal_(norm.weight)
    model.blocks[0].mlp.norm = norm
    model.blocks[1].mlp.norm.register_forward_hook(lambda module, args, out: out * 1.5)
    expected = model(X)
    convit.accelerate(model)
    assert all(type(block.mlp).__module__.startswith("convit") for block in model.blocks)
    close(model(X), expected)


def test_fair_like_modules():
    """FAIR's modules have other bases, cache the indices as a plain attribute, and its MLPs hold one dropout for both places; those of
    timm's past have no place for a norm. What they become can be scripted."""

    class GPSA(timm.models.convit.GPSA):
        pass

    class Mlp(torch.nn.Module):
        def forward(self, x):
            return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))

        def __init__(self, in_features, hidden_features=None, drop=0.0):
            super().__init__()
            self.fc1 = torch.nn.Linear(in_features, hidden_features or in_features)
            self.act = torch.nn.GELU()
            self.fc2 = torch.nn.Linear(hidden_features or in_features, in_features)
            self.drop = torch.nn.Dropout(drop)

    one_drop = Mlp

    class Mlp(torch.nn.Module):
        def __init__(self, in_features, hidden_features=None, drop=0.0):
            super().__init__()
            self.fc1 = torch.nn.Linear(in_features, hidden_features or in_features)
            self.act, self.drop1 = torch.nn.GELU(), torch.nn.Dropout(drop)
            self.fc2, self.drop2 = torch.nn.Linear(hidden_features or in_features, in_features), torch.nn.Dropout(drop)

        def forward(self, x):
            return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))

    model = timm_model().eval()
    expected = model(X)
    for block in model.blocks[:3]:
        block.attn.__class__ = GPSA
        rel = block.attn.rel_indices
        block.attn._buffers.pop("rel_indices", None)  # before 1.0.31 timm's is a plain attribute too
        block.attn.__dict__["rel_indices"] = rel
        block.attn.current_grid_size = 4
    for i, block in enumerate(model.blocks):
        del block.mlp.norm
        block.mlp.__class__ = (one_drop, Mlp)[i % 2]
        if i % 2 == 0:
            block.mlp.drop = block.mlp.drop1
            del block.mlp.drop1, block.mlp.drop2
    close(model(X), expected)
    assert not convit.accelerated(convit.accelerate(model)).left
    assert not any(type(block.mlp) in (one_drop, Mlp) for block in model.blocks)
    close(model(X), expected)
    for block in model.blocks[:2]:
        x = torch.randn(3, 48)
        close(torch.jit.script(block.mlp)(x), block.mlp(x))
    assert not any("rel_indices" in vars(module) for module in model.modules())  # N x N
    convit.accelerated(model).undo()
    assert type(model.blocks[0].attn) is GPSA
    close(model(X), expected)


def test_errors():
    with pytest.raises(ValueError, match="Linear contains no GPSA or MHSA"):
        convit.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="torch.nn.Module, got str"):
        convit.accelerate("convit_tiny")


def test_timms_model_of_one_patch_is_itself_again_after_undo():
    torch.manual_seed(0)
    model, x = (
        timm.models.convit.ConVit(img_size=8, patch_size=8, embed_dim=4, num_classes=3, depth=2, local_up_to_layer=1).eval(),
        torch.randn(2, 3, 8, 8),
    )
    expected = model(x)
    convit.accelerate(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    convit.accelerated(model).undo()
    assert torch.equal(model(x), expected)
    model.blocks[0].attn.rel_indices = torch.ones(1, 1, 1, 3)
    assert "rel_indices of its own" in convit.accelerated(convit.accelerate(model)).left["blocks.0.attn"]


def test_a_model_on_the_meta_device_gets_its_weights_afterwards():
    theirs = timm_model().eval()
    model = copy.deepcopy(theirs)
    model(X)
    model.to("meta")
    assert not convit.accelerated(convit.accelerate(model)).left
    model.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    close(model(X), theirs(X))
