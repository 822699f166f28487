"""The executable spec, in NumPy: what stored bytes mean and what kernels compute. Its functions serve tests
only.

A weight is a matrix of N rows (output channels) and K columns. For a convolution,
K = taps * (in_channels / groups) with the channel running fastest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .formats import A8, FLOAT, ActivationSpec, WeightFormat

Array = NDArray[Any]


def pack_codes(codes: Array, bits: int) -> Array:
    """(N, K) codes in [0, 2**bits) -> (N, ceil(K * bits / 8)) uint8.

    Row n is a little-endian bitstream: code k takes bits [k * bits, (k + 1) * bits), bit 0 is the lowest bit
    of byte 0. The row is padded to a byte with zero bits.
    """
    spread = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    streams = spread.reshape(len(codes), codes.shape[1] * bits)
    return np.asarray(np.packbits(streams, axis=-1, bitorder="little"))


def unpack_codes(qdata: Array, bits: int, k: int) -> Array:
    """Inverse of pack_codes: (N, ceil(k * bits / 8)) uint8 -> (N, k) uint8."""
    stream = np.unpackbits(qdata, axis=-1, bitorder="little")[:, : k * bits]
    return np.asarray(np.packbits(stream.reshape(len(qdata), k, bits), axis=-1, bitorder="little")[..., 0])


def spread_groups(per_group: Array, format: WeightFormat, k: int) -> Array:
    """(N, groups) -> (N, k): the value that applies to each code."""
    return np.asarray(np.repeat(per_group, format.group_size or max(k, 1), axis=1)[:, :k])


def code_values(codes: Array, zero: Array | None, format: WeightFormat) -> Array:
    """Codes (N, K) before the scale: int64 where zero points are whole, else float64."""
    format.require_dense()
    q = codes.astype(np.int64)
    if format.encoding == "int":
        return np.asarray(q - 2 ** (format.bits - 1))
    if format.encoding == "binary":
        return 2 * q - 1
    if format.encoding == "ternary":
        return q - 1
    assert zero is not None
    wide = zero.astype(np.int64 if format.zero_dtype == "uint8" else np.float64)
    return np.asarray(q - spread_groups(wide, format, q.shape[1]))


def dequantize(codes: Array, scale: Array, zero: Array | None, format: WeightFormat) -> Array:
    """scale * f(code), in float32 with one rounding: (N, K)."""
    values = code_values(codes, zero, format).astype(np.float64)
    return (spread_groups(scale.astype(np.float64), format, codes.shape[1]) * values).astype(np.float32)


def _grouped(w: Array, format: WeightFormat, fill: float) -> Array:
    """(N, K) -> (N, groups, group size), padded with `fill`."""
    n, k = w.shape
    size = format.group_size or max(k, 1)
    groups = format.groups(k)
    padded = np.full((n, groups * size), fill, dtype=w.dtype)
    padded[:, :k] = w
    return padded.reshape(n, groups, size)


def quantize_weight(w: Array, format: WeightFormat) -> tuple[Array, Array, Array | None]:
    """Round to nearest: float32 (N, K) -> codes uint8 (N, K), scale (N, groups), zero (N, groups) or None.

    int: scale = amax / (2**(bits-1) - 1), code = round(w / scale) + 2**(bits-1).
    uint: scale = (max - min) / (2**bits - 1) over the group and 0, zero = round(-min / scale),
    code = round(w / scale) + zero. Halves round to even; w is divided by the scale as stored. A group whose
    scale is 0, or so small that 1 / scale overflows, has scale 0 and the codes of zero. Scales that float16
    would lose (overflow, or below its normal range) make the whole tensor float32: see stored_scale().
    """
    format.require_dense()
    if format.encoding not in ("int", "uint") or format.zero_dtype == "float32":
        raise NotImplementedError(f"format {format.name}: no rounding quantizer")
    w = w.astype(np.float32)
    top = 2 ** (format.bits - 1) - 1 if format.encoding == "int" else 2**format.bits - 1
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if format.encoding == "int":
            scale = _grouped(np.abs(w), format, 0.0).max(axis=2) / np.float32(top)
        else:
            low = np.minimum(_grouped(w, format, 0.0).min(axis=2), np.float32(0))
            high = np.maximum(_grouped(w, format, 0.0).max(axis=2), np.float32(0))
            scale = high / np.float32(top) - low / np.float32(top)
        scale = np.where(np.isfinite(np.float32(1) / scale), scale, np.float32(0)).astype(np.float32)
        scale = stored_scale(scale, format)
        step = spread_groups(scale.astype(np.float32), format, w.shape[1])
        q = np.rint(np.divide(w, step, out=np.zeros_like(w), where=step > 0))
        if format.encoding == "int":
            return (np.clip(q, -top, top) + 2 ** (format.bits - 1)).astype(np.uint8), scale, None
        wide = scale.astype(np.float32)
        zero = np.clip(np.rint(np.divide(-low, wide, out=np.zeros_like(low), where=wide > 0)), 0, top)
        codes = np.clip(q + spread_groups(zero, format, w.shape[1]), 0, top)
    return codes.astype(np.uint8), scale, zero.astype(np.uint8)


def stored_scale(scale: Array, format: WeightFormat) -> Array:
    """Scales in the format's dtype, or all in float32 if float16 would overflow or become denormal."""
    if format.scale_dtype == "float32":
        return scale.astype(np.float32)
    half = scale.astype(np.float16)
    lost = ~np.isfinite(half) | ((scale > 0) & (half < np.float16(2.0**-14)))
    return scale.astype(np.float32) if lost.any() else half


