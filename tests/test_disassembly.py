"""The inner loops of the built kernels keep their sums in registers, but for the known ones below."""

import itertools
import re
import shutil
import subprocess
from functools import cache

import pytest

from pyengine import _C
from pyengine.backends.cpu import ISAS

# What these promises were made with; another compiler allocates registers in its own way.
PINNED = "GCC: (Debian 12."
BUILT = sorted({isa for op, _, isa, _, _ in _C.kernels() if op == "linear"} - {"portable"}, key=ISAS.index)
FILE = _C.__file__
TILE = re.compile(r"(a8_tile|int8_a16_tile|int4_tile|nibble_tile|byte_tile|float_tile|amx_tiles)I")
VECTOR = re.compile(r"%[xyz]mm\d")
JUMP = re.compile(r"\t(j\w+) +([0-9a-f]+)")
ENDS = re.compile(r"\t(jmp|ret)\b")
# vmovq and vmovd carry general registers, which is no matter of ours.
SCALAR = re.compile(r"\tvmov[qd] ")


def output(tool, *flags):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed: apt-get install binutils")
    return subprocess.run([tool, *flags, FILE], capture_output=True, text=True, check=True).stdout


@cache
def functions():
    """{(file, mangled name): lines of disassembly} of the tiles: local symbols follow that of their file."""
    code = {}
    for line in output("objdump", "-d", "--no-show-raw-insn").splitlines():
        at = re.match(r" +([0-9a-f]+):\t", line)
        if at:
            code[int(at[1], 16)] = line
    addresses, tiles, file = sorted(code), {}, ""
    for line in output("readelf", "-sW").splitlines():
        fields = line.split()
        if len(fields) == 8 and fields[3] == "FILE":
            file = fields[7].removesuffix(".cpp")
        elif len(fields) == 8 and fields[3] == "FUNC" and TILE.search(fields[7]):
            begin = int(fields[1], 16)
            inside = (a for a in addresses if begin <= a < begin + int(fields[2], 0))
            tiles[file, fields[7]] = {a: code[a] for a in inside}
    return tiles


def reaches(lines, begin, end):
    """Whether control gets from one address to the other without leaving the range between them."""
    inside = [a for a in lines if begin <= a <= end]
    following = dict(itertools.pairwise(inside))
    seen, todo = set(), [begin]
    while todo:
        at = todo.pop()
        if at in seen or not begin <= at <= end:
            continue
        seen.add(at)
        jump = JUMP.search(lines[at])
        if jump:
            todo.append(int(jump[2], 16))
        if at in following and not ENDS.search(lines[at]):
            todo.append(following[at])
    return end in seen


def innermost_loops(lines):
    """Ranges of addresses from the target of a jump back to the jump, with no other such range inside. A jump
    back from code that stands out of line is no loop.
    """
    jumps = ((int(jump[2], 16), at) for at, line in lines.items() if (jump := JUMP.search(line)))
    loops = [(to, at) for to, at in jumps if to in lines and to <= at and reaches(lines, to, at)]
    return [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]


def spills(lines):
    """Vector instructions of innermost loops that read or write the stack."""
    framed = any("mov    %rsp,%rbp" in line for line in lines.values())
    stack = re.compile(r"\((%rsp|%rbp)[,)]" if framed else r"\(%rsp[,)]")
    return [
        line
        for begin, end in innermost_loops(lines)
        for at, line in lines.items()
        if begin <= at <= end and VECTOR.search(line) and stack.search(line) and not SCALAR.search(line)
    ]


# What is not yet so, in instructions of the worst tile. int8_a8 of AVX2 has eight sums and as many words for
# one row against four panels; two rows of 16-bit codes against two panels of nibbles want 17 registers.
KNOWN = {
    "avx2": {"a8_tile": 8, "int4_tile": 10},
}


@pytest.mark.parametrize("isa", BUILT)
def test_no_vector_register_is_spilled_in_an_inner_loop(isa):
    if PINNED not in output("readelf", "-p", ".comment"):
        pytest.skip("the extension was not built by the pinned compiler, Debian's g++ 12")
    tiles = {name: lines for (file, name), lines in functions().items() if file == isa}
    assert tiles
    assert all(innermost_loops(lines) for lines in tiles.values())
    worst = {}
    for name, lines in tiles.items():
        if count := len(spills(lines)):
            kernel = TILE.search(name)[1]
            worst[kernel] = max(count, worst.get(kernel, 0))
    assert worst == KNOWN.get(isa, {})
