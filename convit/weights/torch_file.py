"""PyTorch's checkpoint format, read within bounds and without torch: nothing in a file is ever run.

A file is a zip archive, ``name/data.pkl`` with one stored record ``name/data/<key>`` a storage; or, before PyTorch 1.6, a sequence of
pickles followed by the storages. ``torch.load(weights_only=True)`` runs no code either, but it trusts the sizes that a pickle states and
hangs on nested keys.
"""

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from convit.weights import archive
from convit.weights.files import MAX_DIMS, MAX_TENSORS, SETTINGS, BadFile, Settings, Tensors, mapped, parse_settings, shown, to_torch
from convit.weights.pickles import DTYPES, Global, Machine, Storage, Tensor

# where a training checkpoint keeps its weights; timm looks in this order too
WEIGHT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
_MAGIC = 0x1950A86A20F9469CFC6C


def read(path: Path, data: memoryview, key: str | None) -> tuple[Tensors, Settings | None]:
    """The tensors of a dictionary of weights, and the recorded settings; ``key`` None takes the first of ``WEIGHT_KEYS``.

    Raises:
        BadFile: It is truncated, damaged or no checkpoint, holds other things than dense tensors, or would run code when unpickled.
    """
    loaded = _loaded(path, data)
    settings = parse_settings(path, loaded.get(SETTINGS))
    if key is None:
        key = next((k for k in WEIGHT_KEYS if isinstance(loaded.get(k), dict)), None)
    elif not isinstance(loaded.get(key), dict):
        keys = ", ".join(str(k)[:40] for k in list(loaded)[:20])
        raise BadFile(path, f"has no dictionary of weights of that name; key must name one of its entries: {keys}", f"key={shown(key)}")
    weights = loaded if key is None else loaded[key]
    if len(weights) > MAX_TENSORS:
        raise BadFile(path, f"has {len(weights):,} tensors; no ConViT has more than {MAX_TENSORS:,}")
    tensors: Tensors = {}
    total = 0
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = f"{value.name} (not supported)" if isinstance(value, Global) else shown(value)
            raise BadFile(path, f"must be a dense tensor, got {kind}", shown(name))
        tensors[name] = _array(path, shown(name), value)
        total += tensors[name].nbytes
        _check_shared(path, total, data)
    return tensors, settings


def _check_shared(path: Path, total: int, data: memoryview) -> None:
    if total > 2 * len(data):  # a few tied weights are fine
        raise BadFile(path, f"has tensors that share their storage many times over: more than {total:,} bytes out of {len(data):,}")


def facts(path: Path) -> dict[str, Any]:
    """What a dictionary holds beside its tensors: the numbers, texts, lists and mappings of these that are no deeper than two.

    Raises:
        OSError: The file cannot be opened.
        BadFile: See ``read``.
    """
    loaded = _loaded(path, mapped(path))
    known: dict[tuple[int, int], bool] = {}
    return {name: value for name, value in loaded.items() if isinstance(name, str) and _plain(value, 2, known)}


def check(path: Path) -> None:
    """Hold a whole file, whatever its dictionary holds, against the bounds of ``read``: then ``torch.load`` takes no more than its size.

    Raises:
        OSError: The file cannot be opened.
        BadFile: See ``read``.
    """
    data = mapped(path)
    left, seen, total = [_loaded(path, data)], set(), 0
    while left:
        value: Any = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            total += _array(path, "a tensor", value).nbytes
            _check_shared(path, total, data)
        elif isinstance(value, (dict, list, tuple, set)):
            left.extend(value.values() if isinstance(value, dict) else value)


def _plain(value: Any, depth: int, known: dict[tuple[int, int], bool]) -> bool:
    """``known``: what was looked at before, for a list may hold another many times over."""
    if not isinstance(value, (dict, list)):
        return value is None or isinstance(value, (str, int, float))
    if (id(value), depth) not in known:
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        most = (0, 100, MAX_TENSORS)[depth]
        known[id(value), depth] = len(value) <= most and all(_plain(one, depth - 1, known) for one in inside)
    return known[id(value), depth]


def _loaded(path: Path, data: memoryview) -> dict[Any, Any]:
    try:
        loaded = _read_zip(path, data) if bytes(data[:4]) == archive.MAGIC else _read_old(path, data)
    except (IndexError, struct.error, UnicodeDecodeError):
        raise BadFile(path, "is truncated, or is no PyTorch checkpoint") from None
    if not isinstance(loaded, dict):
        raise BadFile(path, f"must hold a dictionary of tensors, got {shown(loaded)}")
    return loaded


