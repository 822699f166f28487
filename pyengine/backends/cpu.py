"""The C++ kernels of csrc/, their layouts, and which of them this processor runs."""

from __future__ import annotations

import ctypes
import glob
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..formats import A8, A16, WeightFormat
from ..packed import DTYPES, PackedWeight
from ..registry import KernelSpec, Layout, Problem
from .torch import CANONICAL

logger = logging.getLogger("pyengine")

# In rising order of preference.
ISAS = ("portable", "avx2", "avxvnni", "avx512vnni", "amx", "neondot", "i8mm")

# As numbered in csrc/dtypes.h.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.int16)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
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
_C.set_tensor_api(torch.Tensor.__dlpack_c_exchange_api__)


def _int8_layout(
    name: str, nbytes: Callable[..., int], pack: Callable[..., None], unpack: Callable[..., None]
) -> Layout:
    """A layout of int8 weights with one float32 scale per row, from functions of csrc."""

    def pack_weight(weight: PackedWeight) -> Tensor:
        qdata, scale = weight.qdata, weight.scale.float()
        layout = torch.empty(nbytes(*weight.shape), dtype=torch.uint8, device="cpu")
        pack(qdata.data_ptr(), scale.data_ptr(), *weight.shape, layout.data_ptr())
        return layout

    def unpack_weight(layout: Tensor, format: WeightFormat, shape: tuple[int, int]) -> PackedWeight:
        n, k = shape
        qdata = layout.new_empty(n, k)
        scale = layout.new_empty(n, 1, dtype=torch.float32)
        unpack(layout.data_ptr(), n, k, qdata.data_ptr(), scale.data_ptr())
        return PackedWeight(format, shape, qdata, scale.to(getattr(torch, format.scale_dtype)))

    return Layout(name, lambda format, shape: nbytes(*shape), pack_weight, unpack_weight)


def _zero_point(format: WeightFormat) -> int:
    """The code that means 0, or what dtypes.h says of zero points per group. A binary code counts double."""
    if format.zero_dtype is not None:
        return -1 if format.zero_dtype == "uint8" else -2
    return 1 << (format.bits - 1) if format.encoding == "int" else 1


def _group(format: WeightFormat, k: int) -> int:
    return format.group_size or max(k, 1)


def _nibble_offsets(format: WeightFormat, shape: tuple[int, int]) -> tuple[int, int, int]:
    """Where the zero points begin, where the codes begin, and the size."""
    zero_size = 0 if format.zero_dtype is None else DTYPES[format.zero_dtype].itemsize
    scale_size = DTYPES[format.scale_dtype].itemsize
    return _C.nibbles_offsets(*shape, _group(format, shape[1]), scale_size, zero_size)


def _nibbles_bytes(format: WeightFormat, shape: tuple[int, int]) -> int:
    return _nibble_offsets(format, shape)[2]


def _to_panels(per_group: Tensor) -> Tensor:
    """(N, groups) -> (N / 16, groups, 16), padded with zeros."""
    n, groups = per_group.shape
    return torch.nn.functional.pad(per_group, (0, 0, 0, -n % 16)).view(-1, 16, groups).transpose(1, 2)


