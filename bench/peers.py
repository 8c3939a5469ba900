"""Everything that the benchmark times against everything else: the attention core and whole models, ours and the peers'.

The attention core starts from packed projections, qk [B, N, 2, H, D] and v [B, N, H, D], and ends in [B, N, H * D]: what stands
between the two linear layers of an attention module. A peer builds a call without arguments that returns the output, followed
with ``backward`` by the gradients of (qk, v, pos_weight, gating); None where the peer has no such input.

What a user would cache between calls is built outside the timed call: relative indices always, the dense position softmax in
inference only, where the weights are constants.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import convit
from convit.dispatch import ORDER, Problem
from convit.kernels.gpsa.reference import relative_positions

Call = Callable[[], tuple]


@dataclass(frozen=True)
class Core:
    """One problem of the attention core."""

    batch: int
    grid: tuple[int, int]
    heads: int
    head_dim: int
    backward: bool = False
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.heads}x{self.head_dim}"

    def __str__(self) -> str:
        kind = "fwd+bwd" if self.backward else "fwd"
        return f"{kind} {self.shape} {self.dtype} {where(self.device, self.threads)}"

    @property
    def flops(self) -> float:
        """Arithmetic of the algorithm, two per multiply-add: two N x N products forward, five backward, and position's contractions."""
        content = 2.0 * self.batch * self.heads * self.tokens**2 * self.head_dim
        position = 2.0 * self.batch * self.heads * self.tokens * sum(self.grid) * self.head_dim
        return 7 * content + 3 * position if self.backward else 2 * content + position

    @property
    def bytes(self) -> float:
        """Memory that must move: q, k, v and the output once each; backward them again, the output's gradient, and three gradients."""
        tensor = self.batch * self.tokens * self.heads * self.head_dim * getattr(torch, self.dtype).itemsize
        return tensor * (4 + 8 if self.backward else 4)


def where(device: str, threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}" if device == "cpu" else device


class CoreInputs:
    """The tensors of a ``Core``, equal for every peer and in every process on one type of device."""

    def __init__(self, core: Core, dtype: torch.dtype | None = None):
        generator = torch.Generator(core.device).manual_seed(20210319)
        batch, tokens, heads, dim = core.batch, core.tokens, core.heads, core.head_dim
        stored = getattr(torch, core.dtype)

        def parameter(*shape: int, to: torch.dtype = stored) -> nn.Parameter:
            # drawn in float32 and rounded once to the storage type, so that the float64 copy holds the same numbers
            x = torch.randn(shape, generator=generator, device=core.device).to(to)
            return nn.Parameter(x.to(dtype or to), requires_grad=core.backward)

        self.core = core
        self.qk = parameter(batch, tokens, 2 * heads * dim)
        self.v = parameter(batch, tokens, heads * dim)
        self.pos_weight = parameter(heads, 3)
        self.gating = parameter(heads)
        with torch.no_grad():
            self.pos_weight *= 0.3
            self.pos_weight[:, 2] = -self.pos_weight[:, 2].abs()
        self.grad_out = parameter(batch, tokens, heads * dim).detach()

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.qk, self.v, self.pos_weight, self.gating

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.leaves, self.grad_out))

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as [B, H, N, D] views of the packed projections."""
        core = self.core
        q, k = self.qk.view(core.batch, core.tokens, 2, core.heads, core.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, self.v.view(core.batch, core.tokens, core.heads, core.head_dim).transpose(1, 2)

    def join(self, out: Tensor) -> Tensor:
        return out.transpose(1, 2).reshape(self.core.batch, self.core.tokens, -1)

    def call(self, forward: Callable[[], Tensor]) -> Call:
        """The timed call: ``forward`` in inference mode, or forward and every gradient."""
        if not self.core.backward:

            def infer() -> tuple:
                with torch.inference_mode():
                    return (forward(),)

            return infer

        def train() -> tuple:
            out = forward()
            return out, *torch.autograd.grad(out, self.leaves, self.grad_out, allow_unused=True)

        return train


OUTPUTS = ("out", "dqk", "dv", "dpos_weight", "dgating")


def plain_attention(inputs: CoreInputs) -> Tensor:
    """Softmax attention without position, spelled out: what plain SDPA is checked against."""
    q, k, v = inputs.heads()
    return inputs.join((q @ k.transpose(-2, -1) * inputs.core.head_dim**-0.5).softmax(-1) @ v)


def gpsa_attention(inputs: CoreInputs) -> Tensor:
    q, k, v = inputs.heads()
    return inputs.join(convit.gpsa(q, k, v, inputs.pos_weight, inputs.gating, inputs.core.grid, backend="reference"))


# ---- peers of the attention core --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A competitor: ``build(problem)`` returns the timed call, ``missing(problem)`` why it cannot run or is left out."""

    name: str
    build: Callable[..., Call]
    missing: Callable[..., str | None] = field(default=lambda problem: None)
    ours: bool = False
    truth: str = "gpsa"  # the function it computes: "gpsa", "plain", or for whole models the name of the reference model
    slow: Callable[..., str | None] = field(default=lambda problem: None)  # why the default set leaves it out of this problem
    computes: Callable[..., str] = field(default=lambda problem: problem.dtype)  # the type of its products, which bounds its error


class _Returns(nn.Module):
    """Stands for a linear layer whose result is already there."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.x = x

    def forward(self, _x: Tensor) -> Tensor:
        return self.x


def _timm_module(inputs: CoreInputs) -> nn.Module:
    """timm's own GPSA module, its projections replaced by their packed results."""
    from timm.models.convit import GPSA

    core = inputs.core
    module = GPSA(core.heads * core.head_dim, core.heads).to(core.device, inputs.v.dtype)
    module.qk, module.v, module.proj = _Returns(inputs.qk), _Returns(inputs.v), nn.Identity()
    module.pos_proj.weight = inputs.pos_weight
    module.gating_param = inputs.gating
    nn.init.zeros_(module.pos_proj.bias)
    module.get_rel_indices = _on_device(inputs.v)
    module.rel_indices = module.get_rel_indices(core.tokens)
    return module


