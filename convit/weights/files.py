"""How files are opened and written here, and the format of ``.safetensors``; PyTorch's and MindSpore's have modules of their own.

Files of strangers are read within bounds: only regular files, mapped and not copied, every size and count checked against the file's
own length before anything is allocated, in time and memory linear in that length. ``BadFile`` says what is wrong, in which file and where.

Settings travel as one JSON object: the metadata key ``convit`` of safetensors, the top-level key ``convit`` of a ``.pth``, a string
named ``convit`` in a ``.ckpt``. numpy has no bfloat16: such tensors are arrays of the structured type ``BFLOAT16``, which slices,
joins and compares like any other.
"""

import contextlib
import errno
import json
import math
import mmap
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BFLOAT16 = np.dtype([("bfloat16", "<u2")])

Tensors = dict[str, np.ndarray]
Settings = dict[str, Any]

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt")
SETTINGS = "convit"
MAX_TENSORS = 100_000  # a training checkpoint of the largest ConViT has some thousands
MAX_DIMS = 32  # numpy's own bound
_MAX_HEADER = 4 << 20  # bytes; parsed JSON takes some thirty times its text

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
_PARTIAL = re.compile(r"\.\d+-[0-9a-f]{8}\.partial(\.\w+)*$")
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


class BadFile(ValueError):
    """A file that is not what it should be: which file, what is wrong and, where it is known, the place in it."""

    def __init__(self, path: str | os.PathLike[str], problem: str, place: str = "") -> None:
        super().__init__(f"{os.fspath(path)}{place and f', {place}'} {problem}")


def shown(value: Any, limit: int = 60) -> str:
    """What a message shows of a value that a stranger wrote: never more than about ``limit`` characters, and in no time."""
    if isinstance(value, (str, bytes)):
        return repr(value if len(value) <= limit else value[:limit]) + ("" if len(value) <= limit else "...")
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, list) and 0 < len(value) <= 8 and not any(isinstance(one, (list, tuple, dict, set)) for one in value):
        return f"[{', '.join(shown(one, limit // len(value)) for one in value)}]"
    return repr(value) if value is None or isinstance(value, (bool, int, float)) else f"a {type(value).__name__}"


def mapped(path: str | os.PathLike[str]) -> memoryview:
    """The bytes of a regular file, mapped into memory: nothing is read before it is looked at.

    Raises:
        OSError: The file cannot be opened.
        BadFile: It is a folder, a named pipe, a device.
    """
    check_regular(path)
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b"")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse, before it is opened, what is no regular file: a pipe would block for ever.

    Raises:
        OSError: There is no such file.
        BadFile: It is a folder, a named pipe, a device.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise BadFile(path, f"is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, not a file")


def read_text(path: str | os.PathLike[str], limit: int) -> str:
    """The text of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: The file cannot be opened.
        BadFile: It is no regular file, longer, or no UTF-8.
    """
    data = mapped(path)
    if len(data) > limit:
        raise BadFile(path, f"has {len(data):,} bytes, more than the {limit:,} that such a file may have")
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(path, f"is no text: {error}") from None


