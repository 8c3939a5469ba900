"""What a user replaces in a model after it was built or accelerated counts, as in timm's under the same treatment, or is refused."""

import copy
import gc
import io
import logging
import types
import warnings
import weakref

import pytest
import torch
from test_accelerate import close, nonsquare, timm_model
from torch import nn

import convit

timm = pytest.importorskip("timm")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def seeded(make):
    torch.manual_seed(3)
    return make().eval()


class Stem(nn.Module):
    """A patch embedding as users write it: it does not say how the patches lie."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 48, 16, 16)

    def forward(self, x):
        return self.conv(x).flatten(2).transpose(1, 2)


class Alone(nn.Module):
    """A wrapper as it is written for timm's modules."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x) * 1.25


class HandsOn(Alone):
    def forward(self, *args):
        return self.module(*args) * 1.25


class HandsOnNames(Alone):
    def forward(self, x, **named):
        return self.module(x, **named) * 1.25


class Optional(Alone):
    """Its second argument is no grid."""

    def forward(self, x, twice=False):
        return self.module(x) * (2 if twice else 1.25)


def own_forward(module):
    module.forward = types.MethodType(lambda self, x, forward=module.forward: forward(x) * 1.25, module)
    return module


def own_attention(module):
    module.get_attention = lambda x, attention=module.get_attention: attention(x) * 1.25
    return module


def halved(module, tokens):
    """timm's relative positions, halved."""
    return timm.models.convit.GPSA.get_rel_indices(module, tokens) / 2


def own_indices(module):
    module.rel_indices = halved(module, 16)
    return module


def own_method_for_indices(module):
    module.get_rel_indices = lambda tokens: halved(module, tokens)
    return module


def hooked(module):
    module.register_forward_hook(lambda module, args, out: out * 1.25)
    return module


CHANGES = {
    "a patch embedding of one's own": ("patch_embed", lambda _: seeded(Stem)),
    "timm's patch embedding": ("patch_embed", lambda _: seeded(lambda: timm.layers.PatchEmbed(64, 16, 3, 48))),
    "a wrapped patch embedding": ("patch_embed", Alone),
    "a hooked patch embedding": ("patch_embed", hooked),
    "an attention in a wrapper": ("blocks.0.attn", Alone),
    "an attention in a wrapper in one that hands on": ("blocks.0.attn", lambda module: HandsOn(Alone(module))),
    "an attention in wrappers that hand on": ("blocks.0.attn", lambda module: HandsOn(HandsOnNames(HandsOn(module)))),
    "a block in a wrapper in one that hands on": ("blocks.1", lambda module: HandsOn(HandsOnNames(Alone(module)))),
    "an attention with another option": ("blocks.0.attn", Optional),
    "a block with another option": ("blocks.0", Optional),
    "plain attention": ("blocks.0.attn", lambda _: seeded(lambda: timm.models.convit.MHSA(48, 4))),
    "our plain attention": ("blocks.0.attn", lambda _: seeded(lambda: convit.MHSA(48, 4))),
    "timm's ViT attention": ("blocks.0.attn", lambda _: seeded(lambda: timm.layers.Attention(48, 4))),
    "an attention with a forward of its own": ("blocks.0.attn", own_forward),
    "a block with a forward of its own": ("blocks.0", own_forward),
    "an attention map of one's own": ("blocks.0.attn", own_attention),
    "positions of one's own": ("blocks.0.attn", own_indices),
    "a method for positions": ("blocks.0.attn", own_method_for_indices),
    "one gate for all heads": ("blocks.0.attn.gating_param", lambda _: nn.Parameter(torch.tensor(0.3))),
    "gates of another shape": ("blocks.0.attn.gating_param", lambda gate: nn.Parameter(gate.detach().view(1, -1, 1, 1) * 2)),
    "scale": ("blocks.0.attn.scale", lambda scale: scale * 3),
    "heads": ("blocks.3.attn.num_heads", lambda _: 2),
    "norm": ("norm", lambda _: nn.Identity()),
    "a norm of the patches": ("patch_embed.norm", lambda _: nn.LayerNorm(48)),
    "a norm in the last MLP": ("blocks.3.mlp.norm", lambda _: nn.LayerNorm(192)),
    "no position embedding": ("use_pos_embed", lambda _: False),
    "pooling": ("global_pool", lambda _: "avg"),
    "order of the blocks": ("blocks", lambda blocks: nn.ModuleList([blocks[i] for i in (2, 0, 1, 3)])),
}


def change(model, name):
    path, make = CHANGES[name]
    parent, _, attribute = path.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, attribute, make(getattr(parent, attribute)))
    return model


def ours_like(model, image):
    ours = convit.ConViT(img_size=image, num_classes=7, embed_dim=48, depth=4, num_heads=4, local_up_to_layer=3).eval()
    ours.load_state_dict(model.state_dict())
    return ours


@pytest.mark.parametrize("name", CHANGES)
def test_replaced_afterwards(name):
    theirs = timm_model().eval()
    for parameter in theirs.blocks.parameters():
        nn.init.normal_(parameter, std=0.4)  # so that what happens to attention shows
    accelerated, ours = convit.accelerate(copy.deepcopy(theirs)), ours_like(theirs, 64)
    before, expected = copy.deepcopy(theirs)(X), change(theirs, name)(X)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    for model in (accelerated, ours):
        close(change(model, name)(X), expected)
        close(model(X[:1]), expected[:1])


