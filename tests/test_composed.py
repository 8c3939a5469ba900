"""Random compositions of what PyTorch users do to a module, over ours and accelerated ones: equal to timm's under the same treatment.

The suite draws few; ``COMPOSED_EXAMPLES=500 pytest tests/test_composed.py -k composed`` draws as many as are asked for.
"""

import contextlib
import copy
import io
import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_replaced import Alone
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import convit

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore")
EXAMPLES = int(os.environ.get("COMPOSED_EXAMPLES", "20"))

SHAPE = {"img_size": 32, "patch_size": 8, "num_classes": 5, "depth": 2, "local_up_to_layer": 1, "num_heads": 4}


@pytest.fixture(autouse=True, scope="module")
def one_process_group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ---- the pairs ----


def pair(kind: str, drop: float) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """timm's, what is to equal it, and an input."""
    torch.manual_seed(0)
    options = {"attn_drop": drop, "proj_drop": drop}
    if kind in ("GPSA", "MHSA"):
        theirs, ours = (getattr(home, kind)(32, num_heads=4, qkv_bias=True, **options) for home in (timm.models.convit, convit))
        x = torch.randn(2, 16, 32)
    else:
        rates = {"attn_drop_rate": drop, "proj_drop_rate": drop, "qkv_bias": True}
        theirs = timm.models.convit.ConVit(embed_dim=8, **SHAPE, **rates)
        ours = convit.ConViT(embed_dim=32, **SHAPE, **rates)
        x = torch.randn(2, 3, 32, 32)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs(x)  # which makes timm's indices for this grid: quantised, it could not any more
    if kind == "accelerated":
        ours = copy.deepcopy(theirs)
    else:
        ours.load_state_dict(theirs.state_dict())
    return theirs, ours, x


# ---- what is done to a part of a module: (parent, name, module) -> None ----


class Lora(nn.Module):
    """As adapters are: around a layer, whose weight and bias they show."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(2, base.in_features, generator=generator).to(base.weight) * 0.1)
        self.b = nn.Parameter(torch.randn(base.out_features, 2, generator=generator).to(base.weight) * 0.1)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


class DroppingLora(Lora):
    """As they are trained: with dropout, so that the order in which layers are called decides over the numbers."""

    def forward(self, x):
        return self.base(x) + nn.functional.dropout(x, 0.2, self.training) @ self.a.T @ self.b.T


class LoraLinear(nn.Linear):
    """As adapters were: a subclass."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True) * 0.01


class Half(nn.Module):
    def forward(self, weight):
        return weight * 0.5


class Scaled(torch.Tensor):
    """A weight that means another in ``linear``, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not nn.functional.linear:
            return super().__torch_function__(function, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            x, weight, *bias = args
            return function(x, weight * 1.5, *bias, **(kwargs or {}))


class Reentrant(nn.Module):
    """A user's own wrapper around ``torch.utils.checkpoint``."""

    def __init__(self, module, reentrant):
        super().__init__()
        self.module, self.reentrant = module, reentrant

    def forward(self, *args):
        return checkpoint(self.module, *args, use_reentrant=self.reentrant)


class Compiled(nn.Module):
    def __init__(self, module, backend):
        super().__init__()
        self.compiled = torch.compile(module, backend=backend)

    def forward(self, *args):
        return self.compiled(*args)


def by_class(parent, name, module):
    module.__class__ = LoraLinear


def scaled_weight(parent, name, module):
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Scaled))


def own_forward(parent, name, module):
    """As offloading libraries do: the instance's ``forward`` is replaced, weights are elsewhere between the calls."""
    kept, forward = {key: p.detach().clone() for key, p in module.named_parameters(recurse=False)}, module.forward

    def loaded(*args, **kwargs):
        for key, value in kept.items():
            setattr(module, key, nn.Parameter(value))
        try:
            return forward(*args, **kwargs)
        finally:
            for key in kept:
                setattr(module, key, nn.Parameter(torch.empty_like(kept[key], device="meta")))

    for key in kept:
        setattr(module, key, nn.Parameter(torch.empty_like(kept[key], device="meta")))
    module.forward = loaded


