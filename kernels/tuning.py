"""Block sizes by the number of rows: data. No GPU has measured them: they are what compiles without spills.

Rows of a call, at most -> the constexpr arguments and the launch options of the kernel.
"""

from __future__ import annotations

from typing import Any

Blocks = dict[str, Any]

W8A8: dict[int | None, Blocks] = {
    16: {"BM": 16, "BN": 64, "BK": 128, "num_warps": 4, "num_stages": 5},
    32: {"BM": 32, "BN": 64, "BK": 128, "num_warps": 4, "num_stages": 4},
    64: {"BM": 64, "BN": 64, "BK": 128, "num_warps": 4, "num_stages": 4},
    None: {"BM": 128, "BN": 128, "BK": 128, "num_warps": 8, "num_stages": 3},
}
W4A16: dict[int | None, Blocks] = {
    16: {"BM": 16, "BN": 64, "num_warps": 4, "num_stages": 4},
    32: {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 4},
    None: {"BM": 64, "BN": 128, "num_warps": 8, "num_stages": 3},
}
# float32 activations have no matrix instruction: products are taken one by one, from registers.
W4A32: dict[int | None, Blocks] = {
    None: {"BM": 16, "BN": 32, "num_warps": 4, "num_stages": 2},
}


# AMD's compute units have 64 KB of shared memory, and copy to it through registers.
AMD: Blocks = {"num_stages": 2}
# Products and sums are fused where a kernel says fma, nowhere else: as on the CPU.
ALWAYS: Blocks = {"enable_fp_fusion": False}


def blocks(table: dict[int | None, Blocks], rows: int, *, amd: bool) -> Blocks:
    """The arguments for calls of so many rows."""
    entry = next(entry for limit, entry in table.items() if limit is None or rows <= limit)
    return {**entry, **(AMD if amd else {}), **ALWAYS}
