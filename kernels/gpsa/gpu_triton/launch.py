"""The host's side: what a call launches, worked out once for its shapes and strides, and the operator's forward and backward."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from triton.runtime import driver

from convit.kernels.eager import recorded, without_autocast
from convit.kernels.gpsa import torch_operator
from convit.kernels.gpsa.gpu_triton import configs
from convit.kernels.gpsa.gpu_triton.common import LOG2E, reduce_kernel
from convit.kernels.gpsa.gpu_triton.configs import CONFIGS, CONTENT, DEVICES, MANY, SMALL, Config, Content, Device, Row
from convit.kernels.gpsa.gpu_triton.loop import delta_kernel, dkdv_loop_kernel, dq_loop_kernel, fwd_loop_kernel, mix_kernel, moments_kernel
from convit.kernels.gpsa.gpu_triton.tile import dkdv_tile_kernel, dq_tile_kernel, fwd_tile_kernel

Steps: TypeAlias = tuple[int, ...]  # a tensor's strides


class Call:
    """A launch with all but its tensors: made once for a plan."""

    __slots__ = ("kernel", "programs", "config", "numbers", "device", "direct", "options", "constants", "compiled", "run", "tail")

    def __init__(
        self, kernel: Any, programs: int, config: Config, numbers: tuple[float, ...], index: int, device: Device, constants: dict[str, Any]
    ):
        self.kernel, self.programs, self.config, self.numbers, self.constants = kernel, programs, config, numbers, constants
        self.device, self.direct, self.options = index, device.direct, device.options(config)
        self.compiled: Any = None  # what Triton launched last
        self.run: Callable[..., Any] | None = None  # launches it for tensors at multiples of 16 bytes
        self.tail: tuple[Any, ...] = ()  # what it is given after the tensors


def launch(call: Call, *tensors: Tensor) -> None:
    """Triton's own launch binds the arguments and works out anew which kernel they mean: tens of microseconds. Here only the alignment
    of the tensors is open, so that where a device allows it the compiled kernel is called."""
    run = call.run
    if call.direct:
        addresses, bits = [x.data_ptr() for x in tensors], 0
        for address in addresses:
            bits |= address
        aligned = bits % 16 == 0
        if run is not None and aligned and not call.kernel.pre_run_hooks:  # launch hooks are asked for at every launch
            run(*addresses, *call.tail, stream=driver.active.get_current_stream(call.device))
            return
    call.compiled = call.kernel[(call.programs,)](*tensors, *call.numbers, **call.options, **call.constants)
    if call.direct and aligned:
        call.tail = (*call.numbers, *(call.constants[name] for name in call.kernel.arg_names[len(tensors) + len(call.numbers) :]))
        call.run = call.compiled[(call.programs, 1, 1)]


_through: Callable[..., None] = launch  # what every launch goes to


@contextlib.contextmanager
def trial(
    *,
    through: Callable[..., None] | None = None,
    devices: Mapping[str, Device] | None = None,
    rows: Mapping[str, Sequence[Row]] | None = None,
    content: Sequence[Content] = (),
) -> Iterator[None]:
    """For measurements and tests, while the block lasts: launches go to ``through(call, *tensors)`` in place of ``launch``, ``devices``
    are known too, and each kernel's ``rows`` and those of ``content`` come before those of their tables. It holds for the whole process."""
    global _through
    before, known, tables = _through, dict(DEVICES), {kernel: list(table) for kernel, table in CONFIGS.items()}
    sources = list(CONTENT)
    _cached_plan.cache_clear()
    try:
        _through = through or before
        DEVICES.update(devices or {})
        for kernel, some in (rows or {}).items():
            CONFIGS[kernel][:0] = some
        CONTENT[:0] = content
        yield
    finally:
        _through = before
        DEVICES.clear()
        DEVICES.update(known)
        CONFIGS.update(tables)
        CONTENT[:] = sources
        _cached_plan.cache_clear()


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


