"""Shapes, inputs and the judge that every backend of GPSA is tested with."""

from typing import NamedTuple

import torch
from tolerances import allowed_error
from torch import Tensor

import convit

NAMES = ("out", "dq", "dk", "dv", "dpos_weight", "dgating")


class Case(NamedTuple):
    batch: int
    heads: int
    head_dim: int
    grid: tuple[int, int]

    def __str__(self) -> str:
        return f"B{self.batch}-H{self.heads}-D{self.head_dim}-{self.grid[0]}x{self.grid[1]}"


# the models' own shapes first, then awkward ones: one token, one row, one column, primes, D that fills no vector
CASES = [
    Case(2, 4, 48, (14, 14)),
    Case(1, 9, 64, (14, 14)),
    Case(1, 2, 48, (28, 28)),
    Case(2, 3, 20, (7, 11)),
    Case(1, 1, 16, (1, 1)),
    Case(2, 2, 33, (1, 13)),
    Case(2, 2, 7, (13, 1)),
    Case(1, 2, 128, (5, 6)),
    Case(3, 1, 1, (3, 2)),
]


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    pos_weight: Tensor
    gating: Tensor

    def cast(self, dtype: torch.dtype) -> "Inputs":
        """q, k and v in ``dtype``; the parameters stay float32 or go to float64."""
        parameters = torch.promote_types(dtype, torch.float32)
        return Inputs(*(x.to(dtype) for x in self[:3]), *(x.to(parameters) for x in self[3:]))


def make_inputs(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Inputs, Tensor]:
    """q and k as views of one packed projection, v of another, as the module makes them; and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, dim, (gh, gw) = case
    tokens = gh * gw
    qk = torch.randn(batch, tokens, 2, heads, dim, generator=generator)
    v = torch.randn(batch, tokens, heads, dim, generator=generator)
    grad = torch.randn(batch, tokens, heads, dim, generator=generator)
    pos_weight = torch.randn(heads, 3, generator=generator) * 0.5
    pos_weight[:, 2] = -pos_weight[:, 2].abs()
    gating = torch.randn(heads, generator=generator)
    qk, v, grad = (x.to(dtype).to(device) for x in (qk, v, grad))
    q, k = (x.transpose(1, 2) for x in qk.unbind(2))
    return Inputs(q, k, v.transpose(1, 2), pos_weight.to(device), gating.to(device)), grad.transpose(1, 2)


def run(function, inputs: Inputs, grad: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Output and all gradients of ``function(q, k, v, pos_weight, gating, grid)``."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, grid)
    return dict(zip(NAMES, [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))], strict=True))


def reference64(inputs: Inputs, grad: Tensor, grid: tuple[int, int], scale: float | None = None) -> dict[str, Tensor]:
    def definition(*args):
        return convit.gpsa(*args, scale=scale, backend="reference")

    return run(definition, inputs.cast(torch.float64), grad.double(), grid)


def eager(q, k, v, pos_weight, gating, grid, scale=None):
    """The formula as timm and FAIR write it, in the dtype of q throughout."""
    from convit.kernels.gpsa.reference import relative_positions

    dtype = q.dtype
    rel = relative_positions(grid, q.device).to(dtype)
    position = torch.einsum("ijc,hc->hij", rel, pos_weight.to(dtype)).softmax(dim=-1)
    content = ((q @ k.transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(dim=-1)
    gate = torch.sigmoid(gating.to(dtype)).view(1, -1, 1, 1)
    attn = (1.0 - gate) * content + gate * position
    return (attn / attn.sum(dim=-1, keepdim=True)) @ v


def relative_error(ours: Tensor, truth: Tensor) -> float:
    truth = truth.double()
    return ((ours.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def check(
    ours: dict[str, Tensor], inputs: Inputs, grad: Tensor, grid: tuple[int, int], definition: bool = False, scale: float | None = None
) -> None:
    """Judge ``ours`` (from ``run``) against float64, allowing twice the eager path's error; ``definition``: ours is the reference."""
    truth = reference64(inputs, grad, grid, scale)
    peer = run(lambda *args: eager(*args, scale=scale), inputs, grad, grid)
    dtype, tokens = inputs.q.dtype, inputs.q.shape[2]
    for name in NAMES:
        error = relative_error(ours[name], truth[name])
        allowed = allowed_error(dtype, tokens, relative_error(peer[name], truth[name]), definition)
        negligible = truth[name].norm() <= 1e-12 * max(1.0, truth["out"].norm())
        if negligible:  # such as the gradients of q and k with one token: zero by cancellation
            error, allowed = ours[name].double().norm().item(), 1e-5 if dtype == torch.float32 else 1e-2
        if not error <= allowed:
            difference = (ours[name].double() - truth[name]).abs()
            worst = torch.unravel_index(difference.nan_to_num(torch.inf).argmax(), difference.shape)
            index = tuple(int(i) for i in worst)
            raise AssertionError(
                f"{name}: relative error {error:.3g} > {allowed:.3g}; worst at {index}: "
                f"{ours[name][index].item():.9g} instead of {truth[name][index].item():.9g}"
            )