def parse_json(path: str | os.PathLike[str], text: bytes | str, place: str) -> Any:
    """``json.loads`` for what strangers wrote: names are unique, and whatever goes wrong is a ``BadFile``."""
    try:
        return json.loads(text if isinstance(text, str) else str(text, "utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise BadFile(path, "cannot be read: it is nested too deeply", place) from None
    except ValueError as error:
        raise BadFile(path, f"cannot be read: {str(error)[:200]}", place) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known = dict(pairs)
    if len(known) < len(pairs):
        raise ValueError("a name occurs twice")
    return known


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


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[BinaryIO]:
    """The file ``path``, made if need be and held by this process alone; the system lets go of it when the process ends, however it ends.

    Where the system has no such locks (Windows, some network file systems) nobody is kept out.

    Raises:
        BlockingIOError: Somebody else holds it, and ``wait`` is False.
        OSError: It cannot be opened.
    """
    while True:
        with open(path, "a+b") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except BlockingIOError:
                    raise
                except OSError as error:
                    if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                        raise
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # it was renamed or removed while this process waited for it
            yield file
            return


def name_of(names: Mapping[np.dtype, str], tensor: str, dtype: np.dtype, kind: str) -> str:
    dtype = dtype.newbyteorder("<") if dtype.names is None else dtype
    if dtype not in names:
        raise ValueError(f"{tensor} has dtype {dtype}, which {kind} files cannot hold")
    return names[dtype]


def little_endian(array: np.ndarray) -> bytes:
    return (array if array.dtype.names else array.astype(array.dtype.newbyteorder("<"), copy=False)).tobytes()


def parse_settings(path: str | os.PathLike[str], found: Any) -> Settings | None:
    """The recorded settings: None, JSON text or a mapping to a mapping or None."""
    settings = parse_json(path, found, "its settings") if isinstance(found, (str, bytes)) else found
    if settings is not None and not isinstance(settings, dict):
        raise BadFile(path, f"must be an object, got {shown(settings)}", "its settings")
    return settings


def to_torch(array: np.ndarray) -> Any:
    """A torch tensor with the bits of ``array``; it may share memory."""
    import torch

    array = np.require(array, requirements=["C", "A", "W"]).reshape(array.shape)  # what is mapped from a file is copied here
    return torch.from_numpy(array.view("<i2")).view(torch.bfloat16) if array.dtype == BFLOAT16 else torch.from_numpy(array)


def from_torch(tensor: Any) -> np.ndarray:
    """An array with the bits of a dense torch tensor; it may share memory."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy()).view(BFLOAT16)
    return np.asarray(tensor.numpy())


# safetensors: the length of a JSON header as a 64-bit integer, the header, the data


def read_safetensors(path: Path, data: memoryview) -> tuple[Tensors, Settings | None]:
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise BadFile(path, f"is truncated: its header should be {shown(length)} bytes, the file has {len(data)}")
    if length > _MAX_HEADER:
        raise BadFile(path, f"has a header of {length:,} bytes; no ConViT needs more than {_MAX_HEADER:,}")
    header = parse_json(path, bytes(data[8 : 8 + length]), "its header")
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(header, dict) or not isinstance(metadata, (dict, type(None))) or len(header) > MAX_TENSORS:
        raise BadFile(path, f"must be an object of at most {MAX_TENSORS:,} tensors, and __metadata__ an object", "its header")
    body = data[8 + length :]
    entries = {name: _entry(path, name, entry, len(body)) for name, entry in header.items()}
    expected = 0
    tensors: Tensors = {}
    for name, (kind, shape, start, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start != expected or end - start != math.prod(shape) * _SAFETENSORS[kind].itemsize:
            raise BadFile(path, f"is damaged: {list(shape)} {kind} cannot be at bytes {start} to {end}", shown(name))
        tensors[name] = np.frombuffer(body[start:end], _SAFETENSORS[kind]).reshape(shape)
        expected = end
    if expected != len(body):
        raise BadFile(path, f"is damaged: {len(body) - expected} bytes follow the last tensor")
    return {name: tensors[name] for name in entries}, parse_settings(path, (metadata or {}).get(SETTINGS))


def _entry(path: Path, name: str, entry: Any, length: int) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, start, end) of one tensor in a header, each number within the file."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise BadFile(path, "must have dtype, shape and data_offsets", shown(name))
    kind, shape, offsets = entry["dtype"], entry.get("shape"), entry.get("data_offsets")
    if kind not in _SAFETENSORS:
        raise BadFile(path, f"has dtype {shown(kind)}, which is not supported", shown(name))
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not isinstance(offsets, list) or len(offsets) != 2:
        raise BadFile(path, "must have a shape and two data_offsets", shown(name))
    for number in (*shape, *offsets):
        if type(number) is not int or number < 0:
            raise BadFile(path, f"is damaged: its shape and offsets must be numbers from 0, got {shown(number)}", shown(name))
        if number > length:
            raise BadFile(path, f"is truncated or damaged: it says {shown(number)}, but there are {length} bytes of data", shown(name))
    if 0 in shape and math.prod(size or 1 for size in shape) > 1 << 40:
        raise BadFile(path, f"is damaged: nothing can have the shape {shown(shape)}", shown(name))
    return kind, tuple(shape), offsets[0], offsets[1]


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
