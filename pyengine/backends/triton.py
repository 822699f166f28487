"""The Triton kernels of kernels/ and their layouts. Triton is imported when a GPU's first layer is built."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats import A8, WeightFormat
from ..packed import DTYPES, PackedWeight, pack_codes
from ..registry import KernelSpec, Layout, Problem
from .cpu import int8_per_channel

# What a layout is padded to: 16 rows, and 128 codes along K.
ROWS, TILE, PLANE = 16, 128, 32
# Whether torch's GPUs are AMD's.
AMD = torch.version.hip is not None
# Of NVIDIA's, the first with instructions for bfloat16 and asynchronous copies.
OLDEST = (8, 0)
# Codes along K whose products an int32 surely holds.
SPAN = A8.span


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _padded(shape: tuple[int, int]) -> tuple[int, int]:
    return _up(shape[0], ROWS), _up(shape[1], TILE)


# ---- rows16x128: int8 as it is -------------------------------------------------------------------


def _rows_bytes(format: WeightFormat, shape: tuple[int, int]) -> int:
    n, k = _padded(shape)
    return n * k + 4 * n


def _rows_views(layout: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Codes (N, K) int8 and scale (N) float32, padded."""
    n, k = _padded(shape)
    return layout[: n * k].view(torch.int8).view(n, k), layout[n * k :].view(torch.float32)


def _pack_rows(weight: PackedWeight) -> Tensor:
    (n, k), (padded_n, padded_k) = weight.shape, _padded(weight.shape)
    layout = weight.qdata.new_empty(_rows_bytes(weight.format, weight.shape))
    codes, scale = _rows_views(layout, weight.shape)
    codes.copy_(pad((weight.qdata ^ 128).view(torch.int8), (0, padded_k - k, 0, padded_n - n)))
    scale.copy_(pad(weight.scale[:, 0], (0, padded_n - n)))
    return layout


def _unpack_rows(layout: Tensor, format: WeightFormat, shape: tuple[int, int]) -> PackedWeight:
    n, k = shape
    codes, scale = _rows_views(layout, shape)
    qdata = codes[:n, :k].contiguous().view(torch.uint8) ^ 128
    return PackedWeight(format, shape, qdata, scale[:n, None].to(DTYPES[format.scale_dtype]))


# ---- planes16x128: up to 4 bits ------------------------------------------------------------------


