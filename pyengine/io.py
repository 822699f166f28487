"""Models and files: save, load, describe. One safetensors file, see manifest.py and container.py."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ._version import __version__
from .container import Container
from .formats import FORMAT_VERSION, FormatError
from .manifest import FLOAT_LAYERS, LAYER_DTYPES, LayerEntry, Manifest, need, read_manifest
from .nn import Embedding, Linear
from .nn.packed_module import PackedModule
from .packed import PackedWeight

logger = logging.getLogger("pyengine")

LAYER_TENSORS = ("qdata", "scale", "zero", "bias")
PathLike = str | os.PathLike[str]


# ---- saving --------------------------------------------------------------------------------------


def save(model: nn.Module, path: PathLike) -> None:
    """Write the model to one safetensors file: packed layers in their canonical bytes, everything else as it
    is.

    Buffers that a state_dict leaves out are included. The file appears whole or not at all: it is written
    beside the target and renamed over it, so that saving onto the file that the model was mapped from works
    too.

    Raises TypeError if the state holds something that is not a tensor, ValueError for tensors on the meta
    device.
    """
    tensors, manifest = _collect(model)
    _write_atomically(os.path.realpath(path), tensors, json.dumps(manifest, separators=(",", ":")))


def _collect(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    layers: dict[str, PackedModule] = {}
    first_name: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedModule):
            if id(module) in first_name:
                aliases[name] = first_name[id(module)]
            else:
                first_name[id(module)] = name
                layers[name] = module

    skip = tuple(_join(name, "") for name in aliases)
    state = {
        name: value for name, value in model.state_dict().items() if not name.startswith(skip or ("\0",))
    }
    volatile = [name for name in _volatile_buffers(model) if name not in state]
    buffers = dict(model.named_buffers(remove_duplicate=False))
    state.update({name: buffers[name] for name in volatile})

    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[int, torch.Size, tuple[int, ...], torch.dtype], str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"state {name!r} is a {type(value).__name__}, not a tensor, and cannot be saved")
        if value.is_meta:
            raise ValueError(f"tensor {name!r} is on the meta device: it has no values to save")
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        tensors[name] = value.detach().cpu().contiguous()
    owned = {_join(name, part) for name in layers for part in LAYER_TENSORS}
    manifest = {
        "version": list(FORMAT_VERSION),
        "library": __version__,
        "recipe": list(model.__dict__.get("pyengine_recipe", ())),
        "layers": {name: _describe_layer(name, layer, tensors) for name, layer in layers.items()},
        "rest": _crc(tensors[name] for name in sorted(tensors) if name not in owned),
        "aliases": aliases,
        "volatile": volatile,
        "edits": [],
    }
    # Tensors that share memory in part (views of one another) are stored apart.
    return {name: _own_memory(tensor) for name, tensor in tensors.items()}, manifest


def _own_memory(tensor: Tensor) -> Tensor:
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _volatile_buffers(model: nn.Module) -> Iterator[str]:
    """Names of the non-persistent buffers, but for the layouts of packed layers."""
    for prefix, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers[name] is not None and not isinstance(module, PackedModule):
                yield _join(prefix, name)


def _describe_layer(name: str, layer: PackedModule, tensors: dict[str, Tensor]) -> dict[str, Any]:
    parts = [_join(name, part) for part in LAYER_TENSORS if _join(name, part) in tensors]
    entry: dict[str, Any] = {
        "op": layer.op,
        "format": layer.format.name,
        "input": layer.input_spec.name,
        "shape": list(layer.prepared.shape),
        "dtype": str(layer.dtype).removeprefix("torch."),
        "crc32": _crc(tensors[part] for part in parts),
    }
    if isinstance(layer, Embedding) and layer.padding_idx is not None:
        entry["padding_idx"] = layer.padding_idx
    return entry


def _crc(tensors: Iterator[Tensor]) -> str:
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _write_atomically(target: str, tensors: dict[str, Tensor], manifest: str) -> None:
    from safetensors.torch import save_file

    temporary = f"{target}.{secrets.token_hex(6)}.tmp"
    try:
        save_file(tensors, temporary, metadata={"format": "pt", "pyengine": manifest})
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


# ---- what is in a file ---------------------------------------------------------------------------


def _layer_parts(file: Container, name: str, entry: LayerEntry) -> list[str]:
    """The names of a layer's tensors, in the order of the checksum; each is there, and no more than the
    format has.
    """
    wanted = ["qdata", "scale", *(["zero"] if entry.format.zero_dtype else [])]
    for part in wanted:
        need(_join(name, part) in file.entries, f"layer {name!r}: tensor {_join(name, part)!r} is missing")
    if entry.op == "linear" and _join(name, "bias") in file.entries:
        wanted.append("bias")
    return [_join(name, part) for part in wanted]


def _rest_names(file: Container, manifest: Manifest) -> list[str]:
    owned = {part for name, entry in manifest.layers.items() for part in _layer_parts(file, name, entry)}
    return [name for name in sorted(file.entries) if name not in owned]


def describe(path: PathLike) -> dict[str, Any]:
    """What is in a file, without a model: versions, recipe, layers (name, op, format, activations, shape,
    dtype, bytes, intact), other tensors and their bytes, total bytes, and whether every checksum holds.
    Raises FormatError."""
    with Container(path) as file:
        manifest = read_manifest(file.metadata)

        def size(names: list[str]) -> int:
            return sum(file.entries[name].end - file.entries[name].begin for name in names)

        layers = []
        for name, entry in manifest.layers.items():
            parts = _layer_parts(file, name, entry)
            layers.append(
                {
                    "name": name,
                    "op": entry.op,
                    "format": entry.format.name,
                    "activations": entry.input_spec.name,
                    "shape": list(entry.shape),
                    "dtype": str(entry.dtype).removeprefix("torch."),
                    "bytes": size(parts),
                    "crc32": entry.crc32,
                    "intact": file.checksum(parts) == entry.crc32,
                }
            )
        rest = _rest_names(file, manifest)
        rest_intact = file.checksum(rest) == manifest.rest
        return {
            "version": list(manifest.version),
            "library": manifest.library,
            "recipe": manifest.recipe,
            "layers": layers,
            "aliases": manifest.aliases,
            "rest": {
                "tensors": len(rest),
                "bytes": size(rest),
                "crc32": manifest.rest,
                "intact": rest_intact,
            },
            "bytes": file.size,
            "intact": rest_intact and all(layer["intact"] for layer in layers),
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
    paged in when used (do not truncate the file under them); False reads them into memory. Packed layers are
    derived one by one, each source released.

    The file is checked before anything is allocated or changed. Raises FormatError with the name of the layer
    and what is wrong, and leaves a given model as it was.
    """
    device = torch.device(device)
    try:
        with Container(path, mapped=mmap) as file:
            manifest = read_manifest(file.metadata)
            if isinstance(model_or_factory, nn.Module):
                _fill(model_or_factory, file, manifest, device)
                return model_or_factory
            model = _build_on_meta(model_or_factory)
            if model is not None:
                _fill(model, file, manifest, device)
                if not _stray_meta(model):
                    return model.eval()
                logger.info(
                    "the model keeps tensors outside of parameters and buffers: it is built again in memory"
                )
            model = model_or_factory()
            _fill(model, file, manifest, device)
            return model.eval()
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)!r}: {error}") from None


