"""Checkpoints of a run: what a resumed one needs to continue as if it had never stopped."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from convit.engine.folder import writing
from convit.weights import torch_file
from convit.weights.files import BadFile


def save(path: Path, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
    """``torch.save`` of both, atomically."""
    with writing(path) as file:
        torch.save(tensors | facts, file)


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote, to CPU, tensors and plain values only.

    Raises:
        ValueError: The file is no such checkpoint.
    """
    try:
        torch_file.check(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except BadFile as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from None
    except Exception as error:  # of the archive, of pickle, or the refusal of weights_only
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged or no checkpoint: {reason}") from None
    if not isinstance(state, dict) or "progress" not in state:
        raise ValueError(f"{path} is no checkpoint of a training run (last.pth is); to start from its weights use --ckpt_path")
    return state


def facts_of(path: str) -> dict[str, Any]:
    """The plain values that a run stored beside its weights, such as ``recipe`` and ``classes``; empty for any other file.

    Raises:
        OSError: The file cannot be opened.
    """
    try:
        found = torch_file.facts(Path(path))
    except BadFile:  # of another kind, or damaged: load_checkpoint will say which
        return {}
    return found if isinstance(found.get("recipe"), dict) else {}


class States:
    """Model and optimiser state as one process would save it, whether they are whole, replicated or sharded."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, sharded: bool) -> None:
        self.model, self.optimizer, self.sharded = model, optimizer, sharded
        self._name = {id(p): name for name, p in model.named_parameters()}

    def get(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both states; if sharded, a collective call whose result is complete on rank 0."""
        if not self.sharded:
            return self.model.state_dict(), self.optimizer.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        return get_state_dict(self.model, self.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def set(self, model: dict[str, Any], saved: dict[str, Any] | None = None, old: torch.optim.Optimizer | None = None) -> None:
        """Load the weights and, if given, the state that the optimiser ``old`` of the same model had saved.

        It is matched by the parameters' names, whatever the groups were; the options of the groups stay those of our optimiser.
        """
        optimizer: Any = None
        if saved is not None and old is not None:
            keys = [key for group in saved["param_groups"] for key in group["params"]]
            known = dict(zip(self._names(old), (saved["state"].get(key) for key in keys), strict=True))
            names = self._names(self.optimizer)
            state: dict[Any, Any]
            if self.sharded:
                groups, state = [], {name: known[name] for name in names if known[name]}
                for group in self.optimizer.param_groups:
                    own = [self._name[id(p)] for p in group["params"]]
                    groups.append({key: value for key, value in group.items() if key != "params"} | {"params": own})
                optimizer = {"state": state, "param_groups": groups}
            else:
                state = {i: known[name] for i, name in enumerate(names) if known[name]}
                optimizer = {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}
        if not self.sharded:
            self.model.load_state_dict(model)
            if optimizer is not None:
                self.optimizer.load_state_dict(optimizer)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, model, options=options)
        if optimizer is not None:
            set_optimizer_state_dict(self.model, self.optimizer, optimizer, options=options)

    def _names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Of the optimiser's parameters, in its order."""
        return [self._name[id(p)] for group in optimizer.param_groups for p in group["params"]]