def quantize_rows(x: Array, spec: ActivationSpec = A8) -> tuple[Array, Array]:
    """The dynamic quantizer: float32 (M, K) -> int8 or int16 codes (M, K) in [-L, L], float32 scale (M).

    L = 127 or 32767; amax = max |x|; inv = L / amax with IEEE division; q = round-half-even(x * inv);
    scale = amax / L. If inv is not finite: scale 0 and codes 0. A NaN or an infinity in the row: scale NaN
    and codes 0.
    """
    x, largest = x.astype(np.float32), np.float32(spec.largest)
    with np.errstate(all="ignore"):
        amax = np.abs(x).max(axis=1, initial=np.float32(0))
        inv = largest / amax
        usable = np.isfinite(inv) & np.isfinite(amax)
        q = np.rint(x * np.where(usable, inv, np.float32(0))[:, None])
        q = np.where(usable[:, None], np.clip(q, -largest, largest), np.float32(0))
        scale = np.where(
            usable, amax / largest, np.where(np.isfinite(amax), np.float32(0), np.float32(np.nan))
        )
    return q.astype(f"int{spec.bits}"), scale.astype(np.float32)


def segments(format: WeightFormat, k: int, spec: ActivationSpec) -> list[tuple[int, int, int]]:
    """(group, begin, end) of the codes along K that are summed in int32: groups, and within a longer group
    spec.span codes at a time.
    """
    size = format.group_size or max(k, 1)
    return [
        (group, begin, min(begin + spec.span, (group + 1) * size, k))
        for group in range(format.groups(k))
        for begin in range(group * size, min((group + 1) * size, max(k, 1)), spec.span)
    ]


def linear_int32(
    x_codes: Array, codes: Array, format: WeightFormat, zero: Array | None = None, spec: ActivationSpec = A8
) -> Array:
    """The exact sums of every integer kernel: int8 or int16 (M, K), codes (N, K) -> (M, N, segments), whole
    and in the range of int32 where zero points are whole.

    From here on a kernel computes in float32, for each row in the same order: from t = 0, for each segment in
    ascending k, t = t + float(sum), and y = t * (scale_x * scale_w) + bias for int8 with one scale per
    channel; for all others t = t + scale_w * float(sum), in one or two roundings, and y = t * scale_x + bias.
    """
    values = code_values(codes, zero, format)
    x_codes = x_codes.astype(np.int64)
    parts = segments(format, codes.shape[1], spec)
    return np.stack([x_codes[:, a:b] @ values[:, a:b].T for _, a, b in parts], axis=-1)


def activate(y: Array, activation: str | None) -> Array:
    """The epilogue's function, in float64."""
    from math import erf

    if activation == "relu":
        return np.where(y < 0, 0.0, y)
    if activation == "gelu":
        return np.asarray(y * 0.5 * (1 + np.vectorize(erf, otypes=[np.float64])(y / np.sqrt(2.0))))
    if activation == "silu":
        with np.errstate(over="ignore"):
            return np.asarray(y / (1 + np.exp(-y)))
    return y


def linear(
    x: Array,
    codes: Array,
    scale: Array,
    zero: Array | None,
    format: WeightFormat,
    bias: Array | None = None,
    input_spec: ActivationSpec = FLOAT,
    activation: str | None = None,
) -> Array:
    """y = activation(sum over groups of (q_x . q_w) * scale_x * scale_w + bias), in float64: (M, N)."""
    k = codes.shape[1]
    if input_spec.bits:
        q, scale_x = quantize_rows(x, input_spec)
        rows, factor = q.astype(np.float64), scale_x.astype(np.float64)[:, None]
    else:
        rows, factor = x.astype(np.float64), np.ones((len(x), 1))
    weight = code_values(codes, zero, format) * spread_groups(scale.astype(np.float64), format, k)
    with np.errstate(invalid="ignore", over="ignore"):
        y = rows @ weight.T * factor
        return activate(y if bias is None else y + bias.astype(np.float64), activation)


def embedding(ids: Array, codes: Array, scale: Array, zero: Array | None, format: WeightFormat) -> Array:
    """Rows of the dequantized table: ids (...) -> float32 (..., K)."""
    return dequantize(codes, scale, zero, format)[ids]
