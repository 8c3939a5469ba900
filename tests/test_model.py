"""The PyTorch model against timm's, and what timm's ViT users expect of it."""

import copy
import inspect
import pickle
import re

import pytest
import torch
from tolerances import FLOOR, MODEL

import convit
from convit.pytorch.gpsa import local_offsets
from convit.pytorch.layers import resample_position_embedding

timm = pytest.importorskip("timm")

PARAMETERS = {
    "convit_tiny": 5_710_512,
    "convit_tiny_plus": 9_972_912,
    "convit_small": 27_777_322,
    "convit_small_plus": 48_979_882,
    "convit_base": 86_540_040,
    "convit_base_plus": 153_134_856,
}


def small(**kwargs) -> convit.ConViT:
    """A ConViT of full structure that runs in milliseconds."""
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 24, "depth": 3, "num_heads": 4, "local_up_to_layer": 2}
    return convit.ConViT(**{**arguments, **kwargs}).eval()


def images(height=32, width=32, batch=2, channels=3, dtype=torch.float32):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert convit.list_models() == list(PARAMETERS)
    with torch.device("meta"):
        model = convit.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["convit_tiny", "convit_small", "convit_base"])
def test_state_dicts_and_logits_equal_timms_both_ways(name):
    torch.manual_seed(0)
    ours, theirs = convit.create_model(name).eval(), timm.create_model(name).eval()
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [(k, v.shape) for k, v in theirs.state_dict().items()]
    x = images(224, 224, batch=1)
    for source, target in ((theirs, ours), (ours, theirs)):
        torch.manual_seed(1)
        for parameter in source.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        target.load_state_dict(source.state_dict(), strict=True)
        with torch.no_grad():
            expected, logits = theirs(x), ours(x)
        assert (logits - expected).abs().max() <= MODEL[torch.float32] * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_outputs_and_gradients_equal_timms(dtype, backend):
    torch.manual_seed(0)
    shape = {"img_size": 64, "num_classes": 7, "depth": 4, "local_up_to_layer": 3, "num_heads": 4}
    theirs = timm.models.convit.ConVit(embed_dim=12, **shape).to(dtype)
    ours = convit.ConViT(embed_dim=48, **shape).to(dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(64, 64, dtype=dtype)
    with convit.use_backend(backend):
        pairs = [(theirs(x), ours(x))]
        for logits in pairs[0]:
            logits.square().sum().backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name.endswith("pos_proj.bias"):
            assert not parameter.grad.any()  # timm's is rounding noise about the exact zero
        else:
            pairs.append((theirs_by_name[name].grad, parameter.grad))
    for expected, value in pairs:
        assert (value - expected).norm() <= MODEL[dtype] * expected.norm()


def test_initialisation_is_the_papers():
    theirs = timm.models.convit.GPSA(144, num_heads=9, locality_strength=0.7)
    ours = convit.GPSA(144, num_heads=9, locality_strength=0.7)
    theirs.local_init()
    ours.local_init()
    torch.testing.assert_close(ours.pos_proj.weight, theirs.pos_proj.weight, rtol=0, atol=0)
    assert torch.equal(ours.v.weight, torch.eye(144)) and torch.equal(ours.gating_param, torch.ones(9))
    model = small(depth=2, local_up_to_layer=2, global_pool="avg", reg_tokens=2, qkv_bias=True, embed_dim=96)
    for name, parameter in model.named_parameters():
        if name.endswith("attn.v.weight"):
            assert torch.equal(parameter, torch.eye(96))
        elif name.endswith("bias") and "patch_embed" not in name:
            assert not parameter.any(), name
        elif parameter.ndim > 1 and "pos_proj" not in name and "patch_embed" not in name:
            assert 0.015 < parameter.std() < 0.025, name


@pytest.mark.parametrize("heads", range(1, 26))
def test_every_head_starts_at_an_offset_of_its_own(heads):
    offsets = local_offsets(heads)
    assert len(set(offsets)) == len(offsets) == heads


def test_local_heads_attend_where_they_should():
    gpsa = convit.GPSA(24, num_heads=12, locality_strength=20.0)
    gpsa.local_init()
    gpsa.gating_param.data.fill_(50.0)
    attn = gpsa.get_attention(torch.zeros(1, 49, 24))[0]
    for head, (dx, dy) in enumerate(local_offsets(12)):
        assert attn[head, 3 * 7 + 3].argmax() == (3 + int(dy)) * 7 + 3 + int(dx)


@pytest.mark.parametrize("size", [(48, 48), (24, 40), (8, 64)], ids=str)
def test_any_image_size(size):
    model = small()
    x = images(*size)
    with pytest.raises(ValueError, match=f"takes images of 32 x 32, got {size[0]} x {size[1]}: call set_input_size"):
        model(x)
    moved = copy.deepcopy(model)
    moved.set_input_size(size)
    dynamic = small(dynamic_img_size=True)
    dynamic.load_state_dict(model.state_dict())
    frozen = copy.deepcopy(model)
    frozen.pos_embed.requires_grad_(False)
    frozen.set_input_size(size)
    assert moved.pos_embed.requires_grad and not frozen.pos_embed.requires_grad
    built = small(img_size=size)
    built.load_state_dict(moved.state_dict(), strict=True)
    with convit.use_backend("reference"):
        expected = built(x)
    torch.testing.assert_close(moved(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dynamic(x), expected, rtol=1e-4, atol=1e-5)
    dynamic(images(32, 32))


@pytest.mark.parametrize("size", [(192, 256), 384], ids=str)
def test_variant_at_other_sizes_from_224_weights(size):
    model = convit.create_model("convit_tiny").eval()
    model.set_input_size(size)
    height, width = (size, size) if isinstance(size, int) else size
    with torch.no_grad():
        assert model(images(height, width, batch=1)).isfinite().all()


def test_position_embedding_is_resampled_as_timm_does():
    from timm.layers import resample_abs_pos_embed

    pos_embed = torch.randn(1, 196, 8)
    theirs = resample_abs_pos_embed(pos_embed, [12, 16], [14, 14], num_prefix_tokens=0)
    torch.testing.assert_close(resample_position_embedding(pos_embed, (14, 14), (12, 16)), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("local", [0, 1, 2])
def test_class_token_always_reaches_the_head(local):
    model = small(local_up_to_layer=local)
    assert [block.use_gpsa for block in model.blocks] == [i < local for i in range(3)]
    assert model.forward_features(images()).shape == (2, 17, 24)
    before = model(images())
    model.cls_token.data += torch.randn(24)  # what all channels share, the norm takes away
    assert not torch.allclose(before, model(images()))


def test_a_class_token_that_would_see_no_image_is_refused():
    """With GPSA blocks alone it joins after the last: its logits would be the same for every image."""
    with pytest.raises(ValueError, match="local_up_to_layer = depth .* Choose global_pool='avg'"):
        small(local_up_to_layer=3)
    model = small(local_up_to_layer=3, global_pool="avg")
    first, second = model(images())
    assert not torch.allclose(first, second)
    with pytest.raises(ValueError, match="Choose global_pool='avg'"):
        model.reset_classifier(5, "token")


def test_register_tokens_and_pooling():
    model = small(reg_tokens=3, global_pool="avg")
    assert model.forward_features(images()).shape == (2, 20, 24)
    tokens = model.forward_features(images())
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 4:].mean(1))
    model.reset_classifier(11, "token")
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    assert model(images()).shape == (2, 11)
    model.reset_classifier(0, "")
    assert model(images()).shape == (2, 20, 24)


@pytest.mark.skipif(not hasattr(timm.models.convit.ConVit, "forward_intermediates"), reason="timm's ConViT has it from 1.0.31 on")
def test_forward_intermediates_as_timms():
    torch.manual_seed(0)
    shape = {"img_size": 64, "num_classes": 7, "depth": 4, "local_up_to_layer": 3, "num_heads": 4}
    theirs = timm.models.convit.ConVit(embed_dim=12, **shape).eval()
    ours = convit.ConViT(embed_dim=48, **shape).eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(64, 64)
    for arguments in ({"indices": 2}, {"indices": [0, 3], "norm": True}, {"output_fmt": "NLC"}, {"indices": [1], "stop_early": True}):
        final, maps = ours.forward_intermediates(x, **arguments)
        expected_final, expected = theirs.forward_intermediates(x, **arguments)
        for a, b in zip([final, *maps], [expected_final, *expected], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    (patches, prefix), (last, cls) = ours.get_intermediate_layers(x, [0, 3], return_prefix_tokens=True, norm=True)
    assert patches.shape == last.shape == (2, 16, 48) and prefix.shape == (2, 0, 48) and cls.shape == (2, 1, 48)
    for wrong in (9, [4], [-5]):
        with pytest.raises(ValueError, match=f"indices must choose among 4 blocks, got {re.escape(str(wrong))}"):
            ours.get_intermediate_layers(x, wrong)


@pytest.mark.parametrize("forced", ["reference", "sdpa"])
def test_checkpointed_blocks_run_again_on_the_backend_of_the_first_time(forced):
    model = small().train()
    model.set_grad_checkpointing()
    with convit.use_backend(forced):
        loss = model(images()).square().sum()
    loss.backward()
    gradient = model.blocks[0].attn.gating_param.grad.clone()
    model.set_grad_checkpointing(False)
    model.zero_grad()
    with convit.use_backend(forced):
        model(images()).square().sum().backward()
    assert torch.equal(model.blocks[0].attn.gating_param.grad, gradient)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_users_own_checkpoint_is_right_or_refused_where_the_backend_changed(reentrant):
    """Nobody tells the second run which backend the first was forced to: its gradients are right, or torch says what differs."""
    from torch.utils.checkpoint import CheckpointError, checkpoint

    attention, x = convit.GPSA(24, 4), torch.randn(2, 16, 24, requires_grad=True)
    (expected,) = torch.autograd.grad(attention(x).square().sum(), x)
    with convit.use_backend("reference"):
        out = checkpoint(attention, x, use_reentrant=reentrant)
    try:
        out.square().sum().backward()
    except CheckpointError:
        assert not reentrant
    else:
        torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)
    x.grad = None
    checkpoint(attention, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_models_from_the_meta_device_are_initialised_whole(norm):
    model = small(norm_layer=norm, use_pos_embed=True, qkv_bias=True, device="meta").to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    torch.manual_seed(0)
    model.init_weights()
    built = small(norm_layer=norm, use_pos_embed=True, qkv_bias=True)
    for (name, ours), expected in zip(model.named_parameters(), built.parameters(), strict=True):
        assert ours.isfinite().all(), name
        if not expected.std() > 0:  # ones and zeros: gates, norms, biases
            assert torch.equal(ours, expected), name
        else:
            assert 0.7 < ours.std() / expected.std() < 1.4, name


def test_the_meta_device_and_an_empty_batch():
    assert small(device="meta")(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 5)
    for options in ({}, {"global_pool": "avg"}, {"reg_tokens": 2}):
        model = small(**options)
        assert model(images()[:0]).shape == (0, 5)
        assert [x.shape for x in model.get_intermediate_layers(images()[:0], 2, reshape=True)] == [(0, 24, 4, 4)] * 2
        model.train()(images()[:0]).sum().backward()


def test_layers_by_name():
    model = small(norm_layer="layernorm", act_layer="gelu_tanh")
    assert model.norm.eps == 1e-6 and model.blocks[0].mlp.act.approximate == "tanh"
    assert small(norm_layer="rmsnorm2d").norm is not None  # timm's
    with pytest.raises(ValueError, match="unknown act_layer 'geluu'; did you mean 'gelu'"):
        small(act_layer="geluu")


def test_images_are_padded_to_whole_patches():
    model, padded = small(dynamic_img_size=True), small(dynamic_img_pad=True)
    x = images(29, 41)
    with pytest.raises(ValueError, match="must be a multiple of the patch size"):
        model(x)
    torch.testing.assert_close(padded(x), model(torch.nn.functional.pad(x, (0, 7, 0, 3))))


def test_another_patch_size():
    from timm.layers import resample_patch_embed

    model = small()
    kernel = resample_patch_embed(model.patch_embed.proj.weight, [4, 4])
    model.set_input_size(patch_size=4)
    assert torch.equal(model.patch_embed.proj.weight, kernel) and model.patch_embed.grid_size == (8, 8)
    assert model(images()).shape == (2, 5) and model.feature_info[0]["reduction"] == 4


def test_what_is_made_anew_is_as_what_it_replaces():
    """Of the model's type and mode, and frozen where that was."""
    model = small().bfloat16().eval()
    model.pos_embed.requires_grad_(False)
    model.patch_embed.proj.weight.requires_grad_(False)
    model.set_input_size(64, patch_size=4)
    model.reset_classifier(7)
    assert not model.training and not model.head.training and not model.patch_embed.proj.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.pos_embed.requires_grad and not model.patch_embed.proj.weight.requires_grad and model.head.weight.requires_grad
    assert not model.head.bias.any() and 0.015 < model.head.weight.std() < 0.025


@pytest.mark.parametrize("indices, kept, token", [(1, 3, True), ([0, 1], 2, False), ([-2], 2, False)])
def test_pruning_keeps_what_the_intermediates_need(indices, kept, token):
    model = small(reg_tokens=1)
    expected = model.forward_intermediates(images(), indices, intermediates_only=True)
    taken = model.prune_intermediate_layers(indices)
    assert len(model.blocks) == kept and (model.cls_token is not None) == token and isinstance(model.head, torch.nn.Identity)
    for ours, theirs in zip(model.forward_intermediates(images(), taken, intermediates_only=True), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert model(images()).shape == (2, 16 + 2 * token, 24)


def test_rates_of_stochastic_depth_and_their_mean():
    model = small(drop_path_rate=0.3)
    assert [block.drop_path.drop_prob for block in model.blocks] == [0.0, pytest.approx(0.15), pytest.approx(0.3)]
    torch.manual_seed(0)
    dropped = model.train().blocks[2].drop_path(torch.ones(4000, 1, 1))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7]) and abs(dropped.mean() - 1) < 0.05


def test_stochastic_depth_drops_a_sample_as_a_whole():
    dropped = convit.pytorch.layers.DropPath(0.5).train()(torch.ones(200, 3, 5))
    assert dropped.flatten(1).std(dim=1).max() == 0 and dropped[:, 0, 0].std() > 0


def test_without_dropout_a_training_step_draws_no_random_number():
    """So that a run repeats whatever else draws from the generator, as timm's model does."""
    model, before = small(drop_path_rate=0.0).train(), torch.get_rng_state()
    model(images()).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_no_decay_for_tokens():
    assert small(reg_tokens=1).no_weight_decay() == {"pos_embed", "cls_token", "reg_token"}


def test_gradient_checkpointing_changes_no_bit():
    """And a block is run again for its gradient, in place of keeping what it computed."""
    model = small(drop_path_rate=0.5, proj_drop_rate=0.2).train()
    gradients, runs = [], []
    model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: runs.append(enable))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(5)
        model(images()).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and runs == [False, True, True]


