"""Which layers a pass touches: patterns of names, and the reasons why a layer must stay as it is."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.packed_module import PackedModule
from ..ops import FLOAT_DTYPES
from ..report import Left

Pattern = str | Callable[[nn.Module, str], bool]
Patterns = Pattern | Iterable[Pattern]

# Token types and the like: MiniLM's two rows, of outliers, cost as much cosine as a third of its other
# layers.
MIN_ROWS = 16

_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


def as_list(patterns: Patterns | None) -> list[Pattern]:
    if patterns is None:
        return []
    return [patterns] if isinstance(patterns, str) or callable(patterns) else list(patterns)


def matches(pattern: Pattern, module: nn.Module, name: str) -> bool:
    """A glob pattern ("*" matches dots too), "re:" and a regular expression for the whole name, or a
    predicate.
    """
    if callable(pattern):
        return bool(pattern(module, name))
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None
    return fnmatch.fnmatchcase(name, pattern)


@dataclass(frozen=True)
class Site:
    """One layer that a pass may replace, with every place where it hangs: (parent, attribute)."""

    name: str
    module: nn.Module
    places: tuple[tuple[nn.Module, str], ...]
    aliases: tuple[str, ...]


def survey(model: nn.Module) -> tuple[list[Site], list[Left]]:
    """Every Linear and Embedding that can be replaced, and every other module with a matrix of its own, with
    why not.

    Raises ValueError if the model is on the meta device, where there is nothing to read.
    """
    modules: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules.setdefault(id(module), (module, []))[1].append(name)
    owned = owners(module for module, _ in modules.values())
    parents: dict[int, list[nn.Module]] = {}
    for module, _ in modules.values():
        for child in module.children():
            parents.setdefault(id(child), []).append(module)
    sites, left = [], []
    for module, names in modules.values():
        if isinstance(module, PackedModule):
            left.append(Left(names[0], type(module).__name__, "already packed"))
            continue
        if not _has_matrix(module):
            continue
        if any(p.is_meta for p in module.parameters(recurse=False)):
            raise ValueError(f"layer {names[0]!r} is on the meta device: it has no weight to quantize")
        reason = _reason(module, names[0], parents.get(id(module), []), owned)
        if reason:
            left.append(Left(names[0], type(module).__name__, reason))
            continue
        places = tuple((model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in names)
        sites.append(Site(names[0], module, places, tuple(names[1:])))
    return sites, left


def _has_matrix(module: nn.Module) -> bool:
    if nn.utils.parametrize.is_parametrized(module):
        return True
    parameters = module.parameters(recurse=False)
    return any(nn.parameter.is_lazy(p) or p.dim() >= 2 for p in parameters)


def address(parameter: Tensor) -> int:
    """The same for parameters that share memory."""
    lazy = nn.parameter.is_lazy(parameter)
    return id(parameter) if lazy or parameter.is_meta else parameter.data_ptr() or id(parameter)


def owners(modules: Iterable[nn.Module]) -> dict[int, list[nn.Module]]:
    """address -> the modules that have the parameter there as their own."""
    owned: dict[int, list[nn.Module]] = {}
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                owned.setdefault(address(parameter), []).append(module)
    return owned


def _reason(
    module: nn.Module, name: str, parents: list[nn.Module], owned: dict[int, list[nn.Module]]
) -> str | None:
    """Why the module must stay float; None if it can be replaced."""
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        return "parametrized: its weight is computed on each access"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolutions are not implemented yet"
    if kind not in (nn.Linear, nn.Embedding):
        base = next((b for b in (nn.Linear, nn.Embedding) if isinstance(module, b)), None)
        return (
            f"subclass of {base.__name__}: its forward may differ" if base else f"no packed {kind.__name__}"
        )
    if not name:
        return "it is the whole model: use pe.nn.Linear.from_float or pe.nn.Embedding.from_float"
    if has_hooks(module):
        return "has hooks, which would be lost"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    extra = [n for n, _ in module.named_parameters() if n not in ("weight", "bias")]
    extra += [n for n, _ in module.named_buffers()] + [n for n, _ in module.named_children()]
    if extra:
        return f"has more than a weight and a bias: {extra[0]}"
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.dtype not in FLOAT_DTYPES:
        return f"weight is {weight.dtype}"
    others = [other for other in owned[address(weight)] if other is not module]
    if others:
        return f"weight is tied with {type(others[0]).__name__}"
    for fused in (nn.TransformerEncoderLayer, nn.MultiheadAttention):
        if any(isinstance(parent, fused) for parent in parents):
            return f"the fused inference path of {fused.__name__} reads its weight"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm changes its weight at run time"
    if isinstance(module, nn.Embedding) and module.num_embeddings < MIN_ROWS:
        return (
            f"a table of {module.num_embeddings} rows: nothing to save, and its error would reach every token"
        )
    return None


def tensor_bytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
