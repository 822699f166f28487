"""What is measured: sizes of real layers, as data."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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


# One token, a small batch, a sentence, a paragraph, a page.
ROWS = (1, 8, 32, 128, 512)
# (K, N): attention and both halves of the feed-forward of MiniLM; those of BERT-base, then attention of
# models of 1 and 7 billion weights.
MINILM = ((384, 384), (384, 1536), (1536, 384))
TRANSFORMER = ((768, 768), (768, 3072), (3072, 768), (2048, 2048), (4096, 4096))

LINEAR = {
    "default": tuple(LinearCase(m, k, n) for k, n in (*MINILM, *TRANSFORMER) for m in ROWS),
    "minilm": tuple(LinearCase(m, k, n) for k, n in MINILM for m in ROWS),
    "transformer": tuple(LinearCase(m, k, n) for k, n in TRANSFORMER for m in ROWS),
    "quick": tuple(LinearCase(m, k, n) for k, n in ((384, 1536), (768, 768)) for m in (1, 32)),
}

# What the Gaussian numbers that x is made of go through: nothing, or what leaves none below zero.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"signed": lambda x: x, "relu": torch.relu}