def as_buffer(parent, name, module):
    if isinstance(bias := module.bias, nn.Parameter):
        del module.bias
        module.register_buffer("bias", bias.detach())


def writing(module):
    return nn.Sequential(nn.ReLU(inplace=True), module)


def scale_gradient(module, grads, _):
    return tuple(None if g is None else g * 1.5 for g in grads)


def replaced(make):
    return lambda parent, name, module: setattr(parent, name, make(module))


LAYER = {
    "prune": lambda parent, name, module: prune.l1_unstructured(module, "weight", 0.4),
    "prune rows": lambda parent, name, module: prune.ln_structured(module, "weight", 0.25, 2, 0),
    "pruned for good": lambda parent, name, module: prune.remove(prune.l1_unstructured(module, "weight", 0.4), "weight"),
    "parametrize": lambda parent, name, module: parametrize.register_parametrization(module, "weight", Half()),
    "parametrize bias": lambda parent, name, module: parametrize.register_parametrization(module, "bias", Half()),
    "weight norm": lambda parent, name, module: parametrizations.weight_norm(module),
    "weight norm by hook": lambda parent, name, module: nn.utils.weight_norm(module),
    "spectral norm": lambda parent, name, module: parametrizations.spectral_norm(module),
    "adapter": replaced(Lora),
    "adapter with dropout": replaced(DroppingLora),
    "adapter by class": by_class,
    "bias as a buffer": as_buffer,
    "weight of a subclass": scaled_weight,
    "transposed weight": lambda parent, name, module: setattr(module, "weight", nn.Parameter(module.weight.detach().t().contiguous().t())),
    "frozen": lambda parent, name, module: module.requires_grad_(False),
    "no bias": lambda parent, name, module: setattr(module, "bias", None),
    "weight in a forward of its own": own_forward,
}
ANY = {
    "hook": lambda parent, name, module: module.register_forward_hook(lambda module, args, out: out * 1.25),
    "pre-hook": lambda parent, name, module: module.register_forward_pre_hook(lambda module, args: (args[0] * 1.25,)),
    "hook with kwargs": lambda parent, name, module: module.register_forward_hook(lambda m, a, k, out: out + 0.1, with_kwargs=True),
    "backward hook": lambda parent, name, module: module.register_full_backward_hook(scale_gradient),
    "checkpoint": replaced(checkpoint_wrapper),
    "own checkpoint": replaced(lambda module: Reentrant(module, False)),
    "reentrant checkpoint": replaced(lambda module: Reentrant(module, True)),
    "offload": replaced(offload_wrapper),
    "compiled inside": replaced(lambda module: Compiled(module, "eager")),
    "compiled in place": lambda parent, name, module: module.compile(backend="eager"),
    "in place before": replaced(writing),
    "wrapper of one argument": replaced(Alone),
    "in place of dropout": lambda parent, name, module: [
        setattr(m, "inplace", True) for m in module.modules() if isinstance(m, nn.Dropout)
    ],
}
ROLES = ("qk", "v", "pos_proj", "proj", "qkv", "fc1", "fc2")
PARTS = ("attn", "mlp", "norm1", "drop1", "proj_drop", "attn_drop", *ROLES)


# ---- what is done to the whole: module -> module ----


def quantised(module):
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)


