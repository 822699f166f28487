"""The generic backend: dequantize, then torch's own operator. Every dense format and device, not fast.
Products of float32 are what torch.set_float32_matmul_precision says: on a GPU anything below "highest"
rounds 16-bit codes.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import ActivationSpec, WeightFormat
from ..packed import DTYPES, PackedWeight
from ..registry import KernelSpec, Layout, Problem

ACTIVATIONS = {None: lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def _sections(
    format: WeightFormat, shape: tuple[int, int]
) -> dict[str, tuple[int, int, tuple[int, int], torch.dtype]]:
    """Name -> (first byte, end, shape, dtype) of each canonical tensor in the layout, 64-byte aligned."""
    n, k = shape
    parts: dict[str, tuple[tuple[int, int], torch.dtype]] = {
        "qdata": ((n, format.row_bytes(k)), torch.uint8),
        "scale": ((n, format.groups(k)), DTYPES[format.scale_dtype]),
    }
    if format.zero_dtype is not None:
        parts["zero"] = ((n, format.groups(k)), DTYPES[format.zero_dtype])
    sections, start = {}, 0
    for name, (size, dtype) in parts.items():
        end = start + size[0] * size[1] * dtype.itemsize
        sections[name] = (start, end, size, dtype)
        start = (end + 63) // 64 * 64
    return sections


def _nbytes(format: WeightFormat, shape: tuple[int, int]) -> int:
    return max(end for _, end, _, _ in _sections(format, shape).values())


def _pack(weight: PackedWeight) -> Tensor:
    sections = _sections(weight.format, weight.shape)
    layout = weight.qdata.new_empty(_nbytes(weight.format, weight.shape))
    written = 0
    for name, tensor in weight.tensors().items():
        start, end, size, dtype = sections[name]
        layout[written:start].zero_()
        layout[start:end].view(dtype).view(size).copy_(tensor)
        written = end
    return layout


def _views(layout: Tensor, format: WeightFormat, shape: tuple[int, int]) -> PackedWeight:
    views = {
        name: layout[start:end].view(dtype).view(size)
        for name, (start, end, size, dtype) in _sections(format, shape).items()
    }
    return PackedWeight.trusted(format, shape, views)


def _unpack(layout: Tensor, format: WeightFormat, shape: tuple[int, int]) -> PackedWeight:
    return PackedWeight(
        format, shape, **{name: t.clone() for name, t in _views(layout, format, shape).tensors().items()}
    )


CANONICAL = Layout("canonical", _nbytes, _pack, _unpack)


def quantize_rows(x: Tensor, spec: ActivationSpec) -> tuple[Tensor, Tensor]:
    """As reference.quantize_rows: (..., K) -> codes as float32 (..., K), scale (..., 1)."""
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    # Of two tensors: torch divides a number by a tensor in two roundings.
    largest = torch.full_like(amax, spec.largest)
    inverse = largest / amax
    usable = torch.isfinite(inverse) & torch.isfinite(amax)
    codes = torch.where(usable, x * inverse, 0.0).round_().clamp_(-spec.largest, spec.largest)
    scale = torch.where(usable, amax / largest, torch.where(torch.isfinite(amax), 0.0, float("nan")))
    return codes, scale


def _linear(
    problem: Problem,
    shape: tuple[int, int],
    x: Tensor,
    layout: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    weight = _views(layout, problem.format, shape).dequantize(torch.float32)
    # Sums are in float32, also where autocast would have them in less: it has cast x already.
    with torch.autocast(x.device.type, enabled=False):
        if problem.input_spec.mode == "float":
            y = F.linear(x.float(), weight)
        else:
            codes, scale = quantize_rows(x, problem.input_spec)
            y = F.linear(codes, weight) * scale
    if bias is not None:
        y = y + bias.float()
    out: Tensor = ACTIVATIONS[activation](y)
    return out.to(x.dtype)


def _embedding(
    problem: Problem, shape: tuple[int, int], ids: Tensor, layout: Tensor, dtype: torch.dtype
) -> Tensor:
    weight = _views(layout, problem.format, shape)
    flat = ids.reshape(-1).long()
    if flat.numel() and flat.device.type != "meta" and not 0 <= int(flat.min()) <= int(flat.max()) < shape[0]:
        raise IndexError(f"embedding: indices {int(flat.min())} to {int(flat.max())} for {shape[0]} rows")
    picked = {name: tensor[flat] for name, tensor in weight.tensors().items()}
    rows = PackedWeight.trusted(problem.format, (flat.numel(), shape[1]), picked)
    return rows.dequantize(dtype).view(*ids.shape, shape[1])


def _serves(problem: Problem) -> bool:
    return problem.input_spec.mode in ("float", "dynamic")


KERNELS = tuple(
    KernelSpec(f"{op}_torch", op, "any", "torch", CANONICAL, _serves, partial(partial, run), fallback=True)
    for op, run in (("linear", _linear), ("embedding", _embedding))
)