class Plan:
    """What every call with the same shapes and strides launches, worked out once."""

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,  # not only half or not: a compiled kernel is of one type
        grid: tuple[int, int],
        scale: float,
        strides: tuple[Steps, ...],
        device: torch.device,
        precision: str,
    ):
        self.batch, self.heads, self.tokens, dim = shape
        self.grid, self.scale, self.device = grid, scale, device
        # the forward kernels take the sign with q, and 0 as what rounds to it: the score of a masked key is minus infinity
        self.scale_log2 = max(abs(scale), 1e-37) * LOG2E.value
        self.index = -1 if device.index is None else device.index
        self.kind = DEVICES[device.type]
        self.family = self.kind.family(self.index)
        self.strides = tuple(step for x in strides for step in x[:3])
        half = dtype != torch.float32
        # float32 tiles of a whole key row do not fit: it takes the loops at any N
        self.arithmetic = "half" if half else precision
        self.block_d = max(16, configs.power_of_two(dim))
        self.padded = configs.padded_grid(grid) if half and self.block_d <= configs.TILE_D else None
        self.lines = 32 if self.batch * self.heads >= MANY else 4  # of an axis that one program takes: its weights serve them all
        self.common: dict[str, Any] = {"D": dim, "BD": self.block_d, "PRECISION": precision}
        if self.padded:
            self.tile = {"GH": grid[0], "GW": grid[1], "GHP": self.padded[0], "GWP": self.padded[1], **self.common}
        self.content = "loop"
        if self.padded is None and scale > 0:  # the framework's fused attention does not say that it takes others
            self.content = configs.content(self.family, half, self.block_d, self.tokens)
        self.mixes: dict[tuple[Steps, bool, bool, bool, bool], Call] = {}

    def config(self, kernel: str) -> Config:
        return configs.choose(kernel, self.family, self.arithmetic, self.block_d)

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Makes this device the current one for a while, which Triton launches on."""
        if self.index < 0 or self.index == (module := torch.get_device_module(self.device)).current_device():
            return contextlib.nullcontext()
        guard: contextlib.AbstractContextManager[Any] = module.device(self.index)
        return guard

    def launch(self, kernel: Any, programs: int, config: Config, numbers: tuple[float, ...], constants: dict[str, Any]) -> Call:
        if programs > self.kind.programs:
            limit = f"{programs} programs in a launch, and {self.device.type} takes {self.kind.programs}"
            raise RuntimeError(f"convit: {limit}: use smaller batches or backend='sdpa'")
        return Call(kernel, programs, config, numbers, self.index, self.kind, constants)

    def call(self, kernel: Any, blocks: int, config: Config, *numbers: float, **constants: Any) -> Call:
        """A launch of ``blocks`` programs for each head of each image."""
        return self.launch(kernel, self.batch * self.heads * blocks, config, numbers, constants)

    def ragged(self, config: Config) -> dict[str, bool]:
        """How the loops treat a last step that N does not fill: a masked copy of the step behind the loop (TAIL), or, where the
        products are long code on the CUDA cores, masks in every step."""
        ragged = self.tokens % config.keys != 0
        return {"MASK": ragged and self.arithmetic != "half", "TAIL": ragged and self.arithmetic == "half"}

    def tile_rows(self, slots: int) -> int:
        """``slots`` as whole rows of the padded grid, no more than it has and no less than a matrix instruction takes."""
        assert self.padded is not None  # only the tile kernels ask
        rows, columns = self.padded
        return max(min(slots, rows * columns), columns, 16)

    def query_blocks(self, config: Config) -> tuple[int, int, int]:
        """Query slots of a step, steps of a program, programs of a head: as few programs as still fill the chip. Where no number of
        steps is set (0, see ``configs.why_not_persistent``), a program takes one of each of its heads."""
        assert self.padded is not None
        slots = self.tile_rows(config.rows)
        blocks = -(-self.grid[0] // (slots // self.padded[1]))
        steps = min(blocks, config.steps) if self.batch * self.heads >= MANY else min(config.steps, 1)
        return slots, steps, -(-blocks // max(steps, 1))

    def line_blocks(self, x: bool, rows: int) -> int:
        """Programs of a head over the lines of one axis, ``rows`` patches of ``lines`` lines each."""
        count, size = self.grid if x else self.grid[::-1]
        return -(-count // self.lines) * -(-size // rows)

    @functools.cached_property
    def fwd_tile(self) -> Call:
        c = self.config("fwd_tile")
        rows, steps, blocks = self.query_blocks(c)
        programs = heads = self.batch * self.heads
        if steps == 0:
            assert self.padded is not None and self.kind.cores is not None
            resident = self.kind.cores(self.index) * (configs.SLOTS // (self.padded[0] * self.padded[1]))
            programs = min(heads, max(resident // blocks, 1))
        numbers = *self.strides, self.scale_log2, self.heads, 0 if steps else heads  # 0: no other batch needs another kernel
        constants = {"BM": rows, "STEPS": steps, "NEGATIVE": self.scale < 0, "POSITION": True, **self.tile}
        return self.launch(fwd_tile_kernel, programs * blocks, c, numbers, constants)

    @functools.cached_property
    def dq_blocks(self) -> int:
        """Programs of a head in the kernel of dq, or in that of delta alone."""
        if self.content == "sdpa":
            return -(-self.tokens // SMALL.rows)
        c = self.config("dq_tile" if self.padded else "dq_loop")
        return self.query_blocks(c)[2] if self.padded else -(-self.tokens // c.rows)

    @functools.cached_property
    def moment_blocks(self) -> tuple[int, int]:
        rows = self.config("moments").rows
        return self.line_blocks(True, rows), self.line_blocks(False, rows)

    @functools.cached_property
    def parts(self) -> int:
        """Programs of a head that leave a share of the gradients of the gate and the position weights."""
        return self.dq_blocks + (0 if self.padded else sum(self.moment_blocks))

    @functools.cached_property
    def dq_tile(self) -> Call:
        assert self.padded is not None
        c = self.config("dq_tile")
        rows, steps, blocks = self.query_blocks(c)
        keys = self.tile_rows(c.keys)
        slots = self.padded[0] * self.padded[1]
        # slots of keys at a time: all of them where that needs no stack, which with Triton 3.3 it does
        newer = configs.TRITON >= (3, 4)
        part = slots if self.block_d <= 64 and self.family not in ("sm100", "npu") and newer else keys
        # a program with a whole head forms the positional part by contractions: Triton 3.3 does not compile them, 3.9 needs stack for them
        whole = blocks == 1 and self.block_d <= 64 and max(self.padded) <= 32 and self.family != "npu" and newer and configs.TRITON < (3, 9)
        channels = 2048 // (max(16, self.padded[0]) * max(16, self.padded[1])) if whole else 0
        numbers = *self.strides, self.scale, self.heads, self.batch * self.heads * self.tokens
        constants = {"BM": rows, "BN": keys, "BP": part, "CHANNELS": channels, "STEPS": steps, "LARGE_SCORES": True, **self.tile}
        return self.call(dq_tile_kernel, blocks, c, *numbers, **constants)

    @functools.cached_property
    def dkdv_tile(self) -> Call:
        c = self.config("dkdv_tile")
        rows, keys = self.tile_rows(c.rows), self.tile_rows(c.keys)
        assert self.padded is not None
        blocks = -(-self.grid[0] // (keys // self.padded[1]))
        numbers = *self.strides, self.scale, self.heads, self.batch * self.heads * self.tokens
        return self.call(dkdv_tile_kernel, blocks, c, *numbers, BM=rows, BN=keys, **self.tile)

    @functools.cached_property
    def fwd_loop(self) -> Call:
        c = self.config("fwd_loop")
        numbers = *self.strides, self.scale_log2, self.heads, self.tokens
        exact = self.arithmetic == "ieee"  # beside such products the exact exponent costs nothing, and a second pass costs registers
        constants = {"BM": c.rows, "BN": c.keys, **self.ragged(c), **self.common}
        constants |= {"NEGATIVE": self.scale < 0, "POSITION": True, "EXACT": exact, "LARGE_SCORES": not exact}
        return self.call(fwd_loop_kernel, -(-self.tokens // c.rows), c, *numbers, **constants)

    @functools.cached_property
    def dq_loop(self) -> Call:
        c = self.config("dq_loop")
        numbers = *self.strides, self.scale, self.heads, self.tokens, self.batch * self.heads * self.tokens, self.parts
        constants = {"BM": c.rows, "BN": c.keys, "LARGE_SCORES": True, **self.ragged(c), **self.common}
        return self.call(dq_loop_kernel, self.dq_blocks, c, *numbers, **constants)

    @functools.cached_property
    def dkdv_loop(self) -> Call:
        c = self.config("dkdv_loop")
        numbers = *self.strides, self.scale, self.heads, self.tokens, self.batch * self.heads * self.tokens
        return self.call(dkdv_loop_kernel, -(-self.tokens // c.keys), c, *numbers, BM=c.rows, BN=c.keys, **self.common)

    @functools.cached_property
    def delta(self) -> Call:
        numbers = *self.strides[:3], self.heads, self.tokens, self.parts
        return self.call(delta_kernel, self.dq_blocks, SMALL, *numbers, D=self.common["D"], BD=self.block_d, BM=SMALL.rows)

    @functools.cached_property
    def moments(self) -> list[Call]:
        """One launch for both axes, or one for each."""
        c = self.config("moments")
        numbers = *self.strides[:3], *self.strides[9:12], self.heads, *self.grid, self.parts
        constants = {"LINES": self.lines, "BM": c.rows, "BK": c.keys, **self.common}
        x, y = self.moment_blocks
        launches = ((x + y, 0, "xy"),) if self.kind.selects else ((x, 0, "x"), (y, x, "y"))
        return [
            self.call(moments_kernel, blocks, c, *numbers, self.dq_blocks + before, AXES=axes, **constants)
            for blocks, before, axes in launches
        ]

    @functools.cached_property
    def reduce(self) -> Call:
        return self.launch(reduce_kernel, self.heads, SMALL, (self.heads, self.batch, self.parts), {"BLOCK": 256})

    def mix(self, strides: tuple[int, ...], is_x: bool, transpose: bool, sums: bool, content: bool) -> Call:
        """Product of a tensor of these strides with one factor or its transpose; ``sums``: also what the transposes divide by;
        ``content``: mixed with a content by the gate."""
        key = strides, is_x, transpose, sums, content
        if key not in self.mixes:
            c = self.config("mix")
            constants: dict[str, Any] = {"X": is_x, "TRANSPOSE": transpose, "SUMS": sums, "CONTENT": content}
            constants |= {"SHORT": self.grid[is_x] <= c.keys, "LINES": self.lines, "BM": c.rows, "BK": c.keys, **self.common}
            programs = self.batch * self.heads * self.line_blocks(is_x, c.rows)
            programs += self.heads * sum(-(-size // c.rows) for size in self.grid) if sums else 0
            self.mixes[key] = self.launch(mix_kernel, programs, c, (*strides[:3], self.heads, *self.grid), constants)
        return self.mixes[key]


_cached_plan = functools.lru_cache(maxsize=1024)(Plan)


def _plan(q: Tensor, grid_h: int, grid_w: int, scale: float, *strides: Steps) -> Plan:
    return _cached_plan(q.shape, q.dtype, (grid_h, grid_w), scale, strides, q.device, configs.precision(q.dtype, q.device.type))


def forward(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, grid_h: int, grid_w: int, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = _unit(q), _unit(k), _unit(v)
    out = torch_operator.empty_heads(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    plan = _plan(q, grid_h, grid_w, scale, q.stride(), k.stride(), v.stride())
    with plan.current():
        if plan.padded:
            _through(plan.fwd_tile, q, k, v, pos_weight, gating, out, lse)
        elif plan.content == "sdpa":
            lse.fill_(float("nan"))  # not known, and not asked for
            position = _mix(plan, v, pos_weight, pos_weight, True) if grid_w > 1 else v
            _mix(plan, position, pos_weight, pos_weight, False, content=_as_heads(_content(q, k, v, scale)), gating=gating, out=out)
        else:
            position = v
            for is_x in (True, False):
                if plan.grid[is_x] > 1:  # one patch along an axis: its factor is 1
                    position = _mix(plan, position, pos_weight, pos_weight, is_x)
            _through(plan.fwd_loop, q, k, v, _as_heads(position), gating, out, lse)
    return out, lse


def _as_heads(x: Tensor) -> Tensor:
    """``x`` in the layout of ``torch_operator.empty_heads``: a compiler or another kernel may have one of its own."""
    return x if x.transpose(1, 2).is_contiguous() else torch_operator.empty_heads(x).copy_(x)


def _content(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    with without_autocast(q.device.type):
        return scaled_dot_product_attention(q, k, v, scale=scale)


def _mix(
    plan: Plan, x: Tensor, pos_weight: Tensor, sums: Tensor, is_x: bool, transpose: bool = False, first: bool = False,
    content: Tensor | None = None, gating: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Product of ``x`` [B, H, N, D] with Px or Py, or its transpose by ``sums``, which the ``first`` such call fills; where a ``content``
    is given, the sum of it and the product by their shares."""
    if out is None:
        out = torch_operator.empty_heads(x)
    call = plan.mix(x.stride(), is_x, transpose, first, content is not None)
    _through(call, x, pos_weight, sums, x if content is None else content, pos_weight if gating is None else gating, out)
    return out


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gating: Tensor, out: Tensor, lse: Tensor,
    grid_h: int, grid_w: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_out, q, k, v = _unit(grad_out), _unit(q), _unit(k), _unit(v)
    out, lse = _as_heads(out), lse.contiguous()
    dq, dk, dv = torch_operator.empty_heads(q), torch_operator.empty_heads(k), torch_operator.empty_heads(v)
    if dq.numel() == 0:
        return dq, dk, dv, torch.zeros_like(pos_weight), torch.zeros_like(gating)
    plan = _plan(q, grid_h, grid_w, scale, grad_out.stride(), q.stride(), k.stride(), v.stride())
    stats = lse.new_empty((3, *lse.shape))
    part = lse.new_empty((plan.batch * plan.heads, plan.parts, 4))
    dpos_weight, dgating = torch.empty_like(pos_weight), torch.empty_like(gating)
    with plan.current():
        if plan.padded:
            _through(plan.dq_tile, grad_out, q, k, v, pos_weight, gating, lse, dq, stats, part)
            _through(plan.dkdv_tile, grad_out, q, k, v, pos_weight, gating, stats, dk, dv)
        else:
            sums = lse.new_empty((plan.heads, sum(plan.grid)))
            mixed_v = _mix(plan, v, pos_weight, sums, False, first=True)
            if plan.content == "sdpa":
                content_dv = _content_gradients(plan, grad_out, q, k, v, gating, dq, dk, part)
            else:
                _through(plan.dq_loop, grad_out, q, k, v, out, gating, lse, dq, stats, part)
            mixed = _mix(plan, grad_out, pos_weight, sums, True, transpose=True)
            for call in plan.moments:
                _through(call, grad_out, mixed_v, mixed, v, pos_weight, part)
            if plan.content == "sdpa":
                _mix(plan, mixed, pos_weight, sums, False, transpose=True, content=content_dv, gating=gating, out=dv)
            else:
                position = _mix(plan, mixed, pos_weight, sums, False, transpose=True) if plan.grid[0] > 1 else mixed
                _through(plan.dkdv_loop, grad_out, q, k, v, position, gating, stats, dk, dv)
        _through(plan.reduce, part, gating, dpos_weight, dgating)
    return dq, dk, dv, dpos_weight, dgating


def _content_gradients(
    plan: Plan, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, gating: Tensor, dq: Tensor, dk: Tensor, part: Tensor
) -> Tensor:
    """dq, dk and the content's share of the gate's gradient; returns dv of the content alone, before the gate.

    The content is formed again. Its gradients are torch's own, for the output's as it is: the gate's share comes last, in float32, since
    (1 - g) dO may be nothing in float16."""
    with recorded():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        content = _content(q, k, v, plan.scale)
        content_dq, content_dk, content_dv = torch.autograd.grad(content, (q, k, v), grad_out)
    _through(plan.delta, grad_out, _as_heads(content.detach()), part)
    rest = torch.sigmoid(-gating).view(-1, 1, 1)
    torch.mul(content_dq, rest, out=dq)
    torch.mul(content_dk, rest, out=dk)
    return _as_heads(content_dv)


def register(device_type: str) -> None:
    """Make ``forward`` and ``backward`` the operator's kernels for a type of device in the table."""
    torch_operator.register(DEVICES[device_type].key, forward, backward, device_type)


for _device_type in DEVICES:
    register(_device_type)