def _from_panels(part: Tensor, dtype: torch.dtype, n: int, groups: int) -> Tensor:
    panels = part[: -(-n // 16) * 16 * groups * dtype.itemsize].view(dtype).view(-1, groups, 16)
    per_group = part.new_empty(n, groups, dtype=dtype)
    return per_group.copy_(panels.transpose(1, 2).reshape(-1, groups)[:n])


def _doubled(format: WeightFormat) -> int:
    """How far a code is shifted: binary codes 0 and 1 mean -1 and 1, which is 0 and 2 with zero point 1."""
    return int(format.encoding == "binary")


def _pack_nibbles(weight: PackedWeight) -> Tensor:
    format, (n, k) = weight.format, weight.shape
    zero_at, codes_at, size = _nibble_offsets(format, weight.shape)
    layout = torch.empty(size, dtype=torch.uint8, device="cpu")
    layout[:codes_at].zero_()
    for begin, per_group in ((0, weight.scale), (zero_at, weight.zero)):
        if per_group is not None:
            part = _to_panels(per_group)
            end = begin + part.numel() * part.element_size()
            layout[begin:end].view(part.dtype).view(part.shape).copy_(part)
    codes = layout.data_ptr() + codes_at
    _C.pack_nibbles(weight.qdata.data_ptr(), n, k, format.bits, _doubled(format), codes)
    return layout


def _unpack_nibbles(layout: Tensor, format: WeightFormat, shape: tuple[int, int]) -> PackedWeight:
    (n, k), groups = shape, format.groups(shape[1])
    zero_at, codes_at, _ = _nibble_offsets(format, shape)
    qdata = layout.new_empty(n, format.row_bytes(k))
    codes = layout.data_ptr() + codes_at
    _C.unpack_nibbles(codes, n, k, format.bits, _doubled(format), qdata.data_ptr())
    scale = _from_panels(layout, DTYPES[format.scale_dtype], n, groups)
    zero = None
    if format.zero_dtype is not None:
        zero = _from_panels(layout[zero_at:], DTYPES[format.zero_dtype], n, groups)
    return PackedWeight(format, shape, qdata, scale, zero)


NIBBLES = Layout("nibbles16x8", _nibbles_bytes, _pack_nibbles, _unpack_nibbles)
PANELS = _int8_layout("panels16x4", _C.panels_bytes, _C.pack_panels, _C.unpack_panels)
OCTETS = _int8_layout("panels16x8", _C.octets_bytes, _C.pack_octets, _C.unpack_octets)


def format_arguments(format: WeightFormat) -> tuple[int, int, int]:
    """The group size (0: the whole row), type of the scales and zero point of a call."""
    return format.group_size, DTYPE_CODES[DTYPES[format.scale_dtype]], _zero_point(format)


def _linear(index: int, layout: Layout, problem: Problem, shape: tuple[int, int]) -> Callable[..., Any]:
    group_size, scale_type, zero = format_arguments(problem.format)
    nbytes = layout.nbytes(problem.format, shape)
    call = _C.bind_linear(index, *shape, group_size or shape[1] or 1, scale_type, zero, nbytes)

    def linear(x: Tensor, layout: Tensor, bias: Tensor | None, activation: str | None) -> Tensor | None:
        code = 0 if activation is None else ACTIVATION_CODES.get(activation, -1)
        y = call(x, layout, bias, code)
        if y is None:  # perhaps only for the order of x in memory, or the type of the bias
            y = call(x.contiguous(), layout, None if bias is None else bias.float().contiguous(), code)
        return y

    return linear


def linear_into(
    y: Tensor, kernel: KernelSpec, format: WeightFormat, x: Tensor, layout: Tensor, shape: tuple[int, int]
) -> Tensor:
    """The kernel as it is, on contiguous tensors of any pair of types that it takes: x (M, K) -> y (M, N)."""
    (n, k), (group_size, scale_type, zero) = shape, format_arguments(format)
    _C.linear(
        _INDEX[kernel.name], x.data_ptr(), DTYPE_CODES[x.dtype], x.shape[0], layout.data_ptr(), n, k, 0,
        y.data_ptr(), DTYPE_CODES[y.dtype], 0, group_size or k or 1, scale_type, zero, 0,
    )  # fmt: skip
    return y


def _embedding(index: int, layout: Layout, problem: Problem, shape: tuple[int, int]) -> Callable[..., Any]:
    (n, k), (group_size, scale_type, zero) = shape, format_arguments(problem.format)
    bits, factor = problem.format.bits, 1 + _doubled(problem.format)

    def embedding(ids: Tensor, layout: Tensor, dtype: torch.dtype) -> Tensor:
        wide = ids.to(torch.int64).contiguous()
        y = layout.new_empty((*ids.shape, k), dtype=dtype)
        bad = _C.embedding(
            index, wide.data_ptr(), wide.numel(), layout.data_ptr(), n, k, y.data_ptr(), DTYPE_CODES[dtype],
            bits, group_size or k or 1, scale_type, zero, factor,
        )  # fmt: skip
        if bad >= 0:
            raise IndexError(f"embedding: index {int(wide.view(-1)[bad])} is out of range for {n} rows")
        return y

    return embedding


def int8_per_channel(format: WeightFormat) -> bool:
    return format.encoding == "int" and format.bits == 8 and not format.group_size


def _nibbles_fit(format: WeightFormat, largest: int = A8.largest) -> bool:
    """Up to 4 bits, and eight codes at a time lie in one group. Of zero points that are not whole: a sum of
    products with codes up to `largest` is exact in float32.
    """
    sums = format.group_size * (2**format.bits - 1) * largest
    exact = format.zero_dtype != "float32" or 0 < sums <= 2**24
    return format.bits <= 4 and format.group_size % 8 == 0 and exact


def _rows_fit(format: WeightFormat) -> bool:
    return format.zero_dtype != "float32" and format.group_size % 8 == 0


def _rows_of_4_bits(format: WeightFormat) -> bool:
    return format.bits <= 4 and _rows_fit(format)


def _rows_of_8_bits(format: WeightFormat) -> bool:
    return format.bits == 8 and _rows_fit(format)


# By (op, variant in kernels.inc): the layout, the formats and the activations served, and what makes a
# function of an index, a layout, a problem and a shape.
_VARIANTS: dict[tuple[str, str], tuple[Layout, Callable[[WeightFormat], bool], str, Callable[..., Any]]] = {
    ("linear", "int8"): (PANELS, int8_per_channel, "float", _linear),
    ("linear", "int8_a8"): (PANELS, int8_per_channel, "a8", _linear),
    ("linear", "int8_a16"): (PANELS, int8_per_channel, "a16", _linear),
    ("linear", "int4"): (NIBBLES, _nibbles_fit, "float", _linear),
    ("linear", "int4_a8"): (NIBBLES, _nibbles_fit, "a8", _linear),
    ("linear", "int4_a16"): (NIBBLES, partial(_nibbles_fit, largest=A16.largest), "a16", _linear),
    ("embedding", "int8"): (CANONICAL, _rows_of_8_bits, "float", _embedding),
    ("embedding", "int4"): (CANONICAL, _rows_of_4_bits, "float", _embedding),
}
# The kernels that want a layout of their own.
_LAYOUTS = {("linear", "int8_a8", "i8mm"): OCTETS}


def _spec(op: str, variant: str, isa: str, index: int) -> KernelSpec:
    layout, fits, activation, run = _VARIANTS[op, variant]
    layout = _LAYOUTS.get((op, variant, isa), layout)
    return KernelSpec(
        name=f"{op}_{variant}_{isa}",
        op=op,
        device="cpu",
        isa=isa,
        layout=layout,
        serves=lambda problem: fits(problem.format) and problem.input_spec.name == activation,
        bind=partial(run, index, layout),
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
