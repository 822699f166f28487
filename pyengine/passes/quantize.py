"""quantize_: float layers -> layers with packed weights, rounded to nearest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .. import nn as packed_nn
from ..nn.packed_module import PackedModule
from ..progress import track
from ..quantizers import METHODS
from ..report import Change, Left, Report
from ..scheme import Scheme
from .select import Pattern, Patterns, Site, as_list, matches, survey, tensor_bytes

Schemes = str | Scheme | Mapping[Pattern, str | Scheme | None]

LAYERS: dict[type[nn.Module], Any] = {nn.Linear: packed_nn.Linear, nn.Embedding: packed_nn.Embedding}


def quantize_(
    model: nn.Module,
    scheme: Schemes,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    method: str | None = None,
    progress: bool | None = None,
) -> Report:
    """Replace the Linear and Embedding layers of a model by packed ones, in place.

    scheme: a string such as "w8a8", a Scheme, or a dict from name patterns to those or None (float), of which
    the first that matches a layer holds. include, exclude: name patterns (glob, "re:...", or a predicate
    (module, name)); by default every layer is included. progress: True, False, or None for a bar on a
    terminal.

    method: how codes are found, without data: "round" to the nearest with the scale of the largest weight,
    "mse" with the scale of the least squared error, "hqq" with half-quadratic zero points (see quantizers);
    None is "mse" for weights of up to 4 bits, else "round". Only exact torch types are replaced; the Report
    says what was left and why. Either all layers are replaced or, on an exception or Ctrl-C, none.

    Raises ValueError for a pattern that matches no layer, for weights that are not finite (with the layer's
    name), and for a model on the meta device; NotImplementedError for schemes without code.
    """
    rules = _rules(scheme)
    if method not in (None, *METHODS):
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    included, excluded = as_list(include), as_list(exclude)
    sites, left = survey(model)
    _check_patterns([*included, *excluded, *(p for p in rules if p != "*")], sites, left, model)
    chosen: list[tuple[Site, Scheme]] = []
    for site in sites:
        picked, reason = _pick(site, rules, included, excluded)
        if picked is None:
            left.append(Left(site.name, type(site.module).__name__, reason))
        else:
            chosen.append((site, picked))

    replacements: list[tuple[Site, PackedModule]] = []
    changes = []
    for site, wanted in track(chosen, "quantize", progress):
        layer = LAYERS[type(site.module)].from_float(site.module, wanted, method=method, name=site.name)
        replacements.append((site, layer))
        changes.append(_change(site, layer, wanted, method))
    _swap(replacements)
    step = {"pass": "quantize", "scheme": _describe(rules)}
    record(model, step if method is None else {**step, "method": method})
    aliases = {alias: site.name for site, _ in replacements for alias in site.aliases}
    return Report(f"quantize_ {_describe(rules)}", tuple(changes), tuple(left), aliases)


def _rules(scheme: Schemes) -> dict[Pattern, Scheme | None]:
    if isinstance(scheme, Mapping):
        return {pattern: None if s is None else Scheme.parse(s) for pattern, s in scheme.items()}
    return {"*": Scheme.parse(scheme)}


def _describe(rules: dict[Pattern, Scheme | None]) -> str:
    names = {
        str(p) if isinstance(p, str) else "predicate": s.name if s else "float" for p, s in rules.items()
    }
    return names["*"] if list(names) == ["*"] else ", ".join(f"{p}: {s}" for p, s in names.items())


def _check_patterns(patterns: list[Pattern], sites: list[Site], left: list[Left], model: nn.Module) -> None:
    layers = {id(site.module) for site in sites} | {id(model.get_submodule(item.name)) for item in left}
    known = [(m, name) for name, m in model.named_modules(remove_duplicate=False) if id(m) in layers]
    for pattern in patterns:
        if not any(matches(pattern, module, name) for module, name in known):
            raise ValueError(f"pattern {pattern!r} matches no layer of the model")


def _pick(
    site: Site, rules: dict[Pattern, Scheme | None], included: list[Pattern], excluded: list[Pattern]
) -> tuple[Scheme | None, str]:
    """The scheme of a layer, or None and why it stays float."""

    def any_name(pattern: Pattern) -> bool:
        return any(matches(pattern, site.module, name) for name in (site.name, *site.aliases))

    if any(any_name(pattern) for pattern in excluded):
        return None, "excluded"
    if included and not any(any_name(pattern) for pattern in included):
        return None, "not included"
    for pattern, scheme in rules.items():
        if any_name(pattern):
            return scheme, "its scheme is None"
    return None, "no pattern of the scheme matches it"


def _change(site: Site, layer: PackedModule, scheme: Scheme, method: str | None) -> Change:
    packed = layer.packed()
    bias = getattr(layer, "bias", None)
    note = ""
    if scheme.scale_dtype is None and packed.format.scale_dtype != scheme.format.scale_dtype:
        note = "scales in float32: float16 would lose some"
    if scheme.pairs and isinstance(layer, packed_nn.Linear) and method in (None, "round"):
        note = _pair_cost(site, layer)
    activations = "" if layer.input_spec.mode == "float" else f" {layer.input_spec.name}"
    weight = site.module.weight
    assert not isinstance(weight, nn.Module)
    return Change(
        name=site.name,
        before=f"{type(site.module).__name__} {str(weight.dtype).removeprefix('torch.')}",
        after=f"{packed.format.name}{activations}",
        kernel=layer.kernel,
        bytes_before=tensor_bytes(weight, bias),
        bytes_file=packed.nbytes + tensor_bytes(bias),
        bytes_runtime=tensor_bytes(layer.layout, bias),
        fallback=layer.prepared.kernel.fallback,
        note=note,
    )


def _pair_cost(site: Site, layer: PackedModule) -> str:
    """What the pair-sum option costs: how much larger a step is than without it, mean and largest."""
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    if not weight.numel():
        return ""
    step = weight.detach().float().abs().amax(1, keepdim=True) / 127
    scale = layer.packed().scale
    growth = scale[step > 0] / step[step > 0]
    return f"pair sums: steps {growth.mean():.2f}x, at most {growth.max():.2f}x" if growth.numel() else ""


def _swap(replacements: list[tuple[Site, PackedModule]]) -> None:
    """Hang every new layer in its places; on any interruption hang the old ones back."""
    done: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for site, layer in replacements:
            for parent, attribute in site.places:
                done.append((parent, attribute, site.module))
                parent._modules[attribute] = layer
    except BaseException:
        for parent, attribute, module in done:
            parent._modules[attribute] = module
        raise


def record(model: nn.Module, step: dict[str, Any]) -> None:
    """Note a pass on the model, for the recipe in the file's manifest."""
    model.__dict__["pyengine_recipe"] = [*model.__dict__.get("pyengine_recipe", ()), step]
