"""Benchmarks: cases as data, peers measured interleaved in the same process. See README.md in this folder."""

from .cases import ACTIVATIONS, LINEAR, LinearCase
from .limits import limits
from .ours import SCHEMES
from .peers import DEFAULT_PEERS, PEERS
from .plot import plot, read_records
from .run import run
from .show import problems, table
from .summary import compare, summary

__all__ = [
    "ACTIVATIONS",
    "DEFAULT_PEERS",
    "LINEAR",
    "PEERS",
    "SCHEMES",
    "LinearCase",
    "compare",
    "limits",
    "plot",
    "problems",
    "read_records",
    "run",
    "summary",
    "table",
]
