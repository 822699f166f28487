"""Benchmarks: cases as data, peers measured interleaved in the same process. See README.md in this folder."""

from .cases import LINEAR, LinearCase
from .contenders import PEERS
from .run import run
from .show import problems, table

__all__ = ["LINEAR", "PEERS", "LinearCase", "problems", "run", "table"]
