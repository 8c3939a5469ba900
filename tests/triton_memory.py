"""Every address that the Triton kernels read or write, checked in the interpreter: inside its tensors, written before it is read, and
no input written to. Run by test_triton.py with TRITON_INTERPRET=1."""

import mmap
import os
from typing import NamedTuple

assert os.environ.get("TRITON_INTERPRET") == "1"
# ruff: noqa: E402

import numpy as np
import pytest
import torch
from gpsa_cases import Case, make_inputs
from triton.runtime.interpreter import InterpreterBuilder
from triton_quickly import once_a_launch

from convit.kernels.gpsa.gpu_triton import configs, launch
from convit.kernels.gpsa.gpu_triton.configs import Config, Content, Row
from convit.kernels.gpsa.gpu_triton.loop import mix_kernel

once_a_launch()


class Area(NamedTuple):
    """The bytes of one piece of storage: the number of the last launch that had an element there; whether it was written; an input's."""

    base: int
    launch: np.ndarray
    written: np.ndarray
    input: np.ndarray


def elements(x: torch.Tensor, base: int) -> np.ndarray:
    """Of every element, where it begins; what lies between the elements of a view belongs to others."""
    offsets = np.zeros((), np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size) * stride
    return x.data_ptr() - base + offsets.reshape(-1) * x.element_size()


