"""convit.accelerate on timm's models and on FAIR-like ones."""

import copy

import pytest
import torch
from tolerances import MODEL

import convit

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


def test_swaps_in_place_and_shares_everything():
    model = timm_model().eval()
    expected, before = model(X), dict(model.named_parameters())
    calls = []
    model.blocks[0].attn.register_forward_hook(lambda *args: calls.append("hook"))
    assert convit.accelerate(model) is model
    assert [type(block.attn) for block in model.blocks] == [convit.GPSA] * 3 + [convit.MHSA]
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not model.blocks[0].attn.training and not list(model.buffers())
    close(model(X), expected)
    assert calls == ["hook"]
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


def test_twice_and_on_ours_is_harmless():
    model = convit.accelerate(convit.accelerate(timm_model().eval()))
    close(model(X), timm_model().eval()(X))
    ours = convit.create_model("convit_tiny")
    assert convit.accelerate(ours) is ours


def test_geometry_comes_from_the_patch_embedding():
    """A model of timm built for 32 x 128 patches a 2 x 8 grid that timm takes for 4 x 4; ours is the definition's."""
    model = timm_model(img_size=(32, 128)).eval()
    convit.accelerate(model)
    ours = convit.ConViT(img_size=(32, 128), num_classes=7, embed_dim=48, depth=4, num_heads=4, local_up_to_layer=3).eval()
    ours.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 128)
    close(model(x), ours(x))


def test_perceptrons():
    """Ours take over, unless there is a norm between the layers, which ours would leave out."""
    model = timm_model().eval()
    model.blocks[0].mlp.norm = torch.nn.LayerNorm(model.blocks[0].mlp.fc1.out_features)
    expected = model(X)
    convit.accelerate(model)
    assert [type(block.mlp).__module__.split(".")[0] for block in model.blocks] == ["timm"] + ["convit"] * 3
    close(model(X), expected)


def test_fair_like_modules():
    """FAIR's modules have other bases, cache the indices as a plain attribute, and its perceptrons hold one dropout for both places."""

    class GPSA(timm.models.convit.GPSA):
        pass

    class Mlp(torch.nn.Module):
        def forward(self, x):
            return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))

    model = timm_model().eval()
    expected = model(X)
    for block in model.blocks[:3]:
        block.attn.__class__ = GPSA
        rel = block.attn._buffers.pop("rel_indices")
        block.attn.__dict__["rel_indices"] = rel
        block.attn.current_grid_size = 4
    for block in model.blocks:
        block.mlp.__class__ = Mlp
        block.mlp.drop = block.mlp.drop1
        del block.mlp.drop1, block.mlp.drop2, block.mlp.norm
    close(model(X), expected)
    convit.accelerate(model)
    assert not any(type(block.mlp) is Mlp for block in model.blocks)
    close(model(X), expected)


def test_errors():
    with pytest.raises(ValueError, match="Linear contains no GPSA or MHSA"):
        convit.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="torch.nn.Module, got str"):
        convit.accelerate("convit_tiny")
