"""Layers quantized on calibration data: what gptq and awq have a model and its batches do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, cast

from torch import Tensor, nn

from .. import nn as packed_nn
from ..nn.packed_module import PackedModule
from ..packed import PackedWeight
from ..progress import track
from ..quantizers import awq, gptq, output_power, quantize
from ..scheme import Scheme
from .calibration import Forward, SecondMoments, call_order, evaluation, in_chunks
from .dataflow import Group, divided, groups
from .select import Site, tensor_bytes

Sites = Mapping[str, tuple[Site, Scheme]]
Found = tuple[Site, Scheme, PackedModule, str]
Put = Callable[[MutableMapping[str, Any], str, Any], None]

logger = logging.getLogger("pyengine")


def by_gptq(
    model: nn.Module,
    sites: Sites,
    data: Iterable[Any],
    forward: Forward,
    *,
    act_order: bool,
    progress: bool | None,
) -> Iterator[Found]:
    """(site, scheme, new layer, note) of each site, in the order in which the model calls them, some at a
    time: each sees inputs that come through the layers already quantized. A layer has to be hung in before
    the next is asked for.
    """
    layers = _layers(sites)
    called = call_order(model, layers, _first(data), forward)
    chunks = in_chunks(called, lambda name: _moments_bytes(layers[name]), _limit(model))
    batches = sum(1 for _ in data)
    steps = track(range(len(chunks) * batches + len(layers)), "gptq", progress)
    for chunk in chunks:
        seen = _watch(model, {name: layers[name] for name in chunk}, data, forward, steps)
        for name in chunk:
            site, scheme = sites[name]
            weight, note = _gptq_weight(layers[name], name, scheme, seen.moments.pop(name), act_order)
            yield site, scheme, packed_nn.Linear.from_packed(layers[name], weight, scheme, name=name), note
            next(steps, None)
    yield from _uncalled(sites, called, steps)


def by_awq(
    model: nn.Module,
    sites: Sites,
    data: Iterable[Any],
    forward: Forward,
    *,
    put: Put,
    progress: bool | None,
) -> Iterator[Found]:
    """As by_gptq, but the last called first: a layer whose rows take up the scales of the layers behind it
    is then still float, and all see the inputs of the float model. put(mapping, key, value) is
    mapping[key] = value in the transaction: it gives the producers their new parameters.
    """
    layers = _layers(sites)
    found = groups(model, layers, _first(data), forward)
    chunks = in_chunks(
        reversed(found), lambda g: _moments_bytes(layers[g.layers[0]]) if g.producer else 0, _limit(model)
    )
    # What the layers of a group read is counted at the first of them.
    watched = [{g.layers[0]: layers[g.layers[0]] for g in chunk if g.producer} for chunk in chunks]
    batches = sum(1 for _ in data)
    steps = track(range(sum(map(bool, watched)) * batches + len(layers)), "awq", progress)
    for chunk, leaders in zip(chunks, watched, strict=True):
        seen = _watch(model, leaders, data, forward, steps) if leaders else SecondMoments({})
        for group in chunk:
            leader = group.layers[0]
            statistics = (seen.moments.pop(leader), seen.magnitudes.pop(leader)) if group.producer else None
            for name, weight, note in _awq_weights(group, layers, sites, statistics, put):
                site, scheme = sites[name]
                layer = packed_nn.Linear.from_packed(layers[name], weight, scheme, name=name)
                yield site, scheme, layer, note
                next(steps, None)
    yield from _uncalled(sites, [name for group in found for name in group.layers], steps)


def _first(data: Iterable[Any]) -> Any:
    """The first batch. Raises ValueError if there is none."""
    for batch in data:
        return batch
    raise ValueError("calibration_data is empty")


def _layers(sites: Sites) -> dict[str, nn.Linear]:
    return {name: cast(nn.Linear, site.module) for name, (site, _) in sites.items()}


def _limit(model: nn.Module) -> int:
    """An eighth of the model for the moments: with the packed layers the peak stays near one and a half."""
    return tensor_bytes(*model.parameters()) // 8


def _moments_bytes(layer: nn.Linear) -> int:
    return 4 * layer.in_features**2


def _watch(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    data: Iterable[Any],
    forward: Forward,
    steps: Iterator[int],
) -> SecondMoments:
    seen = SecondMoments(layers)
    with seen.watching(), evaluation(model):
        for batch in data:
            forward(model, batch)
            next(steps, None)
    return seen


def _uncalled(sites: Sites, called: Iterable[str], steps: Iterator[int]) -> Iterator[Found]:
    seen = set(called)
    for name in (name for name in sites if name not in seen):
        site, scheme = sites[name]
        logger.warning("linear %r: calibration never calls it, its codes are found without data", name)
        layer = packed_nn.Linear.from_float(cast(nn.Linear, site.module), scheme, name=name)
        yield site, scheme, layer, "not called in calibration: without data"
        next(steps, None)
    next(steps, None)  # past the last: the bar goes away


def _plain(weight: Tensor, scheme: Scheme, name: str) -> PackedWeight:
    try:
        return quantize(weight, scheme)
    except ValueError as error:
        raise ValueError(f"linear {name!r}: {error}") from None


def _powers(weight: Tensor, other: Tensor, moments: Tensor) -> tuple[float, float]:
    """The power of the layer's output, and of what it is off with the other weight, which is overwritten."""
    return output_power(weight, moments), output_power(other.sub_(weight.detach()), moments)