def test_a_model_left_without_a_block_that_reads_the_image_is_refused():
    ours = ours_like(timm_model(), 64)
    ours.blocks = ours.blocks[:2]
    with pytest.raises(ValueError, match="nothing of the image would reach it"):
        ours(X)
    ours.global_pool = "max"
    with pytest.raises(ValueError, match="must be 'token', 'avg' or '', got 'max'"):
        ours(X)


def embedding(image):
    return seeded(lambda: timm.layers.PatchEmbed(image, 16, 3, 48))


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, pickled, lambda m: torch.compile(m, fullgraph=True, backend="eager")], ids=["copy", "pickle", "compile"]
)
def test_the_grid_is_that_of_the_patch_embed_of_now(way):
    """Also after copies, which are independent, and where the compiler has seen another."""
    model, x = nonsquare()
    convit.accelerate(model, grid="image")
    moved = way(model)
    expected = ours_like(model, (32, 128))(x)
    close(moved(x), expected)
    getattr(moved, "_orig_mod", moved).patch_embed = embedding((128, 32))
    close(moved(x.mT), ours_like(getattr(moved, "_orig_mod", moved), (128, 32))(x.mT))
    if way is copy.deepcopy:
        close(model(x), expected)


def test_the_grid_holds_no_model_and_outlives_it(caplog):
    caplog.set_level(logging.INFO, "convit")  # nor does what is logged, which the fixture keeps
    model, _ = nonsquare()
    names = list(dict(model.named_modules()))
    block = convit.accelerate(model, grid="image").blocks[0]
    assert list(dict(model.named_modules())) == names
    x = torch.randn(1, 16, 48)
    expected, gone = block(x), weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    for each in (block, copy.deepcopy(block), pickled(block)):
        assert torch.equal(each(x), expected)


def test_the_images_grid_or_none():
    model, x = nonsquare()
    bare = copy.deepcopy(model)
    bare.patch_embed = seeded(Stem)
    with pytest.raises(ValueError, match="grid='image' needs a patch_embed with grid_size"):
        convit.accelerate(bare, grid="image")
    assert type(bare.blocks[0].attn) is timm.models.convit.GPSA
    convit.accelerate(model, grid="image").patch_embed = Alone(model.patch_embed)
    model(x)  # what it wraps knows
    model.patch_embed = seeded(Stem)
    with pytest.raises(ValueError, match="N = 16 patches, and the patch_embed, Stem, has grid_size none"):
        model(x)
    model.patch_embed.grid_size = (2, 8)
    model(x)


def test_ours_never_lays_patches_otherwise_than_the_image():
    ours = convit.ConViT(
        img_size=(32, 128), num_classes=7, embed_dim=48, depth=2, num_heads=4, local_up_to_layer=1, dynamic_img_size=True
    ).eval()
    x = torch.randn(1, 3, 32, 128)
    expected = ours(x)
    ours.blocks[0].attn = Alone(ours.blocks[0].attn)
    ours.blocks[0].attn.forward = lambda x: ours.blocks[0].attn.module(x)
    close(ours(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it says that timm's are laid otherwise
        convit.accelerate(ours)
    close(ours(x), expected)
    with pytest.raises(
        ValueError, match="Alone takes x alone, so the attention in it would lay the patches on 2 x 8, where the image has 8 x 2"
    ):
        ours(x.mT)
    ours.patch_embed = seeded(Stem)
    ours.blocks[0].attn = ours.blocks[0].attn.module
    ours.patch_embed.grid_size = (2, 8)
    seen = []
    ours.blocks[0].attn.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    ours(x)
    close(seen[0][1], ours.blocks[0].attn(seen[0][0], grid=(2, 8)))  # as its grid_size says
    del ours.patch_embed.grid_size
    with pytest.raises(
        ValueError, match="Stem, in the place of patch_embed, gives N = 16 patches of images of 32 x 128, and has no grid_size"
    ):
        ours(x)


@pytest.mark.parametrize("wrap", [Alone, lambda module: HandsOn(HandsOnNames(module))], ids=["alone", "hands on"])
def test_wrappers_compile_into_one_graph(wrap):
    ours = ours_like(timm_model(), 64)
    ours.blocks[0], ours.blocks[1].attn = wrap(ours.blocks[0]), wrap(ours.blocks[1].attn)
    close(torch.compile(ours, fullgraph=True, backend="eager")(X), ours(X))


@pytest.mark.parametrize("path", ["qk.weight", "v.weight", "v.bias", "pos_proj.weight", "pos_proj.bias", "gating_param", "proj.weight", ""])
def test_freed_memory_is_not_read(path):
    """As offloading and sharding leave it between the calls."""
    attention, x = convit.GPSA(16, 2, qkv_bias=True), torch.randn(1, 16, 16)
    freed = attention.get_submodule(path.rpartition(".")[0]).get_parameter(path.rpartition(".")[2]).data if path else x
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="setStorage|storage|not allocated"):
        attention(x)


def test_undo_follows_what_the_model_has_now():
    model = timm_model().eval()
    expected = model(X)
    done = convit.accelerated(convit.accelerate(model))
    model.blocks = nn.Sequential(*(Alone(block) for block in model.blocks[:3]), model.blocks[3])
    done.undo()
    model.blocks = nn.Sequential(*(block.module for block in model.blocks[:3]), model.blocks[3])
    assert torch.equal(model(X), expected) and not convit.accelerated(model).swapped
