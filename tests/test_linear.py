"""The linear layers through oneDNN: values and gradients against float64, and everything that must still reach the layer itself."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import convit
from convit import ops
from convit.kernels import eager
from convit.kernels.linear import cpu_onednn, cpu_packed

if reason := cpu_onednn.why_not(torch.zeros(1, 1), torch.zeros(1, 1)):
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def products(monkeypatch):
    """How many products went through oneDNN."""
    calls = []
    product = cpu_onednn._product
    monkeypatch.setattr(cpu_onednn, "_product", lambda *args: calls.append(args) or product(*args))
    return calls


def layer(i=24, o=40, bias=True):
    torch.manual_seed(0)
    return nn.Linear(i, o, bias=bias)


def error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 196, 192), (2, 5, 3, 33), (1, 777)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("approximate", [None, "none", "tanh"])
def test_values_and_gradients(shape, bias, approximate, products):
    fc = layer(shape[-1], 2 * shape[-1] + 1, bias)
    act = approximate and nn.GELU(approximate)
    x = torch.randn(shape)
    grad = torch.randn(*shape[:-1], fc.out_features)

    def run(linear, layer, x):
        x = x.clone().requires_grad_()
        y = linear(layer, x)
        return y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad.to(y.dtype))

    plain = lambda layer, x: layer(x) if act is None else act(layer(x))  # noqa: E731
    exact = run(plain, copy.deepcopy(fc).double(), x.double())
    eager = run(plain, fc, x)
    ours = run(lambda layer, x: ops.linear(layer, x, act), fc, x)
    assert len(products) == 3  # forward, dx, dweight
    with torch.inference_mode():
        ours = *ours, ops.linear(fc, x, act)
    for actual, other, truth in zip(ours, (*eager, eager[0]), (*exact, exact[0]), strict=True):
        assert actual.shape == truth.shape
        assert error(actual, truth) <= max(2 * error(other, truth), 2e-7)


@pytest.mark.parametrize(
    "weight, bias",
    [
        (lambda: torch.randn(6, 4), lambda: torch.arange(12.0).view(6, 2)[:, 1]),
        (lambda: torch.randn(6, 4), lambda: torch.ones(1).expand(6)),
        (lambda: torch.randn(6, 4), lambda: torch.ones(1)),
        (lambda: torch.randn(6, 8)[:, ::2], lambda: torch.randn(6)),
        (lambda: torch.randn(4, 6).t(), lambda: torch.randn(6)),
        (lambda: torch.randn(6, 1).expand(6, 4), lambda: torch.randn(6)),
        (lambda: torch.randn(30).as_strided((6, 4), (2, 1)), lambda: torch.randn(6)),
        (lambda: torch.randn(6, 4).to_sparse_csr(), lambda: torch.randn(6)),
    ],
    ids=["strided bias", "expanded bias", "bias of one", "columns", "transposed", "expanded", "overlapping", "sparse"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_every_layout_that_the_layer_takes(weight, bias):
    fc = layer(4, 6)
    fc.weight, fc.bias = nn.Parameter(weight()), nn.Parameter(bias())
    for x in (torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(2, 1, 4).expand(2, 5, 4)):
        torch.testing.assert_close(ops.linear(fc, x), fc(x))


def test_shapes_that_do_not_fit_are_refused_by_the_layer():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ops.linear(layer(4, 6), torch.randn(2, 5))


def test_the_output_may_be_written_to(products):
    fc, x = layer(), torch.randn(2, 3, 24)
    y = ops.linear(fc, x)
    y += 1
    nn.Dropout(inplace=True)(ops.linear(fc, x)).sum().backward()
    assert len(products) == 3 and torch.equal(y, ops.linear(fc, x) + 1)


def test_nan_infinity_and_large_values():
    fc = layer(1, 1, bias=False)
    nn.init.ones_(fc.weight)
    x = torch.tensor([float("nan"), float("inf"), 1e30, -1e30, 0.0])[:, None]
    for approximate in ("none", "tanh"):
        act = nn.GELU(approximate)
        with torch.inference_mode():
            exact, theirs = act(x.double()).float(), act(x)  # of infinity torch's own makes NaN, in some versions and shapes
            found = ops.linear(fc, x, act)
            torch.testing.assert_close(found, torch.where(found.isnan() & theirs.isnan(), theirs, exact), equal_nan=True)


def test_expanded_gradient_and_second_derivative():
    fc, x = layer(), torch.randn(6, 24, requires_grad=True)
    for square in (lambda f: f(x).pow(3).sum(), lambda f: f(x).sum()):
        grads = []
        for f in (fc, lambda x: ops.linear(fc, x)):
            (dx,) = torch.autograd.grad(square(f), x, create_graph=True)
            grads.append((dx, *torch.autograd.grad(dx.square().sum(), fc.weight)))
        assert all(error(ours, theirs) < 1e-6 for theirs, ours in zip(*grads, strict=True))


def test_frozen_parts_get_no_gradient(products):
    fc, x = layer().requires_grad_(False), torch.randn(2, 24, requires_grad=True)
    ops.linear(fc, x).sum().backward()
    assert len(products) == 2 and fc.weight.grad is None and x.grad is not None


def test_what_no_gradient_needs_may_be_written_to(products):
    """As with torch's own layer: ``x`` under a frozen weight, the weight under an input without gradient."""
    fc, x = layer(), torch.randn(5, 24, requires_grad=True)
    y, h = ops.linear(fc, x.detach()), x * 1.0
    with torch.no_grad():
        fc.weight.mul_(2)
    y.sum().backward()
    fc.requires_grad_(False)
    y = ops.linear(fc, h)
    h.add_(1)
    y.sum().backward()
    torch.testing.assert_close(x.grad, fc.weight.sum(0).expand(5, -1))
    assert len(products) == 4