def _build_on_meta(factory: Callable[[], nn.Module]) -> nn.Module | None:
    try:
        with torch.device("meta"):
            model = factory()
    except Exception as error:  # whatever a constructor does with values that meta tensors lack
        logger.info("the model cannot be built on the meta device (%s): it is built in memory", error)
        return None
    if not isinstance(model, nn.Module):
        raise TypeError(f"the factory made a {type(model).__name__}, not a torch.nn.Module")
    return model


def _stray_meta(model: nn.Module) -> bool:
    return any(isinstance(v, Tensor) and v.is_meta for m in model.modules() for v in vars(m).values())


def _fill(model: nn.Module, file: Container, manifest: Manifest, device: torch.device) -> None:
    """Build and check all that the model gets, then hang it in."""
    slots = _slots(model, file, manifest)
    layers: dict[str, PackedModule] = {}
    for name, entry in manifest.layers.items():
        parts = _layer_parts(file, name, entry)
        need(
            file.checksum(parts) == entry.crc32,
            f"layer {name!r}: its checksum does not match, the file is damaged",
        )
        try:
            layers[name] = _build_layer(name, entry, file, parts, device).train(
                model.get_submodule(name).training
            )
        except FormatError as error:
            raise FormatError(f"layer {name!r}: {error}") from None
        file.release(parts)
    rest = _rest_names(file, manifest)
    need(
        file.checksum(rest) == manifest.rest,
        "the checksum of the float tensors does not match, the file is damaged",
    )
    values = {name: file.tensor(name).to(device) for name in rest if name in slots}

    parameters: dict[str, Tensor] = {}
    for name, value in values.items():
        module, attribute, old = slots[name]
        grad = isinstance(old, nn.Parameter) and old.requires_grad
        is_parameter = attribute in module._parameters
        parameters[name] = nn.Parameter(value, requires_grad=grad) if is_parameter else value
    for name, (module, attribute, _) in slots.items():
        source = manifest.aliases.get(name, name)
        if source in parameters:
            table = module._parameters if attribute in module._parameters else module._buffers
            table[attribute] = parameters[source]  # type: ignore[assignment]
    for name, layer in (
        *layers.items(),
        *((a, layers[s]) for a, s in manifest.aliases.items() if s in layers),
    ):
        parent, _, attribute = name.rpartition(".")
        model.get_submodule(parent)._modules[attribute] = layer
    model.__dict__["pyengine_recipe"] = manifest.recipe


