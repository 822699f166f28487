"""torch: F.linear in float32, and dynamic quantization with each of its engines."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contenders import Bound, Runtime, copies


def torch_fp32(linear: nn.Linear, cold_bytes: int) -> Runtime:
    weight, bias = linear.weight.detach(), linear.bias.detach()
    weights = [weight.clone() for _ in range(copies(weight.nbytes, cold_bytes))]

    def bind(x: Tensor, count: int) -> Bound:
        calls = [functools.partial(F.linear, x, each, bias) for each in weights[:count]]
        return list(calls), calls[0]

    return Runtime("F.linear float32", weight.nbytes, len(weights), bind)


def torch_int8(linear: nn.Linear, cold_bytes: int, *, engine: str) -> Runtime:
    """As torch.ao.quantization.quantize_dynamic sets it up.

    The engine is asked for while weights are packed and not again: what is packed knows what runs it.
    """
    with warnings.catch_warnings(), _engine(engine):
        warnings.simplefilter("ignore")  # deprecated since torch 2.10
        quantize_dynamic: Any = torch.ao.quantization.quantize_dynamic
        first = quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)[0]
        weight, bias = first.weight(), first.bias()
        layers = [first]
        for _ in range(copies(weight.numel(), cold_bytes) - 1):
            layers.append(type(first)(linear.in_features, linear.out_features))
            layers[-1].set_weight_bias(weight, bias)

    def bind(x: Tensor, count: int) -> Bound:
        return [functools.partial(each, x) for each in layers[:count]], functools.partial(first, x)

    return Runtime(f"torch quantized.dynamic.Linear {engine}", weight.numel(), len(layers), bind)


@contextmanager
def _engine(name: str) -> Iterator[None]:
    engines: Any = torch.backends.quantized
    before = engines.engine
    engines.engine = name
    try:
        yield
    finally:
        engines.engine = before
