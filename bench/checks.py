"""The answers in float64 and what a competitor's answer may differ from them: nothing is timed before it is checked."""

import importlib.util
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from models import CHECKED, Model, reference_outputs
from peers import OUTPUTS, Core, CoreInputs, gpsa_attention, plain_attention
from torch import Tensor

# Ours are held to the tolerance table of the tests. Another implementation, whose rounding is its own affair, may err ten times as
# much as the same mathematics in the framework's own operations: it must only compute the same function.
PEERS = 10.0

LARGEST = 4096  # tokens: beyond, the float64 answer is formed for some queries only
QUERIES = 256


def _tolerance_table():
    spec = importlib.util.spec_from_file_location("tolerances", Path(__file__).resolve().parent.parent / "tests" / "tolerances.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOLERANCES = _tolerance_table()


class WrongAnswer(AssertionError):
    """A competitor does not compute what it is timed for."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``; infinite where ``actual`` is not finite."""
    difference = (actual.detach().to(expected.device, torch.float64) - expected).norm()
    if not torch.isfinite(difference):
        return math.inf
    return (difference / expected.norm().clamp_min(1e-300)).item()


def _sampled_rows(core: Core) -> Tensor:
    if core.tokens <= LARGEST:
        return torch.arange(core.tokens, device=core.device)
    return torch.linspace(0, core.tokens - 1, QUERIES, device=core.device, dtype=torch.float64).long()


def _attention_rows(core: Core, truth: str, dtype: torch.dtype) -> Tensor:
    """Forward answer for the sampled queries of the first sample of the batch, straight from the formula."""
    inputs = CoreInputs(core, dtype)
    q, k, v = (x[:1] for x in inputs.heads())
    rows = _sampled_rows(core)
    content = (q[:, :, rows] @ k.transpose(-2, -1) * core.head_dim**-0.5).softmax(-1)
    if truth == "plain":
        return (content @ v).transpose(1, 2).reshape(1, len(rows), -1)
    j, width = torch.arange(core.tokens, device=core.device), core.grid[1]
    dx, dy = j % width - (rows % width)[:, None], j // width - (rows // width)[:, None]
    rel = torch.stack([dx, dy, dx**2 + dy**2]).to(dtype)
    position = torch.einsum("cij,hc->hij", rel, inputs.pos_weight).softmax(-1)
    gate = torch.sigmoid(inputs.gating).view(1, -1, 1, 1)
    return (((1 - gate) * content + gate * position) @ v).transpose(1, 2).reshape(1, len(rows), -1)


@cache
def _expected(core: Core, truth: str) -> tuple[tuple[Tensor | None, ...], tuple[float, ...]]:
    """The float64 outputs, and the errors of the same mathematics in the problem's own dtype."""
    if core.tokens > LARGEST:
        if core.backward:
            raise ValueError(f"gradients are checked up to {LARGEST} tokens, got {core.tokens}")
        with torch.inference_mode():
            exact = (_attention_rows(core, truth, torch.float64),)
            eager = (_attention_rows(core, truth, getattr(torch, core.dtype)),)
    else:
        attention = plain_attention if truth == "plain" else gpsa_attention

        def outputs(dtype: torch.dtype | None) -> tuple:
            inputs = CoreInputs(core, dtype)
            return inputs.call(lambda: attention(inputs))()

        exact = tuple(None if x is None else x.detach().clone() for x in outputs(torch.float64))
        eager = outputs(None)
    errors = [0.0 if x is None else relative_error(y, x) for x, y in zip(exact, eager, strict=True)]
    # a gradient of H or 3 H numbers can be right by luck: its yardstick is the worst of the eager outputs
    return exact, tuple(max(errors) if i > 2 and e else e for i, e in enumerate(errors))


@cache
def _expected_logits(model: Model, truth: str) -> tuple[Tensor, float]:
    exact, eager = reference_outputs(model, truth)
    return exact, relative_error(eager, exact)


def _allowed(problem: Core | Model, peer, eager: float) -> float:
    dtype = getattr(torch, peer.computes(problem))
    if not peer.ours:
        return max(PEERS * eager, TOLERANCES.FLOOR[dtype])
    # a whole model stacks its layers' errors: for it, the eager model is the only yardstick
    tokens = problem.tokens if isinstance(problem, Core) else TOLERANCES.FLOAT32_BOUND_TOKENS + 1
    return TOLERANCES.allowed_error(dtype, tokens, eager, definition=peer.name == "convit reference")


def check(problem: Core | Model, peer, outputs: tuple) -> dict[str, float]:
    """Compare the outputs of ``peer`` with float64.

    Returns:
        The relative error of each output.

    Raises:
        WrongAnswer: An output is missing, not finite, of another shape, or errs more than the rule allows.
    """
    key = replace(problem, threads=1)  # one answer serves every thread count
    if isinstance(problem, Model):
        key = replace(key, device="cpu", train=False)  # nor do its logits depend on the step
        logits, error = _expected_logits(key, peer.truth)
        if peer.computes(problem) != problem.dtype:  # the same function, judged by what the eager model loses in that type
            error = _expected_logits(replace(key, dtype=peer.computes(problem)), peer.truth)[1]
        exact, eager, outputs = (logits,), (error,), (outputs[0][:CHECKED],)
    else:
        exact, eager = _expected(key, peer.truth)
        if problem.tokens > LARGEST:
            outputs = (outputs[0][:1, _sampled_rows(problem).to(outputs[0].device)],)
    errors = {}
    for name, actual, expected, yardstick in zip(OUTPUTS, outputs, exact, eager, strict=False):
        if expected is None:
            continue
        if actual is None or actual.shape != expected.shape:
            got = "nothing" if actual is None else list(actual.shape)
            raise WrongAnswer(f"{peer.name} on {problem}: {name} must be {list(expected.shape)}, got {got}")
        errors[name] = relative_error(actual, expected)
        allowed = _allowed(problem, peer, yardstick)
        if not errors[name] <= allowed:
            raise WrongAnswer(
                f"{peer.name} on {problem}: {name} errs by {errors[name]:.2e} against float64; allowed are {allowed:.2e}"
                f" (eager: {yardstick:.2e})"
            )
    return errors
