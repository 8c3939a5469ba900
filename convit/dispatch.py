"""Which kernels exist, which can run a problem, and the choice between them.

The precedence is ``backend=``, ``with use_backend(...)``, ``CONVIT_BACKEND``, automatic. A forced backend runs or raises; only the
automatic choice moves on to the next, and it logs why once. Nothing is imported or probed before a backend is asked about.
"""

import importlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from types import ModuleType
from typing import NamedTuple

logger = logging.getLogger("convit")

# name -> the module of its kernel, one file per device and tool
MODULES = {
    "reference": "convit.kernels.gpsa.reference",
    "sdpa": "convit.kernels.gpsa.any_sdpa",
    "cpp": "convit.kernels.gpsa.cpu_cpp",
    "triton": "convit.kernels.gpsa.gpu_triton",
    "aot": "convit.kernels.gpsa.cpu_aot",
    "flash": "convit.kernels.gpsa.ascend_flash",
    "blocks": "convit.kernels.gpsa.any_blocks",
    "akg": "convit.kernels.gpsa.ascend_akg",
    "tbe": "convit.kernels.gpsa.ascend_tbe",
}

# names that another framework than torch spells in a file of its own
FRAMEWORK_MODULES = {("mindspore", "reference"): "convit.kernels.gpsa.any_mindspore"}

# (framework, device) -> order of preference; "" stands for every other device of the framework
ORDER = {
    ("torch", "cpu"): ("cpp", "sdpa", "reference"),
    ("torch", "cuda"): ("triton", "sdpa", "reference"),
    ("torch", "npu"): ("triton", "sdpa", "reference"),
    ("torch", ""): ("sdpa", "reference"),
    ("mindspore", "cpu"): ("aot", "reference"),
    ("mindspore", "ascend"): ("flash", "blocks", "reference"),
    ("mindspore", ""): ("reference",),
}

_forced: ContextVar[str | None] = ContextVar("convit_backend", default=None)


class _Traced(threading.local):
    """What ``_forced`` holds, where a compiler can read it and guard on it; of the thread, not of the task."""

    def __init__(self) -> None:  # once per thread: a default of the class would not be guarded
        self.forced: str | None = None


_traced = _Traced()
_loaded: dict[str, ModuleType | str] = {}
_logged: set[tuple[str, str]] = set()


class Problem(NamedTuple):
    """What a backend is asked to run: enough for ``why_not``, nothing of the tensors themselves."""

    framework: str  # "torch" or "mindspore"
    device: str  # torch device type or MindSpore device target, lower case
    dtype: str  # of q, k and v: "float32", "bfloat16", ...
    batch: int | None  # None: not known when MindSpore compiles the graph
    heads: int
    tokens: int
    head_dim: int
    grid: tuple[int, int]
    dropout_p: float = 0.0

    def __str__(self) -> str:
        shape = f"[{self.batch}, {self.heads}, {self.tokens}, {self.head_dim}]"
        dropout = f", dropout_p={self.dropout_p}" if self.dropout_p else ""
        return f"gpsa(q={shape} {self.dtype} on {self.device}, grid={self.grid}{dropout})"


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for an unknown ``name``, or nothing."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_name(name: str) -> str:
    """Return ``name`` if it is a backend's; raise ``ValueError`` with the nearest one otherwise."""
    if name in MODULES:
        return name
    raise ValueError(f"unknown backend {name!r}{nearest(name, MODULES)} (known: {', '.join(MODULES)})")


def _module(name: str, framework: str) -> ModuleType | str:
    """The backend's module, or the reason why it could not be imported."""
    home = FRAMEWORK_MODULES.get((framework, name), MODULES[name])
    _load(home)
    return _loaded[home]


def load(*names: str) -> None:
    """Import the modules of these backends of torch now: while a compiler traces it is too late for more than one."""
    for name in names:
        _load(MODULES[name])


def _load(home: str) -> bool:
    if home not in _loaded:
        try:
            _loaded[home] = importlib.import_module(home)
        except ModuleNotFoundError as error:
            if error.name == home:
                _loaded[home] = "this version of ConViT does not contain it"
            else:
                _loaded[home] = f"{error.name} is not installed"
        except Exception as error:  # a broken installation is a reason, and it must read as itself
            _loaded[home] = f"failed to import: {type(error).__name__}: {error}"
    return True


