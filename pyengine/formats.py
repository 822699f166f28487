"""The spec of packed weights and quantized activations. What the bytes mean is stated by reference.py."""

from __future__ import annotations

import re
from dataclasses import dataclass

FORMAT_VERSION = (1, 0)

ENCODINGS = ("int", "uint", "binary", "ternary", "codebook", "float")
SCALE_DTYPES = ("float16", "float32")
ZERO_DTYPES = ("uint8", "float32")


class FormatError(ValueError):
    """A file, or the tensors of a packed weight, contradict themselves or the format."""


@dataclass(frozen=True)
class Sparsity:
    """Which codes are stored: a bitmap over blocks of (rows, columns), optionally with n kept of every m
    along K.
    """

    block: tuple[int, int] = (1, 1)
    pattern: tuple[int, int] | None = None


@dataclass(frozen=True)
class WeightFormat:
    """How an (N, K) weight is stored: `value = scale * f(code)`, f by encoding, scales per channel or per
    group.

    encoding: int: code - 2**(bits-1). uint: code - zero. binary: 2*code - 1. ternary: code - 1.
        codebook: table[code].
    group_size: codes along K that share a scale (the last group may be short); 0 means the whole row.
    zero_dtype: of the zero points of uint codes; None for every other encoding.
    """

    encoding: str = "int"
    bits: int = 8
    group_size: int = 0
    scale_dtype: str = "float32"
    zero_dtype: str | None = None
    sparsity: Sparsity | None = None

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ValueError(f"encoding {self.encoding!r} is none of {', '.join(ENCODINGS)}")
        widths = {"int": range(2, 9), "uint": range(1, 9), "binary": (1,), "ternary": (2,)}
        if self.bits not in widths.get(self.encoding, range(1, 33)):
            raise ValueError(f"{self.encoding} codes of {self.bits} bits are not a format")
        if self.group_size < 0:
            raise ValueError(f"group_size {self.group_size} is negative")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale dtype {self.scale_dtype!r} is none of {', '.join(SCALE_DTYPES)}")
        if (self.zero_dtype in ZERO_DTYPES) != (self.encoding == "uint"):
            raise ValueError(f"{self.encoding} codes cannot have zero points of type {self.zero_dtype}")

    @property
    def name(self) -> str:
        """A name that parse_format() turns back into this format: int8, int4_g32, uint4_g128, int8_f16."""
        parts = [self.encoding if self.encoding in ("binary", "ternary") else f"{self.encoding}{self.bits}"]
        if self.group_size:
            parts.append(f"g{self.group_size}")
        if self.scale_dtype != default_scale_dtype(self.group_size):
            parts.append("f16" if self.scale_dtype == "float16" else "f32")
        if self.zero_dtype == "float32":
            parts.append("zf32")
        if self.sparsity is not None:
            parts.append(
                "sparse" if self.sparsity.pattern is None else "{}of{}".format(*self.sparsity.pattern)
            )
        return "_".join(parts)

    def groups(self, k: int) -> int:
        """Number of scales of a row of k codes; a row of no codes has one."""
        return max(1, -(-k // self.group_size)) if self.group_size else 1

    def row_bytes(self, k: int) -> int:
        return (k * self.bits + 7) // 8

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Of a dense weight (N, K) in a file: codes, scales and zero points."""
        n, k = shape
        sizes = {"float16": 2, "float32": 4, "uint8": 1, None: 0}
        return n * (self.row_bytes(k) + self.groups(k) * (sizes[self.scale_dtype] + sizes[self.zero_dtype]))

    def require_dense(self) -> None:
        """Raises NotImplementedError for what has a place in the spec but no code yet."""
        if self.sparsity is not None:
            raise NotImplementedError(f"format {self.name}: sparse weights are not implemented yet")
        if self.encoding in ("codebook", "float"):
            raise NotImplementedError(f"format {self.name}: {self.encoding} weights are not implemented yet")


def default_scale_dtype(group_size: int) -> str:
    """float16 for groups, where scales are a tenth of the bytes; float32 per channel, where they are next to
    none.
    """
    return "float16" if group_size else "float32"


_NAME = re.compile(r"(?:(int|uint)([1-8])|(binary)|(ternary))(?:_g([1-9][0-9]{0,8}))?(?:_(f16|f32))?(_zf32)?")


def parse_format(name: str) -> WeightFormat:
    """The format of that name; inverse of WeightFormat.name for dense formats."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise FormatError(f"unknown weight format {name!r}")
    kind, bits, binary, ternary, group, scale, zero = match.groups()
    group_size = int(group or 0)
    try:
        format = WeightFormat(
            encoding=kind or binary or ternary,
            bits=int(bits) if bits else 1 if binary else 2,
            group_size=group_size,
            scale_dtype={"f16": "float16", "f32": "float32", None: default_scale_dtype(group_size)}[scale],
            zero_dtype="float32" if zero else "uint8" if kind == "uint" else None,
        )
    except ValueError as error:
        raise FormatError(f"weight format {name!r}: {error}") from None
    if format.name != name:
        raise FormatError(f"weight format {name!r} is called {format.name!r}")
    return format


# The formats that the golden bytes in tests/golden freeze, and that the documentation lists.
FORMATS = {
    name: parse_format(name)
    for name in (
        *("int8", "int8_g32", "int8_g128", "int4", "int4_g32", "int4_g128", "int2_g32"),
        *("uint8", "uint4", "uint4_g32", "uint4_g128", "uint3_g32", "ternary", "binary_g32"),
    )
}


@dataclass(frozen=True)
class ActivationSpec:
    """How activations enter a kernel: as they are (float), or as integer codes with a scale.

    mode: float, dynamic (scales taken from the data at run time) or static (from calibration).
    bits: 8: codes in [-127, 127]; 16: codes in [-32767, 32767]; 0 for float.
    granularity: row: one scale per row of a linear layer's input; sample: per image; tensor: one.
    nonnegative: codes are not below 0, behind ReLU and the like.
    """

    mode: str = "float"
    bits: int = 0
    symmetric: bool = True
    granularity: str = "row"
    nonnegative: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("float", "dynamic", "static"):
            raise ValueError(f"activation mode {self.mode!r} is none of float, dynamic, static")
        if self.bits not in ((0,) if self.mode == "float" else (8, 16)):
            raise ValueError(f"{self.mode} activations of {self.bits} bits are not a format")
        if self.granularity not in ("row", "sample", "tensor"):
            raise ValueError(f"granularity {self.granularity!r} is none of row, sample, tensor")

    @property
    def name(self) -> str:
        """float, a8, a16, a8_static."""
        return (
            "float"
            if self.mode == "float"
            else f"a{self.bits}" + ("_static" if self.mode == "static" else "")
        )

    @property
    def largest(self) -> int:
        """Of integer codes: 127 or 32767."""
        return (1 << (self.bits - 1)) - 1

    @property
    def span(self) -> int:
        """So many products of a code and an int8 weight add up exactly in int32: 2**17 or 512, since
        127 * 128 * 2**17 and 32767 * 128 * 512 are below 2**31.
        """
        return 1 << (25 - self.bits)


FLOAT = ActivationSpec()
A8 = ActivationSpec("dynamic", 8)
A16 = ActivationSpec("dynamic", 16)
ACTIVATIONS = {spec.name: spec for spec in (FLOAT, A8, A16)}