@pytest.mark.parametrize("buffer", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_or_bias_that_is_no_parameter_counts(name, buffer):
    fc, x = layer(), torch.randn(5, 24)
    value = getattr(fc, name).detach() + 1
    delattr(fc, name)
    fc.register_buffer(name, value) if buffer else setattr(fc, name, value)
    torch.testing.assert_close(ops.linear(fc, x), fc(x))


def test_a_changed_weight_is_seen(products):
    fc, x = layer(), torch.randn(5, 24)
    with torch.no_grad():
        ops.linear(fc, x)
        fc.weight.data.mul_(2)
        torch.testing.assert_close(ops.linear(fc, x), fc(x))
    assert products


def test_hooks_and_replacements_are_called(products, monkeypatch):
    x = torch.randn(5, 24)
    hooked, seen = layer(), []
    handle = hooked.register_forward_hook(lambda *args: seen.append("layer"))
    ops.linear(hooked, x)
    handle.remove()
    act = nn.GELU()
    act.register_forward_hook(lambda *args: seen.append("act"))
    with torch.no_grad():
        ops.linear(hooked, x, act)
    assert seen == ["layer", "act"] and len(products) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append("global"))
    ops.linear(hooked, x)
    handle.remove()
    replaced = layer()
    replaced.forward = lambda x: seen.append("replaced")
    ops.linear(replaced, x)
    compiled = layer()
    compiled._compiled_call_impl = lambda x: seen.append("compiled")
    ops.linear(compiled, x)
    lora = nn.Sequential(layer())
    torch.testing.assert_close(ops.linear(lora, x), lora(x))
    pruned = torch.nn.utils.prune.l1_unstructured(layer(), "weight", 0.5)
    torch.testing.assert_close(ops.linear(pruned, x), pruned(x))
    for owner, name in ((nn.Module, "__call__"), (nn.functional, "linear"), (nn.Linear, "forward")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *args, name=name: seen.append(name))
            ops.linear(layer(), x)
    assert seen == ["layer", "act", "global", "replaced", "compiled", "__call__", "linear", "forward"] and len(products) == 1