def _on_device(like: Tensor) -> Callable[[int], Tensor]:
    """timm's relative indices; its own method asks the weight of the projection, which is gone, for device and dtype."""

    def rel_indices(tokens: int) -> Tensor:
        side = int(tokens**0.5)
        return relative_positions((side, side)).unsqueeze(0).to(like.device, like.dtype)

    return rel_indices


def _timm_eager(core: Core) -> Call:
    inputs = CoreInputs(core)
    module = _timm_module(inputs)
    return inputs.call(lambda: module(inputs.v))


def _timm_compiled(core: Core) -> Call:
    inputs = CoreInputs(core)
    module = torch.compile(_timm_module(inputs))
    return inputs.call(lambda: module(inputs.v))


def _timm_missing(core: Core) -> str | None:
    if find_spec("timm") is None:
        return "timm is not installed"
    if core.grid[0] != core.grid[1]:
        return "timm takes square grids only"
    return None


def _sdpa_dense(core: Core) -> Call:
    inputs = CoreInputs(core)
    rel = relative_positions(core.grid, inputs.v.device).to(inputs.v.dtype)

    def position(rel: Tensor) -> Tensor:
        return F.linear(rel, inputs.pos_weight).permute(2, 0, 1).softmax(-1)

    # weights that do not change allow the matrix itself to be kept, weights that train only the relative indices
    constant = rel if core.backward else position(rel).contiguous()

    def forward() -> Tensor:
        q, k, v = inputs.heads()
        p = position(constant) if core.backward else constant
        gate = torch.sigmoid(inputs.gating).view(1, -1, 1, 1)
        return inputs.join(torch.lerp(F.scaled_dot_product_attention(q, k, v), p @ v, gate))

    return inputs.call(forward)


def _sdpa_plain(core: Core) -> Call:
    inputs = CoreInputs(core)
    return inputs.call(lambda: inputs.join(F.scaled_dot_product_attention(*inputs.heads())))


def _sdpa_by(backend: str) -> Callable[[Core], Call]:
    """Plain attention by one of the framework's kernels, which its own choice need not be."""

    def build(core: Core) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        call, kernel = _sdpa_plain(core), getattr(SDPBackend, backend)

        def held() -> tuple:
            with sdpa_kernel(kernel):
                return call()

        return held

    return build


SDPA_KERNELS = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def _flex(core: Core) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    inputs = CoreInputs(core)
    width, weight = core.grid[1], inputs.pos_weight
    attention = torch.compile(flex_attention)

    def position(score, b, h, i, j):
        dx, dy = j % width - i % width, j // width - i // width
        return weight[h, 0] * dx + weight[h, 1] * dy + weight[h, 2] * (dx * dx + dy * dy)

    def forward() -> Tensor:
        q, k, v = inputs.heads()
        gate = torch.sigmoid(inputs.gating).view(1, -1, 1, 1)
        return inputs.join(torch.lerp(attention(q, k, v), attention(q, k, v, score_mod=position), gate))

    return inputs.call(forward)


def _flex_missing(core: Core) -> str | None:
    if core.device == "cpu" and core.backward:
        return "FlexAttention has no backward on CPU"
    return None


def backends(device: str) -> tuple[str, ...]:
    """Names of our backends for torch tensors on ``device``, the first choice first."""
    return ORDER.get(("torch", device), ORDER["torch", ""])


def _ours(name: str) -> Peer:
    def build(core: Core) -> Call:
        inputs = CoreInputs(core)

        def forward() -> Tensor:
            q, k, v = inputs.heads()
            return inputs.join(convit.gpsa(q, k, v, inputs.pos_weight, inputs.gating, core.grid, backend=name))

        return inputs.call(forward)

    def missing(core: Core) -> str | None:
        shape = core.batch, core.heads, core.tokens, core.head_dim
        return convit.why_not(name, Problem("torch", core.device, core.dtype, *shape, core.grid))

    return Peer(f"convit {name}", build, missing, ours=True, slow=_definition_is_slow if name == "reference" else lambda core: None)


def _ours_compiled(core: Core) -> Call:
    inputs = CoreInputs(core)

    @torch.compile(fullgraph=True)
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return inputs.join(convit.gpsa(q, k, v, inputs.pos_weight, inputs.gating, core.grid))

    return inputs.call(lambda: attention(*inputs.heads()))


def _definition_is_slow(core: Core) -> str | None:
    return "the definition takes seconds at this size" if core.device == "cpu" and core.tokens > 1024 else None


def core_peers(device: str) -> list[Peer]:
    """Every competitor for the attention core on ``device``."""

    def compiles(core: Core) -> str | None:
        return "compiles for half a minute on CPU" if device == "cpu" else None

    return [
        *(_ours(name) for name in backends(device)),
        Peer("timm eager", _timm_eager, _timm_missing),
        Peer("SDPA + dense P@v", _sdpa_dense),
        Peer("plain SDPA", _sdpa_plain, truth="plain"),
        *(Peer(f"SDPA {name}", _sdpa_by(kernel), truth="plain") for name, kernel in SDPA_KERNELS.items() if device == "cuda"),
        Peer("torch.compile(convit)", _ours_compiled, slow=compiles, ours=True),
        Peer("torch.compile(timm)", _timm_compiled, _timm_missing, slow=compiles),
        Peer("FlexAttention x 2", _flex, _flex_missing, slow=compiles),
    ]