def write(file: BinaryIO, tensors: Tensors, settings: Settings | None) -> None:
    """A bare dictionary of tensors, or ``model`` with the settings beside it; needs torch."""
    import torch

    weights = {name: to_torch(array).clone() for name, array in tensors.items()}
    torch.save({"model": weights, SETTINGS: settings} if settings else weights, file)


def _array(path: Path, name: str, tensor: Tensor) -> np.ndarray:
    storage, offset, shape, strides, kind = tensor
    if kind not in DTYPES or not isinstance(storage, Storage):
        raise BadFile(path, f"has dtype {kind[:40]}, which is not supported", name)
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides) or len(shape) > MAX_DIMS:
        raise BadFile(path, "is damaged: it has no shape", name)
    if storage.record is not None:
        storage.data, storage.record = storage.record.check(path, name), None
    dtype, available = DTYPES[kind], len(storage.data or b"")
    if 0 in shape and all(type(size) is int and size >= 0 for size in shape) and math.prod(size or 1 for size in shape) < 1 << 40:
        return np.empty(shape, dtype)
    if not all(type(number) is int and 0 <= number <= available for number in (offset, *shape, *strides)):
        raise BadFile(path, f"is damaged: its shape, strides and offset do not fit a storage of {available} bytes", name)
    numbers = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if (last + 1) * dtype.itemsize > available or numbers * dtype.itemsize > available:
        raise BadFile(path, f"is truncated or damaged: {list(shape)} {kind} needs more than its storage of {available} bytes", name)
    steps = tuple(stride * dtype.itemsize for stride in strides)
    array: np.ndarray = np.ndarray(shape, dtype, storage.data, offset * dtype.itemsize, steps)
    return array


# archives


def _read_zip(path: Path, data: memoryview) -> Any:
    records = dict(archive.records(path, data))
    folder = next((name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl")), None)
    if folder is None:
        raise BadFile(path, "is no PyTorch checkpoint: it is an archive without data.pkl")
    if f"{folder}/constants.pkl" in records:
        raise BadFile(path, archive.PROGRAM)
    order = records.get(f"{folder}/byteorder")
    if order is not None and bytes(order.data) != b"little":
        raise BadFile(path, "was written on a big-endian machine, which is not supported")

    def storage(kind: str, key: str, numel: int) -> Storage:
        record = records.get(f"{folder}/data/{key}")
        if record is None or len(record.data) != numel * DTYPES[kind].itemsize:
            found = "no record" if record is None else f"{len(record.data)} bytes"
            raise BadFile(path, f"is damaged: {shown(numel)} elements of {kind} are {found} in the archive", f"storage {shown(key)}")
        return Storage(kind, numel, None, record)

    return Machine(path, records[f"{folder}/data.pkl"].check(path, "data.pkl"), storage).run()


# files before PyTorch 1.6: magic number, protocol, system, the object, the keys of its storages; then each storage with its length


def _read_old(path: Path, data: memoryview) -> Any:
    storages: dict[str, Storage] = {}

    def storage(kind: str, key: str, numel: int) -> Storage:
        return storages.setdefault(key, Storage(kind, numel, None))

    head: list[Any] = []
    loaded, keys, at = None, None, 0
    for part in range(5):
        machine = Machine(path, data[at:], storage)
        value = machine.run()
        at += machine.at
        if part == 0 and value != _MAGIC:
            raise BadFile(path, "is no PyTorch checkpoint: it is a pickle of something else")
        if part == 3:
            loaded = value
        elif part == 4:
            keys = value
        else:
            head.append(value)
    if head[1] != 1001 or not isinstance(head[2], dict) or head[2].get("little_endian") is not True or not isinstance(keys, list):
        raise BadFile(path, "is no PyTorch checkpoint of a little-endian machine")
    for key in keys:
        if not isinstance(key, str) or key not in storages:
            raise BadFile(path, "is damaged: nothing uses it", f"storage {shown(key)}")
        one = storages[key]
        (numel,) = struct.unpack_from("<q", data, at)
        length = one.numel * DTYPES[one.dtype].itemsize
        if numel != one.numel or at + 8 + length > len(data):
            raise BadFile(path, f"is truncated or damaged: {shown(one.numel)} elements are not in the file", f"storage {shown(key)}")
        one.data = data[at + 8 : at + 8 + length]
        at += 8 + length
    return loaded
