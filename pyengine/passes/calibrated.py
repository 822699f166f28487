"""Layers quantized on calibration data: what gptq and awq have a model and its batches do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sized
from typing import Any, cast

from torch import Tensor, nn

from .. import nn as packed_nn
from ..nn.packed_module import PackedModule
from ..packed import PackedWeight
from ..progress import track
from ..quantizers import awq, gptq, output_power, quantize
from ..scheme import Scheme
from .calibration import Forward, SecondMoments, call_order, evaluation, in_chunks
from .checkpoint import Asked, Checkpoint, Finished
from .dataflow import Group, confirmed, divided, groups
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
    checkpoint: Checkpoint,
    *,
    act_order: bool,
    progress: bool | None,
) -> Iterator[Found]:
    """(site, scheme, new layer, note) of each site, in the order in which the model calls them, some at a
    time: each sees inputs that come through the layers already quantized. A layer has to be hung in before
    the next is asked for. Layers that the checkpoint has need no inputs.
    """
    layers = _layers(sites)
    called = call_order(model, layers, _first(data), forward)
    chunks = in_chunks(called, lambda name: _moments_bytes(layers[name]), _limit(model))
    batches = _count(data)
    steps = track(range(len(chunks) * batches + len(layers)), "gptq", progress)
    for chunk in chunks:
        missing = {name: layers[name] for name in chunk if not checkpoint.has(name)}
        seen = _watch(model, missing, data, forward, steps, batches)
        for name in chunk:
            asked = _asked([name], sites)
            if name not in missing:
                finished = checkpoint.load(asked)
            else:
                scheme, moments = sites[name][1], seen.moments.pop(name)
                finished = Finished({name: _gptq_weight(layers[name], name, scheme, moments, act_order)})
                checkpoint.keep(asked, finished)
            yield from _built(finished, sites, steps)
    yield from _uncalled(sites, called, steps)


def by_awq(
    model: nn.Module,
    sites: Sites,
    data: Iterable[Any],
    forward: Forward,
    checkpoint: Checkpoint,
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
    found = confirmed(model, found, layers, track(data, "awq: confirm", progress), forward)
    chunks = in_chunks(
        reversed(found), lambda g: _moments_bytes(layers[g.layers[0]]) if g.producer else 0, _limit(model)
    )
    # What the layers of a group read, all the same tensor, is counted at the first of them.
    watched = [{g.layers[0]: layers[g.layers[0]] for g in chunk if g.producer} for chunk in chunks]
    batches = _count(data)
    steps = track(range(sum(map(bool, watched)) * batches + len(layers)), "awq", progress)
    for chunk, leaders in zip(chunks, watched, strict=True):
        there = {group.layers[0] for group in chunk if checkpoint.has(group.layers[0])}
        missing = {name: layer for name, layer in leaders.items() if name not in there}
        seen = _watch(model, missing, data, forward, steps, batches if leaders else 0)
        for group in chunk:
            leader, asked = group.layers[0], _asked(group.layers, sites)
            if leader in there:
                finished = checkpoint.load(asked)
            else:
                statistics = None
                if group.producer:
                    statistics = seen.moments.pop(leader), seen.magnitudes.pop(leader)
                finished = _awq_weights(group, asked, statistics)
                checkpoint.keep(asked, finished)
            if finished.scales is not None and group.producer is not None:
                for key, parameter in divided(group.producer, finished.scales).items():
                    put(group.producer._parameters, key, parameter)
            yield from _built(finished, sites, steps)
    yield from _uncalled(sites, [name for group in found for name in group.layers], steps)


def _asked(names: Iterable[str], sites: Sites) -> dict[str, tuple[Scheme, Tensor]]:
    return {name: (sites[name][1], cast(nn.Linear, sites[name][0].module).weight) for name in names}


def _built(finished: Finished, sites: Sites, steps: Iterator[int]) -> Iterator[Found]:
    for name, (weight, note) in finished.layers.items():
        site, scheme = sites[name]
        linear = cast(nn.Linear, site.module)
        yield site, scheme, packed_nn.Linear.from_packed(linear, weight, scheme, name=name), note
        next(steps, None)


def _first(data: Iterable[Any]) -> Any:
    """The first batch. Raises ValueError if there is none."""
    for batch in data:
        return batch
    raise ValueError("calibration_data is empty")


def _count(data: Iterable[Any]) -> int:
    return len(data) if isinstance(data, Sized) else sum(1 for _ in data)


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
    batches: int,
) -> SecondMoments:
    """Of what the layers read, if there are any; either way it counts as so many steps."""
    seen = SecondMoments(layers)
    if not layers:
        for _ in range(batches):
            next(steps, None)
        return seen
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


def _awq_weights(group: Group, asked: Asked, statistics: tuple[Tensor, Tensor] | None) -> Finished:
    plain = {name: _plain(weight, scheme, name) for name, (scheme, weight) in asked.items()}
    if statistics is None:
        return Finished({n: (packed, f"awq: not scaled, {group.reason}") for n, packed in plain.items()})
    moments, magnitudes = statistics
    schemes, weights = zip(*asked.values(), strict=True)
    found = awq(weights, schemes, moments, magnitudes)
    if found is None:
        for name in plain:
            logger.warning("linear %r: no awq on its inputs, its codes are found without data", name)
        return Finished({name: (packed, "awq impossible: without data") for name, packed in plain.items()})
    scales, packed_weights = found
    finished = {}
    for (name, (_, weight)), packed in zip(asked.items(), packed_weights, strict=True):
        whole, after = _powers(weight, packed.dequantize() / scales, moments)
        _, before = _powers(weight, plain[name].dequantize(), moments)
        finished[name] = packed, _note("awq", after, before, whole)
    return Finished(finished, scales)