def _groups(format: WeightFormat, k: int) -> int:
    """Scales of a row of whole tiles: a kernel reads those of the padding too."""
    return max(1, -(-_up(k, TILE) // format.group_size)) if format.group_size else 1


def _offset(format: WeightFormat) -> int:
    """What is added to the codes of a symmetric format so that 8 means 0."""
    return {"int": 8 - (1 << (format.bits - 1)), "binary": 7, "ternary": 7, "uint": 0}[format.encoding]


def _planes_sections(format: WeightFormat, shape: tuple[int, int]) -> tuple[int, int, int]:
    """Where the scales begin, where the zero points begin, and the size."""
    n, k = _padded(shape)
    scales = n * k // 2
    zeros = scales + n * _groups(format, shape[1]) * DTYPES[format.scale_dtype].itemsize
    return scales, zeros, zeros + (2 * n * _groups(format, shape[1]) if format.zero_dtype else 0)


def _planes_bytes(format: WeightFormat, shape: tuple[int, int]) -> int:
    return _planes_sections(format, shape)[2]


def _planes_views(
    layout: Tensor, format: WeightFormat, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Words int16 (N/16, K/128, 16, 32): nibble j of word i in tile t is code 128 t + 32 j + i. Scale
    (groups, N), and zero points less 8 (groups, N) float16.
    """
    (n, k), groups = _padded(shape), _groups(format, shape[1])
    scales, zeros, _ = _planes_sections(format, shape)
    words = layout[:scales].view(torch.int16).view(n // ROWS, k // TILE, ROWS, PLANE)
    scale = layout[scales:zeros].view(DTYPES[format.scale_dtype]).view(groups, n)
    zero = layout[zeros:].view(torch.float16).view(groups, n) if format.zero_dtype else None
    return words, scale, zero


def _pack_planes(weight: PackedWeight) -> Tensor:
    format, (n, k), (padded_n, padded_k) = weight.format, weight.shape, _padded(weight.shape)
    codes = weight.codes()
    codes = codes * 2 + 7 if format.encoding == "binary" else codes + _offset(format)
    codes = pad(codes, (0, padded_k - k, 0, padded_n - n), value=8)
    planes = codes.view(padded_n // ROWS, ROWS, padded_k // TILE, 4, PLANE).transpose(1, 2)
    low, high = planes[..., 0, :] | planes[..., 1, :] << 4, planes[..., 2, :] | planes[..., 3, :] << 4
    layout = weight.qdata.new_empty(_planes_bytes(format, weight.shape))
    words, scale, zero = _planes_views(layout, format, weight.shape)
    words.view(torch.uint8).view(*words.shape, 2).copy_(torch.stack((low, high), -1))
    more = 0, padded_n - n, 0, _groups(format, k) - format.groups(k)
    scale.copy_(pad(weight.scale.t(), more))
    if zero is not None and weight.zero is not None:
        zero.copy_(pad(weight.zero.t().to(torch.float16) - 8, more))
    return layout


def _unpack_planes(layout: Tensor, format: WeightFormat, shape: tuple[int, int]) -> PackedWeight:
    (n, k), (padded_n, padded_k) = shape, _padded(shape)
    words, scale, zero = _planes_views(layout, format, shape)
    pairs = words.view(torch.uint8).view(*words.shape, 2)
    planes = torch.stack((pairs & 15, pairs >> 4), -1)  # (..., 32, 2 bytes, 2 nibbles)
    codes = planes.permute(0, 2, 1, 4, 5, 3).reshape(padded_n, padded_k)[:n, :k]
    codes = (codes - 7) // 2 if format.encoding == "binary" else codes - _offset(format)
    groups = format.groups(k)
    return PackedWeight(
        format,
        shape,
        pack_codes(codes.contiguous(), format.bits),
        scale[:groups, :n].t().contiguous(),
        None if zero is None else (zero[:groups, :n].t() + 8).to(torch.uint8).contiguous(),
    )


ROWS_LAYOUT = Layout("rows16x128", _rows_bytes, _pack_rows, _unpack_rows)
PLANES_LAYOUT = Layout("planes16x128", _planes_bytes, _pack_planes, _unpack_planes)


# ---- launching -----------------------------------------------------------------------------------


@functools.cache
def available() -> bool:
    """Whether Triton is installed, and every GPU here, if there is one, is one that it compiles for."""
    if importlib.util.find_spec("triton") is None:
        return False
    count = 0 if AMD else torch.cuda.device_count()
    return all(torch.cuda.get_device_capability(i) >= OLDEST for i in range(count))


@functools.cache
def _modules() -> tuple[Any, Any]:
    from pyengine.kernels import linear, tuning

    return linear, tuning


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def quantize_rows(x: Tensor, padded_k: int) -> tuple[Tensor, Tensor]:
    """As reference.quantize_rows: (M, K) -> int8 codes (M, padded_k), zero from K on; float32 scale (M)."""
    m, k = x.shape
    codes, scale = x.new_empty(m, padded_k, dtype=torch.int8), x.new_empty(m, dtype=torch.float32)
    _modules()[0].quantize_rows[(m,)](
        x, codes, scale, k, padded_k, BLOCK=1024, num_warps=4, enable_fp_fusion=False
    )
    return codes, scale


def _w8a8(
    problem: Problem, x: Tensor, layout: Tensor, bias: Tensor | None, y: Tensor, shape: tuple[int, int],
    activation: str | None,
) -> None:  # fmt: skip
    codes, scale = quantize_rows(x, _padded(shape)[1])
    _launch_w8a8(codes, scale, layout, bias, y, shape, activation)


def _launch_w8a8(
    codes: Tensor, scale: Tensor, layout: Tensor, bias: Tensor | None, y: Tensor, shape: tuple[int, int],
    activation: str | None,
) -> None:  # fmt: skip
    kernels, tuning = _modules()
    (m, padded_k), n = codes.shape, shape[0]
    weight, scale_w = _rows_views(layout, shape)
    blocks = tuning.blocks(tuning.W8A8, m, amd=AMD)
    kernels.linear_w8a8[_grid(m, n, blocks)](
        codes, scale, weight, scale_w, bias, y, m, n, padded_k,
        SPAN=SPAN, LONG=padded_k > SPAN, ACTIVATION=activation, HAS_BIAS=bias is not None, **blocks,
    )  # fmt: skip


def _w4a16(
    problem: Problem, x: Tensor, layout: Tensor, bias: Tensor | None, y: Tensor, shape: tuple[int, int],
    activation: str | None,
) -> None:  # fmt: skip
    kernels, tuning = _modules()
    (m, k), n, format = x.shape, shape[0], problem.format
    words, scale, zero = _planes_views(layout, format, shape)
    table = tuning.W4A32 if x.dtype == torch.float32 else tuning.W4A16
    blocks = tuning.blocks(table, m, amd=AMD)
    kernels.linear_w4a16[_grid(m, n, blocks)](
        x, words, scale, zero, bias, y, m, n, k, words.shape[1],
        GROUP=format.group_size, SLICES=min(format.group_size or TILE, TILE) // PLANE,
        HAS_ZERO=zero is not None, ACTIVATION=activation, HAS_BIAS=bias is not None,
        WHOLE=k % TILE == 0, PTX=x.is_cuda and not AMD, **blocks,
    )  # fmt: skip


def _grid(m: int, n: int, blocks: dict[str, int]) -> tuple[int, int]:
    """Rows come first: only that axis may be longer than 65,535."""
    return -(-m // blocks["BM"]), -(-n // blocks["BN"])


def _bind(launch: Callable[..., None], problem: Problem, shape: tuple[int, int]) -> Callable[..., Tensor]:
    def linear(x: Tensor, layout: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        y = x.new_empty(*x.shape[:-1], shape[0])
        m = math.prod(x.shape[:-1])
        if bias is not None:
            bias = bias.to(torch.float32).contiguous()
        if y.numel():
            with _on(x):
                flat = x.reshape(m, shape[1]).contiguous()
                launch(problem, flat, layout, bias, y.view(m, shape[0]), shape, activation)
        return y

    return linear


def linear_into(
    y: Tensor, kernel: KernelSpec, format: WeightFormat, x: Tensor, layout: Tensor, shape: tuple[int, int]
) -> Tensor:
    """The bare sums of int8 codes x (M, K), into y (M, N) of int32."""
    with _on(x):
        codes = pad(x, (0, _padded(shape)[1] - shape[1]))
        _launch_w8a8(codes, layout.new_empty(0, dtype=torch.float32), layout, None, y, shape, None)
    return y


def _planes_fit(format: WeightFormat) -> bool:
    """Up to 4 bits, whole zero points, and groups that are whole slices of a tile, or whole tiles."""
    whole = format.group_size in (32, 64) or format.group_size % TILE == 0
    return format.bits <= 4 and format.zero_dtype != "float32" and whole


def _spec(
    name: str,
    layout: Layout,
    fits: Callable[[WeightFormat], bool],
    input_spec: str,
    launch: Callable[..., None],
) -> KernelSpec:
    return KernelSpec(
        name=name,
        op="linear",
        device="cuda",
        isa="triton",
        layout=layout,
        serves=lambda problem: available() and fits(problem.format) and problem.input_spec.name == input_spec,
        bind=partial(_bind, launch),
    )


KERNELS = (
    _spec("linear_int8_a8_triton", ROWS_LAYOUT, int8_per_channel, "a8", _w8a8),
    _spec("linear_int4_triton", PLANES_LAYOUT, _planes_fit, "float", _w4a16),
)
