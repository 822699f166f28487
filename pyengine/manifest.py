"""The manifest: what a file says of the model in it, as JSON in the metadata of the safetensors header.

Key "pyengine": version [major, minor] of the format; library; recipe, the passes that ran; layers, per packed
layer its op, weight format, activations, shape, dtype and the CRC-32 of its tensors; rest, the CRC-32 of all
other tensors; aliases, further names of a tensor or layer; volatile, the buffers that a state_dict leaves
out; edits, structural changes to replay. It never names code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ._version import __version__
from .container import parse_json
from .formats import ACTIVATIONS, FORMAT_VERSION, ActivationSpec, FormatError, WeightFormat, parse_format

LAYER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT_LAYERS: dict[str, type[nn.Module]] = {"linear": nn.Linear, "embedding": nn.Embedding}


def need(condition: bool, problem: str) -> None:
    """Raises FormatError(problem) unless the condition holds."""
    if not condition:
        raise FormatError(problem)


@dataclass(frozen=True)
class LayerEntry:
    """What the manifest says of one packed layer."""

    op: str
    format: WeightFormat
    input_spec: ActivationSpec
    shape: tuple[int, int]
    dtype: torch.dtype
    crc32: str
    padding_idx: int | None


@dataclass(frozen=True)
class Manifest:
    """See the top of this file."""

    version: tuple[int, int]
    library: str
    recipe: list[Any]
    layers: dict[str, LayerEntry]
    rest: str
    aliases: dict[str, str]
    volatile: list[str]


T = TypeVar("T")


def _field(value: dict[str, Any], key: str, kind: type[T], where: str) -> T:
    """value[key], if it is of that JSON type."""
    found = value.get(key)
    if not isinstance(found, kind) or isinstance(found, bool):
        raise FormatError(f"{where}: {key} is not a {kind.__name__}")
    return found


def _choice(value: dict[str, Any], key: str, table: dict[str, T], where: str) -> T:
    """table[value[key]]."""
    name = _field(value, key, str, where)
    need(name in table, f"{where}: {key} {name[:40]!r} is unknown")
    return table[name]


def _names(value: Any, where: str) -> None:
    need(all(isinstance(name, str) for name in value), f"{where} are not all names")


def _sizes(value: dict[str, Any], key: str, where: str) -> tuple[int, int]:
    sizes = _field(value, key, list, where)
    whole = all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 1 << 48 for x in sizes)
    need(whole and len(sizes) == 2, f"{where}: {key} is not two sizes")
    return sizes[0], sizes[1]


def _layer_entry(name: str, value: Any) -> LayerEntry:
    where = f"manifest, layer {name!r}"
    if not isinstance(value, dict):
        raise FormatError(f"{where}: not an object")
    shape = _sizes(value, "shape", where)
    padding_idx = _field(value, "padding_idx", int, where) if "padding_idx" in value else None
    need(padding_idx is None or 0 <= padding_idx < shape[0], f"{where}: padding_idx is out of range")
    _choice(value, "op", FLOAT_LAYERS, where)
    return LayerEntry(
        op=value["op"],
        format=parse_format(_field(value, "format", str, where)),
        input_spec=_choice(value, "input", ACTIVATIONS, where),
        shape=shape,
        dtype=_choice(value, "dtype", LAYER_DTYPES, where),
        crc32=_field(value, "crc32", str, where),
        padding_idx=padding_idx,
    )


def read_manifest(metadata: dict[str, str]) -> Manifest:
    """The manifest, every field checked. Raises FormatError if it is missing, malformed or of a newer major
    version.
    """
    need("pyengine" in metadata, "no pyengine manifest: the file was not written by pyengine.save")
    value = parse_json(metadata["pyengine"], "the manifest")
    version = _sizes(value, "version", "manifest")
    if version[0] > FORMAT_VERSION[0]:
        raise FormatError(
            f"format version {version[0]}.{version[1]} needs a pyengine that reads major {version[0]}; "
            f"this one ({__version__}) reads up to {FORMAT_VERSION[0]}"
        )
    layers = _field(value, "layers", dict, "manifest")
    aliases = _field(value, "aliases", dict, "manifest")
    volatile = _field(value, "volatile", list, "manifest")
    edits = _field(value, "edits", list, "manifest")
    _names(aliases.values(), "manifest: aliases")
    _names(volatile, "manifest: volatile")
    need(not edits, f"manifest: edit {str(edits)[:60]} is not known to this version")
    return Manifest(
        version=version,
        library=_field(value, "library", str, "manifest"),
        recipe=_field(value, "recipe", list, "manifest"),
        layers={name: _layer_entry(name, entry) for name, entry in layers.items()},
        rest=_field(value, "rest", str, "manifest"),
        aliases=aliases,
        volatile=volatile,
    )
