"""Our layers as a model calls them, and their bare kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyengine as pe
from pyengine import _C, reference
from pyengine.backends import cpu

from .contenders import Bound, Contender, Runtime, beyond, copies

SCHEMES = ("w8a8", "w8")

# The limit by the bits of the activations and the kind of weights; any else computes in float.
_SEQUENCES = {(8, "int8"): "int8_pair_sum", (8, "int4"): "int4_sum16"}
_SEQUENCES |= dict.fromkeys([(16, "int8"), (16, "int4")], "int16_dot2")


def ours(linear: nn.Linear, cold_bytes: int, schemes: Iterable[str] = SCHEMES) -> Iterator[Contender]:
    """pe.nn.Linear with each scheme, and its kernel alone on tensors that are allocated beforehand."""
    for scheme in schemes:
        layer = pe.nn.Linear.from_float(linear, scheme, method="round")
        yield _contender(f"pyengine {scheme}", layer, _module(layer, cold_bytes))
        index = {f"{op}_{variant}_{isa}": index for op, variant, isa, index, _ in _C.kernels()}.get(
            layer.kernel
        )
        if index is not None:  # the generic backend has no bare kernel
            yield _contender(f"pyengine {scheme} kernel", layer, _kernel(layer, index, cold_bytes))


def _contender(name: str, layer: pe.nn.Linear, runtime: Runtime) -> Contender:
    weights = "int8" if layer.format.bits > 4 else "int4"
    sequence = _SEQUENCES.get((layer.input_spec.bits, weights), "fma")
    inputs = "dynamic" if layer.input_spec.bits else "float"
    return Contender(name, True, weights, inputs, sequence, runtime, functools.partial(_problem, layer))


def _module(layer: pe.nn.Linear, cold_bytes: int) -> Runtime:
    number = copies(layer.layout.nbytes, cold_bytes)
    layers = [layer, *(_replica(layer) for _ in range(number - 1))]

    def bind(x: Tensor, count: int) -> Bound:
        return [functools.partial(each, x) for each in layers[:count]], functools.partial(layer, x)

    return Runtime(layer.kernel, layer.layout.nbytes, number, bind)


def _kernel(layer: pe.nn.Linear, index: int, cold_bytes: int) -> Runtime:
    number = copies(layer.layout.nbytes, cold_bytes)
    # Copies of its own: a weight that the layer has just read would lie in the cache.
    layouts = [layer.layout.clone() for _ in range(number)]

    def bind(x: Tensor, count: int) -> Bound:
        return _bind_kernel(index, layouts[:count], layer, x)

    return Runtime(layer.kernel, layer.layout.nbytes, number, bind)


def _replica(layer: pe.nn.Linear) -> pe.nn.Linear:
    """The same layer on a copy of its layout; copy.deepcopy would derive the layout anew."""
    copy: pe.nn.Linear = object.__new__(type(layer))
    copy.__dict__ = {**layer.__dict__, "_buffers": {"layout": layer.layout.clone()}}
    return copy


def _bind_kernel(index: int, layouts: list[Tensor], layer: pe.nn.Linear, x: Tensor) -> Bound:
    (m, k), n, bias, code = x.shape, layer.out_features, layer.bias, cpu.DTYPE_CODES[x.dtype]
    assert bias is not None
    y = x.new_full((m, n), math.nan)
    group_size, scale_type, zero = cpu.format_arguments(layer.format)
    workspace = torch.empty(_C.linear_workspace_bytes(index, m, k, group_size or k), dtype=torch.uint8)

    def call(layout: Tensor) -> Any:
        run: Any = functools.partial(
            _C.linear, index, x.data_ptr(), code, m, layout.data_ptr(), n, k, bias.data_ptr(),
            y.data_ptr(), code, 0, group_size or k, scale_type, zero, workspace.data_ptr(),
        )  # fmt: skip
        run.keep = (x, y, workspace)  # addresses keep nothing alive
        return run

    return [call(layout) for layout in layouts], lambda: y


def _problem(layer: pe.nn.Linear, x: Tensor, y: Tensor) -> str:
    """Compares with reference.py: what may differ is the float rounding of K sums, or of the epilogue."""
    packed, spec = layer.packed(), layer.input_spec
    assert layer.bias is not None
    codes, scale, bias = packed.codes().numpy(), packed.scale.numpy(), layer.bias.numpy()
    zero = None if packed.zero is None else packed.zero.numpy()
    expected = torch.from_numpy(
        reference.linear(x.numpy(), codes, scale, zero, packed.format, bias, input_spec=spec)
    )
    sums = len(reference.segments(packed.format, x.shape[1], spec)) if spec.bits else x.shape[1]
    if spec.bits and sums == 1:
        magnitude, roundings = expected.abs() + 2 * layer.bias.abs(), 8
    else:
        magnitude = F.linear(x.abs(), packed.dequantize().abs(), layer.bias.abs())
        roundings = sums + 8
    return beyond(y, expected, magnitude.double() * roundings * 2.0**-24)
