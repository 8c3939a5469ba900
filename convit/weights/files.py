"""The bytes of checkpoint files: PyTorch ``.pth``, ``.safetensors`` and MindSpore ``.ckpt``, as numpy arrays by name.

A file is recognised by its content, so a wrong suffix does no harm. safetensors and MindSpore files are read and written here without
their libraries; PyTorch files need torch and load with ``weights_only=True``. Settings travel as one JSON object: the metadata
key ``convit`` of safetensors, the top-level key ``convit`` of a ``.pth``, a string named ``convit`` in a ``.ckpt``.

numpy has no bfloat16: such tensors are arrays of the structured type ``BFLOAT16``, which slices, joins and compares like any other.
"""

import argparse
import contextlib
import io
import json
import math
import os
import re
import zlib
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
_SETTINGS = "convit"

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
_MINDSPORE: dict[str, np.dtype] = {
    "Float64": np.dtype("<f8"),
    "Float32": np.dtype("<f4"),
    "Float16": np.dtype("<f2"),
    "BFloat16": BFLOAT16,
    "Int64": np.dtype("<i8"),
    "Int32": np.dtype("<i4"),
    "Int16": np.dtype("<i2"),
    "Int8": np.dtype("i1"),
    "UInt64": np.dtype("<u8"),
    "UInt32": np.dtype("<u4"),
    "UInt16": np.dtype("<u2"),
    "UInt8": np.dtype("u1"),
    "Bool": np.dtype("?"),
}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS.items()}
_MINDSPORE_NAMES = {dtype: name for name, dtype in _MINDSPORE.items()}
# the first four bytes of a file that MindSpore encrypted with AES-GCM, AES-CBC or SM4-CBC
_ENCRYPTED = tuple(magic.to_bytes(4, "little") for magic in (0x7F3A5ED8, 0x7F3A5ED9, 0x7F3A5EDA))


def read_file(path: str | os.PathLike[str], key: str | None = None) -> tuple[Tensors, Settings | None]:
    """Read any of the formats: the tensors under the names they have in the file, and the recorded settings if there are any.

    Args:
        path: The file.
        key: For ``.pth`` files that hold several dictionaries of weights, the one to read; default: the first of ``WEIGHT_KEYS``.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is no checkpoint, is truncated or damaged, is encrypted, or would run code when unpickled.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(16)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return _read_torch(path, key)
    if key is not None:
        raise ValueError(f"{path}: key={key!r} is for .pth files; this file has only one dictionary of weights")
    if head[:4] in _ENCRYPTED:
        raise ValueError(
            f"{path} is encrypted by MindSpore; decrypt it first: "
            "mindspore.save_checkpoint([{'name': n, 'data': p} for n, p in mindspore.load_checkpoint(file, dec_key=...).items()], out)"
        )
    data = bytearray(path.stat().st_size)
    with open(path, "rb") as file:
        file.readinto(data)
    if head[8:9] == b"{":
        return _read_safetensors(path, data)
    if head[:1] == b"\x0a":
        return _read_mindspore(path, data)
    raise ValueError(f"{path} is no checkpoint: expected a PyTorch, safetensors or MindSpore file, got {_looks_like(head, data)}")


def write_file(path: str | os.PathLike[str], tensors: Tensors, settings: Settings | None) -> None:
    """Write ``tensors`` in the format of the suffix, whole or not at all.

    Args:
        path: ``.pth``, ``.pt`` or ``.bin`` (PyTorch), ``.safetensors`` or ``.ckpt`` (MindSpore); an existing file is replaced.
        tensors: Arrays by name; the order is kept.
        settings: A JSON object to travel with them, or None.

    Raises:
        ValueError: The suffix is unknown, or the format has no such dtype.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"the suffix of {path.name!r} must be one of {', '.join(SUFFIXES)}, got {suffix or 'none'!r}")
    with replacing(path) as file:
        if suffix == ".safetensors":
            _write_safetensors(file, tensors, settings)
        elif suffix == ".ckpt":
            _write_mindspore(file, tensors, settings)
        else:
            _write_torch(file, tensors, settings)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes ``path`` when the block ends well, and nothing when it does not."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _looks_like(head: bytes, data: bytearray) -> str:
    if not data:
        return "an empty file"
    if head.lstrip()[:1] == b"<":
        return "a web page (a failed download?)"
    if head.startswith(b"version https://"):
        return "a git-lfs pointer; fetch the file itself with `git lfs pull`"
    return f"a file that starts with {bytes(head[:8])!r}"


def _name_of(names: dict[np.dtype, str], tensor: str, dtype: np.dtype, kind: str) -> str:
    dtype = dtype.newbyteorder("<") if dtype.names is None else dtype
    if dtype not in names:
        raise ValueError(f"{tensor} has dtype {dtype}, which {kind} files cannot hold")
    return names[dtype]


def _settings(path: Path, text: Any) -> Settings | None:
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
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def _torch_dtypes() -> tuple:
    import torch

    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
    return tuple(getattr(torch, name) for name in names.split())


def _read_torch(path: Path, key: str | None) -> tuple[Tensors, Settings | None]:
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
    settings = _settings(path, loaded.get(_SETTINGS))
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


def _write_torch(file: BinaryIO, tensors: Tensors, settings: Settings | None) -> None:
    import torch

    weights = {name: to_torch(array).clone() for name, array in tensors.items()}
    torch.save({"model": weights, _SETTINGS: settings} if settings else weights, file)