def sharded(module):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (1,))
    for part in getattr(module, "blocks", ()):
        fully_shard(part, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def averaged(module):
    return torch.optim.swa_utils.AveragedModel(module)


def pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def checkpointed_blocks(module):
    if isinstance(module, convit.ConViT):  # timm's does not offer it
        module.set_grad_checkpointing()
    return module


WHOLE = {
    "dynamic quantisation": quantised,
    "DDP": nn.parallel.DistributedDataParallel,
    "FSDP2": sharded,
    "average": averaged,
    "timm's average": lambda module: timm.utils.ModelEmaV3(module),
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "compile": lambda module: torch.compile(module, backend="eager"),
    "compile with autograd": lambda module: torch.compile(module, backend="aot_eager"),
    "checkpointed blocks": checkpointed_blocks,
    "float64": lambda module: module.double(),
    "Sequential": nn.Sequential,
}

# the compiler takes seconds a composition: a few of it are in the suite by name
COMPILE = EXAMPLES > 50
ANY_DRAWN = [each for each in ANY if COMPILE or "compile" not in each]
# FSDP2 runs on CPU from torch 2.7 on; timm keeps float32 indices of the first call in other types before 1.0.31
OLD = {"FSDP2"} if torch.__version__.startswith("2.6") else set()
OLD |= set() if hasattr(timm.models.convit.ConVit, "forward_intermediates") else {"float64"}
WHOLE_DRAWN = [each for each in WHOLE if each not in OLD and (COMPILE or "compile" not in each)]

layer_steps = st.tuples(st.sampled_from(list(LAYER)), st.sampled_from(ROLES), st.integers(0, 2))
part_steps = st.tuples(st.sampled_from(ANY_DRAWN), st.sampled_from(PARTS), st.integers(0, 2))
whole_steps = st.tuples(st.sampled_from(WHOLE_DRAWN), st.just(""), st.just(0))
WAYS = ("train", "evaluate", "no_grad", "inference", "autocast", "saved on CPU", "functional", "gradient of each sample")


def apply(step, module: nn.Module) -> nn.Module:
    """``module`` after a step; the same one where it has no such part."""
    treatment, role, index = step
    torch.manual_seed(7)
    if treatment in WHOLE:
        return WHOLE[treatment](module)
    known = LAYER if treatment in LAYER else ANY
    found = [name for name, m in module.named_modules() if name.split(".")[-1] == role and (known is ANY or isinstance(m, nn.Linear))]
    if found:
        parent, _, name = found[index % len(found)].rpartition(".")
        above = module.get_submodule(parent)
        known[treatment](above, name, getattr(above, name))
    return module


def run(module, x, way):
    """What the module gives, every gradient, and what it gives after a step of the optimiser."""
    module.train(way not in ("evaluate", "no_grad", "inference"))
    floating = [p.dtype for p in module.parameters() if p.is_floating_point()]
    x = x.to(floating[0] if floating else x.dtype)
    torch.manual_seed(5)
    if way in ("no_grad", "inference"):
        with torch.no_grad() if way == "no_grad" else torch.inference_mode():
            return {"out": module(x)}
    if way == "gradient of each sample":
        parameters = dict(module.named_parameters())

        def loss(parameters, x):
            return torch.func.functional_call(module, parameters, (x[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")(parameters, x)
    x.requires_grad_()
    context = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "saved on CPU": torch.autograd.graph.save_on_cpu,
    }.get(way, contextlib.nullcontext)
    with context():
        if way == "functional":
            parameters = {name: p * 1.0 for name, p in module.named_parameters()}
            out = torch.func.functional_call(module, parameters, (x,))
        else:
            out = module(x)
    results = {"out": out.detach().clone()}
    if out.requires_grad:
        out.float().square().sum().backward()
        results |= {f"gradient of {name}": whole(p.grad) for name, p in module.named_parameters() if p.grad is not None}
        results |= {} if x.grad is None else {"gradient of x": x.grad}
        torch.optim.SGD(module.parameters(), lr=0.01).step()
        if hasattr(module, "update"):
            module.update(module.module)
        elif hasattr(module, "update_parameters"):
            module.update_parameters(module.module)
        torch.manual_seed(6)
        with torch.no_grad():
            results["out after a step"] = module.eval()(x)
    return results


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def compare(kind, steps, when, way, drop):
    """Whether ours gives what timm's gives; False where timm's cannot be so treated."""
    torch._dynamo.reset()
    theirs, ours, x = pair(kind, drop)
    if way == "gradient of each sample" and any("compile" in step[0] for step in steps):
        return False  # torch fails at it wherever a graph breaks, in timm's model too
    if way == "gradient of each sample" and ("checkpointed blocks", "", 0) in steps:
        return False  # which torch.func refuses of any checkpoint, and timm's ConViT has none
    try:
        for step in steps:
            theirs = apply(step, theirs)
        expected = run(theirs, x.clone(), way)
    except Exception as error:
        print(f"timm's: {type(error).__name__}: {error}")
        return False
    for i, step in enumerate(steps):
        if kind == "accelerated" and i == when:
            ours = accelerated(ours)
        ours = apply(step, ours)
    if kind == "accelerated" and when >= len(steps):
        ours = accelerated(ours)
    torch._dynamo.reset()
    found = run(ours, x.clone(), way)
    # the bias's is rounding noise about an exact zero in timm; what has no values cannot be compared
    names = {name for name, each in expected.items() if not each.is_meta and ("pos_proj" not in name or "bias" not in name)}
    assert names <= found.keys()
    rough = way == "autocast" or any(step[0] == "dynamic quantisation" for step in steps)
    largest = max(each.double().norm() for name, each in expected.items() if name in names and each.numel()) if names else 0.0
    for name in sorted(names):
        a, b = found[name].double(), expected[name].double()
        assert a.shape == b.shape and found[name].dtype == expected[name].dtype, name
        allowed = (3e-2 if rough else 1e-4 if "gradient" in name else 1e-5) * b.norm() + (1e-2 if rough else 1e-6) * largest
        assert (a - b).norm() <= allowed, f"{name}: {(a - b).norm():.2e} of {b.norm():.2e}"
    return True


def accelerated(module):
    try:
        return convit.accelerate(module)
    except ValueError as error:  # nothing that it knows is left, after other treatments
        assert "nothing to accelerate" in str(error)
        return module


KINDS = ("GPSA", "MHSA", "model", "accelerated")


@example(kind="accelerated", steps=[("prune", "pos_proj", 0), ("compile", "", 0)], when=1, way="train", drop=0.0)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 50)
@given(
    kind=st.sampled_from(KINDS),
    steps=st.lists(st.one_of(layer_steps, part_steps, whole_steps), min_size=1, max_size=4),
    when=st.integers(0, 4),
    way=st.sampled_from(WAYS),
    drop=st.sampled_from([0.0, 0.0, 0.2]),
)
def test_composed(kind, steps, when, way, drop):
    compare(kind, steps, when, way, drop)


@pytest.mark.parametrize("treatment", [*LAYER, *ANY_DRAWN, *WHOLE_DRAWN])
def test_each_treatment_is_one_that_timm_takes(treatment):
    """By itself each works on timm's, in some use: else the compositions would say nothing of it."""
    role = "" if treatment in WHOLE else "pos_proj" if treatment in LAYER else "attn"
    way = "no_grad" if treatment in ("dynamic quantisation", "weight in a forward of its own") else "train"
    assert compare("model" if treatment == "checkpointed blocks" else "accelerated", [(treatment, role, 0)], 0, way, 0.0)


@pytest.mark.skipif("FSDP2" in OLD, reason="torch 2.6's DTensor lacks operators that timm's own modules call")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_distributed_over_a_mesh(kind):
    """Parameters on every device, the batch divided among them: DTensors throughout."""
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    theirs, ours, x = pair(kind, 0.0)
    ours = accelerated(ours) if kind == "accelerated" else ours
    mesh, found = dist.init_device_mesh("cpu", (1,)), []
    for module in (theirs, ours):
        distribute_module(module, mesh)
        out = module(distribute_tensor(x, mesh, [Shard(0)]))
        out.square().sum().backward()
        gradients = [whole(p.grad) for name, p in module.named_parameters() if not name.endswith("pos_proj.bias")]
        found.append([whole(out), *gradients])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