@pytest.mark.parametrize("when", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_hook_of_any_kind_is_run(products, monkeypatch, when, everywhere):
    monkeypatch.setattr(nn.modules.module, "_global_is_full_backward_hook", None)  # as it is set back
    fc, seen = layer(), []
    owner, name = (nn.modules.module, f"register_module_{when}_hook") if everywhere else (fc, f"register_{when}_hook")
    handle = getattr(owner, name)(lambda *args: seen.append(when))
    try:
        ops.linear(fc, torch.randn(5, 24, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert seen == [when] and not products


def test_a_mode_beside_the_default_device_sees_the_call(products):
    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    fc, x, seen = layer(), torch.randn(5, 24), []
    with torch.device("cpu"):
        ops.linear(fc, x)
        assert len(products) == 1
        with Watching():
            ops.linear(fc, x)
    assert nn.functional.linear in seen and len(products) == 1


def test_a_gelu_in_the_place_of_torchs_is_called(products, monkeypatch):
    monkeypatch.setattr(nn.functional, "gelu", lambda x, approximate: x * 0)
    with torch.no_grad():
        assert not ops.linear(layer(), torch.randn(5, 24), nn.GELU()).any()


def test_products_packed_where_torch_lacks_onednn(monkeypatch):
    """The same numbers from its own linear layer, and none of the weight's memory."""
    fc, x = layer(), torch.randn(5, 24)
    with torch.no_grad():
        for packs in (True, False):
            monkeypatch.setattr(cpu_packed, "_packs", lambda dtype, packs=packs: packs)
            weight, bias = fc.weight.clone(), fc.bias.clone()
            product = cpu_packed.Packed(weight, bias, torch.float32, 5)
            weight.zero_()
            assert torch.equal(product.unpack(), fc.weight)
            torch.testing.assert_close(product(x), fc(x))
            for form in ("none", "tanh"):
                torch.testing.assert_close(product(x, form), nn.functional.gelu(fc(x), approximate=form), rtol=1e-5, atol=1e-6)


def test_who_watches_the_operators_sees_them(products):
    fc, x = layer(), torch.randn(5, 24)
    with FlopCounterMode(display=False) as counter:
        ops.linear(fc, x)
    assert counter.get_total_flops() == 2 * 5 * 24 * 40
    y = ops.linear(fc, x.clone().requires_grad_())
    products.clear()
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 5 * 24 * 40
    mapped = torch.func.vmap(lambda x: ops.linear(fc, x))(x[:, None])
    torch.testing.assert_close(mapped[:, 0], fc(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(fc, x).dtype == torch.bfloat16
    with convit.use_backend("reference"):
        ops.linear(fc, x)
    with torch.backends.mkldnn.flags(enabled=False):
        ops.linear(fc, x)
    ops.linear(copy.deepcopy(fc).double(), x.double())
    assert not products


def test_every_layer_of_a_model(products):
    model = convit.create_model("convit_tiny", img_size=32, num_classes=5).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        ours = model(x)
        assert len(products) == 10 * 5 + 2 * 4
        with convit.use_backend("reference"):
            assert error(ours, model.double()(x.double())) < 2e-6


@pytest.mark.parametrize("name", ["_complete", "_function_mode_stack", "_DeviceContext"])
def test_where_torch_lacks_a_name_the_call_takes_the_plain_path(monkeypatch, name):
    """Of another version, which may have none of what says whether anybody watches."""
    x, layer = torch.ones(2, 3), torch.nn.Linear(3, 3)
    with torch.device("cpu"):  # a mode, but one that changes nothing
        assert eager.eager(x) and eager.bare(layer, torch.nn.Linear)
        monkeypatch.setattr(eager, name, None)
        assert not eager.eager(x)
    monkeypatch.delattr(torch.nn.modules.module, "_global_forward_hooks")
    assert not eager.bare(layer, torch.nn.Linear)
    monkeypatch.undo()
    assert eager.eager(x) and eager.bare(layer, torch.nn.Linear)
