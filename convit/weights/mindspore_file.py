"""MindSpore's checkpoint format: a protobuf message, here with its field numbers.

    Checkpoint  { repeated Value value = 1 }
    Value       { string tag = 1; TensorProto tensor = 2; MapTensorProto maptensor = 3 }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

A scalar has no dims. A tensor beyond 512 MB is split along its rows over consecutive values with the same tag, each with the dims of
the whole. With crc_check the message is followed by "crc_num" and its CRC-32 in ten bytes, big-endian.
"""

import io
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from convit.weights.files import (
    BFLOAT16,
    MAX_DIMS,
    MAX_TENSORS,
    SETTINGS,
    BadFile,
    Settings,
    Tensors,
    little_endian,
    mapped,
    name_of,
    parse_json,
    parse_settings,
    shown,
)

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
_MINDSPORE_NAMES = {dtype: name for name, dtype in _MINDSPORE.items()}
# the first four bytes of a file that MindSpore encrypted with AES-GCM, AES-CBC or SM4-CBC
ENCRYPTED = tuple(magic.to_bytes(4, "little") for magic in (0x7F3A5ED8, 0x7F3A5ED9, 0x7F3A5EDA))


class _Value(NamedTuple):
    kind: str
    dims: tuple[int, ...]
    pieces: list[memoryview]


def read(path: Path, data: memoryview) -> tuple[Tensors, Settings | None]:
    """The tensors by name, and the recorded settings.

    Raises:
        BadFile: It is truncated, damaged or no MindSpore checkpoint.
    """
    return _tensors(path, _values(path, data))


def facts(path: Path, name: str) -> dict[str, Any]:
    """The object that the string ``name`` holds as JSON; empty if the file has no such string.

    Raises:
        OSError: The file cannot be opened.
        BadFile: See ``read``.
    """
    values = _values(path, mapped(path))
    _tensors(path, values)  # within bounds too
    found = values.get(name)
    if found is None or found.kind != "str":
        return {}
    loaded = parse_json(path, str(b"".join(found.pieces), "utf-32-le", "replace"), shown(name))
    return loaded if isinstance(loaded, dict) else {}


def _tensors(path: Path, values: dict[str, _Value]) -> tuple[Tensors, Settings | None]:
    tensors: Tensors = {}
    settings = None
    for tag, (kind, dims, pieces) in values.items():
        content = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
        if kind == "str":
            if tag == SETTINGS:
                settings = parse_settings(path, str(content, "utf-32-le", "replace"))
            continue
        if kind not in _MINDSPORE:
            raise BadFile(path, f"has dtype {shown(kind)}, which is not supported", shown(tag))
        dtype = _MINDSPORE[kind]
        if dims == (0,) and len(content):
            dims = ()  # the scalars of MindSpore 1.x
        if not all(size <= len(content) for size in dims) or math.prod(dims) * dtype.itemsize != len(content):
            numbers = [size if size <= 1 << 40 else shown(size) for size in dims]
            raise BadFile(path, f"is truncated or damaged: {numbers} {kind} has {len(content)} bytes", shown(tag))
        tensors[tag] = np.frombuffer(content, dtype).reshape(dims)
    return tensors, settings


def _values(path: Path, data: memoryview) -> dict[str, _Value]:
    body = data[:-17] if bytes(data[-17:-10]) == b"crc_num" else data
    values: dict[str, _Value] = {}
    try:
        for count, (number, value) in enumerate(_fields(body)):
            if number != 1 or count >= MAX_TENSORS:
                raise ValueError(f"field {number}" if number != 1 else f"tensor after {MAX_TENSORS:,} others")
            _read_value(_bytes(value), values)
    except IndexError:
        raise BadFile(path, "is truncated, or is no MindSpore checkpoint") from None
    except ValueError as error:
        raise BadFile(path, f"is no MindSpore checkpoint, or is damaged: unexpected {str(error)[:200]}") from None
    if len(body) < len(data) and zlib.crc32(body) != int.from_bytes(data[-10:], "big"):
        raise BadFile(path, "is damaged: its CRC-32 does not match its content")
    return values


def _read_value(message: memoryview, values: dict[str, _Value]) -> None:
    tag, tensor = "", None
    for count, (number, value) in enumerate(_fields(message)):
        if number == 1 and count < 2:
            tag = str(_bytes(value), "utf-8")
        elif number == 2 and count < 2:
            tensor = _bytes(value)
        else:
            raise ValueError(f"hash-table parameter {shown(tag)}" if number == 3 else f"field {number} of {shown(tag)}")
    if not tag or tensor is None:
        raise ValueError("value without a name or a tensor")
    dims: list[int] = []
    kind, content = "", memoryview(b"")
    for count, (number, value) in enumerate(_fields(tensor)):
        if number == 1 and isinstance(value, int):
            dims.append(value)
        elif number == 1:  # packed
            at, packed = 0, _bytes(value)
            while at < len(packed) and len(dims) <= MAX_DIMS:
                size, at = _varint(packed, at)
                dims.append(size)
        elif number == 2:
            kind = str(_bytes(value), "utf-8")
        elif number == 3:
            content = _bytes(value)
        else:
            raise ValueError(f"field {number} of {shown(tag)}")
        if len(dims) > MAX_DIMS or count > MAX_DIMS + 2:
            raise ValueError(f"number of dimensions of {shown(tag)}")
    known = values.setdefault(tag, _Value(kind, tuple(dims), []))
    if known[:2] != (kind, tuple(dims)):
        raise ValueError(f"second tensor {shown(tag)} of another shape or type")
    known.pieces.append(content)


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("number of more than 64 bits")


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
        raise ValueError("number in place of bytes")
    return value


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _encode_varint(len(content)) + content


def write(file: BinaryIO, tensors: Tensors, settings: Settings | None) -> None:
    for tag, array in tensors.items():
        kind = name_of(_MINDSPORE_NAMES, tag, array.dtype, "MindSpore")
        _write_value(file, tag, array.shape, kind, little_endian(array))
    if settings:
        _write_value(file, SETTINGS, (0,), "str", json.dumps(settings).encode("utf-32-le"))


def _write_value(file: BinaryIO, tag: str, dims: tuple[int, ...], kind: str, content: bytes) -> None:
    sizes = b"".join(b"\x08" + _encode_varint(size) for size in dims)
    tensor = io.BytesIO()
    tensor.write(sizes + _field(2, kind.encode()))
    tensor.write(_field(3, content))
    file.write(_field(1, _field(1, tag.encode()) + _field(2, tensor.getvalue())))