METHODS = ("set_grad_checkpointing", "prune_intermediate_layers", "get_intermediate_layers", "forward_intermediates", "forward_head")


@pytest.mark.parametrize("name", [*METHODS, "group_matcher", "reset_classifier"])
def test_methods_take_what_timms_take_with_the_same_defaults(name):
    vit = pytest.importorskip("timm").models.vision_transformer.VisionTransformer
    ours, theirs = (inspect.signature(getattr(kind, name)).parameters for kind in (convit.ConViT, vit))
    assert {x: p.default for x, p in ours.items()} == {x: theirs[x].default for x in ours}


def test_every_parameter_gets_a_gradient():
    model = small(reg_tokens=1).train()
    model(images()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dynamic", [False, True])
def test_hooks_and_wrappers_written_for_timms_keep_the_grid(dynamic):
    """They know one argument; the patches of 16 x 64 pixels, 2 x 8, would also lie on a square."""
    model = small(img_size=(16, 64), dynamic_img_size=dynamic)
    x = images(16, 64)
    expected = model(x)
    hooked, wrapped, left_out = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    for module in (hooked.blocks[0], hooked.blocks[0].attn, hooked.blocks[2], hooked.blocks[2].attn):
        module.register_forward_pre_hook(lambda module, args: (args[0] * 1.0,))
    wrapped.blocks[0], wrapped.blocks[1].attn = torch.nn.Sequential(wrapped.blocks[0]), torch.nn.Sequential(wrapped.blocks[1].attn)

    class Any(torch.nn.Sequential):
        def forward(self, *args):
            return self[0](*args)

    wrapped.blocks[2].attn = Any(wrapped.blocks[2].attn)
    for other in (hooked, wrapped):
        torch.testing.assert_close(other(x), expected)
    wrapped.set_grad_checkpointing()
    torch.testing.assert_close(wrapped(x), expected)
    left_out.blocks[0].attn, left_out.blocks[1] = torch.nn.Identity(), torch.nn.Identity()
    assert left_out(x).shape == expected.shape


def test_attention_is_traced_symbolically_as_timms_is():
    attention, x = convit.MHSA(24, 4), torch.randn(2, 10, 24)
    torch.testing.assert_close(torch.fx.symbolic_trace(attention)(x), attention(x))


def test_a_method_replaced_on_the_class_is_called(monkeypatch):
    model, x = small(), images()
    expected = model(x)
    features = convit.ConViT.forward_features
    monkeypatch.setattr(convit.ConViT, "forward_features", lambda self, x: features(self, x) * 0.0)
    with torch.no_grad():
        assert torch.equal(model(x), model.head.bias.expand(2, -1)) and not torch.equal(model(x), expected)


@pytest.mark.parametrize("rate", ["drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_dropouts_act_while_training_only(rate):
    model = small(**{rate: 0.5})
    x = images(batch=4)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_timm_groups_parameters_by_layer():
    from timm.optim import param_groups_layer_decay

    model = small(reg_tokens=1)
    groups = param_groups_layer_decay(model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    stem = [model.cls_token, model.pos_embed, model.reg_token, model.patch_embed.proj.weight]
    assert {id(p) for p in stem[:3]} <= undecayed
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len({scales[id(p)] for p in stem}) == 1
    assert scales[id(stem[0])] < scales[id(model.blocks[0].mlp.fc1.weight)] < scales[id(model.blocks[1].mlp.fc1.weight)]
    assert scales[id(model.blocks[-1].mlp.fc1.weight)] <= scales[id(model.norm.weight)] < scales[id(model.head.weight)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_and_autocast(dtype):
    model = small()
    expected = model(images())
    tolerance = 20 * FLOOR[dtype]
    with torch.autocast("cpu", dtype):
        under_autocast = model(images())
    assert (under_autocast - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1)
    model.to(dtype)
    logits = model(images(dtype=dtype))
    assert logits.dtype == dtype
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1)


def test_autocast_trains():
    model = small().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images()).float().square().sum()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_deepcopy_and_pickle():
    model = small()
    expected = model(images())
    assert torch.equal(copy.deepcopy(model)(images()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()), expected)


def test_compile_export_and_trace_agree_with_eager():
    model = small()
    expected = model(images())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), expected)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(images(batch=5))[:2], model(images(batch=5))[:2])
    with pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(model, images())
    torch.testing.assert_close(traced(images()), expected)


