"""Scheme: what to do to a layer, in one string such as w8a8 or w4_g32_asym."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .formats import A8, A16, FLOAT, ActivationSpec, WeightFormat, default_scale_dtype

_SCHEME = re.compile(
    r"w(?P<bits>[1-8])(?:a(?P<act>8|16))?(?:_g(?P<group>[1-9]\d{0,5}))?(?P<asym>_asym)?(?P<static>_static)?"
)


@dataclass(frozen=True)
class Scheme:
    """Number formats of a layer's weight and activations.

    bits, group_size, symmetric: of the weight; group_size 0 is one scale per output channel.
    activation_bits: 0 leaves activations float; 8 and 16 quantize each row at run time; `static` takes
    calibrated scales. scale_dtype: of the weight's scales; None is float16 for groups and float32 per
    channel.
    numerics: exact, or fast to admit kernels whose float error is larger than that of the integers
    themselves.
    """

    bits: int = 8
    activation_bits: int = 0
    group_size: int = 0
    symmetric: bool = True
    static: bool = False
    scale_dtype: str | None = None
    numerics: str = "exact"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"scheme: weights of {self.bits} bits; between 1 and 8 are possible")
        if self.activation_bits not in (0, 8, 16):
            raise ValueError(
                f"scheme: activations of {self.activation_bits} bits; 0 (float), 8 or 16 are possible"
            )
        if self.static and not self.activation_bits:
            raise ValueError("scheme: static scales need integer activations, as in w8a8_static")
        if self.symmetric and self.bits == 1:
            raise ValueError("scheme: 1-bit weights are binary (wb) or asymmetric (w1_asym)")
        if self.numerics not in ("exact", "fast"):
            raise ValueError(f"scheme: numerics {self.numerics!r} is neither exact nor fast")
        if self.static:
            raise NotImplementedError(f"scheme {self.name}: static activations are not implemented yet")
        self.format.require_dense()

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """w<bits>[a<8|16>][_g<group>][_asym][_static] -> Scheme."""
        if isinstance(text, Scheme):
            return text
        if not isinstance(text, str):
            raise TypeError(f"a scheme is a string or a pyengine.Scheme, not {type(text).__name__}")
        if text in ("wt", "wb") or re.fullmatch(r"wc[1-8]", text):
            raise NotImplementedError(
                f"scheme {text}: ternary, binary and codebook weights are not implemented yet"
            )
        match = _SCHEME.fullmatch(text)
        if match is None:
            raise ValueError(f"scheme {text!r} is not of the form w<1-8>[a<8|16>][_g<group>][_asym][_static]")
        return cls(
            bits=int(match["bits"]),
            activation_bits=int(match["act"] or 0),
            group_size=int(match["group"] or 0),
            symmetric=not match["asym"],
            static=bool(match["static"]),
        )

    @property
    def name(self) -> str:
        parts = [f"w{self.bits}" + (f"a{self.activation_bits}" if self.activation_bits else "")]
        parts += [f"g{self.group_size}"] if self.group_size else []
        parts += [] if self.symmetric else ["asym"]
        parts += ["static"] if self.static else []
        return "_".join(parts)

    @property
    def format(self) -> WeightFormat:
        return WeightFormat(
            encoding="int" if self.symmetric else "uint",
            bits=self.bits,
            group_size=self.group_size,
            scale_dtype=self.scale_dtype or default_scale_dtype(self.group_size),
            zero_dtype=None if self.symmetric else "uint8",
        )

    @property
    def input_spec(self) -> ActivationSpec:
        return {0: FLOAT, 8: A8, 16: A16}[self.activation_bits]
