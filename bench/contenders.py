"""What takes part: an implementation of a linear layer, with copies of its weight, and what checks it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

Call = Callable[[], object]
# One call per copy of the weight, and what the first of them has computed last.
Bound = tuple[list[Call], Callable[[], Tensor]]

# Weights of less than 32 KB would need more: they are as cold as this many copies make them.
MAX_COPIES = 4096
# A copy of a runtime's is a session of its own, which takes up to 30 ms to make.
MAX_SESSIONS = 32


@dataclass(frozen=True)
class Runtime:
    """Something that computes y = x @ weight.T + bias.

    kernel: what does the work. weight_bytes: of one copy as it lies in memory. copies: how many it has for
    cold caches. bind(x, count): calls on the first `count` of them.
    """

    kernel: str
    weight_bytes: int
    copies: int
    bind: Callable[[Tensor, int], Bound]


@dataclass(frozen=True)
class Contender:
    """A runtime under a name.

    weights: fp32, int8 or int4. inputs: how activations are taken: float, dynamic (quantized as they come) or
    static (quantized with a scale that is known beforehand). sequence: the row of csrc/limits/limits.inc that
    it is held against. problem(x, y): what is wrong with the result y, or an empty string.
    """

    name: str
    ours: bool
    weights: str
    inputs: str
    sequence: str
    runtime: Runtime
    problem: Callable[[Tensor, Tensor], str]

    def compute(self, x: Tensor) -> Tensor:
        calls, result = self.runtime.bind(x, 1)
        calls[0]()
        return result()


def copies(size: int, cold_bytes: int, most: int = MAX_COPIES) -> int:
    """How many weights of `size` bytes are read before one is read again."""
    return max(1, min(math.ceil(cold_bytes / size), most))


def beyond(y: Tensor, expected: Tensor, allowed: Tensor) -> str:
    """NaN counts as beyond."""
    within = (y.double() - expected).abs() <= allowed
    if bool(within.all()):
        return ""
    return (
        f"{int((~within).sum())} of {y.numel()} outputs are further from the reference than rounding explains"
    )


def relative_error(y: Tensor, expected: Tensor) -> float:
    """||y - expected|| / ||expected||, Frobenius norms in float64."""
    return float((y.double() - expected).norm() / expected.norm())


def exact(linear: nn.Linear, x: Tensor) -> Tensor:
    """The layer's result with its float weights, in float64."""
    bias = None if linear.bias is None else linear.bias.detach().double()
    return F.linear(x.double(), linear.weight.detach().double(), bias)
