"""PyTorch's pickles, interpreted by a machine of the few instructions that tensors and plain values need: nothing in a file is ever run.

Classes that are known to hold only values (``argparse.Namespace`` in FAIR's files, numpy's scalars) become placeholders; any other is
refused.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convit.weights import archive
from convit.weights.files import BFLOAT16, MAX_DIMS, MAX_TENSORS, BadFile, shown

_MAX_OPERATIONS = 500_000  # a second's work; a training checkpoint takes some ten thousand
_MAX_NUMBERS = 5_000  # keys that are numbers: their hashes can be made to collide, and those of names cannot

DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": BFLOAT16,
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
_OTHER_STORAGES = ("ComplexFloatStorage", "ComplexDoubleStorage", "QUInt8Storage", "QInt8Storage", "QInt32Storage", "QUInt4x2Storage")
_REBUILD = tuple(f"torch._utils.{name}" for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"))
_REBUILD_PARAMETER = tuple(f"torch._utils.{name}" for name in ("_rebuild_parameter", "_rebuild_parameter_with_state"))
# what holds values but no weights that could be read: a placeholder takes its place
_INERT = tuple(
    f"{module}.{name}"
    for modules, names in (
        ("argparse", "Namespace"),
        ("builtins __builtin__", "bytearray complex dict frozenset int list object set"),
        ("collections", "Counter defaultdict"),
        ("_codecs", "encode"),
        ("copyreg copy_reg", "_reconstructor"),
        ("numpy", "dtype ndarray"),
        ("numpy.core.multiarray numpy._core.multiarray", "_reconstruct scalar"),
        ("pathlib pathlib._local", "PosixPath WindowsPath"),  # the latter of Python 3.13
        ("torch", "Generator Tensor device"),
        ("torch._utils", "_rebuild_meta_tensor_no_storage _rebuild_qtensor _rebuild_sparse_tensor"),
        ("torch.nn.parameter", "Parameter"),
        ("torch.serialization", "_get_layout"),
    )
    for module in modules.split()
    for name in names.split()
)
_CALLED = {*_REBUILD, *_REBUILD_PARAMETER, *_INERT, "collections.OrderedDict", "torch.Size", "torch._tensor._rebuild_from_type_v2"}


class Global(NamedTuple):
    """A class or function by name; or, as a value, the placeholder for what it would have made."""

    name: str


class Storage:
    """``numel`` elements of ``dtype``; ``data`` is None until an old file's storages are reached; ``record`` is not checked yet."""

    def __init__(self, dtype: str, numel: int, data: memoryview | None, record: archive.Record | None = None) -> None:
        self.dtype, self.numel, self.data, self.record = dtype, numel, data, record


class Tensor(NamedTuple):
    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: str


