"""What the kernels share: functions that are inlined into them.

PTX is where the instructions count: it unpacks two weights at a time. Every such function has a twin in plain
Triton, behind a constexpr, that gives the same bits: AMD and the interpreter run that one.
"""

import triton
import triton.language as tl

# 1.5 * 2^23: what is added to it and taken off again has no bits left for a fraction.
ROUND = tl.constexpr(12582912.0)
SQRT_HALF = tl.constexpr(0.7071067811865476)


def _float16_plane(shift: int) -> str:
    """Four bits of both halves as 1024 + q, or 1024 + 16 q where that saves a shift; then q - 8."""
    odd = shift % 8
    mask = "0x00f000f0" if odd else "0x000f000f"
    # 0.0625 and -72, or 1032, in both halves.
    rest = (
        "mov.b32 a, 0x2c002c00; mov.b32 b, 0xd480d480; fma.rn.f16x2 $0, t, a, b;"
        if odd
        else "mov.b32 a, 0x64086408; sub.f16x2 $0, t, a;"
    )
    return _plane(shift - odd, mask, "0x64006400", rest)


def _bfloat16_plane(shift: int) -> str:
    """As 128 + q, the last bit of which is 1: no shift can be saved. Then q - 8, as q * 1 - 136."""
    rest = "mov.b32 a, 0x3f803f80; mov.b32 b, 0xc308c308; fma.rn.bf16x2 $0, t, a, b;"
    return _plane(shift, "0x000f000f", "0x43004300", rest)


def _plane(shift: int, mask: str, magic: str, rest: str) -> str:
    moved = f"shr.u32 t, $1, {shift};" if shift else "mov.b32 t, $1;"
    # 0xea: (t & mask) | magic.
    return f"{{ .reg .b32 t, a, b, m; {moved} mov.b32 m, {magic}; lop3.b32 t, t, {mask}, m, 0xea; {rest} }}"


FLOAT16_PLANES = tl.constexpr(tuple(_float16_plane(4 * j) for j in range(4)))
BFLOAT16_PLANES = tl.constexpr(tuple(_bfloat16_plane(4 * j) for j in range(4)))


@triton.jit
def plane(words, j: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr):
    """int16 words of four nibbles -> nibble j, less 8, in a float type: exact."""
    if PTX and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            FLOAT16_PLANES[j], "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    if PTX and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            BFLOAT16_PLANES[j], "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return (((words >> (4 * j)) & 15) - 8).to(tl.float32).to(dtype)


@triton.jit
def minus(a, b, dtype: tl.constexpr, PTX: tl.constexpr):
    """a - b of small whole numbers. The interpreter has no bfloat16 arithmetic."""
    if PTX:
        return a - b.to(dtype)
    return (a.to(tl.float32) - b.to(tl.float32)).to(dtype)


@triton.jit
def magnitude_bits(x):
    """The bits of |x|, which order as the values do, with infinity and NaN on top: >= 0x7f800000."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """relu, gelu x (1 + erf(x / sqrt 2)) / 2, silu x / (1 + exp(-x)), or nothing; a NaN stays one."""
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)
    if ACTIVATION == "gelu":
        return x * 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    return x
