"""Every derivative that torch can ask of convit.gpsa, on every backend, against the definition."""

import pytest
import torch
import torch.autograd.functional as functional
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vmap

import convit

BACKENDS = ("cpp", "sdpa")
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:`torch.jit.script` is deprecated")


def flat(x):
    return torch.cat([flat(y) for y in x]) if isinstance(x, (tuple, list)) else x.flatten()


def arguments(grid, heads=2, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (1, heads, grid[0] * grid[1], dim)
    return tuple(torch.randn(size, generator=generator) for size in (shape, shape, shape, (heads, 3), (heads,)))


def functions(backend):
    """The operator at two sizes and scalars of it, with a scale that no derivative may forget."""

    def large(*inputs):
        return convit.gpsa(*inputs, (4, 3), scale=0.6, backend=backend)

    def small(*inputs):
        return convit.gpsa(*inputs, (2, 2), scale=-0.4, backend=backend)

    return large, small, lambda *inputs: large(*inputs).square().sum(), lambda *inputs: small(*inputs).pow(3).sum()


LARGE, TANGENTS, SMALL = arguments((4, 3)), arguments((4, 3), seed=1), arguments((2, 2), 1, 2)
MAPPED = tuple(torch.stack([x, 2 * x, x - 1], 1) for x in LARGE)
WEIGHTS = (0, 3, 4)  # q, pos_weight, gating


def leaves():
    return [x.clone().requires_grad_() for x in LARGE]


def in_forward_mode(large):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(large(*map(forward_ad.make_dual, LARGE, TANGENTS))).tangent


def tangent_of_a_gradient(large):
    inputs = leaves()
    out = large(*inputs)
    with forward_ad.dual_level():
        found = torch.autograd.grad(out, inputs, forward_ad.make_dual(LARGE[0], LARGE[1]))
        return [forward_ad.unpack_dual(x).tangent for x in found]


def of_order(loss, order):
    inputs = leaves()
    value = loss(*inputs)
    for _ in range(order):
        gradients = torch.autograd.grad(value, inputs, create_graph=True)
        value = sum(x.square().sum() for x in gradients)
    return torch.autograd.grad(value, inputs)


def of_a_batch_of_gradients(large, each):
    inputs = leaves()
    out = large(*inputs)
    grads = torch.stack([LARGE[0], LARGE[1], LARGE[2]])
    if each:
        return vmap(lambda g: torch.autograd.grad(out, inputs, g, retain_graph=True))(grads)
    return torch.autograd.grad(out, inputs, grads, is_grads_batched=True)


def of_a_batch_of_gradients_and_again(large):
    inputs = leaves()
    out = large(*inputs)
    gradients = torch.autograd.grad(out, inputs, torch.stack([LARGE[0], LARGE[1]]), is_grads_batched=True, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in gradients), inputs)


DERIVATIVES = {
    "jvp": lambda large, small, loss, cube: jvp(large, LARGE, TANGENTS)[1],
    "forward_ad": lambda large, small, loss, cube: in_forward_mode(large),
    "tangent of a gradient": lambda large, small, loss, cube: tangent_of_a_gradient(large),
    "grad": lambda large, small, loss, cube: grad(loss, tuple(range(5)))(*LARGE),
    "jacrev": lambda large, small, loss, cube: jacrev(small, WEIGHTS)(*SMALL),
    "jacfwd": lambda large, small, loss, cube: jacfwd(small, WEIGHTS)(*SMALL),
    "hessian": lambda large, small, loss, cube: hessian(cube, WEIGHTS)(*SMALL),
    "jacrev of jacrev": lambda large, small, loss, cube: jacrev(jacrev(cube, WEIGHTS), WEIGHTS)(*SMALL),
    "jacrev of jacfwd": lambda large, small, loss, cube: jacrev(jacfwd(cube, WEIGHTS), WEIGHTS)(*SMALL),
    "vmap": lambda large, small, loss, cube: vmap(large, in_dims=1)(*MAPPED),
    "vmap over one": lambda large, small, loss, cube: vmap(large, (None, None, None, None, 1))(*LARGE[:4], MAPPED[4]),
    "vmap of vmap": lambda large, small, loss, cube: vmap(
        vmap(large, (1, None, None, None, None)), (None, None, None, 1, None), out_dims=2
    )(MAPPED[0], *LARGE[1:3], MAPPED[3], LARGE[4]),
    "vmap of grad": lambda large, small, loss, cube: vmap(grad(loss, WEIGHTS), (1, 1, None, None, None))(*MAPPED[:2], *LARGE[2:]),
    "vmap of hessian": lambda large, small, loss, cube: vmap(hessian(cube, 3))(*(torch.stack([x, x - 1]) for x in SMALL)),
    "double backward": lambda large, small, loss, cube: of_order(loss, 1),
    "third order": lambda large, small, loss, cube: of_order(loss, 2),
    "batched gradients": lambda large, small, loss, cube: of_a_batch_of_gradients(large, False),
    "vmap of autograd.grad": lambda large, small, loss, cube: of_a_batch_of_gradients(large, True),
    "gradient of batched gradients": lambda large, small, loss, cube: of_a_batch_of_gradients_and_again(large),
    "functionalize": lambda large, small, loss, cube: functionalize(large)(*LARGE),
    "grad of functionalize": lambda large, small, loss, cube: grad(functionalize(loss), tuple(range(5)))(*LARGE),
    "functionalize of grad": lambda large, small, loss, cube: functionalize(grad(loss, tuple(range(5))))(*LARGE),
    "functional.hessian": lambda large, small, loss, cube: functional.hessian(cube, SMALL, vectorize=True),
    "functional.jacobian": lambda large, small, loss, cube: functional.jacobian(small, SMALL, vectorize=True, strategy="forward-mode"),
    "functional.jvp": lambda large, small, loss, cube: functional.jvp(large, LARGE, TANGENTS)[1],
}