# torch.compile calls a function so marked when it traces, in place of tracing an import
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def runnable(name: str, problem: Problem) -> ModuleType | str:
    """The module of backend ``name`` if it can run ``problem``, else why not."""
    module = _module(check_name(name), problem.framework)
    if isinstance(module, str):
        return module
    reason: str | None = module.why_not(problem)
    return module if reason is None else reason


def why_not(name: str, problem: Problem) -> str | None:
    """Why backend ``name`` cannot run ``problem``; ``None`` if it can.

    Args:
        name: One of ``convit.backends()``.
        problem: What ``convit.gpsa`` would be asked; see ``Problem``.
    """
    answer = runnable(name, problem)
    return answer if isinstance(answer, str) else None


def backends() -> tuple[str, ...]:
    """Names of all backends, whether or not they can run here."""
    return tuple(MODULES)


def order(problem: Problem) -> tuple[str, ...]:
    """The backends that the automatic choice tries for ``problem``, first choice first.

    On a processor with a matrix unit (AMX) ``sdpa`` comes first for bfloat16 beyond 256 tokens: PyTorch's attention multiplies there,
    ``cpp`` does not. Up to 256 tokens ``cpp`` stays first: what PyTorch does beside the products takes longer. Not measured on such a chip.
    """
    names = ORDER.get((problem.framework, problem.device), ORDER[problem.framework, ""])
    if names[0] == "cpp" and problem.dtype == "bfloat16" and problem.tokens > 256:
        cpp = _module("cpp", problem.framework)
        if not isinstance(cpp, str) and cpp.slower_than_torch(problem.dtype):
            return ("sdpa", *(name for name in names if name != "sdpa"))
    return names


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend inside a ``with`` block, for this thread or task; ``None`` returns to the automatic choice.

    Raises:
        ValueError: ``name`` is no backend.
    """
    choice = "" if name is None else check_name(name)
    before = _traced.forced
    token = _forced.set(choice)
    _traced.forced = choice
    try:
        yield
    finally:
        _traced.forced = before
        _forced.reset(token)


def forced_backend(argument: str | None, tracing: bool = False) -> str | None:
    """The backend that the argument, the context or the environment forces, in this order; ``None`` if none does."""
    name = argument
    if name is None:
        name = _traced.forced if tracing else _forced.get()
    if name is None:
        name = os.environ.get("CONVIT_BACKEND") or None
    if not name or name == "auto":
        return None
    return check_name(name)


def choose(problem: Problem, forced: str | None, quiet: bool = False) -> ModuleType:
    """The module that runs ``problem``: the forced backend, else the first of the device's that can, noted in the log unless ``quiet``.

    Raises:
        RuntimeError: The forced backend cannot run the problem, or none can; the message lists each one's reason.
    """
    names = (forced,) if forced else order(problem)
    reasons: dict[str, str] = {}
    for name in names:
        answer = runnable(name, problem)
        if not isinstance(answer, str):
            if reasons and not quiet:
                _log_once(problem, name, reasons)
            return answer
        reasons[name] = answer
    raise RuntimeError(_refusal(problem, forced, reasons))


def _log_once(problem: Problem, chosen: str, reasons: dict[str, str]) -> None:
    for name, reason in reasons.items():
        if (name, reason) not in _logged:
            _logged.add((name, reason))
            logger.info("%s: %s instead of %s: %s", problem, chosen, name, reason)


def _refusal(problem: Problem, forced: str | None, reasons: dict[str, str]) -> str:
    lines = [f"convit: backend {forced!r} cannot run {problem}" if forced else f"convit: no backend for {problem}"]
    if forced:
        reasons = reasons | {name: why_not(name, problem) or "can run it" for name in order(problem) if name != forced}
    width = max(map(len, reasons))
    lines += [f"  {name:<{width}}  {reason}" for name, reason in reasons.items()]
    lines.append("Choose another backend, leave the choice to convit, or set backend='reference' to run the definition.")
    return "\n".join(lines)
