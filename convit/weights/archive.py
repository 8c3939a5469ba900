"""The zip archives of PyTorch's format, read within bounds: stored records, each with its CRC-32, which ``torch.load`` does not check."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from convit.weights.files import MAX_TENSORS, BadFile, shown

MAGIC = b"PK\x03\x04"
PROGRAM = "is no PyTorch checkpoint: it is a TorchScript program (torch.jit.load runs it)"


class Record(NamedTuple):
    """A record of an archive, and the CRC-32 that the archive states for it; 0 where its writer computed none."""

    data: memoryview
    crc: int

    def check(self, path: Path, name: str) -> memoryview:
        """The bytes, if they are those that were written."""
        if self.crc and zlib.crc32(self.data) != self.crc:
            raise BadFile(path, f"is damaged: its CRC-32 is not the stated {self.crc:08x}", name)
        return self.data


def records(path: Path, data: memoryview) -> Iterator[tuple[str, Record]]:
    """The records of a zip archive without compression, by name."""
    tail = bytes(data[-65557:])
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise BadFile(path, "is truncated: the archive has no directory at its end")
    end = len(data) - len(tail) + at
    count, size, start = struct.unpack_from("<10xHII", data, end)
    if end >= 20 and bytes(data[end - 20 : end - 16]) == b"PK\x06\x07":
        (wide,) = struct.unpack_from("<8xQ", data, end - 20)
        count, size, start = struct.unpack_from("<32xQQQ", data, wide) if wide < len(data) else (0, 0, len(data))
    if start + size > end or count > MAX_TENSORS or size > 1000 * count:
        raise BadFile(path, "is truncated or damaged: its directory is not in the file, or too large")
    used, at, known = 0, start, set[str]()
    for _ in range(count):
        method, crc, packed, length, names, extra, comment, header = struct.unpack_from("<10xH4xIIIHHH8xI", data, at)
        name = bytes(data[at + 46 : at + 46 + names])
        fields, at = data[at + 46 + names : at + 46 + names + extra], at + 46 + names + extra + comment
        while len(fields) >= 4:  # 64-bit sizes, in this order, where the 32-bit ones are full
            tag, width = struct.unpack_from("<HH", fields)
            if tag == 1:
                wides = iter(struct.unpack_from(f"<{width // 8}Q", fields, 4))
                length, packed, header = (next(wides, 0) if n == 0xFFFFFFFF else n for n in (length, packed, header))
            fields = fields[4 + width :]
        if method and b"/code/" in name:
            raise BadFile(path, PROGRAM)
        if method or packed != length:
            raise BadFile(path, "is compressed, which torch.save never does", shown(name))
        begin = header + 30 + sum(struct.unpack_from("<26xHH", data, header)) if header < len(data) else len(data)
        used += length
        if begin + length > start or used > len(data):
            raise BadFile(path, "is truncated or damaged: the record is not in the file", shown(name))
        text = name.decode("utf-8", "replace")
        if text in known:  # readers differ in which of them they take
            raise BadFile(path, "is there twice", shown(text))
        known.add(text)
        yield text, Record(data[begin : begin + length], crc)
