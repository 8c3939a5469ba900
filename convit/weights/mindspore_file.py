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
from typing import BinaryIO

import numpy as np

from convit.weights.files import BFLOAT16, SETTINGS, Settings, Tensors, little_endian, name_of, parse_settings

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


def read(path: Path, data: bytearray) -> tuple[Tensors, Settings | None]:
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
            if tag == SETTINGS:
                settings = parse_settings(path, content)
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
