"""The kernels for ARM: compiled by a cross compiler, and run by an emulator of a processor."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from native.build import ISAS, build

PREFIX = "aarch64-linux-gnu-"
EMULATOR = "qemu-aarch64-static"
WARNINGS = [
    "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wno-sign-conversion", "-Wno-ignored-attributes",
    "-Werror",
]  # fmt: skip
ARM = [isa for isa, entry in ISAS.items() if entry["arch"] == "aarch64"]

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, (f"{PREFIX}g++", f"{PREFIX}nm", f"{PREFIX}objdump", EMULATOR))),
    reason="no cross compiler or no emulator: apt install g++-aarch64-linux-gnu qemu-user-static",
)


def output(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arm")
    return build(folder, ARM, compiler=f"{PREFIX}g++ -static", flags=["-O2", *WARNINGS])


@pytest.fixture(scope="module")
def kernel_objects(driver):
    return [path for isa in ARM for path in driver.parent.glob(f"*_{isa}.o")]


@pytest.mark.parametrize(
    ("processor", "isas"),
    [
        ("max", ["portable", "neondot", "i8mm"]),
        ("cortex-a76", ["portable", "neondot"]),
        ("cortex-a72", ["portable"]),
    ],
)
def test_a_processor_is_offered_what_it_has(driver, processor, isas):
    assert output(EMULATOR, "-cpu", processor, driver, "--supported").split() == isas


def test_kernels_agree_with_plain_loops_and_with_the_portable_kernels(driver):
    """Each on the least processor that has its instructions."""
    cases = [
        ("cortex-a72", "portable", 0, 60),
        ("cortex-a76", "neondot", 0, 75),
        ("cortex-a76", "neondot", 75, 75),
        ("max", "i8mm", 0, 400),
    ]
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(output, EMULATOR, "-cpu", cpu, driver, *case) for cpu, *case in cases]
        for run in runs:
            assert run.result().endswith(" 0 failed\n")


def test_kernel_files_export_their_kernels_and_nothing_else(kernel_objects):
    assert len(kernel_objects) >= 3
    for path in kernel_objects:
        for line in output(f"{PREFIX}nm", "-C", "--defined-only", "--extern-only", path).splitlines():
            _, kind, name = line.split(maxsplit=2)
            assert kind in "TDR", line
            assert re.match(r"pyengine::(linear|embedding)_\w+", name), line


def inner_loops(path):
    """(function, instructions) of every loop without a loop in it."""
    for text in output(f"{PREFIX}objdump", "-dC", "--no-show-raw-insn", path).split("\n\n"):
        lines = re.findall(r"^ +([0-9a-f]+):\t(.*)$", text, re.MULTILINE)
        place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
        jumps = [
            (place[int(to, 16)], i)
            for i, (_, line) in enumerate(lines)
            for to in re.findall(r"^(?:b|cb|tb)[.nz\w]*\t(?:.*, )?([0-9a-f]+) <", line)
            if place.get(int(to, 16), i + 1) <= i
        ]
        for begin, end in jumps:
            if not any((begin, end) != other and begin <= other[0] and other[1] <= end for other in jumps):
                yield text.splitlines()[0], [line for _, line in lines[begin : end + 1]]


def test_the_loops_of_the_tiles_keep_their_sums_in_registers(kernel_objects):
    tiles = re.compile(r"(a8_tile|octets_tile|int8_a16_tile|float_tile|add_octets)<")
    found = set()
    for path in kernel_objects:
        for function, instructions in inner_loops(path):
            products = [i for i in instructions if re.match(r"(sdot|smlal2?|smmla|fmla)\t", i)]
            if len(products) >= 4 and tiles.search(function):
                found.add(tiles.search(function)[1])
                spilled = [i for i in instructions if re.match(r"(ldr|str|ldp|stp)\tq.*\[sp", i)]
                assert not spilled, (function, spilled)
    assert {"a8_tile", "octets_tile", "float_tile"} <= found
