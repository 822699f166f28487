"""What is measured: sizes of real layers, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearCase:
    """y (M, N) = x (M, K) @ weight (N, K).T + bias (N): M rows of activations, K inputs, N outputs."""

    m: int
    k: int
    n: int

    @property
    def name(self) -> str:
        return f"{self.m}x{self.k}x{self.n}"

    @classmethod
    def parse(cls, text: str) -> LinearCase:
        """MxKxN, as in 8x768x3072."""
        if not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}x[1-9]\d{0,5}", text):
            raise ValueError(f"shape {text!r} is not of the form MxKxN, as in 8x768x3072")
        return cls(*map(int, text.split("x")))


# One token, a small batch, a short and a longer sequence.
ROWS = (1, 8, 32, 128)
# (K, N): attention and feed-forward of MiniLM, of BERT-base size models, and attention of a 7B model.
SIZES = ((384, 384), (384, 1536), (768, 768), (768, 3072), (3072, 768), (4096, 4096))

LINEAR = {
    "default": tuple(LinearCase(m, k, n) for k, n in SIZES for m in ROWS),
    "int4": tuple(LinearCase(m, k, n) for k, n in ((768, 768), (768, 3072), (4096, 4096)) for m in ROWS),
    "quick": tuple(LinearCase(m, k, n) for k, n in ((384, 1536), (768, 768)) for m in (1, 32)),
}
