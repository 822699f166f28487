"""Finished layers on disk, so that a long calibration that was interrupted goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..container import Container, Entry, as_bytes, checksum, parse_json, plain, replacing, write
from ..formats import FormatError, parse_format
from ..packed import PackedWeight, is_finite
from ..scheme import Scheme

METADATA = "pyengine_checkpoint"
SCALES = "scales"

Asked = Mapping[str, tuple[Scheme, Tensor]]  # layer -> its scheme and float weight


@dataclass(frozen=True)
class Finished:
    """What was found for the layers that are quantized together: layer -> weight and note; and by what their
    common input is divided.
    """

    layers: dict[str, tuple[PackedWeight, str]]
    scales: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        named = {
            f"{name}.{part}": tensor
            for name, (weight, _) in self.layers.items()
            for part, tensor in weight.tensors().items()
        }
        return named if self.scales is None else {**named, SCALES: self.scales}


class Checkpoint:
    """A folder with a file for each set of layers that are quantized together. None: nothing is kept.

    options: what the codes depend on besides schemes and weights. Files hold these, the float weights'
    checksums and their own: a file that was made otherwise, or is damaged, raises and is left alone.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        self._options = dict(options)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def _path(self, first: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{hashlib.sha256(first.encode()).hexdigest()[:16]}.safetensors"

    def has(self, first: str) -> bool:
        """Whether the set whose first layer is of that name is there."""
        return self._folder is not None and self._path(first).exists()

    def _made_from(self, asked: Asked) -> dict[str, Any]:
        layers = {
            name: {"scheme": dataclasses.asdict(scheme), "weight": checksum([plain(weight)])}
            for name, (scheme, weight) in asked.items()
        }
        return {**self._options, "layers": layers}

    def keep(self, asked: Asked, finished: Finished) -> None:
        if self._folder is None:
            return
        tensors = {name: plain(tensor) for name, tensor in finished.tensors().items()}
        found = {name: [weight.format.name, note] for name, (weight, note) in finished.layers.items()}
        about = {
            "made_from": self._made_from(asked),
            "found": found,
            "crc32": checksum(tensors[name] for name in sorted(tensors)),
        }
        entries = {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with replacing(self._path(next(iter(asked)))) as file:
            write(file, entries, {METADATA: json.dumps(about)}, tensors.items())

    def load(self, asked: Asked) -> Finished:
        """What keep() got for the same layers. Raises FormatError for a damaged file, ValueError for one that
        was made from something else; both name the layer.
        """
        first = next(iter(asked))
        path = self._path(first)
        try:
            with Container(path, mapped=False) as file:
                about = parse_json(file.metadata.get(METADATA, ""), f"its metadata {METADATA}")
                _require_same(about.get("made_from"), self._made_from(asked))
                return _finished(file, about, asked)
        except FormatError as error:
            raise FormatError(f"checkpoint {os.fspath(path)!r}, layer {first!r}: {error}") from None
        except _Different as error:
            raise ValueError(
                f"checkpoint {os.fspath(path)!r}: layer {first!r} was quantized with another {error}; "
                "take another folder, or remove this one"
            ) from None


class _Different(Exception):
    pass


def _require_same(made_from: Any, wanted: Mapping[str, Any]) -> None:
    made_from = made_from if isinstance(made_from, dict) else {}
    for key, value in wanted.items():
        # As JSON gives it back.
        if made_from.get(key) != json.loads(json.dumps(value)):
            raise _Different("scheme or weight" if key == "layers" else key)


def _finished(file: Container, about: Mapping[str, Any], asked: Asked) -> Finished:
    tensors = {name: file.tensor(name) for name in file.entries}
    if checksum(tensors[name] for name in sorted(tensors)) != about.get("crc32"):
        raise FormatError("its checksum does not match, the file is damaged")
    found = about.get("found")
    if not isinstance(found, dict) or found.keys() != asked.keys():
        raise FormatError("it holds other layers")
    layers: dict[str, tuple[PackedWeight, str]] = {}
    for name, entry in found.items():
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(e, str) for e in entry):
            raise FormatError("it does not say the layer's format and note")
        format, (n, k) = parse_format(entry[0]), asked[name][1].shape
        parts = ("qdata", "scale", "zero") if format.zero_dtype else ("qdata", "scale")
        if not tensors.keys() >= {f"{name}.{part}" for part in parts}:
            raise FormatError("a tensor is missing")
        weight = PackedWeight(format, (n, k), **{part: tensors.pop(f"{name}.{part}") for part in parts})
        layers[name] = weight, entry[1]
    scales = tensors.pop(SCALES, None)
    if scales is not None and not (scales.shape == (k,) and is_finite(scales) and bool((scales > 0).all())):
        raise FormatError("its scales are not one finite positive number per input")
    if tensors:
        raise FormatError(f"tensor {next(iter(tensors))!r} belongs to no layer")
    return Finished(layers, scales)


def fingerprint(data: Iterable[Any]) -> str:
    """CRC-32 of the tensors in the batches, also in lists, tuples and mappings; of other things in a batch
    only the types count.
    """
    value = 0

    def add(item: Any) -> None:
        nonlocal value
        value = zlib.crc32(type(item).__name__.encode(), value)
        if isinstance(item, Tensor):
            value = zlib.crc32(f"{item.dtype}{tuple(item.shape)}".encode(), value)
            value = zlib.crc32(as_bytes(plain(item)), value)
        elif isinstance(item, Mapping):
            for key in item:
                value = zlib.crc32(str(key).encode(), value)
                add(item[key])
        elif isinstance(item, (list, tuple)):
            for part in item:
                add(part)

    for batch in data:
        add(batch)
    return f"{value:08x}"
