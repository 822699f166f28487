"""Models and files: save, load, describe. One safetensors file, see manifest.py and container.py."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .container import Container, Entry, PathLike, check_storable, checksum, plain, replacing, write
from .formats import FormatError
from .manifest import (
    FLOAT_LAYERS,
    LAYER_DTYPES,
    LayerEntry,
    Manifest,
    dtype_name,
    need,
    read_manifest,
    write_manifest,
)
from .nn import Embedding, Linear
from .nn.packed_module import PackedModule
from .packed import PackedWeight

logger = logging.getLogger("pyengine")

# What a file says may be as long as the file; a message is not.
MAX_MESSAGE = 400


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of the module itself."""
    both = {**module._parameters, **module._buffers}
    return {key: tensor for key, tensor in both.items() if tensor is not None}


# ---- saving --------------------------------------------------------------------------------------


def save(model: nn.Module, path: PathLike) -> None:
    """Write the model to one safetensors file: packed layers in their canonical bytes, everything else as it
    is.

    Buffers that a state_dict leaves out are included. The file appears whole or not at all: it is written
    beside the target and renamed over it, so that saving onto the file that the model was mapped from works
    too. Packed layers are unpacked one by one.

    Raises TypeError for state that is not a dense tensor or that a packed layer in a file cannot have,
    ValueError for tensors on the meta device and for a model that is itself a packed layer.
    """
    layers, aliases = _packed_layers(model)
    rest, volatile = _float_tensors(model, aliases)
    entries = {name: _entry(tensor) for name, tensor in rest.items()}
    described: dict[str, LayerEntry] = {}
    for name, layer in layers.items():
        described[name], parts = _describe_layer(name, layer)
        entries.update(parts)
    metadata = write_manifest(
        described,
        recipe=list(model.__dict__.get("pyengine_recipe", ())),
        rest=checksum(plain(rest[name]) for name in sorted(rest)),
        aliases=aliases,
        volatile=volatile,
    )
    with replacing(path) as file:
        write(file, entries, metadata, _content(layers, rest))


def _packed_layers(model: nn.Module) -> tuple[dict[str, PackedModule], dict[str, str]]:
    """The packed layers by their first names, and their further names."""
    layers: dict[str, PackedModule] = {}
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedModule):
            if not name:
                raise ValueError(
                    "the model is itself a packed layer: put it in a module, such as nn.Sequential"
                )
            first = first_name.setdefault(id(module), name)
            if first == name:
                layers[name] = module
            else:
                aliases[name] = first
    return layers, aliases


def _float_tensors(model: nn.Module, aliases: dict[str, str]) -> tuple[dict[str, Tensor], list[str]]:
    """Every parameter and buffer outside of packed layers, and the names of the non-persistent buffers.

    A tensor that is another one under a further name is added to the aliases instead. Tensors that share
    memory in part (views of one another) are stored apart.
    """
    tensors: dict[str, Tensor] = {}
    volatile: list[str] = []
    first_name: dict[tuple[Any, ...], str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedModule):
            continue
        own = _own_tensors(module)
        state: dict[str, Any] = {}
        module._save_to_state_dict(state, "", keep_vars=True)
        for key in state.keys() - own.keys():
            raise TypeError(
                f"state {_join(prefix, key)!r} is neither a parameter nor a buffer and cannot be saved"
            )
        for key, tensor in own.items():
            name = _join(prefix, key)
            check_storable(name, tensor)
            if key in module._non_persistent_buffers_set:
                volatile.append(name)
            first = first_name.setdefault(_identity(tensor), name)
            if first == name:
                tensors[name] = tensor
            else:
                aliases[name] = first
    return tensors, volatile


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same view of the same memory."""
    place = tensor.data_ptr() if tensor.numel() else id(tensor)
    kind = tensor.device, tensor.dtype, tensor.is_conj(), tensor.is_neg()
    return place, tensor.shape, tensor.stride(), *kind


def _layer_tensors(name: str, layer: PackedModule) -> dict[str, Tensor]:
    """A packed layer's tensors as the file has them, in the order of the checksum."""
    bias = layer._parameters.get("bias")
    tensors = {**layer.packed().tensors(), **({} if bias is None else {"bias": bias})}
    for more in _own_tensors(layer).keys() - {"layout", "bias"}:
        raise TypeError(f"layer {name!r} has {more!r}, which a packed {layer.op} in a file cannot have")
    for part, tensor in tensors.items():
        check_storable(_join(name, part), tensor)
    return {_join(name, part): plain(tensor) for part, tensor in tensors.items()}