class Memory:
    """What may be read and written: launches go through ``launch``, which knows the tensors of each."""

    def __init__(self, *inputs: torch.Tensor):
        self.kept: list[tuple] = [inputs]  # no tensor is freed: its addresses would come back with another
        self.areas: dict[int, Area] = {}
        self.launches = self.reads = 0
        for x in inputs:
            self.given(x)

    def given(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor that others wrote, and that no kernel may."""
        area = self.area(x)
        area.written[elements(x, area.base)] = area.input[elements(x, area.base)] = True
        self.kept.append((x,))
        return x

    def area(self, x: torch.Tensor) -> Area:
        base, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
        return self.areas.setdefault(base, Area(base, np.zeros(size, np.int32), np.zeros(size, bool), np.zeros(size, bool)))

    def launch(self, call, *tensors: torch.Tensor) -> None:
        self.kept.append(tensors)
        self.launches += 1
        for x in tensors:
            area = self.area(x)
            area.launch[elements(x, area.base)] = self.launches
        launch.launch(call, *tensors)

    def inside(self, addresses: np.ndarray) -> tuple[Area, np.ndarray]:
        first, last = int(addresses.min()), int(addresses.max())
        for area in self.areas.values():
            if area.base <= first and last < area.base + len(area.launch):
                at = addresses.astype(np.int64) - area.base
                if (area.launch[at] == self.launches).all():
                    return area, at
        raise AssertionError("an access outside of the tensors of the launch")

    def read(self, addresses: np.ndarray) -> None:
        self.reads += 1
        if addresses.size:
            area, at = self.inside(addresses)
            assert area.written[at].all(), "a read of memory that nothing wrote"

    def write(self, addresses: np.ndarray) -> None:
        if addresses.size:
            area, at = self.inside(addresses)
            assert not area.input[at].any(), "a write to an input"
            area.written[at] = True


@pytest.fixture
def watch(monkeypatch):
    """Makes a ``Memory`` see every access of the interpreter from then on."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def watched(memory: Memory) -> Memory:
        def create_masked_load(self, ptrs, mask, *rest):
            memory.read(ptrs.data[mask.data.astype(bool)])
            return load(self, ptrs, mask, *rest)

        def create_masked_store(self, ptrs, value, mask, *rest):
            memory.write(ptrs.data[mask.data.astype(bool)])
            return store(self, ptrs, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", create_masked_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", create_masked_store)
        return memory

    return watched


def passes(memory: Memory, case: Case, inputs, grad, scale: float, *rows: Content) -> None:
    with launch.trial(through=memory.launch, content=rows):
        out, lse = launch.forward(*inputs, *case.grid, scale)
        launch.backward(grad, *inputs, out, lse, *case.grid, scale)


KINDS = {"tile": torch.float16, "loop": torch.float32, "loop, half": torch.float16}
CASES = [
    ("tile", Case(1, 2, 16, (3, 5)), {}),
    ("tile", Case(2, 1, 20, (7, 11)), {"many": True}),
    ("tile", Case(1, 1, 16, (3, 5)), {"scale": -0.5, "size": 300.0}),
    ("tile", Case(5, 1, 20, (7, 11)), {"persistent": True}),
    ("loop", Case(1, 2, 16, (3, 5)), {}),
    ("loop", Case(2, 1, 20, (2, 40)), {"many": True}),
    ("loop", Case(1, 1, 16, (5, 1)), {"scale": -0.5, "size": 1e4}),
    ("loop", Case(1, 1, 16, (1, 70)), {}),
    ("loop, half", Case(1, 1, 16, (2, 129)), {}),
    ("loop", Case(2, 1, 20, (3, 7)), {"sdpa": True, "many": True}),
]


@pytest.mark.parametrize("kind, case, options", CASES, ids=lambda value: str(value))
def test_every_access_is_inside_its_tensors_and_written_before_it_is_read(kind, case, options, watch, monkeypatch):
    if options.get("many"):
        monkeypatch.setattr(launch, "MANY", 1)
    inputs, grad = make_inputs(case, dtype=KINDS[kind])
    inputs = inputs._replace(q=inputs.q * options.get("size", 1.0))  # large scores take a branch of their own
    memory = watch(Memory(*inputs, grad))
    rows = []
    if options.get("sdpa"):
        rows = [Content("", "float32", 64, 1, "sdpa")]
        real = launch._as_heads  # through which what the framework's attention wrote comes to the kernels
        monkeypatch.setattr(launch, "_as_heads", lambda x: memory.given(real(x)))
    persistent = [Row("", "half", 64, Config(64, 256, 4, 2, 0))] if options.get("persistent") else []
    with launch.trial(rows={"fwd_tile": persistent}):
        passes(memory, case, inputs, grad, options.get("scale", 0.25), *rows)
    assert memory.reads > 20


@pytest.mark.parametrize("kind", ["tile", "loop"])
def test_a_tensor_one_row_too_short_is_noticed(kind, watch):
    """The planted fault: the kernels are told one token more than k has."""
    case = Case(1, 1, 16, (3, 5))
    inputs, grad = make_inputs(case, dtype=KINDS[kind])
    short = torch.cat([inputs.k, inputs.k], 2)[:, :, :14].as_strided(inputs.k.shape, (480, 480, 16, 1))
    memory = Memory(*inputs._replace(k=short[:, :, :14]), grad)
    real = memory.launch

    def launched(call, *tensors):
        real(call, *(x[:, :, :14] if x.data_ptr() == short.data_ptr() else x for x in tensors))

    memory.launch = launched
    with pytest.raises(Exception, match="outside of the tensors"):
        passes(watch(memory), case, inputs._replace(k=short), grad, 0.25)


def test_a_kernel_that_is_left_out_is_noticed(watch):
    """The planted fault: scratch memory that the next kernel reads was never written."""
    case = Case(1, 1, 16, (3, 5))
    inputs, grad = make_inputs(case)
    memory = Memory(*inputs, grad)
    real = memory.launch
    memory.launch = lambda call, *tensors: None if call.kernel is mix_kernel else real(call, *tensors)
    with pytest.raises(Exception, match="nothing wrote"):
        passes(watch(memory), case, inputs, grad, 0.25)


@pytest.mark.parametrize("kind", ["tile", "loop"])
def test_elements_further_apart_than_32_bits_count(kind, monkeypatch):
    """Images and patches of views into large storage: the same bits as side by side. (Pages that nothing touches take no memory.)"""
    if kind == "loop":
        monkeypatch.setattr(configs, "padded_grid", lambda grid: None)
    case, image, patch = Case(3, 1, 16, (1, 3)), 2**30, 2**30 + 4096
    size = 2 * (2 * image + 2 * patch + 64)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    storage = torch.frombuffer(memory, dtype=torch.float16)
    inputs, grad = make_inputs(case, dtype=torch.float16)
    views = [storage[16 * i :].as_strided(grad.shape, (image, image, patch, 1)) for i in range(4)]
    for view, x in zip(views, (*inputs[:3], grad), strict=True):
        view.copy_(x)

    def both(q, k, v, grad):
        given = q, k, v, *inputs[3:]
        with launch.trial():
            out, lse = launch.forward(*given, *case.grid, 0.25)
            return out, lse, *launch.backward(grad, *given, out, lse, *case.grid, 0.25)

    assert all(map(torch.equal, both(*views), both(*inputs[:3], grad)))
