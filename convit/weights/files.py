"""The bytes of checkpoint files: PyTorch ``.pth``, ``.safetensors`` and MindSpore ``.ckpt``, as numpy arrays by name.

A file is recognised by its content, so a wrong suffix does no harm. safetensors and MindSpore files are read and written here without
their libraries; PyTorch files need torch and load with ``weights_only=True``. Settings travel as one JSON object: the metadata
key ``convit`` of safetensors, the top-level key ``convit`` of a ``.pth``, a string named ``convit`` in a ``.ckpt``.

numpy has no bfloat16: such tensors are arrays of the structured type ``BFLOAT16``, which slices, joins and compares like any other.
"""

import argparse
import contextlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

BFLOAT16 = np.dtype([("bfloat16", "<u2")])

Tensors = dict[str, np.ndarray]
Settings = dict[str, Any]

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt")
# where a training checkpoint keeps its weights; timm looks in this order too
WEIGHT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
SETTINGS = "convit"
_PARTIAL = re.compile(r"\.\d+-[0-9a-f]{8}\.partial(\.\w+)?$")

_SAFETENSORS: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS.items()}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that becomes ``path``, whole and synced, when the block ends well; else ``path`` stays as it was.

    Its name, ``file.name``, serves libraries that write by name. It is unlike that of any other writer, ends in the suffix of
    ``path``, and starts with a dot and ``path``'s own name, so that what a kill leaves behind can be told (see ``partials``).

    Raises:
        OSError: It cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        with open(partial, "xb") as file:
            yield file
        with open(partial, "rb+") as file:  # by name again: a library may have put another file in its place
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # the new name must survive a power cut too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def partials(folder: Path) -> list[Path]:
    """What writers that were killed inside ``replacing`` left in a folder; for its owner, when nobody else writes there."""
    return [path for path in folder.glob(".*.partial*") if _PARTIAL.search(path.name)]


def name_of(names: dict[np.dtype, str], tensor: str, dtype: np.dtype, kind: str) -> str:
    dtype = dtype.newbyteorder("<") if dtype.names is None else dtype
    if dtype not in names:
        raise ValueError(f"{tensor} has dtype {dtype}, which {kind} files cannot hold")
    return names[dtype]


def parse_settings(path: Path, text: Any) -> Settings | None:
    if text is None:
        return None
    try:
        text = bytes(text).decode("utf-32-le") if isinstance(text, bytearray) else text
        settings = json.loads(text) if isinstance(text, str) else text
        if not isinstance(settings, dict):
            raise TypeError(f"expected an object, got {settings!r}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its settings {text!r} cannot be read: {error}") from error
    return settings


# PyTorch


def to_torch(array: np.ndarray) -> Any:
    """A torch tensor with the bits of ``array``; it may share memory."""
    import torch

    if array.dtype == BFLOAT16:
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape).view("<i2")).view(torch.bfloat16)
    array = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray turns a scalar into a vector
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def from_torch(tensor: Any) -> np.ndarray:
    """An array with the bits of a dense torch tensor; it may share memory."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
        return np.asarray(tensor.numpy()).view(BFLOAT16)
    return np.asarray(tensor.numpy())


def _torch_dtypes() -> tuple[Any, ...]:
    import torch

    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
    return tuple(getattr(torch, name) for name in names.split())


def read_torch(path: Path, key: str | None) -> tuple[Tensors, Settings | None]:
    import torch

    try:
        # FAIR's training checkpoints carry their command line; a Namespace only holds attributes
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted:
            raise ValueError(
                f"{path} was refused: its pickle calls {wanted[1]}, so loading it could run any code. "
                "Save the state_dict alone where the file comes from, or as safetensors"
            ) from error
        # torch's own advice, to load with weights_only=False, is not for files that one did not make
        found = re.search(r"WeightsUnpickler error: (.*)", str(error))
        reason = (found[1] if found else str(error).partition("\n")[0]) or "its pickle is not one of plain tensors"
        raise ValueError(f"{path} is truncated or is no PyTorch checkpoint: {reason}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(loaded).__name__}")
    settings = parse_settings(path, loaded.get(SETTINGS))
    if key is None:
        key = next((k for k in WEIGHT_KEYS if isinstance(loaded.get(k), Mapping)), None)
    elif not isinstance(loaded.get(key), Mapping):
        raise ValueError(f"{path}: key must name a dictionary of weights, got {key!r}; the file has {', '.join(map(str, loaded))}")
    weights = loaded if key is None else loaded[key]
    tensors = {}
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
            raise ValueError(f"{path} must hold a dictionary of dense tensors, got {type(value).__name__} at {name!r}")
        if value.dtype not in _torch_dtypes():
            raise ValueError(f"{path}: {name} has dtype {value.dtype}, which is not supported")
        tensors[str(name)] = from_torch(value)
    return tensors, settings


def write_torch(file: BinaryIO, tensors: Tensors, settings: Settings | None) -> None:
    import torch

    weights = {name: to_torch(array).clone() for name, array in tensors.items()}
    torch.save({"model": weights, SETTINGS: settings} if settings else weights, file)


# safetensors: the length of a JSON header as a 64-bit integer, the header, the data


def read_safetensors(path: Path, data: bytearray) -> tuple[Tensors, Settings | None]:
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise ValueError(f"{path} is truncated: its header should be {length} bytes, the file has {len(data)}")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        metadata = header.pop("__metadata__", None) or {}
        entries = {
            name: (entry["dtype"], tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"])) for name, entry in header.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file: its header cannot be read ({error!r})") from error
    body = memoryview(data)[8 + length :]
    expected = 0
    tensors: Tensors = {}
    for name, (kind, shape, start, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if kind not in _SAFETENSORS:
            raise ValueError(f"{path}: {name} has dtype {kind}, which is not supported")
        size = math.prod(shape) * _SAFETENSORS[kind].itemsize
        if start != expected or end - start != size or min(shape, default=0) < 0:
            raise ValueError(f"{path} is damaged: {name} {list(shape)} {kind} cannot be at bytes {start} to {end}")
        if end > len(body):
            raise ValueError(f"{path} is truncated: {name} ends at byte {end} of the data, the file has {len(body)}")
        array = np.frombuffer(body[start:end], _SAFETENSORS[kind]).reshape(shape)
        tensors[name] = array if array.flags.aligned else array.copy()
        expected = end
    if expected != len(body):
        raise ValueError(f"{path} is damaged: {len(body) - expected} bytes follow the last tensor")
    return {name: tensors[name] for name in entries}, parse_settings(path, metadata.get(SETTINGS))


def write_safetensors(file: BinaryIO, tensors: Tensors, settings: Settings | None) -> None:
    metadata = {"format": "pt"} | ({SETTINGS: json.dumps(settings)} if settings else {})
    header: dict[str, Any] = {"__metadata__": metadata} | dict.fromkeys(tensors)
    # wide types first, so that every tensor is aligned
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    offset = 0
    for name in order:
        array = tensors[name]
        kind = name_of(_SAFETENSORS_NAMES, name, array.dtype, "safetensors")
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(little_endian(tensors[name]))


def little_endian(array: np.ndarray) -> bytes:
    return (array if array.dtype.names else array.astype(array.dtype.newbyteorder("<"), copy=False)).tobytes()