# safetensors: the length of a JSON header as a 64-bit integer, the header, the data


def _read_safetensors(path: Path, data: bytearray) -> tuple[Tensors, Settings | None]:
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
    return {name: tensors[name] for name in entries}, _settings(path, metadata.get(_SETTINGS))


def _write_safetensors(file: BinaryIO, tensors: Tensors, settings: Settings | None) -> None:
    metadata = {"format": "pt"} | ({_SETTINGS: json.dumps(settings)} if settings else {})
    header: dict[str, Any] = {"__metadata__": metadata} | dict.fromkeys(tensors)
    # wide types first, so that every tensor is aligned
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    offset = 0
    for name in order:
        array = tensors[name]
        kind = _name_of(_SAFETENSORS_NAMES, name, array.dtype, "safetensors")
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(_little_endian(tensors[name]))


def _little_endian(array: np.ndarray) -> bytes:
    return (array if array.dtype.names else array.astype(array.dtype.newbyteorder("<"), copy=False)).tobytes()


# MindSpore: a protobuf message, here with its field numbers
#     Checkpoint  { repeated Value value = 1 }
#     Value       { string tag = 1; TensorProto tensor = 2; MapTensorProto maptensor = 3 }
#     TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }
# A scalar has no dims. A tensor beyond 512 MB is split along its rows over consecutive values with the same tag, each with the dims of
# the whole. With crc_check the message is followed by "crc_num" and its CRC-32 in ten bytes, big-endian.


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of one protobuf message: (number, integer or bytes)."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(data):
            raise IndexError
        yield number, data[at : at + length]
        at += length


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError(f"number {value}")
    return value


def _read_mindspore(path: Path, data: bytearray) -> tuple[Tensors, Settings | None]:
    body = memoryview(data)
    if data[-17:-10] == b"crc_num":
        body = body[:-17]
        if zlib.crc32(body) != int.from_bytes(data[-10:], "big"):
            raise ValueError(f"{path} is damaged: its CRC-32 does not match its content")
    parts: dict[str, tuple[str, tuple[int, ...], list[memoryview]]] = {}
    try:
        for number, value in _fields(body):
            if number != 1:
                raise ValueError(f"field {number}")
            _read_value(_bytes(value), parts)
    except IndexError:
        raise ValueError(f"{path} is truncated, or is no MindSpore checkpoint") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no MindSpore checkpoint, or is damaged: unexpected {error}") from error
    tensors: Tensors = {}
    settings = None
    for tag, (kind, dims, pieces) in parts.items():
        content = bytearray().join(pieces)
        if kind == "str":
            if tag == _SETTINGS:
                settings = _settings(path, content)
            continue
        if kind not in _MINDSPORE:
            raise ValueError(f"{path}: {tag} has dtype {kind}, which is not supported")
        dtype = _MINDSPORE[kind]
        if dims == (0,) and content:
            dims = ()  # the scalars of MindSpore 1.x
        if math.prod(dims) * dtype.itemsize != len(content):
            raise ValueError(f"{path} is truncated or damaged: {tag} {list(dims)} {kind} has {len(content)} bytes")
        tensors[tag] = np.frombuffer(content, dtype).reshape(dims)
    return tensors, settings


def _read_value(message: memoryview, parts: dict[str, tuple[str, tuple[int, ...], list[memoryview]]]) -> None:
    fields = dict(_fields(message))
    tag = str(_bytes(fields[1]), "utf-8") if 1 in fields else ""
    if 3 in fields:
        raise ValueError(f"hash-table parameter {tag!r}")
    if not tag or 2 not in fields:
        raise ValueError("value without a name or a tensor")
    dims: list[int] = []
    kind, content = "", memoryview(b"")
    for number, value in _fields(_bytes(fields[2])):
        if number == 1 and isinstance(value, int):
            dims.append(value)
        elif number == 1:  # packed
            at, packed = 0, _bytes(value)
            while at < len(packed):
                size, at = _varint(packed, at)
                dims.append(size)
        elif number == 2:
            kind = str(_bytes(value), "utf-8")
        elif number == 3:
            content = _bytes(value)
    known = parts.setdefault(tag, (kind, tuple(dims), []))
    if known[:2] != (kind, tuple(dims)):
        raise ValueError(f"second tensor {tag!r} {dims} {kind} after {list(known[1])} {known[0]}")
    known[2].append(content)


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _encode_varint(len(content)) + content


def _write_mindspore(file: BinaryIO, tensors: Tensors, settings: Settings | None) -> None:
    for tag, array in tensors.items():
        kind = _name_of(_MINDSPORE_NAMES, tag, array.dtype, "MindSpore")
        _write_value(file, tag, array.shape, kind, _little_endian(array))
    if settings:
        _write_value(file, _SETTINGS, (0,), "str", json.dumps(settings).encode("utf-32-le"))


def _write_value(file: BinaryIO, tag: str, dims: tuple[int, ...], kind: str, content: bytes) -> None:
    sizes = b"".join(b"\x08" + _encode_varint(size) for size in dims)
    tensor = io.BytesIO()
    tensor.write(sizes + _field(2, kind.encode()))
    tensor.write(_field(3, content))
    file.write(_field(1, _field(1, tag.encode()) + _field(2, tensor.getvalue())))
