"""The manifest: what a file says of the model in it, as JSON in the metadata of the safetensors header.

Key "pyengine": version [major, minor] of the format; library; recipe, the passes that ran; layers, per packed
layer its op, weight format, activations, shape, dtype and the CRC-32 of its tensors; rest, the CRC-32 of all
other tensors; aliases, further names of a tensor or layer; volatile, the buffers that a state_dict leaves
out; edits, structural changes to replay. It never names code. Key "pyengine_crc32": the CRC-32 of that text.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ._version import __version__
from .container import is_size, parse_json
from .formats import (
    ACTIVATIONS,
    FLOAT,
    FORMAT_VERSION,
    ActivationSpec,
    FormatError,
    WeightFormat,
    parse_format,
)

LAYER_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
}  # fmt: skip
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
    """See the top of this file. Aliases lead to a tensor or to a layer, and never to another alias."""

    version: tuple[int, int]
    library: str
    recipe: list[Any]
    layers: dict[str, LayerEntry]
    rest: str
    aliases: dict[str, str]
    volatile: frozenset[str]


# ---- writing -------------------------------------------------------------------------------------


def write_manifest(
    layers: dict[str, LayerEntry],
    *,
    recipe: list[Any],
    rest: str,
    aliases: dict[str, str],
    volatile: list[str],
) -> dict[str, str]:
    """The metadata that read_manifest() reads, in this library's version of the format. Raises FormatError
    for a layer that it could not read, such as one with a padding_idx out of range.
    """
    manifest = {
        "version": list(FORMAT_VERSION),
        "library": __version__,
        "recipe": recipe,
        "layers": {name: _layer_json(layer) for name, layer in layers.items()},
        "rest": rest,
        "aliases": aliases,
        "volatile": volatile,
        "edits": [],
    }
    text = json.dumps(manifest, separators=(",", ":"), allow_nan=False)
    metadata = {"format": "pt", "pyengine": text, "pyengine_crc32": _crc32(text)}
    read_manifest(metadata)
    return metadata


def _crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode(errors='surrogatepass')):08x}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layer_json(layer: LayerEntry) -> dict[str, Any]:
    entry = {
        "op": layer.op,
        "format": layer.format.name,
        "input": layer.input_spec.name,
        "shape": list(layer.shape),
        "dtype": dtype_name(layer.dtype),
        "crc32": layer.crc32,
    }
    return entry if layer.padding_idx is None else {**entry, "padding_idx": layer.padding_idx}


# ---- reading -------------------------------------------------------------------------------------

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
    need(name in table, f"{where}: {key} {name!r} is unknown")
    return table[name]


def _sizes(value: dict[str, Any], key: str, where: str) -> tuple[int, int]:
    sizes = _field(value, key, list, where)
    need(len(sizes) == 2 and all(is_size(x, 1 << 48) for x in sizes), f"{where}: {key} is not two sizes")
    return sizes[0], sizes[1]


def _shallow(value: Any, levels: int) -> bool:
    """Whether JSON is nested at most that deep: what is kept must not break whoever walks it later."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_shallow(child, levels - 1) for child in children)


def _format(value: dict[str, Any], where: str) -> WeightFormat:
    try:
        return parse_format(_field(value, "format", str, where))
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None


def _layer_entry(name: str, value: Any) -> LayerEntry:
    where = f"manifest, layer {name!r}"
    if not isinstance(value, dict):
        raise FormatError(f"{where}: not an object")
    _choice(value, "op", FLOAT_LAYERS, where)
    entry = LayerEntry(
        op=value["op"],
        format=_format(value, where),
        input_spec=_choice(value, "input", ACTIVATIONS, where),
        shape=_sizes(value, "shape", where),
        dtype=_choice(value, "dtype", LAYER_DTYPES, where),
        crc32=_field(value, "crc32", str, where),
        padding_idx=_field(value, "padding_idx", int, where) if "padding_idx" in value else None,
    )
    if entry.op == "embedding":
        need(entry.input_spec == FLOAT, f"{where}: an embedding has no activations to quantize")
    else:
        need(entry.padding_idx is None, f"{where}: padding_idx is for embeddings")
    need(
        entry.padding_idx is None or 0 <= entry.padding_idx < entry.shape[0],
        f"{where}: padding_idx is out of range",
    )
    return entry


def read_manifest(metadata: dict[str, str]) -> Manifest:
    """The manifest, every field checked. Raises FormatError if it is missing, malformed or of a newer major
    version. Fields that a newer minor version may add are ignored.
    """
    need("pyengine" in metadata, "no pyengine manifest: the file was not written by pyengine.save")
    value = parse_json(metadata["pyengine"], "the manifest")
    version = _sizes(value, "version", "manifest")
    if version[0] > FORMAT_VERSION[0]:
        raise FormatError(
            f"format version {version[0]}.{version[1]} needs a pyengine that reads major {version[0]}; "
            f"this one ({__version__}) reads up to {FORMAT_VERSION[0]}"
        )
    intact = metadata.get("pyengine_crc32") == _crc32(metadata["pyengine"])
    need(intact, "the checksum of the manifest does not match, the file is damaged")
    layers = _field(value, "layers", dict, "manifest")
    aliases = _field(value, "aliases", dict, "manifest")
    volatile = _field(value, "volatile", list, "manifest")
    recipe = _field(value, "recipe", list, "manifest")
    for what, names in (("aliases", [*aliases.values()]), ("volatile", volatile)):
        need(all(isinstance(name, str) for name in names), f"manifest: {what} are not all names")
    need(_shallow(recipe, 8), "manifest: recipe is nested too deep")
    for edit in _field(value, "edits", list, "manifest"):
        what = f" {edit!r}" if isinstance(edit, str) else ""
        raise FormatError(f"manifest: edit{what} is not known to this version")
    for alias, source in aliases.items():
        need(
            source not in aliases, f"manifest: alias {alias!r} leads to {source!r}, which is an alias itself"
        )
        need(alias not in layers, f"manifest: alias {alias!r} is a layer of its own")
    return Manifest(
        version=version,
        library=_field(value, "library", str, "manifest"),
        recipe=recipe,
        layers={name: _layer_entry(name, entry) for name, entry in layers.items()},
        rest=_field(value, "rest", str, "manifest"),
        aliases=aliases,
        volatile=frozenset(volatile),
    )