def _content(layers: dict[str, PackedModule], rest: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, layer in layers.items():
        yield from _layer_tensors(name, layer).items()
    for name, tensor in rest.items():
        yield name, plain(tensor)


def _entry(tensor: Tensor) -> Entry:
    return Entry(tensor.dtype, tuple(tensor.shape))


def _describe_layer(name: str, layer: PackedModule) -> tuple[LayerEntry, dict[str, Entry]]:
    """A packed layer for the manifest, and its tensors for the header."""
    tensors = _layer_tensors(name, layer)
    described = LayerEntry(
        op=layer.op,
        format=layer.format,
        input_spec=layer.input_spec,
        shape=layer.prepared.shape,
        dtype=layer.dtype,
        crc32=checksum(tensors.values()),
        padding_idx=layer.padding_idx if isinstance(layer, Embedding) else None,
    )
    return described, {part: _entry(tensor) for part, tensor in tensors.items()}


# ---- what is in a file ---------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: PathLike, *, mapped: bool) -> Iterator[tuple[Container, Manifest]]:
    """The file and its manifest, both checked; every FormatError in the block gets the path."""
    try:
        with Container(path, mapped=mapped) as file:
            yield file, read_manifest(file.metadata)
    except FormatError as error:
        problem = str(error)
        if len(problem) > MAX_MESSAGE:
            problem = f"{problem[: MAX_MESSAGE // 2]} ... {problem[-MAX_MESSAGE // 2 :]}"
        raise FormatError(f"{os.fspath(path)!r}: {problem}") from None


def _has_bias(file: Container, name: str, entry: LayerEntry) -> bool:
    return entry.op == "linear" and _join(name, "bias") in file.entries


def _layer_parts(file: Container, name: str, entry: LayerEntry) -> list[str]:
    """The names of a layer's tensors, in the order of the checksum; each is there."""
    wanted = ["qdata", "scale", *(["zero"] if entry.format.zero_dtype else [])]
    for part in wanted:
        need(_join(name, part) in file.entries, f"layer {name!r}: tensor {_join(name, part)!r} is missing")
    return [_join(name, part) for part in (*wanted, *(["bias"] if _has_bias(file, name, entry) else []))]


def _rest_names(file: Container, manifest: Manifest) -> list[str]:
    """The names of the tensors outside of packed layers, in the order of the checksum."""
    owned = {part for name, entry in manifest.layers.items() for part in _layer_parts(file, name, entry)}
    return sorted(file.entries.keys() - owned)


def describe(path: PathLike) -> dict[str, Any]:
    """What is in a file, without a model: versions, recipe, layers (name, op, format, activations, shape,
    dtype, bytes, intact), other tensors and their bytes, total bytes, and whether every checksum holds.
    Raises FormatError."""
    with _opened(path, mapped=True) as (file, manifest):

        def summary(names: list[str], crc32: str) -> dict[str, Any]:
            size = sum(file.entries[name].nbytes for name in names)
            intact = checksum(file.tensor(name) for name in names) == crc32
            return {"bytes": size, "crc32": crc32, "intact": intact}

        layers = [
            {
                "name": name,
                "op": entry.op,
                "format": entry.format.name,
                "activations": entry.input_spec.name,
                "shape": list(entry.shape),
                "dtype": dtype_name(entry.dtype),
                **summary(_layer_parts(file, name, entry), entry.crc32),
            }
            for name, entry in manifest.layers.items()
        ]
        names = _rest_names(file, manifest)
        rest = {"tensors": len(names), **summary(names, manifest.rest)}
        return {
            "version": list(manifest.version),
            "library": manifest.library,
            "recipe": manifest.recipe,
            "layers": layers,
            "aliases": manifest.aliases,
            "rest": rest,
            "bytes": file.size,
            "intact": rest["intact"] and all(layer["intact"] for layer in layers),
        }


# ---- loading -------------------------------------------------------------------------------------


def load(
    path: PathLike,
    model_or_factory: nn.Module | Callable[[], nn.Module],
    *,
    device: torch.device | str = "cpu",
    mmap: bool = True,
) -> nn.Module:
    """Read a model that save() wrote.

    model_or_factory: a float or packed model of the same architecture, which is filled and returned; or a
    function that makes one: it is called under the meta device, so that the float weights are never
    allocated, and the result is returned in eval mode. mmap: tensors that stay float lie on the mapped file,
    paged in when used (do not truncate or overwrite the file under them; save() does not); False reads them
    into memory. Packed layers are derived one by one, and each one's source is released.

    The file is checked before anything is allocated or changed. Raises FormatError with the name of the layer
    and what is wrong, and leaves a given model as it was.
    """
    device = torch.device(device)
    # A tensor made in inference mode could never take part in training.
    with torch.inference_mode(False), _opened(path, mapped=mmap) as (file, manifest):
        if isinstance(model_or_factory, nn.Module):
            _fill(model_or_factory, file, manifest, device)
            return model_or_factory
        model = _build_on_meta(model_or_factory)
        if model is not None:
            _fill(model, file, manifest, device, complete=False)
            if not _holds_meta(model):
                return model.eval()
            logger.info("the model keeps tensors that are not in the file: it is built again in memory")
            del model
        model = _as_module(model_or_factory())
        _fill(model, file, manifest, device)
        return model.eval()


def _as_module(made: Any) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise TypeError(f"the factory made a {type(made).__name__}, not a torch.nn.Module")
    return made


def _build_on_meta(factory: Callable[[], nn.Module]) -> nn.Module | None:
    try:
        with torch.device("meta"):
            model = factory()
    except Exception as error:  # whatever a constructor does with values that meta tensors lack
        logger.info("the model cannot be built on the meta device (%s): it is built in memory", error)
        return None
    return _as_module(model)


def _holds_meta(model: nn.Module) -> bool:
    """Whether a meta tensor can be reached from the model, also through lists, dicts and objects."""
    stack: list[Any] = [model]
    seen: set[int] = set()
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            if value.is_meta:
                return True
        elif id(value) not in seen and not isinstance(value, (type, ModuleType)):
            seen.add(id(value))
            if isinstance(value, dict):
                stack.extend(value.values())
            elif isinstance(value, (list, tuple, set, frozenset)):
                stack.extend(value)
            else:
                stack.extend(getattr(value, "__dict__", {}).values())
    return False


@dataclass(frozen=True)
class Place:
    """An attribute of a module in the model: a layer, parameter or buffer that the file may replace."""

    module: nn.Module
    key: str

    @property
    def content(self) -> Any:
        return getattr(self.module, self.key)

    @property
    def volatile(self) -> bool:
        return self.key in self.module._non_persistent_buffers_set


def _fill(
    model: nn.Module, file: Container, manifest: Manifest, device: torch.device, *, complete: bool = True
) -> None:
    """Check all, build all that the model gets, then hang it in.

    complete: raise FormatError if a buffer would stay on the meta device.
    """
    packed = {name: name for name in manifest.layers}
    packed.update({alias: name for alias, name in manifest.aliases.items() if name in manifest.layers})
    layers, tensors = _places(model, packed)
    rest = _rest_names(file, manifest)
    for name, first in packed.items():
        entry = manifest.layers[first]
        _check_layer(name, entry, layers.get(name), _has_bias(file, first, entry))
    for name, place in layers.items():
        fits = name in packed or not isinstance(place.content, PackedModule)
        need(fits, f"layer {name!r} is packed in the model and float in the file")
    _check_names(file, manifest, rest, {*packed, *tensors})
    source = _check_tensors(file, manifest, rest, tensors, complete)

    built: dict[str, PackedModule] = {}
    for name, entry in manifest.layers.items():
        built[name] = _build_layer(name, entry, file, device)
        file.release(_layer_parts(file, name, entry))
    values = {name: file.tensor(name) for name in rest}
    need(
        checksum(values.values()) == manifest.rest,
        "the checksum of the float tensors does not match, the file is damaged",
    )
    used = {name: values[name].to(device) for name in source.values()}

    changes: list[tuple[Place, Any]] = []
    for name, first in packed.items():
        changes.append((layers[name], built[first].train(layers[name].content.training)))
    parameters: dict[str, nn.Parameter] = {}
    for name, first in source.items():
        place, new = tensors[name], used[first]
        if isinstance(place.content, nn.Parameter):
            new = parameters.setdefault(first, nn.Parameter(new, requires_grad=place.content.requires_grad))
        changes.append((place, new))
    _hang(changes)
    model.__dict__["pyengine_recipe"] = manifest.recipe


def _places(model: nn.Module, packed: dict[str, str]) -> tuple[dict[str, Place], dict[str, Place]]:
    """Every module and every tensor of the model by name, the tensors of packed layers left out.

    Only modules that are registered count: a name out of a file is looked up here, never as an attribute.
    """
    layers: dict[str, Place] = {}
    tensors: dict[str, Place] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, child in module._modules.items():
            if child is not None:
                layers[_join(prefix, key)] = Place(module, key)
        if prefix not in packed and not isinstance(module, PackedModule):
            tensors.update({_join(prefix, key): Place(module, key) for key in _own_tensors(module)})
    return layers, tensors


def _check_layer(name: str, entry: LayerEntry, place: Place | None, bias: bool) -> None:
    where = f"layer {name!r} is {entry.op} {entry.shape} in the file"
    if place is None:
        raise FormatError(f"{where}, the model has no such layer")
    module = place.content
    if isinstance(module, PackedModule):
        fits, shape = module.op == entry.op, module.prepared.shape
    else:
        fits = type(module) is FLOAT_LAYERS[entry.op]
        shape = tuple(module.weight.shape) if fits else ()
    need(fits and shape == entry.shape, f"{where}, {type(module).__name__} {shape} in the model")
    if entry.op == "linear":
        differs = f"{where} {'with' if bias else 'without'} bias, the model's differs"
        need(bias == (module.bias is not None), differs)


def _check_names(file: Container, manifest: Manifest, rest: list[str], known: set[str]) -> None:
    """Every name in the file has one place in the model. Volatile buffers may have lost theirs."""
    stored = {*rest, *manifest.layers}
    for alias, first in manifest.aliases.items():
        need(alias not in file.entries, f"alias {alias!r} is a tensor of its own")
        need(first in stored, f"alias {alias!r} leads to {first!r}, which is not in the file")
    for name in manifest.volatile:
        need(name in stored or name in manifest.aliases, f"volatile buffer {name!r} is missing from the file")
    for name in (*rest, *manifest.aliases):
        found = name in known or name in manifest.volatile
        need(found, f"tensor {name!r} of the file has no place in the model")


def _check_tensors(
    file: Container, manifest: Manifest, rest: list[str], tensors: dict[str, Place], complete: bool
) -> dict[str, str]:
    """Name of each tensor of the model that the file has -> the name that it is stored under."""
    stored = set(rest)
    source: dict[str, str] = {}
    for name, place in tensors.items():
        first, old = manifest.aliases.get(name, name), place.content
        if first not in stored:
            kept = place.volatile and name not in manifest.aliases and not (complete and old.is_meta)
            need(kept, f"tensor {name!r} of the model is missing from the file")
            continue
        new = file.entries[first]
        shapes = f"tensor {name!r} has shape {new.shape}, the model's {tuple(old.shape)}"
        need(new.shape == tuple(old.shape), shapes)
        # Float models may be loaded in another float type than they are built in; no other types are mixed.
        both_float = new.dtype.is_floating_point and old.dtype.is_floating_point
        need(both_float or new.dtype == old.dtype, f"tensor {name!r} is {new.dtype}, the model's {old.dtype}")
        volatile = name in manifest.volatile
        need(
            not (volatile and isinstance(old, nn.Parameter)),
            f"tensor {name!r} is a volatile buffer, a parameter in the model",
        )
        source[name] = first
    return source


def _build_layer(name: str, entry: LayerEntry, file: Container, device: torch.device) -> PackedModule:
    names = _layer_parts(file, name, entry)
    parts = {part.rpartition(".")[2]: file.tensor(part) for part in names}
    intact = checksum(parts.values()) == entry.crc32
    need(intact, f"layer {name!r}: its checksum does not match, the file is damaged")
    moved = {part: tensor.to(device) for part, tensor in parts.items()}
    bias = moved.pop("bias", None)
    try:
        weight = PackedWeight(entry.format, entry.shape, **moved)
    except FormatError as error:
        raise FormatError(f"layer {name!r}: {error}") from None
    if entry.op == "embedding":
        return Embedding(weight, padding_idx=entry.padding_idx, dtype=entry.dtype, name=name)
    if bias is not None:
        fits = bias.dtype in LAYER_DTYPES.values() and tuple(bias.shape) == entry.shape[:1]
        need(fits, f"layer {name!r}: bias is {bias.dtype} {tuple(bias.shape)}, N is {entry.shape[0]}")
    return Linear(weight, bias, input_spec=entry.input_spec, dtype=entry.dtype, name=name)


def _hang(changes: list[tuple[Place, Any]]) -> None:
    """Set every attribute; on any interruption set all back.

    By setattr, as load_state_dict(assign=True) does: LSTM and the like keep a second list of parameters.
    """
    done: list[tuple[Place, Any]] = []
    try:
        for place, new in changes:
            done.append((place, place.content))
            setattr(place.module, place.key, new)
    except BaseException:
        for place, old in reversed(done):
            setattr(place.module, place.key, old)
        raise
