"""Who takes part: our layers, our bare kernels and the peers, each with so many copies of its weight."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyengine as pe
from pyengine import _C, reference
from pyengine.backends import cpu

Call = Callable[[], object]

# The largest relative error that a peer of 8 bits may have: beyond it something else is wrong than rounding.
INT8_LIMIT = 0.1

# Weights of less than 32 KB would need more: they are as cold as this many copies make them.
MAX_COPIES = 4096


@dataclass(frozen=True)
class Contender:
    """One implementation of y = x @ weight.T + bias.

    kernel: what does the work. weight_bytes: of one copy as it lies in memory. bind(x): one call per copy of
    the weight. compute(x) -> y. problem(x, y): what is wrong with the result y, or an empty string.
    """

    name: str
    ours: bool
    kernel: str
    weight_bytes: int
    bind: Callable[[Tensor], list[Call]]
    compute: Callable[[Tensor], Tensor]
    problem: Callable[[Tensor, Tensor], str]


SCHEMES = ("w8a8", "w8")


def ours(linear: nn.Linear, cold_bytes: int, schemes: Iterable[str] = SCHEMES) -> Iterator[Contender]:
    """pe.nn.Linear with each scheme, and its kernel alone on tensors that are allocated beforehand."""
    for scheme in schemes:
        layer = pe.nn.Linear.from_float(linear, scheme, method="round")
        yield _module(f"pyengine {scheme}", layer, cold_bytes)
        index = {f"{op}_{variant}_{isa}": index for op, variant, isa, index, _ in _C.kernels()}.get(
            layer.kernel
        )
        if index is not None:  # the generic backend has no bare kernel
            yield _kernel(f"pyengine {scheme} kernel", layer, index, cold_bytes)


def _module(name: str, layer: pe.nn.Linear, cold_bytes: int) -> Contender:
    size = layer.layout.nbytes
    layers = [layer, *(_replica(layer) for _ in range(copies(size, cold_bytes) - 1))]

    def bind(x: Tensor) -> list[Call]:
        return [functools.partial(each, x) for each in layers]

    return Contender(
        name, True, layer.kernel, size, bind, layer, functools.partial(_reference_problem, layer)
    )


def _kernel(name: str, layer: pe.nn.Linear, index: int, cold_bytes: int) -> Contender:
    size = layer.layout.nbytes
    # Copies of its own: a weight that the layer has just read would lie in the cache.
    layouts = [layer.layout.clone() for _ in range(copies(size, cold_bytes))]

    def bind(x: Tensor) -> list[Call]:
        return _bind_kernel(index, layouts, layer, x)[0]

    def compute(x: Tensor) -> Tensor:
        calls, y = _bind_kernel(index, layouts[:1], layer, x)
        calls[0]()
        return y

    return Contender(
        name, True, layer.kernel, size, bind, compute, functools.partial(_reference_problem, layer)
    )


def copies(size: int, cold_bytes: int) -> int:
    """How many weights of `size` bytes are read before one is read again."""
    return max(1, min(math.ceil(cold_bytes / size), MAX_COPIES))


def _replica(layer: pe.nn.Linear) -> pe.nn.Linear:
    """The same layer on a copy of its layout; copy.deepcopy would derive the layout anew."""
    copy: pe.nn.Linear = object.__new__(type(layer))
    copy.__dict__ = {**layer.__dict__, "_buffers": {"layout": layer.layout.clone()}}
    return copy


def _bind_kernel(
    index: int, layouts: list[Tensor], layer: pe.nn.Linear, x: Tensor
) -> tuple[list[Call], Tensor]:
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

    return [call(layout) for layout in layouts], y


def _reference_problem(layer: pe.nn.Linear, x: Tensor, y: Tensor) -> str:
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
    return _beyond(y, expected, magnitude.double() * roundings * 2.0**-24)


def _beyond(y: Tensor, expected: Tensor, allowed: Tensor) -> str:
    """NaN counts as beyond."""
    within = (y.double() - expected).abs() <= allowed
    if bool(within.all()):
        return ""
    return (
        f"{int((~within).sum())} of {y.numel()} outputs are further from the reference than rounding explains"
    )


# ---- peers ------------------------------------------------------------------------------------------------


def relative_error(y: Tensor, expected: Tensor) -> float:
    """||y - expected|| / ||expected||, Frobenius norms in float64."""
    return float((y.double() - expected).norm() / expected.norm())


def exact(linear: nn.Linear, x: Tensor) -> Tensor:
    """The layer's result with its float weights, in float64."""
    bias = None if linear.bias is None else linear.bias.detach().double()
    return F.linear(x.double(), linear.weight.detach().double(), bias)


def torch_float(linear: nn.Linear, cold_bytes: int) -> Contender:
    """F.linear in float32."""
    weight, bias = linear.weight.detach(), linear.bias.detach()
    weights = [weight.clone() for _ in range(copies(weight.nbytes, cold_bytes))]

    def problem(x: Tensor, y: Tensor) -> str:
        magnitude = F.linear(x.abs(), weight.abs(), bias.abs()).double()
        return _beyond(y, exact(linear, x), magnitude * (x.shape[1] + 8) * 2.0**-24)

    return Contender(
        "torch", False, "F.linear float32", weight.nbytes,
        lambda x: [functools.partial(F.linear, x, each, bias) for each in weights],
        lambda x: F.linear(x, weight, bias), problem,
    )  # fmt: skip


def torch_int8(linear: nn.Linear, cold_bytes: int) -> Contender:
    """torch's dynamic quantization, as torch.ao.quantization.quantize_dynamic sets it up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated since torch 2.10
        quantize_dynamic: Any = torch.ao.quantization.quantize_dynamic
        first = quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)[0]
        weight, bias = first.weight(), first.bias()
        layers = [first]
        for _ in range(copies(weight.numel(), cold_bytes) - 1):
            layers.append(type(first)(linear.in_features, linear.out_features))
            layers[-1].set_weight_bias(weight, bias)

    def problem(x: Tensor, y: Tensor) -> str:
        error = relative_error(y, exact(linear, x))
        return "" if error <= INT8_LIMIT else f"relative error {error:.2g} is above {INT8_LIMIT}"

    return Contender(
        "torch_int8", False, f"quantized.dynamic.Linear {torch.backends.quantized.engine}", weight.numel(),
        lambda x: [functools.partial(each, x) for each in layers], first, problem,
    )  # fmt: skip
