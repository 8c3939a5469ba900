"""A yaml file that is one mapping of names, read within bounds and without the surprises of yaml. Imports no framework."""

import re
from collections.abc import Mapping
from typing import Any

from convit.weights.files import BadFile, shown

MAX_DEPTH = 20


def read_mapping(name: str, text: str, same: Mapping[str, str]) -> dict[Any, Any]:
    """The values by key that ``text`` holds.

    Args:
        name: Of the file, for messages.
        text: Its content, of a length that yaml reads in bearable time: some 100 kB a second.
        same: Other names of keys, and the keys.

    Raises:
        BadFile: It is no yaml, has aliases, a key twice, or a number that yaml takes for another.
        ValueError: It is no mapping.
    """
    try:
        import yaml
    except ImportError:
        raise ImportError("recipes need PyYAML: pip install '.[train]' in the source folder") from None
    try:
        # few bytes of aliases of aliases make values of any size
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:  # more takes PyYAML minutes
                raise BadFile(name, "is not yaml of a recipe: it is nested too deeply")
            if isinstance(event, yaml.AliasEvent):
                raise BadFile(name, "has aliases (*name), which recipes do not take: write the values out", _line(event))
        _check_spelling(name, yaml.compose(text, Loader=yaml.SafeLoader), same)
        values = yaml.safe_load(text)
    except BadFile:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise BadFile(name, f"is not yaml: {str(error)[:400]}") from None
    except RecursionError:
        raise BadFile(name, "is not yaml of a recipe: it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a mapping of recipe keys, got {type(values).__name__}")
    return values


def _check_spelling(name: str, node: Any, same: Mapping[str, str]) -> None:
    """Refuse what yaml reads in silence as something else: the last of two values for a key, 1:30 as 90, 010 as 8."""
    known: set[str] = set()
    for one, _ in node.value if node and node.tag.endswith(":map") else ():
        key = same.get(str(one.value), str(one.value))
        if key in known:
            raise BadFile(name, f"gives {shown(key)} a second value", _line(one))
        known.add(key)
    left = [node]
    while left:
        at = left.pop()
        if at and isinstance(at.value, list):
            left += [part for one in at.value for part in (one if isinstance(one, tuple) else (one,))]
        elif at and at.tag.endswith((":int", ":float")) and re.fullmatch(r"[-+]?(0[0-9_]+|[^:]*:.*)", at.value):
            raise BadFile(
                name, f"has {shown(at.value)}, which yaml takes for another number: write it out, or in quotes if a text", _line(at)
            )


def _line(place: Any) -> str:
    return f"line {place.start_mark.line + 1}"
