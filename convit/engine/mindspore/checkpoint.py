"""Checkpoints of a run in MindSpore's format: parameters, and as one JSON string what else a resumed run or a reader needs."""

import json
from pathlib import Path
from typing import Any

import mindspore as ms

from convit.engine.folder import writing
from convit.weights import mindspore_file
from convit.weights.files import BadFile

FACTS = "convit_run"  # the name of the string


def save(path: Path, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
    """``mindspore.save_checkpoint``, atomically."""
    with writing(path) as file:
        parameters = [{"name": name, "data": value} for name, value in tensors.items()]
        try:
            ms.save_checkpoint(parameters, file.name, append_dict={FACTS: json.dumps(facts)})
        except ValueError as error:  # MindSpore's, for a full disk
            raise OSError(error) from error
        finally:
            Path(file.name).with_suffix(".tmp").unlink(missing_ok=True)  # MindSpore's own


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote for last.ckpt: the facts, and the parameters under "parameters".

    Raises:
        ValueError: The file is no such checkpoint.
    """
    try:
        facts = mindspore_file.facts(path, FACTS)  # within bounds, which MindSpore's own reader does not have
        saved = ms.load_checkpoint(str(path)) if facts else {}
        saved.pop(FACTS, None)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint of a training run: {str(error).splitlines()[0]}") from None
    if "progress" not in facts:
        raise ValueError(f"{path} is no checkpoint of a training run (last.ckpt is); to start from its weights use --ckpt_path")
    return {**facts, "parameters": saved}


def facts_of(path: str) -> dict[str, Any]:
    """The plain values that a run stored beside its weights, such as ``recipe`` and ``classes``; empty for any other file."""
    try:
        facts = mindspore_file.facts(Path(path), FACTS)
    except BadFile:  # damaged or of another kind: load_checkpoint will say which
        return {}
    return facts if isinstance(facts.get("recipe"), dict) else {}
