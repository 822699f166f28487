"""PackedWeight: the canonical bytes of a weight, checked when it is built, and the rounding behind them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import memory
from .formats import FormatError, WeightFormat

DTYPES = {"float16": torch.float16, "float32": torch.float32, "uint8": torch.uint8}

# Codes are handled in blocks of rows of about this many, so that temporaries stay small beside the weight.
_BLOCK = 1 << 18


def row_blocks(n: int, k: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(k, 1))
    return (slice(row, min(row + step, n)) for row in range(0, n, step))


def _bit_shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8 * bits, bits, device=device)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(N, K) uint8 codes -> (N, ceil(K * bits / 8)) uint8, a little-endian bitstream per row.

    Eight codes fill `bits` bytes: they are put together in one 64-bit word, of which the low bytes are kept.
    """
    n, k = codes.shape
    if bits == 8 or not k:
        return codes.contiguous()
    width = (k * bits + 7) // 8
    packed = torch.empty(n, width, dtype=torch.uint8, device=codes.device)
    shifts = _bit_shifts(bits, codes.device)
    for rows in row_blocks(n, k):
        octets = torch.nn.functional.pad(codes[rows], (0, -k % 8)).view(-1, -(-k // 8), 8)
        words = (octets.long() << shifts).sum(-1).view(torch.uint8).view(octets.shape[0], -1, 8)
        packed[rows] = words[..., :bits].reshape(octets.shape[0], -1)[:, :width]
    return packed


def unpack_codes(qdata: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of pack_codes: (N, ceil(k * bits / 8)) uint8 -> (N, k) uint8."""
    n = qdata.shape[0]
    if bits == 8 or not k:
        return qdata
    codes = torch.empty(n, k, dtype=torch.uint8, device=qdata.device)
    shifts = _bit_shifts(bits, qdata.device)
    octets = -(-k // 8)
    for rows in row_blocks(n, k):
        block = torch.nn.functional.pad(qdata[rows], (0, octets * bits - qdata.shape[1])).view(
            -1, octets, bits
        )
        words = torch.nn.functional.pad(block, (0, 8 - bits)).contiguous().view(torch.int64)
        codes[rows] = ((words >> shifts) & (2**bits - 1)).to(torch.uint8).view(-1, octets * 8)[:, :k]
    return codes


def _spread(per_group: Tensor, format: WeightFormat, k: int) -> Tensor:
    if not format.group_size:
        return per_group
    return per_group.repeat_interleave(min(format.group_size, max(k, 1)), 1)[:, :k]


def _within(tensor: Tensor, low: float, high: float) -> bool:
    """Whether all elements lie in [low, high]; a NaN does not. Without temporaries of the tensor's size."""
    smallest, largest = torch.aminmax(tensor)
    return bool(low <= smallest) and bool(largest <= high)


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are, without temporaries of the tensor's size."""
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized (N, K) weight in the bytes of the file.

    qdata: uint8 (N, ceil(K * bits / 8)), see reference.pack_codes. scale: (N, groups) in the format's dtype,
    finite, >= 0. zero: (N, groups), uint8 in the domain of the codes or float32; None unless the encoding is
    uint. Raises FormatError if the tensors do not fit each other, and NotImplementedError for formats without
    code.
    """

    format: WeightFormat
    shape: tuple[int, int]
    qdata: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def __post_init__(self) -> None:
        self.format.require_dense()
        n, k = self.shape
        if n < 0 or k < 0:
            raise FormatError(f"weight of shape {self.shape}")
        groups = self.format.groups(k)
        self._check("qdata", self.qdata, torch.uint8, (n, self.format.row_bytes(k)))
        self._check("scale", self.scale, DTYPES[self.format.scale_dtype], (n, groups))
        if self.scale.numel() and not _within(self.scale, 0, torch.finfo(self.scale.dtype).max):
            raise FormatError("scale has values that are negative or not finite")
        if (self.zero is None) != (self.format.zero_dtype is None):
            raise FormatError(
                f"zero points are {'missing' if self.zero is None else 'not part of'} {self.format.name}"
            )
        if self.zero is not None and self.format.zero_dtype is not None:
            self._check("zero", self.zero, DTYPES[self.format.zero_dtype], (n, groups))
            top = 2**self.format.bits - 1
            if self.zero.dtype == torch.uint8 and bool((self.zero > top).any()):
                raise FormatError(f"zero points lie above the largest code, {top}")
            if not bool(torch.isfinite(self.zero).all()):
                raise FormatError("zero points are not finite")
        spare = -k * self.format.bits % 8
        if spare and n and bool((self.qdata[:, -1] >> (8 - spare)).any()):
            raise FormatError("the padding bits at the end of the rows of qdata are not 0")
        if self.format.encoding == "ternary" and bool((self.codes() > 2).any()):
            raise FormatError("ternary codes lie above 2")

    def _check(self, what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        if tensor.dtype != dtype:
            raise FormatError(f"{what} is {tensor.dtype}, format {self.format.name} has {dtype}")
        if tuple(tensor.shape) != shape:
            raise FormatError(
                f"{what} has shape {tuple(tensor.shape)}, {self.format.name} {self.shape} has {shape}"
            )
        if not tensor.is_contiguous():
            raise FormatError(f"{what} is not contiguous")

    @classmethod
    def trusted(
        cls, format: WeightFormat, shape: tuple[int, int], tensors: dict[str, Tensor]
    ) -> PackedWeight:
        """Of tensors that come from a weight that was checked, without checking them again."""
        weight = object.__new__(cls)
        for name, value in {"format": format, "shape": shape, "zero": None, **tensors}.items():
            object.__setattr__(weight, name, value)
        return weight

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeight, (self.format, self.shape, self.qdata, self.scale, self.zero)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names they have in a state_dict and in the file."""
        named = {"qdata": self.qdata, "scale": self.scale}
        return named if self.zero is None else {**named, "zero": self.zero}

    def to(self, device: torch.device) -> PackedWeight:
        if device == self.qdata.device:
            return self
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return PackedWeight.trusted(self.format, self.shape, moved)

    def codes(self) -> Tensor:
        """(N, K) uint8."""
        return unpack_codes(self.qdata, self.format.bits, self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale * f(code): (N, K). Computed in float32 and rounded once to dtype."""
        n, k = self.shape
        codes = self.codes()
        weight = torch.empty(n, k, dtype=dtype, device=codes.device)
        for rows in row_blocks(n, k):
            q = codes[rows].float()
            if self.format.encoding == "int":
                q -= 2 ** (self.format.bits - 1)
            elif self.format.encoding == "binary":
                q = 2 * q - 1
            elif self.format.encoding == "ternary":
                q -= 1
            else:
                assert self.zero is not None
                q -= _spread(self.zero[rows].float(), self.format, k)
            weight[rows] = (q * _spread(self.scale[rows].float(), self.format, k)).to(dtype)
        return weight

    @classmethod
    def quantize(cls, weight: Tensor, format: WeightFormat) -> PackedWeight:
        """Round a float (N, K) weight to nearest: to the bit what reference.quantize_weight states.

        Raises ValueError if the weight is not finite or has no values.
        """
        if format.zero_dtype == "float32":
            raise NotImplementedError(f"format {format.name}: no rounding quantizer")
        cls.require_roundable(weight, format)
        n, k = weight.shape
        scale = torch.empty(n, format.groups(k), device=weight.device)
        for rows in row_blocks(n, k):
            scale[rows] = _scales(weight[rows].detach().float(), format)
        zero = None
        if format.encoding == "uint":
            zero = torch.empty_like(scale)
            stored = stored_scale(scale, format).float()
            for rows in row_blocks(n, k):
                low, _ = extremes(grouped(weight[rows].detach().float(), format))
                zero[rows] = torch.where(stored[rows] > 0, -low / stored[rows], 0.0).round_()
        return cls.encode(weight, format, scale, zero)

    @classmethod
    def encode(
        cls, weight: Tensor, format: WeightFormat, scale: Tensor, zero: Tensor | None = None
    ) -> PackedWeight:
        """The nearest codes of a float (N, K) weight for given parameters (N, groups), float32: scales, and
        for uint formats zero points, whole or not as the format's are. A scale of 0 makes a group of zeros.
        Scales that float16 would lose make the whole tensor float32.
        """
        n, k = weight.shape
        stored = stored_scale(scale, format)
        format = replace(format, scale_dtype="float32" if stored.dtype == torch.float32 else "float16")
        codes = memory.zeros(n, k, dtype=torch.uint8, device=weight.device)
        top = 2**format.bits - 1
        if zero is not None and format.zero_dtype == "uint8":
            zero = zero.clamp(0, top)
        # int8 stays within [-127, 127].
        low = int(zero is None and format.bits == 8)
        for rows in row_blocks(n, k):
            step = _spread(stored[rows].float(), format, k)
            q = torch.where(step > 0, weight[rows].detach().float() / step, 0.0)
            if format.zero_dtype != "float32":
                q.round_()  # before whole numbers are added: halves round to even values, not to even codes
            q += 2 ** (format.bits - 1) if zero is None else _spread(zero[rows], format, k)
            codes[rows] = q.round_().clamp_(low, top).to(torch.uint8)
        kept = None if zero is None else zero.to(DTYPES[format.zero_dtype or "uint8"])
        return cls(format, (n, k), pack_codes(codes, format.bits), stored, kept)

    @staticmethod
    def require_roundable(weight: Tensor, format: WeightFormat) -> None:
        """Raises what is wrong with rounding this weight to that format."""
        format.require_dense()
        if weight.dim() != 2:
            raise ValueError(f"weight has {weight.dim()} dimensions, not 2")
        if not weight.is_floating_point():
            raise TypeError(f"weight is {weight.dtype}, not a float type")
        if format.encoding not in ("int", "uint"):
            raise NotImplementedError(f"format {format.name}: no rounding quantizer")
        if weight.is_meta:
            raise ValueError("weight is on the meta device: it has no values to quantize")
        if not is_finite(weight.detach()):
            raise ValueError("weight has values that are not finite")


def as_matrix(weight: Tensor) -> Tensor:
    """The (N, K) matrix of a layer's weight: itself, or of a convolution (N, channels, *taps) the matrix with
    K = taps * channels, the channel fastest; channels are those of one group of the convolution.
    """
    return weight if weight.dim() <= 2 else weight.movedim(1, -1).flatten(1)


def extremes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest weight of each group (..., group size), and 0."""
    return groups.amin(-1).clamp(max=0.0), groups.amax(-1).clamp(min=0.0)


def grouped(w: Tensor, format: WeightFormat) -> Tensor:
    """(N, K) -> (N, groups, group size), padded with zeros; a group is at most as long as a row."""
    n, k = w.shape
    size = max(min(format.group_size or k, k), 1)
    return torch.nn.functional.pad(w, (0, format.groups(k) * size - k)).view(n, -1, size)


def _scales(w: Tensor, format: WeightFormat) -> Tensor:
    """float32 (N, groups), before they are stored."""
    if format.encoding == "int":
        scale = grouped(w.abs(), format).amax(2) / (2 ** (format.bits - 1) - 1)
    else:
        (low, high), top = extremes(grouped(w, format)), 2**format.bits - 1
        scale = high / top - low / top
    return torch.where(torch.isfinite(1.0 / scale), scale, 0.0)


def stored_scale(scale: Tensor, format: WeightFormat) -> Tensor:
    """In the format's dtype, or all in float32 if float16 would overflow or become denormal."""
    if format.scale_dtype == "float32":
        return scale
    half = scale.to(torch.float16)
    lost = ~torch.isfinite(half) | ((scale > 0) & (half < 2.0**-14))
    return scale if bool(lost.any()) else half
