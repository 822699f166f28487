"""The built extension keeps the rules of csrc/README.md."""

import json
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from pyengine import _C


def symbols(*flags: str) -> list[list[str]]:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    out = subprocess.run(["nm", *flags, _C.__file__], capture_output=True, text=True, check=True).stdout
    return [line.split() for line in out.splitlines()]


def test_extension_links_neither_openmp_nor_torch():
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    out = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = [line for line in out.splitlines() if "NEEDED" in line]
    assert needed
    assert not [
        line for line in needed if "gomp" in line or "omp" in line or "torch" in line or "c10" in line
    ]


def test_no_weak_symbol_comes_from_the_kernels():
    """A weak function of ours compiled with wide flags could replace its baseline twin."""
    weak = [" ".join(row) for row in symbols("-C") if len(row) > 2 and row[1] in "VWvwu"]
    ours = [row for row in weak if "pyengine::" in row or "Simd" in row or "LinearArgs" in row]
    # parallel_for is a template of the drivers, which are built for the baseline only.
    assert [row for row in ours if "parallel_for" not in row] == []


def test_every_instruction_set_of_this_architecture_is_built():
    """A compiler that lacks one leaves it out; the pinned one knows all."""
    isas = json.loads((Path(__file__).parents[1] / "csrc/isas.json").read_text())
    here = {name for name, isa in isas.items() if isa["arch"] == platform.machine()}
    built = {isa for op, _, isa, _, _ in _C.kernels() if op == "linear"} - {"portable"}
    assert built <= here
    if (
        "Debian 12."
        in subprocess.run(["readelf", "-p", ".comment", _C.__file__], capture_output=True, text=True).stdout
    ):
        assert built == here


def test_kernel_table_lists_every_isa_of_every_op_once():
    rows = [(op, variant, isa) for op, variant, isa, _, _ in _C.kernels()]
    assert len(set(rows)) == len(rows)
    for op, variant, _ in rows:
        assert (op, variant, "portable") in rows
