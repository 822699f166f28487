"""Memory that goes back to the system when it is no longer used. malloc would keep it, in holes between what
lives longer.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor


def pages(nbytes: int) -> mmap.mmap | bytearray:
    """Zeros; of less than a page, ordinary memory."""
    small = nbytes < mmap.PAGESIZE
    return bytearray(nbytes) if small else mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def zeros(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """torch.zeros, on the CPU on pages of its own."""
    count = math.prod(shape)
    if device.type != "cpu" or not count:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(pages(dtype.itemsize * count), dtype=dtype).view(shape)
