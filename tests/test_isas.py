"""Every instruction set gives the same integers and stays in its arrays: tests/native on this processor, and
in emulators for what it lacks. csrc/README.md says how to run each by hand.
"""

import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

NATIVE = Path(__file__).parent / "native"
sys.path.insert(0, str(NATIVE))
from build import ISAS, build, run  # noqa: E402

X86 = [isa for isa, entry in ISAS.items() if entry["arch"] == "x86_64"]
NEEDS = {
    "g++": "apt-get install g++",
    "qemu-x86_64-static": "apt-get install qemu-user-static",
}
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")


def need(tool):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed: {NEEDS[tool]}")


def driver(path, *arguments, prefix=(), **environment):
    """What the driver prints."""
    command = [*prefix, str(path), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)
    assert done.returncode == 0, f"{done.returncode}: {' '.join(command)}\n{done.stdout}{done.stderr}"[-4000:]
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def x86(tmp_path_factory):
    need("g++")
    return build(tmp_path_factory.mktemp("x86"), X86, shared=True)


@pytest.fixture(scope="module")
def supported(x86):
    return driver(x86, "--supported")[0].split()


@pytest.mark.parametrize("isa", ["portable", *X86])
def test_thousands_of_random_calls_agree_where_the_processor_has_the_instructions(x86, supported, isa):
    if isa not in supported:
        pytest.skip(f"this processor has no {isa}: an emulator stands for it below")
    assert ", 0 failed" in driver(x86, isa, 0, 500)[0]


@pytest.mark.parametrize(("isa", "count"), [("avxvnni", 10), ("amx", 100)])
def test_random_calls_agree_instruction_by_instruction(x86, supported, tmp_path, isa, count):
    """Each trapping instruction is computed by a signal handler."""
    if isa in supported:
        pytest.skip(f"this processor has {isa}, so that nothing traps")
    if "avx2" not in supported:
        pytest.skip("the handler needs a processor with AVX2")
    handler = tmp_path / "sigill.so"
    run(["gcc", "-O2", "-shared", "-fPIC", str(NATIVE / "sigill.c"), "-o", str(handler)])
    told, trapped = driver(x86, isa, 0, count, LD_PRELOAD=str(handler))
    assert ", 0 failed" in told
    assert int(trapped.split()[-2]) > 10_000


def test_random_calls_agree_in_an_emulator(x86):
    """AVX-512 in BochsCPU, whether this processor has it or not."""
    if find_spec("bochscpu") is None:
        pytest.skip("bochscpu is not installed: pip install bochscpu-python==0.3.1")
    told, _ = driver(NATIVE / "bochs.py", f"{x86}.so", "avx512vnni", 0, 100, prefix=[sys.executable])
    assert "avx512vnni: 600 cases, 0 failed" in told


def test_a_processor_without_avx_runs_the_portable_kernels(x86):
    need("qemu-x86_64-static")
    old = ["qemu-x86_64-static", "-cpu", "Nehalem"]
    assert driver(x86, "--supported", prefix=old)[0].split() == ["portable"]
    assert ", 0 failed" in driver(x86, "portable", 0, 40, prefix=old)[0]


def test_sanitizers_find_nothing(tmp_path_factory, supported):
    """AddressSanitizer and UndefinedBehaviorSanitizer, on what this processor runs."""
    isas = [isa for isa in X86 if isa in supported]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    path = build(tmp_path_factory.mktemp("sanitized"), isas, flags=["-O0", *checks], wide_flags=[])
    for isa in ("portable", *isas):
        assert ", 0 failed" in driver(path, isa, 0, 25)[0]
