"""y = activation(x W^T + bias) on packed weights. W is the left operand of every dot, (N, K) by (K, M), so
that a weight is unpacked once, however many rows of x there are.

Layouts (made in pyengine/backends/triton.py) are padded to whole blocks of 16 rows and 128 codes along K.
"""

import triton
import triton.language as tl

from .device import ROUND, activate, magnitude_bits, minus, plane

# Codes along K in a tile of planes16x128: four planes of 32.
TILE = tl.constexpr(128)
PLANE = tl.constexpr(32)
ROWS = tl.constexpr(16)


@triton.jit
def _store(acc, y, bias, rm, rn, M, N, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr):
    """(N, M) sums in float32 to y (M, N)."""
    if HAS_BIAS:
        acc += tl.load(bias + rn, mask=rn < N, other=0.0)[:, None]
    acc = activate(acc, ACTIVATION)
    at = y + rm.to(tl.int64)[None, :] * N + rn[:, None]
    tl.store(at, acc.to(y.dtype.element_ty), mask=(rm < M)[None, :] & (rn < N)[:, None])


@triton.jit
def quantize_rows(x, codes, scales, K, PADDED, BLOCK: tl.constexpr):
    """x (M, K) -> int8 codes (M, PADDED), zero from K on, and float32 scales (M), as reference.quantize_rows
    states. One program per row.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    bits = tl.zeros((BLOCK,), tl.int32)
    for k in range(0, K, BLOCK):
        part = tl.load(x + row * K + k + columns, mask=k + columns < K, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, magnitude_bits(part))
    top = tl.max(bits, 0)
    finite = top < 0x7F800000
    amax = tl.where(finite, top, 0).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(127.0, amax)
    usable = magnitude_bits(inverse) < 0x7F800000
    scale = tl.where(usable, tl.div_rn(amax, 127.0), 0.0)
    tl.store(scales + row, tl.where(finite, scale, float("nan")))
    inverse = tl.where(usable, inverse, 0.0)
    filled = tl.where(finite, K, 0)
    for k in range(0, PADDED, BLOCK):
        part = tl.load(x + row * K + k + columns, mask=k + columns < filled, other=0.0).to(tl.float32)
        code = tl.minimum(tl.maximum(part * inverse, -127.0), 127.0)
        code = (code + ROUND) - ROUND
        tl.store(codes + row * PADDED + k + columns, code.to(tl.int8), mask=k + columns < PADDED)


@triton.jit
def _int8_dots(acc, w_at, x_at, codes, BK: tl.constexpr):
    """acc + the products of so many codes along K. A step is two dots over half of BK each: one over all of
    it makes Triton 3.8 and 3.9 shuffle bytes.
    """
    HALF: tl.constexpr = BK // 2
    for _ in range(0, codes, BK):
        acc = tl.dot(tl.load(w_at), tl.load(x_at), acc, out_dtype=tl.int32)
        acc = tl.dot(tl.load(w_at + HALF), tl.load(x_at + HALF), acc, out_dtype=tl.int32)
        w_at += BK
        x_at += BK
    return acc


# Calls differ in M: one compilation serves all.
@triton.jit(do_not_specialize=["M"])
def linear_w8a8(
    x, scale_x, weight, scale_w, bias, y, M, N, PADDED,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr, LONG: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """int8 x (M, PADDED), int8 weight (N to whole 16, PADDED) -> y (M, N): acc * (scale_x * scale_w) + bias.

    y of int32 takes the bare sums. SPAN: codes along K whose products an int32 holds, a multiple of BK. LONG:
    there are more, and sums of spans are added up in float32.
    """
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rk = tl.arange(0, BK // 2)
    # Rows beyond the end are read as the last one, and not stored.
    last = tl.cdiv(N, ROWS) * ROWS - 1
    w_at = weight + tl.minimum(rn, last).to(tl.int64)[:, None] * PADDED + rk[None, :]
    x_at = x + tl.minimum(rm, M - 1).to(tl.int64)[None, :] * PADDED + rk[:, None]
    zeros = tl.zeros((BN, BM), tl.int32)
    if y.dtype.element_ty == tl.int32:
        _store(_int8_dots(zeros, w_at, x_at, PADDED, BK), y, bias, rm, rn, M, N, None, False)
    else:
        if LONG:
            acc = tl.zeros((BN, BM), tl.float32)
            for begin in range(0, PADDED, SPAN):
                codes = tl.minimum(SPAN, PADDED - begin)
                acc += _int8_dots(zeros, w_at + begin, x_at + begin, codes, BK).to(tl.float32)
        else:
            acc = _int8_dots(zeros, w_at, x_at, PADDED, BK).to(tl.float32)
        of_row = tl.load(scale_x + rm, mask=rm < M, other=0.0)
        of_column = tl.load(scale_w + rn, mask=rn <= last, other=0.0)
        _store(acc * (of_row[None, :] * of_column[:, None]), y, bias, rm, rn, M, N, ACTIVATION, HAS_BIAS)


@triton.jit(do_not_specialize=["M"])
def linear_w4a16(
    x, weight, scale, zero, bias, y, M, N, K, TILES,
    GROUP: tl.constexpr, SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_ZERO: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """x (M, K) of a float type, weight int16 (N/16, TILES, 16, 32) in planes16x128 -> y (M, N).

    scale, zero: (groups, N to whole 16), the zero points less 8. GROUP: 32, 64, a multiple of 128, or 0 for
    one scale per row; SLICES: how many slices of 32 share a scale in a tile, at most 4. A group's sum is
    scaled as a whole: codes are exact in every float type, and their products with x add up in float32,
    unscaled. WHOLE: K is a multiple of 128.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rk = tl.arange(0, PLANE)
    padded = tl.cdiv(N, ROWS) * ROWS
    row = tl.minimum(rn, padded - 1)
    block = weight + (row // ROWS).to(tl.int64)[:, None] * (TILES * ROWS * PLANE)
    w_at = block + (row % ROWS)[:, None] * PLANE + rk[None, :]
    x_at = x + tl.minimum(rm, M - 1).to(tl.int64)[None, :] * K + rk[:, None]
    inside = rn < padded
    acc = tl.zeros((BN, BM), tl.float32)
    if GROUP == 0 and HAS_ZERO:
        offset = tl.load(zero + rn, mask=inside, other=0.0)
    for tile in range(TILES):
        words = tl.load(w_at)
        part = tl.zeros((BN, BM), tl.float32)
        for j in tl.static_range(4):
            if GROUP != 0 and j % SLICES == 0:
                at = ((tile * TILE + j * PLANE) // GROUP) * padded + rn
                if HAS_ZERO:
                    offset = tl.load(zero + at, mask=inside, other=0.0)
            w = plane(words, j, dtype, PTX)
            if HAS_ZERO:
                w = minus(w, offset[:, None], dtype, PTX)
            if WHOLE:
                columns = tl.load(x_at + j * PLANE)
            else:
                left = K - tile * TILE - j * PLANE
                columns = tl.load(x_at + j * PLANE, mask=(rk < left)[:, None], other=0.0)
            if GROUP == 0:
                acc = tl.dot(w, columns, acc, input_precision="ieee")
            else:
                part = tl.dot(w, columns, part, input_precision="ieee")
                if (j + 1) % SLICES == 0:
                    step = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
                    acc = tl.fma(part, tl.broadcast_to(step[:, None], part.shape), acc)
                    part = tl.zeros((BN, BM), tl.float32)
        w_at += ROWS * PLANE
        x_at += TILE
    if GROUP == 0:
        acc *= tl.load(scale + rn, mask=inside, other=0.0).to(tl.float32)[:, None]
    _store(acc, y, bias, rm, rn, M, N, ACTIVATION, HAS_BIAS)
