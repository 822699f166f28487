"""A safetensors file as untrusted bytes: header, checks, mapping and reads, all on one file descriptor.

The file is an 8-byte little-endian length, a JSON header of that length, and data. The header maps each
tensor's name to its dtype, shape and [begin, end) in the data. Nothing is allocated on the word of the
header: sizes are compared with the file first. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .formats import FormatError

# A header of 16 MB describes a hundred thousand tensors; parsing takes about ten times its size in memory.
MAX_HEADER = 16 << 20

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor in the file: [begin, end) are bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Container:
    """An open file whose header has been checked. Tensors may be used after close()."""

    def __init__(self, path: str | os.PathLike[str], *, mapped: bool = True) -> None:
        self._map: mmap.mmap | None = None
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError("not a regular file")
            self.size = status.st_size
            self.entries, self.metadata = _read_header(self._fd, self.size)
            if mapped:
                # Private and writable: tensors are ordinary ones, and writing to them never reaches the file.
                self._map = mmap.mmap(
                    self._fd, self.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptor. The mapping lives as long as a tensor on it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._map = None

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bytes(self, entry: Entry) -> Tensor:
        """The tensor's bytes: on the mapping, or read into memory of its own."""
        count = entry.end - entry.begin
        if count == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        if self._map is not None:
            return torch.frombuffer(self._map, dtype=torch.uint8, count=count, offset=entry.begin)
        data = torch.empty(count, dtype=torch.uint8, device="cpu")
        target, done = data.numpy().data, 0
        while done < count:
            got = os.preadv(self._fd, [target[done:]], entry.begin + done)
            if got == 0:
                raise FormatError("the file was truncated while it was read")
            done += got
        return data

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name. On a mapped file it shares the mapping, unless it is not aligned there."""
        entry = self.entries[name]
        data = self._bytes(entry)
        if entry.begin % entry.dtype.itemsize:
            data = data.clone()
        return data.view(entry.dtype).view(entry.shape)

    def checksum(self, names: Iterable[str]) -> str:
        """CRC-32 of the named tensors' bytes, one after the other, in hexadecimal."""
        value = 0
        for name in names:
            value = zlib.crc32(self._bytes(self.entries[name]).numpy().data, value)
        return f"{value:08x}"

    def release(self, names: Iterable[str]) -> None:
        """Give back the memory of mapped tensors that are no longer used."""
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        for name in names:
            entry = self.entries[name]
            # Whole pages only: those at the edges may belong to a neighbour that is in use.
            begin = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE
            end = entry.end // mmap.PAGESIZE * mmap.PAGESIZE
            if end > begin:
                self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise FormatError("the header names a key twice")
    return result


def parse_json(text: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object with unique keys; FormatError for anything else, however deep or long."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not JSON: {str(error)[:120]}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object")
    return value


def _read_header(fd: int, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    start = os.pread(fd, 8, 0)
    if len(start) < 8:
        raise FormatError(f"file of {size} bytes is too short to be a safetensors file")
    (length,) = struct.unpack("<Q", start)
    if length > size - 8:
        raise FormatError(
            f"header length {length} exceeds the file of {size} bytes (truncated, or not safetensors)"
        )
    if length > MAX_HEADER:
        raise FormatError(f"header length {length} exceeds the limit of {MAX_HEADER} bytes")
    header = parse_json(os.pread(fd, length, 8), "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("__metadata__ is not a map of strings")
    data = 8 + length
    entries = {name: _entry(name, value, data) for name, value in header.items()}
    at = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise FormatError(
                f"tensor {name!r} leaves a hole or overlaps: it begins at byte {entry.begin}, not {at}"
            )
        at = entry.end
    if at != size:
        raise FormatError(f"the tensors end at byte {at}, the file at {size} (truncated or extended)")
    return entries, metadata


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(name: str, value: Any, data: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"tensor {name!r}: the entry is not dtype, shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise FormatError(f"tensor {name!r}: dtype {str(kind)[:40]!r} is unknown")
    if not isinstance(shape, list) or len(shape) > 64 or not all(map(_whole, shape)):
        raise FormatError(f"tensor {name!r}: shape is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
        raise FormatError(f"tensor {name!r}: data_offsets are not two sizes")
    begin, end = offsets
    wanted = math.prod(shape) * DTYPES[kind].itemsize
    if end - begin != wanted:
        raise FormatError(f"tensor {name!r}: shape and dtype make {wanted} bytes, data_offsets {end - begin}")
    return Entry(DTYPES[kind], tuple(shape), data + begin, data + end)
