"""The C++ kernels of csrc/, their layouts, and which of them this processor runs."""

from __future__ import annotations

import ctypes
import glob
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..formats import WeightFormat
from ..packed import PackedWeight
from ..registry import KernelSpec, Layout, Problem

logger = logging.getLogger("pyengine")

# In rising order of preference.
ISAS = ("portable", "avx2")

# As numbered in csrc/dtypes.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.int32: 4}
ACTIVATION_CODES = {None: 0, "relu": 1, "gelu": 2, "silu": 3}


def _allowed_isas() -> tuple[str, ...]:
    """What the processor supports, up to PYENGINE_ISA, best first."""
    highest = os.environ.get("PYENGINE_ISA") or ISAS[-1]
    if highest not in ISAS:
        raise ValueError(f"PYENGINE_ISA={highest!r} is none of {', '.join(ISAS)}")
    allowed = ISAS[: ISAS.index(highest) + 1]
    return tuple(isa for isa in reversed(allowed) if _C.isa_supported(isa))


ALLOWED_ISAS = _allowed_isas()


def _share_torch_threads() -> None:
    """Hands torch's own parallel_for, a C function that libtorch_cpu exports, to the kernels."""
    library = sorted(glob.glob(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.*")))
    try:
        function = ctypes.CDLL(library[0]).torch_parallel_for
    except (IndexError, OSError, AttributeError) as error:
        logger.warning(
            "this torch does not export torch_parallel_for, CPU kernels run on one thread: %s", error
        )
        return
    _C.set_parallel_for(ctypes.cast(function, ctypes.c_void_p).value or 0)
    # A forked child inherits the memory of torch's pool but not its threads, and would wait for them.
    os.register_at_fork(after_in_child=lambda: _C.set_parallel_for(0))


_share_torch_threads()


def _panels_bytes(format: WeightFormat, shape: tuple[int, int]) -> int:
    return _C.panels_bytes(*shape)


def _pack_panels(weight: PackedWeight) -> Tensor:
    n, k = weight.shape
    qdata, scale = weight.qdata, weight.scale.float()
    layout = torch.empty(_panels_bytes(weight.format, weight.shape), dtype=torch.uint8, device="cpu")
    _C.pack_panels(qdata.data_ptr(), scale.data_ptr(), n, k, layout.data_ptr())
    return layout


def _unpack_panels(layout: Tensor, format: WeightFormat, shape: tuple[int, int]) -> PackedWeight:
    n, k = shape
    qdata = layout.new_empty(n, k)
    scale = layout.new_empty(n, 1, dtype=torch.float32)
    _C.unpack_panels(layout.data_ptr(), n, k, qdata.data_ptr(), scale.data_ptr())
    return PackedWeight(format, shape, qdata, scale.to(getattr(torch, format.scale_dtype)))


def _rows_offset(n: int) -> int:
    return (4 * n + 63) // 64 * 64


def _rows_bytes(format: WeightFormat, shape: tuple[int, int]) -> int:
    n, k = shape
    return _rows_offset(n) + n * k


def _pack_rows(weight: PackedWeight) -> Tensor:
    n, k = weight.shape
    start = _rows_offset(n)
    layout = torch.empty(_rows_bytes(weight.format, weight.shape), dtype=torch.uint8, device="cpu")
    layout[: 4 * n].view(torch.float32).copy_(weight.scale.view(-1))
    layout[4 * n : start].zero_()
    layout[start:].view(n, k).copy_(weight.qdata)
    return layout


def _unpack_rows(layout: Tensor, format: WeightFormat, shape: tuple[int, int]) -> PackedWeight:
    n, k = shape
    scale = layout[: 4 * n].view(torch.float32).view(n, 1).to(getattr(torch, format.scale_dtype), copy=True)
    return PackedWeight(format, shape, layout[_rows_offset(n) :].view(n, k).clone(), scale)


PANELS = Layout("panels16x4", _panels_bytes, _pack_panels, _unpack_panels)
ROWS = Layout("rows8", _rows_bytes, _pack_rows, _unpack_rows)


_FLOAT32 = torch.float32


def _linear(index: int) -> Callable[..., Tensor]:
    run = _C.linear

    def linear(
        x: Tensor,
        layout: Tensor,
        bias: Tensor | None,
        shape: tuple[int, int],
        problem: Any,
        activation: str | None,
    ) -> Tensor:
        n, k = shape
        size = x.shape
        if len(size) == 2:
            m = size[0]
            y = x.new_empty(m, n)
        else:
            m = math.prod(size[:-1])
            y = x.new_empty(*size[:-1], n)  # torch parses a tuple more slowly than it allocates
        if not x.is_contiguous():
            x = x.contiguous()
        if bias is not None and (bias.dtype is not _FLOAT32 or not bias.is_contiguous()):
            bias = bias.to(torch.float32).contiguous()
        code = DTYPE_CODES[x.dtype]
        run(
            index, x.data_ptr(), code, m, layout.data_ptr(), n, k, 0 if bias is None else bias.data_ptr(),
            y.data_ptr(), code, 0 if activation is None else ACTIVATION_CODES[activation], 0,
        )  # fmt: skip
        return y

    return linear


def linear_int32(kernel: KernelSpec, x: Tensor, layout: Tensor, shape: tuple[int, int]) -> Tensor:
    """The kernel's bare int32 sums of int8 codes: (M, K) -> (M, N)."""
    n, k = shape
    y = x.new_empty((x.shape[0], n), dtype=torch.int32)
    _C.linear(
        _INDEX[kernel.name], x.data_ptr(), DTYPE_CODES[x.dtype], x.shape[0], layout.data_ptr(), n, k, 0,
        y.data_ptr(), DTYPE_CODES[y.dtype], 0, 0,
    )  # fmt: skip
    return y


def _embedding(index: int) -> Callable[..., Tensor]:
    def embedding(
        ids: Tensor, layout: Tensor, shape: tuple[int, int], problem: Any, dtype: torch.dtype
    ) -> Tensor:
        n, k = shape
        wide = ids.to(torch.int64).contiguous()
        y = layout.new_empty((*ids.shape, k), dtype=dtype)
        bad = _C.embedding(
            index, wide.data_ptr(), wide.numel(), layout.data_ptr(), n, k, y.data_ptr(), DTYPE_CODES[dtype]
        )
        if bad >= 0:
            raise IndexError(f"embedding: index {int(wide.view(-1)[bad])} is out of range for {n} rows")
        return y

    return embedding


def _int8_per_channel(problem: Problem) -> bool:
    format = problem.format
    return format.encoding == "int" and format.bits == 8 and not format.group_size


# By (op, variant in kernels.inc): the layout, the activations served, what makes a function of an index.
_VARIANTS: dict[tuple[str, str], tuple[Layout, str, Callable[[int], Callable[..., Tensor]]]] = {
    ("linear", "int8"): (PANELS, "float", _linear),
    ("linear", "int8_a8"): (PANELS, "a8", _linear),
    ("embedding", "int8"): (ROWS, "float", _embedding),
}


def _spec(op: str, variant: str, isa: str, index: int) -> KernelSpec:
    layout, activation, make = _VARIANTS[op, variant]
    return KernelSpec(
        name=f"{op}_{variant}_{isa}",
        op=op,
        device="cpu",
        isa=isa,
        layout=layout,
        serves=lambda problem: _int8_per_channel(problem) and problem.input_spec.name == activation,
        run=make(index),
    )


_TABLE = _C.kernels()
_INDEX = {f"{op}_{variant}_{isa}": index for op, variant, isa, index, _ in _TABLE}
# Every kernel that this processor runs, whatever PYENGINE_ISA says: for tests and benchmarks.
SUPPORTED = tuple(
    _spec(op, variant, isa, index)
    for isa in reversed(ISAS)
    for op, variant, row_isa, index, supported in _TABLE
    if row_isa == isa and supported
)
KERNELS = tuple(kernel for kernel in SUPPORTED if kernel.isa in ALLOWED_ISAS)
