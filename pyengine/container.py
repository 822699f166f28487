"""The safetensors file as bytes: writing it, and reading it as what it is, untrusted.

The file is an 8-byte little-endian length, a JSON header of that length, and data. The header maps each
tensor's name to its dtype, shape and [begin, end) in the data. Nothing is allocated on the word of the
header: sizes are compared with the file first. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import mmap
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .formats import FormatError
from .memory import pages

# A header of 16 MB describes a hundred thousand tensors. A hostile one, all brackets, takes almost thirty
# times its size while it is parsed.
MAX_HEADER = 16 << 20

# torch's own tensors begin on a cache line. Its operators may round otherwise where one does not.
LINE = 64

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
PathLike = str | os.PathLike[str]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def check_storable(name: str, tensor: Tensor) -> None:
    """Raises TypeError or ValueError, with the name, for a tensor that a file cannot hold."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        kind = type(tensor).__name__ if tensor.layout == torch.strided else str(tensor.layout)
        raise TypeError(f"tensor {name!r} is a {kind}, not a dense tensor, and cannot be saved")
    if tensor.dtype not in _NAMES:
        raise TypeError(f"tensor {name!r} is {tensor.dtype}, which a file cannot hold")
    if tensor.is_meta:
        raise ValueError(f"tensor {name!r} is on the meta device: it has no values to save")


def plain(tensor: Tensor) -> Tensor:
    """Contiguous, on the CPU; a copy only where it has to be one."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    # Not reshape(-1), which keeps the odd stride that a single element may have.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view


def checksum(tensors: Iterable[Tensor]) -> str:
    """CRC-32 of the tensors' bytes, one after the other, in hexadecimal."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(as_bytes(tensor), value)
    return f"{value:08x}"


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, from byte `begin` on."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.begin + self.nbytes


def _write_order(item: tuple[str, Entry]) -> tuple[bool, int, str]:
    name, entry = item
    return entry.nbytes % LINE != 0, -entry.dtype.itemsize, name


# ---- writing -------------------------------------------------------------------------------------


def write(
    file: BinaryIO,
    entries: Mapping[str, Entry],
    metadata: dict[str, str],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write a whole file; where the entries begin is decided here. The tensors may come in any order and are
    not kept, so that they need not all exist at once. Raises ValueError for a name and for a number of
    tensors that a file cannot hold.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    begin, offsets = 0, {}
    # Whole cache lines first, as the data begin with one: these tensors can be used where they lie in a
    # mapping. Then wide types first, so that each tensor is aligned to its own.
    for name, entry in sorted(entries.items(), key=_write_order):
        if name in header:
            raise ValueError(f"a tensor cannot be named {name!r}")
        offsets[name], end = begin, begin + entry.nbytes
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % LINE)
    if len(text) > MAX_HEADER:
        raise ValueError(f"{len(entries)} tensors make a header of {len(text)} bytes, above {MAX_HEADER}")
    file.write(struct.pack("<Q", len(text)) + text)
    for name, tensor in tensors:
        file.seek(8 + len(text) + offsets[name])
        file.write(as_bytes(tensor))


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[BinaryIO]:
    """A new file that takes the place and the permissions of the one at path when the block ends, and is
    removed if the block raises. Where path is a link, what it points to is replaced.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "No such directory", folder)
    mode = os.stat(target).st_mode if os.path.exists(target) else None
    if mode is not None and not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", target)
    temporary = os.path.join(folder, f".pyengine-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if mode is not None:
                os.chmod(temporary, stat.S_IMODE(mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


# ---- reading -------------------------------------------------------------------------------------


class Container:
    """An open file whose header has been checked. Tensors may be used after close()."""

    def __init__(self, path: PathLike, *, mapped: bool = True) -> None:
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

    def tensor(self, name: str) -> Tensor:
        """The tensor on the mapping; in memory of its own where the file is not mapped or the tensor begins
        within a cache line.
        """
        entry = self.entries[name]
        if self._map is not None and entry.begin % LINE == 0:
            return _typed(name, entry, self._map, entry.begin)
        memory = pages(entry.nbytes)
        target, done = memoryview(memory), 0
        while done < entry.nbytes:
            got = os.preadv(self._fd, [target[done : entry.nbytes]], entry.begin + done)
            if got == 0:
                raise FormatError("the file was truncated while it was read")
            done += got
        return _typed(name, entry, memory, 0)

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


def _typed(name: str, entry: Entry, memory: Any, start: int) -> Tensor:
    """The tensor whose bytes lie in memory from start on, not copied."""
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    data = torch.frombuffer(memory, dtype=torch.uint8, count=entry.nbytes, offset=start)
    if entry.dtype == torch.bool and bool((data > 1).any()):
        raise FormatError(f"tensor {name!r} has bool values that are neither 0 nor 1")
    return data.view(entry.dtype).view(entry.shape)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key stands there twice")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def parse_json(text: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object in UTF-8 with unique keys; FormatError for anything else, however deep or long."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object")
    return value


def is_size(value: Any, limit: int = 1 << 63) -> bool:
    """Whether a value out of JSON is a whole number in [0, limit)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit


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


def _entry(name: str, value: Any, data: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"tensor {name!r}: the entry is not dtype, shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        shown = repr(kind) if isinstance(kind, str) else f"of type {type(kind).__name__}"
        raise FormatError(f"tensor {name!r}: dtype {shown} is unknown")
    if not isinstance(shape, list) or len(shape) > 64 or not all(map(is_size, shape)):
        raise FormatError(f"tensor {name!r}: shape is not a list of up to 64 sizes")
    if not is_size(math.prod(max(size, 1) for size in shape) * DTYPES[kind].itemsize):
        raise FormatError(f"tensor {name!r}: shape is too large for any memory")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise FormatError(f"tensor {name!r}: data_offsets are not two sizes")
    entry = Entry(DTYPES[kind], tuple(shape), data + offsets[0])
    if data + offsets[1] != entry.end:
        raise FormatError(
            f"tensor {name!r}: shape and dtype make {entry.nbytes} bytes, "
            f"data_offsets {offsets[1] - offsets[0]}"
        )
    return entry