class Machine:
    """Pickle's machine, as far as checkpoints need it. Every step takes bytes of the file; nothing grows by itself."""

    def __init__(self, path: Path, data: memoryview, storage: Callable[[str, str, int], Storage]) -> None:
        self.path, self.data, self.storage = path, data, storage
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.numbers = self.copied = 0

    def run(self) -> Any:
        simple, sized = self._SIMPLE, self._SIZED
        for _ in range(_MAX_OPERATIONS):
            code = self.data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                if len(self.stack) != 1:
                    raise self.bad("it ends in the middle")
                return self.stack[0]
            if code in sized:
                form, convert = sized[code]
                (size,) = struct.unpack_from(form, self.data, self.at)
                begin = self.at + struct.calcsize(form)
                if begin + size > len(self.data):
                    raise IndexError
                self.stack.append(convert(bytes(self.data[begin : begin + size])))
                self.at = begin + size
            elif code in simple:
                simple[code](self)
            else:
                raise self.bad(f"instruction {bytes([code])!r} has no place in a checkpoint")
        raise self.bad(f"it takes more than {_MAX_OPERATIONS:,} instructions")

    def bad(self, what: str) -> BadFile:
        return BadFile(self.path, f"is no PyTorch checkpoint, or is damaged: byte {self.at} of its pickle, {what}")

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def line(self) -> str:
        text = bytes(self.data[self.at : self.at + 256])
        end = text.index(b"\n") if b"\n" in text else len(text)
        self.at += end + 1
        return text[:end].decode("utf-8", "replace")

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def tuple_of(self, size: int) -> None:
        if size > len(self.stack):
            raise IndexError
        items = tuple(self.stack[len(self.stack) - size :])
        del self.stack[len(self.stack) - size :]
        self.stack.append(items)

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.bad(f"there is no object {index}")
        self.stack.append(self.memo[index])

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Global):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise self.bad("items without a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.key(key)] = value

    def key(self, key: Any) -> Any:
        """``key`` if hashing it takes no time: hashes of tuples can take for ever, and those of numbers collide."""
        if isinstance(key, (str, bytes, type(None))):
            return key
        parts = key if type(key) is tuple and len(key) <= 8 else (key,)
        if not all(isinstance(part, (str, bytes, int, float, type(None))) for part in parts):
            raise self.bad(f"a key must be a name or a number, got {shown(key)}")
        self.numbers += 1
        if self.numbers > _MAX_NUMBERS:
            raise self.bad(f"more than {_MAX_NUMBERS:,} keys are no names")
        return key

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Global):
            raise self.bad("items without a list")

    def lookup(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?"
        kind = full.removeprefix("torch.storage.").removeprefix("torch.")
        dtype = kind in _STORAGES or kind in _OTHER_STORAGES or kind in DTYPES or kind.startswith(("complex", "float8_"))
        if full not in _CALLED and not (full.startswith("torch.") and dtype):
            raise BadFile(
                self.path,
                f"was refused: its pickle calls {full.replace(chr(10), ' ')[:80]}, so loading it could run any code. "
                "Save the state_dict alone where the file comes from, or as safetensors",
            )
        self.stack.append(Global(full))

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, arguments))

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise self.bad("a call of what is no function")
        name = function.name
        if name == "collections.OrderedDict":
            pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
            self.copied += len(pairs)  # of a list that is called for again and again
            if self.copied > MAX_TENSORS:
                raise self.bad(f"it copies more than {MAX_TENSORS:,} entries")
            if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
                raise self.bad("an OrderedDict that is none")
            return {self.key(key): value for key, value in pairs}
        if name == "torch.Size" and len(arguments) == 1 and isinstance(arguments[0], (tuple, list)):
            return tuple(arguments[0][: MAX_DIMS + 1])  # more are refused with the tensor
        if name in _REBUILD and len(arguments) >= 4:
            storage = arguments[0]
            kind = storage.dtype if isinstance(storage, Storage) else getattr(storage, "name", "none")
            if name.endswith("_v3") and len(arguments) >= 7 and isinstance(arguments[6], Global):
                kind = arguments[6].name.removeprefix("torch.")
            return Tensor(storage, arguments[1], arguments[2], arguments[3], kind)
        if name in _REBUILD_PARAMETER and arguments:
            return arguments[0]
        if name == "torch._tensor._rebuild_from_type_v2" and len(arguments) >= 3 and arguments[0] != function:
            return self.call(arguments[0], arguments[2])
        if name in _INERT:
            return function
        raise self.bad(f"a call of {name} that does not fit it")

    def make(self) -> None:
        self.stack.pop()
        made = self.stack.pop()
        if not isinstance(made, Global):
            raise self.bad("an object of what is no class")
        self.stack.append({} if made.name == "collections.OrderedDict" else made)

    def persistent(self) -> None:
        identity = self.stack.pop()
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage" or not isinstance(identity[1], Global):
            raise self.bad("a storage without a name")
        kind, key, numel = identity[1].name.rpartition(".")[2], identity[2], identity[4]
        if kind in _OTHER_STORAGES:
            self.stack.append(Global(identity[1].name))
            return
        if kind not in _STORAGES or not isinstance(key, str) or type(numel) is not int or numel < 0 or any(identity[5:]):
            raise self.bad(f"a storage of {kind[:40]} {shown(key)} with {shown(numel)} elements")
        self.stack.append(self.storage(_STORAGES[kind], key, numel))

    def discard(self, count: int) -> None:
        for _ in range(count):
            self.stack.pop()

    def same_kind(self, make: Callable[[list[Any]], Any]) -> None:
        items = self.since_mark()
        self.stack.append(make([self.key(item) for item in items]))

    def add(self) -> None:
        items, target = self.since_mark(), self.stack[-1]
        if not isinstance(target, set):
            raise self.bad("items without a set")
        target.update(self.key(item) for item in items)

    def build(self) -> None:
        self.stack.pop()  # the state of a placeholder, or the attributes of a dictionary
        self.stack[-1]

    def pair(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def one(self) -> None:
        item = self.stack.pop()
        self.append([item])

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.lookup(module, name)

    _SIZED: dict[int, tuple[str, Callable[[bytes], Any]]] = {
        0x58: ("<I", lambda text: text.decode("utf-8", "surrogatepass")),  # BINUNICODE
        0x8C: ("<B", lambda text: text.decode("utf-8", "surrogatepass")),
        0x8D: ("<Q", lambda text: text.decode("utf-8", "surrogatepass")),
        0x54: ("<I", lambda text: text.decode("latin-1")),  # BINSTRING, of Python 2
        0x55: ("<B", lambda text: text.decode("latin-1")),
        0x42: ("<I", bytes),  # BINBYTES
        0x43: ("<B", bytes),
        0x8E: ("<Q", bytes),
        0x96: ("<Q", bytes),
        0x8A: ("<B", lambda text: int.from_bytes(text, "little", signed=True)),  # LONG1
    }
    _SIMPLE: dict[int, Callable[["Machine"], Any]] = {
        0x80: lambda m: m.number("<B"),  # PROTO
        0x95: lambda m: m.number("<Q"),  # FRAME
        0x28: mark,
        0x30: lambda m: m.discard(1),
        0x31: lambda m: m.since_mark(),
        0x4E: lambda m: m.push(None),
        0x88: lambda m: m.push(True),
        0x89: lambda m: m.push(False),
        0x4A: lambda m: m.push(m.number("<i")),
        0x4B: lambda m: m.push(m.number("<B")),
        0x4D: lambda m: m.push(m.number("<H")),
        0x47: lambda m: m.push(m.number(">d")),
        0x7D: lambda m: m.push({}),
        0x5D: lambda m: m.push([]),
        0x29: lambda m: m.push(()),
        0x8F: lambda m: m.push(set()),
        0x74: lambda m: m.push(tuple(m.since_mark())),
        0x6C: lambda m: m.push(m.since_mark()),
        0x85: lambda m: m.tuple_of(1),
        0x86: lambda m: m.tuple_of(2),
        0x87: lambda m: m.tuple_of(3),
        0x61: one,
        0x65: lambda m: m.append(m.since_mark()),
        0x73: pair,
        0x75: lambda m: m.set_items(m.since_mark()),
        0x90: add,
        0x91: lambda m: m.same_kind(frozenset),
        0x71: lambda m: m.remember(m.number("<B")),
        0x72: lambda m: m.remember(m.number("<I")),
        0x94: lambda m: m.remember(len(m.memo)),
        0x68: lambda m: m.recall(m.number("<B")),
        0x6A: lambda m: m.recall(m.number("<I")),
        0x63: lambda m: m.lookup(m.line(), m.line()),
        0x93: stack_global,
        0x52: reduce,
        0x81: make,
        0x62: build,
        0x51: persistent,
    }
