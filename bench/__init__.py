"""Benchmarks: cases as data, peers measured interleaved in the same process. See README.md in this folder."""

from .cases import LINEAR, LinearCase
from .contenders import SCHEMES
from .peers import DEFAULT_PEERS, PEERS
from .run import run
from .show import problems, table

__all__ = ["DEFAULT_PEERS", "LINEAR", "PEERS", "SCHEMES", "LinearCase", "problems", "run", "table"]
