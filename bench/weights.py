"""Weights rounded to nearest, as the peers take them: the same codes that ours have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pyengine.formats import parse_format
from pyengine.packed import PackedWeight


@dataclass(frozen=True)
class Rounded:
    """scale * codes. codes: int8 (N, K); of int4 codes + 8 in uint8 (N, K / 2), the first in the low nibble.
    scale: float32 (N, groups). nbytes: of both as a file has them.
    """

    codes: Any
    scale: Any
    nbytes: int

    @property
    def signed_nibbles(self) -> Any:
        """Of int4: two's complement, which differs from offset binary in the highest bit of each nibble."""
        return self.codes ^ 0x88


def int8(linear: nn.Linear) -> Rounded:
    packed = PackedWeight.quantize(linear.weight, parse_format("int8"))
    return Rounded(
        (packed.codes() ^ 0x80).view(torch.int8).numpy(), packed.scale.float().numpy(), packed.nbytes
    )


def int4(linear: nn.Linear, group_size: int | None = None) -> Rounded:
    """group_size None: one scale per row."""
    if linear.in_features % (group_size or 2):
        raise NotImplementedError(f"K={linear.in_features} is no multiple of {group_size or 2}")
    name = "int4" if group_size is None else f"int4_g{group_size}"
    packed = PackedWeight.quantize(linear.weight, parse_format(name))
    return Rounded(packed.qdata.numpy(), packed.scale.float().numpy(), packed.nbytes)