Slots = dict[str, tuple[nn.Module, str, Tensor]]


def _slots(model: nn.Module, file: Container, manifest: Manifest) -> Slots:
    """Every parameter and buffer of the model outside of packed layers: name -> (module, attribute, tensor).

    Checks that file and model agree: layers by type and shape, tensors by name and shape.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    packed = dict.fromkeys(manifest.layers)
    for name, entry in manifest.layers.items():
        _check_layer(name, entry, modules.get(name), _join(name, "bias") in file.entries)
    for alias, source in manifest.aliases.items():
        if source in packed:
            _check_layer(
                alias, manifest.layers[source], modules.get(alias), _join(source, "bias") in file.entries
            )
            packed[alias] = None
    slots: Slots = {}
    for prefix, module in modules.items():
        if prefix in packed:
            continue
        need(
            not isinstance(module, PackedModule),
            f"layer {prefix!r} is packed in the model and float in the file",
        )
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                slots[_join(prefix, attribute)] = (module, attribute, tensor)
    known = set(file.entries) | set(manifest.aliases)
    for name, (module, attribute, tensor) in slots.items():
        source = manifest.aliases.get(name, name)
        if source not in file.entries:
            need(
                attribute in module._non_persistent_buffers_set and not tensor.is_meta and name not in known,
                f"tensor {name!r} of the model is missing from the file",
            )
            continue
        shape = file.entries[source].shape
        need(
            shape == tuple(tensor.shape),
            f"tensor {name!r} has shape {shape}, the model's {tuple(tensor.shape)}",
        )
    for name in [*_rest_names(file, manifest), *manifest.aliases]:
        found = name in slots or name in packed or name in manifest.volatile
        need(found, f"tensor {name!r} of the file has no place in the model")
    return slots


def _check_layer(name: str, entry: LayerEntry, module: nn.Module | None, bias: bool) -> None:
    where = f"layer {name!r} is {entry.op} {entry.shape} in the file"
    need(bool(name) and module is not None, f"{where}, the model has no such layer")
    if isinstance(module, PackedModule):
        fits = module.op == entry.op
        shape: tuple[int, ...] = module.prepared.shape
    else:
        fits = type(module) is FLOAT_LAYERS[entry.op]
        weight = getattr(module, "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    need(fits and shape == entry.shape, f"{where}, {type(module).__name__} {shape} in the model")
    need(
        bias == (getattr(module, "bias", None) is not None),
        f"{where} {'with' if bias else 'without'} bias, the model's differs",
    )


def _build_layer(
    name: str, entry: LayerEntry, file: Container, parts: list[str], device: torch.device
) -> PackedModule:
    tensors = {part.rpartition(".")[2]: file.tensor(part) for part in parts}
    bias = tensors.pop("bias", None)
    weight = PackedWeight(entry.format, entry.shape, **tensors).to(device)
    if entry.op == "embedding":
        return Embedding(weight, padding_idx=entry.padding_idx, dtype=entry.dtype, name=name)
    if bias is not None:
        need(bias.dtype in LAYER_DTYPES.values(), f"bias is {bias.dtype}")
        need(
            tuple(bias.shape) == entry.shape[:1], f"bias has shape {tuple(bias.shape)}, N is {entry.shape[0]}"
        )
        bias = bias.to(device)
    return Linear(weight, bias, input_spec=entry.input_spec, dtype=entry.dtype, name=name)
