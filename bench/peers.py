"""The peers by name, and which of them are asked for where nothing else is said."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .contenders import Contender, torch_float, torch_int8
from .int4 import litert_int4, onnxruntime_int4

PEERS: dict[str, Callable[[nn.Linear, int], Contender]] = {
    "torch": torch_float,
    "torch_int8": torch_int8,
    "onnxruntime_int4": onnxruntime_int4,
    "litert_int4": litert_int4,
}
DEFAULT_PEERS = ("torch", "torch_int8")