def _note(method: str, after: float, before: float, whole: float) -> str:
    """Errors of the output, relative to it."""
    after, before = ((power / whole) ** 0.5 if whole > 0 else 0.0 for power in (after, before))
    return f"{method}: output error {after:.1%}, without data {before:.1%}"


def _gptq_weight(
    linear: nn.Linear, name: str, scheme: Scheme, moments: Tensor, act_order: bool
) -> tuple[PackedWeight, str]:
    """The weight, and what it does to the layer's output."""
    plain = _plain(linear.weight, scheme, name)
    whole, before = _powers(linear.weight, plain.dequantize(), moments)
    found = gptq(linear.weight, scheme.format, moments, act_order=act_order)
    if found is None:
        logger.warning("linear %r: no gptq on its inputs, its codes are found without data", name)
        return plain, "gptq impossible: without data"
    packed, after = found
    return packed, _note("gptq", after, before, whole)


def _awq_weights(
    group: Group,
    layers: Mapping[str, nn.Linear],
    sites: Sites,
    statistics: tuple[Tensor, Tensor] | None,
    put: Put,
) -> Iterator[tuple[str, PackedWeight, str]]:
    """(name, weight, note) of the layers of a group, whose producer has got its new parameters before."""
    weights = {name: layers[name].weight for name in group.layers}
    schemes = {name: sites[name][1] for name in group.layers}
    plain = {name: _plain(weights[name], schemes[name], name) for name in group.layers}
    if statistics is None or group.producer is None:
        yield from ((name, packed, f"awq: not scaled, {group.reason}") for name, packed in plain.items())
        return
    moments, magnitudes = statistics
    found = awq(list(weights.values()), list(schemes.values()), moments, magnitudes)
    if found is None:
        for name, packed in plain.items():
            logger.warning("linear %r: no awq on its inputs, its codes are found without data", name)
            yield name, packed, "awq impossible: without data"
        return
    scales, packed_weights = found
    for key, parameter in divided(group.producer, scales).items():
        put(group.producer._parameters, key, parameter)
    for (name, weight), packed in zip(weights.items(), packed_weights, strict=True):
        whole, after = _powers(weight, packed.dequantize() / scales, moments)
        _, before = _powers(weight, plain[name].dequantize(), moments)
        yield name, packed, _note("awq", after, before, whole)
