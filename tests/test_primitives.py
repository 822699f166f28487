"""The primitives of every instruction set compute what portable.h says, one by one."""

import shutil
import subprocess

import pytest
from native.build import CSRC, HERE, ISAS

from pyengine import _C

HEADERS = sorted(path for path in CSRC.glob("simd/*.h") if path.stem in ISAS)


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.stem)
def test_primitives_compute_what_portable_says(header, tmp_path):
    """On this processor if it has them; those of ARM in an emulator."""
    isa = ISAS[header.stem]
    compiler, runner = ["g++"], []
    if not _C.isa_supported(header.stem):
        if isa["arch"] != "aarch64":
            pytest.skip(f"this processor has no {header.stem}, and only whole kernels are emulated on x86")
        compiler, runner = ["aarch64-linux-gnu-g++", "-static"], ["qemu-aarch64-static", "-cpu", "max"]
    if not all(shutil.which(tool) for tool in [compiler[0], *runner[:1]]):
        pytest.skip("no compiler or no emulator: apt install g++ g++-aarch64-linux-gnu qemu-user-static")
    program = tmp_path / "primitives"
    command = [
        *compiler, "-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-ignored-attributes",
        "-Werror", *isa["flags"], f'-DPYENGINE_SIMD="{header}"', f"-I{CSRC}",
        str(HERE / "simd/primitives.cpp"), "-o", str(program),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    done = subprocess.run([*runner, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 of them differ" in done.stdout
