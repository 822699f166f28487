"""quantize_: float layers -> layers with packed weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from .. import nn as packed_nn
from ..nn.packed_module import PackedModule
from ..progress import track
from ..quantizers import CALIBRATED, METHODS, default_method
from ..report import Change, Left, Report
from ..scheme import Scheme
from .calibrated import Put, by_awq, by_gptq
from .calibration import Forward, feed, require_reiterable
from .checkpoint import Checkpoint, fingerprint
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
    calibration_data: Iterable[Any] | None = None,
    forward: Forward | None = None,
    act_order: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Report:
    """Replace the Linear and Embedding layers of a model by packed ones, in place.

    scheme: a string such as "w8a8", a Scheme, or a dict from name patterns to those or None (float), of which
    the first that matches a layer holds. include, exclude: name patterns (glob, "re:...", or a predicate
    (module, name)); by default every layer is included, by an empty
    list none. progress: True, False, or None for a bar on a
    terminal.

    method: how codes are found: "round" to the nearest with the scale of the largest weight, "mse" with the
    scale of the least squared error, "hqq" with half-quadratic zero points, "gptq" and "awq" on calibration
    data (see quantizers); None is "round" for weights of more than 4 bits, else "gptq" for Linear layers if
    there is calibration data and "mse" if not. awq moves scales of a layer's input into what makes it, a norm
    or the other Linear of a gated pair, where nothing else reads it (dataflow.groups says when); the Report
    says where not, and such layers are quantized without data. calibration_data: batches, anything that can
    be iterated over several times; forward(model, batch) says how one is fed, by default as the argument,
    arguments or keywords. act_order: gptq takes the columns with the largest inputs first.
    checkpoint: a folder where each layer that gptq or awq has finished is kept; the same call after an
    interruption goes on from there and ends in the same codes. What it holds for another weight, scheme,
    method or other data is refused.

    Only exact torch types are replaced; the Report says what was left and why. Either all layers are replaced
    or, on an exception or Ctrl-C, none.

    Raises ValueError for a pattern that matches no layer, for weights that are not finite (with the layer's
    name), for a model on the meta device and for a checkpoint of something else; FormatError for a damaged
    one; NotImplementedError for schemes without code.
    """
    rules = _rules(scheme)
    if method not in (None, *METHODS):
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    if calibration_data is None and method in CALIBRATED:
        raise ValueError(f"method {method!r} needs calibration_data")
    if calibration_data is not None:
        require_reiterable(calibration_data)
    included, excluded = as_list("*" if include is None else include), as_list(exclude)
    sites, left = survey(model)
    given = [pattern for pattern in (*included, *excluded, *rules) if pattern != "*"]
    _check_patterns(given, sites, left, model)
    chosen: list[tuple[Site, Scheme]] = []
    for site in sites:
        picked, reason = _pick(site, rules, included, excluded)
        if picked is None:
            left.append(Left(site.name, type(site.module).__name__, reason))
        else:
            chosen.append((site, picked))

    calibrated = {} if calibration_data is None else _calibrated(chosen, method)
    with _transaction() as put:

        def swap(site: Site, layer: PackedModule) -> None:
            for parent, attribute in site.places:
                put(parent._modules, attribute, layer)

        changes = {}
        plain = [(site, wanted) for site, wanted in chosen if site.name not in calibrated]
        for site, wanted in track(plain, "quantize", progress):
            means = None if method in CALIBRATED else method
            layer = LAYERS[type(site.module)].from_float(site.module, wanted, method=means, name=site.name)
            changes[site.name] = _change(site, layer, wanted, means)
            swap(site, layer)
        if calibrated:
            assert calibration_data is not None
            used = method or "gptq"
            options = {"method": used, "act_order": act_order}
            if checkpoint is not None:
                options["data"] = fingerprint(calibration_data)
            fed = model, calibrated, calibration_data, forward or feed, Checkpoint(checkpoint, options)
            for site, wanted, layer, note in (
                by_awq(*fed, put=put, progress=progress)
                if method == "awq"
                else by_gptq(*fed, act_order=act_order, progress=progress)
            ):
                changes[site.name] = replace(_change(site, layer, wanted, used), note=note)
                swap(site, layer)
    step = {"pass": "quantize", "scheme": _describe(rules)}
    name = (method or "gptq") if calibrated else method
    record(model, step if name is None else {**step, "method": name})
    aliases = {alias: site.name for site, _ in chosen for alias in site.aliases}
    ordered = tuple(changes[site.name] for site, _ in chosen)
    return Report(f"quantize_ {_describe(rules)}", ordered, tuple(left), aliases)


def _calibrated(chosen: list[tuple[Site, Scheme]], method: str | None) -> dict[str, tuple[Site, Scheme]]:
    """The layers that calibration data is for: by default the Linear layers of up to 4 bits."""
    return {
        site.name: (site, scheme)
        for site, scheme in chosen
        if type(site.module) is nn.Linear
        and (method in CALIBRATED or (method is None and default_method(scheme) != "round"))
    }


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
    if not any(any_name(pattern) for pattern in included):
        return None, "not included"
    for pattern, scheme in rules.items():
        if any_name(pattern):
            return scheme, "its scheme is None"
    return None, "no pattern of the scheme matches it"


def _change(site: Site, layer: PackedModule, scheme: Scheme, method: str | None) -> Change:
    format, bias = layer.format, getattr(layer, "bias", None)
    note = ""
    if scheme.scale_dtype is None and format.scale_dtype != scheme.format.scale_dtype:
        note = "scales in float32: float16 would lose some"
    activations = "" if layer.input_spec.mode == "float" else f" {layer.input_spec.name}"
    weight = site.module.weight
    assert not isinstance(weight, nn.Module)
    return Change(
        name=site.name,
        before=f"{type(site.module).__name__} {str(weight.dtype).removeprefix('torch.')}",
        after=f"{format.name}{activations}",
        kernel=layer.kernel,
        bytes_before=tensor_bytes(weight, bias),
        bytes_file=format.nbytes(layer.prepared.shape) + tensor_bytes(bias),
        bytes_runtime=tensor_bytes(layer.layout, bias),
        fallback=layer.prepared.kernel.fallback,
        note=note,
    )


@contextmanager
def _transaction() -> Iterator[Put]:
    """put(mapping, key, value) is mapping[key] = value; an exception puts all the old values back."""
    done: list[tuple[MutableMapping[str, Any], str, Any]] = []

    def put(mapping: MutableMapping[str, Any], key: str, value: Any) -> None:
        done.append((mapping, key, mapping[key]))
        mapping[key] = value

    try:
        yield put
    except BaseException:
        for mapping, key, value in reversed(done):
            mapping[key] = value
        raise


def record(model: nn.Module, step: dict[str, Any]) -> None:
    """Note a pass on the model, for the recipe in the file's manifest."""
    model.__dict__["pyengine_recipe"] = [*model.__dict__.get("pyengine_recipe", ()), step]