@pytest.mark.parametrize("name", DERIVATIVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives(backend, name):
    if reason := convit.why_not(backend, convit.Problem("torch", "cpu", "float32", 1, 2, 12, 8, (4, 3))):
        pytest.skip(reason)
    truth, found = (flat(DERIVATIVES[name](*functions(each))) for each in ("reference", backend))
    assert truth.norm() > 0 and (found - truth).norm() <= 2e-5 * truth.norm()


def images_and_model():
    torch.manual_seed(0)
    model = convit.ConViT(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, local_up_to_layer=1, num_classes=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, torch.randn(3, 3, 16, 16)


def test_gradients_of_each_sample():
    model, x = images_and_model()
    parameters = dict(model.named_parameters())

    def loss(parameters, image):
        return functional_call(model, parameters, image[None]).square().sum()

    together = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(together[name][i], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def in_a_batch(out, inputs, grads, **options):
    return torch.autograd.grad(out, inputs, grads, is_grads_batched=True, **options)


def mapped(out, inputs, grads, **options):
    return vmap(lambda g: torch.autograd.grad(out, inputs, g, retain_graph=True, **options))(grads)


def tangents_of(out, inputs, grads, **options):
    with forward_ad.dual_level():
        found = torch.autograd.grad(out, inputs, forward_ad.make_dual(grads[0], grads[1]), **options)
        return [forward_ad.unpack_dual(x).tangent for x in found]


@pytest.mark.parametrize("gradients", [in_a_batch, mapped, tangents_of])
@pytest.mark.parametrize("module", [lambda: convit.GPSA(32, 4), lambda: convit.MHSA(32, 4)], ids=["GPSA", "MHSA"])
def test_gradients_of_modules_by_every_way(module, gradients):
    """Of a graph that was made plainly, with what its linear layers do; and, but for tangents, their gradients again."""
    torch.manual_seed(0)
    module, x = module(), torch.randn(2, 16, 32)
    found = []
    for backend, dtype in ((None, torch.float32), ("reference", torch.float64)):
        y = x.to(dtype).requires_grad_()
        inputs = [y, *(p for name, p in module.to(dtype).named_parameters() if name != "pos_proj.bias")]
        with convit.use_backend(backend):
            out = module(y)
            grads = torch.stack([out.detach().sin(), out.detach().cos()])
            again = gradients is not tangents_of
            found.append(list(gradients(out, inputs, grads, create_graph=again)))
            if again:
                loss = sum(g.square().sum() for g in found[-1])
                found[-1] += torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() <= 2e-5 * exact.norm()


@pytest.mark.parametrize("backend", [None, "sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_models_have_a_second_derivative_and_tangents(backend, dtype):
    """MHSA blocks and linear layers too: the gradient's directional derivative, in both modes, against a difference."""
    model, x = images_and_model()
    model.to(dtype)
    x, direction = x.to(dtype), torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def gradient(x):
        x = x.detach().requires_grad_() if not x.requires_grad else x
        return torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]

    twin, y = images_and_model()
    twin.double()
    with convit.use_backend("reference"):
        step = 1e-5
        y, towards = y.double(), direction.double()
        losses = [twin(y + sign * step * towards).square().sum() for sign in (1, -1)]
        slope = (losses[0] - losses[1]) / (2 * step)

        def double_gradient(x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(twin(x).square().sum(), x)[0]

        second = (double_gradient(y + step * towards) - double_gradient(y - step * towards)) / (2 * step)
    with convit.use_backend(backend):
        x.requires_grad_()
        found = torch.autograd.grad((gradient(x) * direction).sum(), x)[0]
        assert (found.double() - second).norm() <= 1e-4 * second.norm()
        tangent = jvp(lambda x: model(x).square().sum(), (x.detach(),), (direction,))[1]
        assert abs(tangent.double() - slope) <= 1e-4 * abs(slope)