def test_compiled_training_step_has_no_graph_break():
    model = small().train()
    torch.compile(model, fullgraph=True, backend="aot_eager")(images()).square().sum().backward()
    compiled = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(images()).square().sum().backward()
    for a, p in zip(compiled, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_heads": 5}, "num_heads must divide dim = 24, got 5"),
        ({"local_up_to_layer": 4}, r"local_up_to_layer must be in 0..depth = 0..3, got 4"),
        ({"global_pool": "max"}, "global_pool must be"),
        ({"img_size": 30}, "must be a multiple of the patch size 8 x 8, got 30 x 30"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_unknown_model_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown model 'convit_tinny'; did you mean 'convit_tiny'"):
        convit.create_model("convit_tinny")


def test_no_square_grid_is_named():
    with pytest.raises(ValueError, match="N = 12 patches form no square grid"):
        convit.GPSA(16, 4)(torch.zeros(1, 12, 16))
    assert convit.GPSA(16, 4)(torch.zeros(1, 12, 16), grid=(3, 4)).shape == (1, 12, 16)


def test_attention_maps_equal_timms():
    torch.manual_seed(0)
    x = torch.randn(2, 49, 32)
    for ours, theirs in ((convit.GPSA(32, 4), timm.models.convit.GPSA(32, 4)), (convit.MHSA(32, 4), timm.models.convit.MHSA(32, 4))):
        theirs.load_state_dict(ours.state_dict())
        theirs(x)  # timm makes its relative indices here
        for a, b in zip(ours.get_attention_map(x, return_map=True), theirs.get_attention_map(x, return_map=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    distance, attn = convit.MHSA(32, 4).get_attention_map(torch.randn(2, 50, 32), return_map=True)
    assert distance.shape == (4,) and attn.shape == (4, 50, 50)


def test_last_block_computes_what_the_head_reads(monkeypatch):
    """In inference the class token alone, unless somebody could see the difference."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 48)
    options = {"img_size": (32, 48), "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
    seen = []
    features = convit.ConViT._features

    def watched(*args):
        out = features(*args)
        seen.append(out.shape[1])
        return out

    monkeypatch.setattr(convit.ConViT, "_features", watched)

    def tokens(model, x=x):
        """How many tokens leave the final norm; the logits must be those of all tokens."""
        seen.clear()
        logits = model(x)
        last = seen[-1]
        everything = model.forward_head(model.forward_features(x))
        assert (logits - everything).abs().max() <= MODEL[torch.float32] * everything.abs().max()
        return last

    for options["reg_tokens"] in (0, 2):
        for options["local_up_to_layer"] in (0, 2, 3):
            model = convit.ConViT(**options).eval()
            every = 6 + 1 + options["reg_tokens"]
            with torch.no_grad():
                assert tokens(model) == 1
            assert tokens(model) == every  # gradients may be wanted
    with torch.no_grad():
        assert model.train()(x).shape == (2, 5) and seen[-1] == every
        model.eval()
        handle = model.blocks[-1].mlp.fc1.register_forward_hook(lambda *args: None)
        assert tokens(model) == every
        handle.remove()
        assert tokens(model) == 1
        model.reset_classifier(5, "avg")
        assert tokens(model) == every

        class Extended(convit.ConViT):
            def forward_features(self, x):
                return 2 * super().forward_features(x)

        class Mixing(torch.nn.Module):
            def forward(self, x, grid=None):
                return x + x.mean(1, keepdim=True) if grid is None else block(x, grid)

        assert tokens(Extended(**options).eval()) == every
        for place in ("norm", "blocks.3.mlp", "blocks.3.norm2", "blocks.3.mlp.act", "blocks.3.drop_path", "blocks.3"):
            model = convit.ConViT(**options).eval()
            block = model.blocks[3]
            parent, _, name = place.rpartition(".")
            setattr(model.get_submodule(parent), name, Mixing())
            tokens(model)
        model = convit.ConViT(**options).eval()
        model.blocks[-1].norm1 = torch.nn.LayerNorm((every, 32))
        tokens(model)
        model = convit.ConViT(**options).eval()
        head = model.forward_head
        model.forward_head = lambda x: head(x + x.mean(1, keepdim=True))
        tokens(model)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"patch_size": 0}, "patch_size must be positive, got 0"),
        ({"patch_size": 8.5}, "a size must be an integer or a pair"),
        ({"img_size": (32,)}, r"a size must be an integer or a pair \(height, width\), got \(32,\)"),
        ({"in_chans": -1}, "in_chans must be at least 1, got -1"),
        ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
        ({"num_classes": -2}, "num_classes must be at least 0"),
        ({"reg_tokens": -1}, "reg_tokens must be at least 0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must give the MLPs a width"),
        ({"drop_path_rate": 1.0}, "dropout rates must be in"),
        ({"attn_drop_rate": float("nan")}, "dropout rates must be in"),
        ({"locality_strength": float("inf")}, "locality_strength must be finite, got inf"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 3, 32, 32)])
def test_inputs_of_another_rank_are_named(shape):
    with pytest.raises(ValueError, match=r"images must be \[B, C, H, W\], got"):
        small()(torch.zeros(shape))
    for attention in (convit.GPSA(24, 4), convit.MHSA(24, 4)):
        with pytest.raises(ValueError, match=r"x must be \[B, N, C\], got"):
            attention(torch.zeros(shape[2:] if len(shape) == 5 else shape[1:]).expand(1, 1, *shape[1:]))


def test_a_file_of_weights_for_another_number_of_channels(tmp_path):
    """As timm does it: summed to one channel, repeated at the same gain for more."""
    from timm.models._manipulate import adapt_input_conv

    source = convit.create_model("convit_tiny", img_size=32, depth=2, local_up_to_layer=1)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    for channels in (1, 4):
        model = convit.create_model(
            "convit_tiny", pretrained=tmp_path / "a.pth", in_chans=channels, img_size=32, depth=2, local_up_to_layer=1
        )
        assert torch.equal(model.patch_embed.proj.weight, adapt_input_conv(channels, source.patch_embed.proj.weight))
        assert model(images(channels=channels)).shape == (2, 1000)


def test_weights_beyond_the_models_type_are_refused_by_name(tmp_path):
    weights = {name: x.double() for name, x in small().state_dict().items()}
    weights["head.weight"][0, 0] = 1e300
    torch.save(weights, tmp_path / "a.pth")
    model = small()
    with pytest.raises(ValueError, match=r"in which it would be infinite: head.weight reaches 1e\+300"):
        convit.load_checkpoint(model, tmp_path / "a.pth")
    assert torch.equal(model.head.weight, small().head.weight)
    assert convit.load_checkpoint(model.double(), tmp_path / "a.pth").head.weight[0, 0] == 1e300
    weights["head.weight"][0, 0] = 1e30
    torch.save({name: x.float() for name, x in weights.items()}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"infinite: head.weight reaches 1e\+30"):
        convit.load_checkpoint(small().half(), tmp_path / "b.pth")
