"""Two stand-in NPUs (csrc/npu.cpp): torch's private device under its name, the Triton kernels in the interpreter. Run by test_npu.py in a
process of its own, with TRITON_INTERPRET=1 and the library in NPU_LIBRARY."""

import ctypes
import os
from types import ModuleType

import pytest
import torch
from gpsa_cases import Case, Inputs, check, make_inputs, run
from torch import Tensor
from triton_quickly import once_a_launch

import convit
from convit.dispatch import Problem, choose, order
from convit.kernels.gpsa.gpu_triton import configs, launch

once_a_launch()
chips = ctypes.CDLL(os.environ["NPU_LIBRARY"])


class current:
    """``torch.npu.device``."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __enter__(self) -> None:
        self.before = chips.npu_current_device()
        chips.npu_set_device(self.index)

    def __exit__(self, *error: object) -> None:
        chips.npu_set_device(self.before)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> Tensor:
    return torch.ops.aten.convolution(x.cpu(), weight.cpu(), None if bias is None else bias.cpu(), *rest).to(x.device)


def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest):
    gradients = torch.ops.aten.convolution_backward(grad.cpu(), x.cpu(), weight.cpu(), [len(weight)], *rest)
    return tuple(y if y is None else y.to(x.device) for y in gradients)


def start() -> None:
    """What importing torch_npu does on a machine with two chips."""
    chips.npu_start()
    torch.utils.rename_privateuse1_backend("npu")
    npu = ModuleType("torch.npu")
    npu.__dict__.update(
        is_available=lambda: True,
        device_count=lambda: 2,
        current_device=chips.npu_current_device,
        device=current,
        get_device_name=lambda index=None: "Ascend910B1",
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
    )
    torch._register_device_module("npu", npu)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    operators = torch.library.Library("aten", "IMPL")
    operators.impl("convolution_overrideable", convolution, "PrivateUse1")
    operators.impl("convolution_backward_overrideable", convolution_backward, "PrivateUse1")
    globals()["operators"] = operators  # they go with it


start()


def on_host(x: Tensor) -> Tensor:
    """The same memory as a tensor of the CPU, which the interpreter takes."""
    storage = x.untyped_storage()
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.fixture
def launched(monkeypatch):
    """Kernels in the order of their launches, each on the device of its tensors."""
    names = []

    def through(call: launch.Call, *tensors: Tensor) -> None:
        devices = {x.device for x in tensors}
        assert devices == {torch.device("npu", chips.npu_current_device())}
        # that compiler's own option, which the interpreter does not know
        assert call.options.pop("multibuffer", False) in (False, True) and not call.options
        assert call.programs <= configs.NPU.programs
        names.append(call.kernel.__name__.removesuffix("_kernel"))
        launch.launch(call, *map(on_host, tensors))

    monkeypatch.setitem(configs.backends, "ascend", None)
    configs._no_npu.cache_clear()
    with launch.trial(through=through, devices={"npu": configs.NPU}):
        launch.register("npu")
        yield names
    configs._no_npu.cache_clear()
    assert chips.npu_current_device() == 0


TILE = ["fwd_tile", "dq_tile", "dkdv_tile", "reduce"]
LOOP = ["mix", "mix", "fwd_loop", "mix", "dq_loop", "mix", "moments", "moments", "mix", "dkdv_loop", "reduce"]


@pytest.mark.parametrize(
    "case, dtype, kernels",
    [
        (Case(1, 2, 16, (7, 11)), torch.float16, TILE),
        (Case(1, 1, 16, (2, 2)), torch.float16, TILE),
        (Case(1, 1, 16, (17, 16)), torch.float16, LOOP),
        (Case(1, 1, 20, (3, 13)), torch.float32, LOOP),
    ],
    ids=str,
)
def test_the_automatic_choice_launches_the_plan_on_the_tensors_own_device(launched, case, dtype, kernels):
    inputs, grad = make_inputs(case, dtype=dtype)
    far = [x.to("npu:1") for x in inputs]
    ours = run(convit.gpsa, Inputs(*far), grad.to("npu:1"), case.grid)
    assert launched == kernels
    assert all(x.device == torch.device("npu:1") for x in ours.values())
    check({name: x.cpu() for name, x in ours.items()}, inputs, grad, case.grid)


def test_a_model_trains_as_on_the_cpu(launched):
    losses = {}
    images, targets = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1])
    for device in ("cpu", "npu:1"):
        torch.manual_seed(0)
        model = convit.ConViT(img_size=16, patch_size=8, num_classes=3, embed_dim=32, depth=2, num_heads=2, local_up_to_layer=1).to(device)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        losses[device] = []
        with convit.use_backend("reference" if device == "cpu" else None):
            for _ in range(2):
                optimiser.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(images.to(device)), targets.to(device))
                loss.backward()
                optimiser.step()
                losses[device].append(loss.item())
    assert launched == LOOP * 2  # in float32
    assert losses["npu:1"] == pytest.approx(losses["cpu"], abs=1e-5) and losses["cpu"][1] < losses["cpu"][0]


def test_autocast(launched):
    inputs, _ = make_inputs(Case(1, 2, 16, (3, 4)), device="npu:0")
    with torch.autocast("npu", torch.float16):
        assert convit.gpsa(*inputs, (3, 4)).dtype == torch.float16
    assert launched == TILE[:1]


def test_another_chip_takes_sdpa(launched, monkeypatch):
    problem = Problem("torch", "npu", "float16", 2, 4, 196, 48, (14, 14))
    assert order(problem) == ("triton", "sdpa", "reference") and choose(problem, None).__name__.endswith("gpu_triton")
    able_chips, others = ("Ascend910B4-1", "Ascend910_9382"), ("Ascend910B", "Ascend910PremiumA", "Ascend310P3", "Ascend950PR_9599")
    for name in able_chips + others:
        monkeypatch.setattr(torch.npu, "get_device_name", lambda index=None, name=name: name)
        configs._no_npu.cache_clear()
        reason = convit.why_not("triton", problem)
        assert reason is None if name in able_chips else name in reason
        assert choose(problem, None).__name__.endswith("gpu_triton" if name in able_chips else "any_sdpa")
    inputs, _ = make_inputs(Case(1, 2, 16, (3, 4)), device="npu:1")
    out = convit.gpsa(*inputs, (3, 4))
    assert not launched and torch.allclose(out.cpu(), convit.gpsa(*(x.cpu() for x in inputs), (3, 4), backend="reference"), atol=1e-5)


def test_a_batch_of_too_many_programs_takes_sdpa(launched):
    small, large = (Problem("torch", "npu", "float16", batch, 16, 196, 48, (14, 14)) for batch in (585, 586))
    assert convit.why_not("triton", small) is None
    assert convit.why_not("triton", large) == "65632 programs in a launch, and npu takes 65535: use smaller batches"
    assert choose(large, None).__name__.endswith("any_sdpa")


def test_wide_heads_take_sdpa(launched):
    case = Case(1, 2, 80, (3, 4))
    reason = convit.why_not("triton", Problem("torch", "npu", "float16", 1, 2, 12, 80, case.grid))
    assert reason == "head dimension 80 is larger than 64 in float16: 'sdpa' serves it"
    inputs, grad = make_inputs(case, dtype=torch.float16)
    ours = run(convit.gpsa, Inputs(*(x.to("npu:1") for x in inputs)), grad.to("npu:1"), case.grid)
    assert not launched
    check({name: x.cpu() for name, x in ours.items()}, inputs, grad, case.grid)
