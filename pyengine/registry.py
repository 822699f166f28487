"""What a kernel says of itself, and how one is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .formats import ActivationSpec, WeightFormat
from .packed import PackedWeight


@dataclass(frozen=True)
class Problem:
    """What is asked of a kernel, known when a layer is built or moved."""

    op: str
    format: WeightFormat
    input_spec: ActivationSpec
    device: str


@dataclass(frozen=True)
class Layout:
    """How a kernel wants the weight: one uint8 tensor, derived from the canonical bytes and back.

    nbytes(format, (N, K)) is its size. pack(weight) -> layout. unpack(layout, format, (N, K)) -> weight.
    """

    name: str
    nbytes: Callable[[WeightFormat, tuple[int, int]], int]
    pack: Callable[[PackedWeight], Tensor]
    unpack: Callable[[Tensor, WeightFormat, tuple[int, int]], PackedWeight]


@dataclass(frozen=True)
class KernelSpec:
    """One kernel. bind(problem, weight shape) is the function that runs it: for linear (x, layout, bias,
    activation) -> y, for embedding (ids, layout, dtype) -> y. What that gets has been checked by ops.py; but
    linear of device "cpu" looks at its tensors itself, and returns None for those that it cannot take."""

    name: str
    op: str
    device: str
    isa: str
    layout: Layout
    serves: Callable[[Problem], bool]
    bind: Callable[[Problem, tuple[int, int]], Callable[..., Any]]
    fallback: bool = False


def choose(kernels: Iterable[KernelSpec], problem: Problem) -> KernelSpec:
    """The first kernel that serves the problem: the tables of the backends list the fastest first.

    Raises NotImplementedError if none does.
    """
    for kernel in kernels:
        if kernel.op == problem.op and kernel.device in (problem.device, "any") and kernel.serves(problem):
            return kernel
    raise NotImplementedError(
        f"no kernel for {problem.op} with {problem.format.name} weights and {problem.input_spec.name} "
        f"activations on {problem.device}"
    )
