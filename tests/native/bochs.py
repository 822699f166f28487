"""Runs calls of the driver's AVX-512 kernels inside BochsCPU, on the same memory at the same addresses.

By hand: python tests/native/bochs.py FOLDER/driver.so avx512vnni FIRST COUNT [VARIANT]
"""

import ctypes
import sys
import time
from pathlib import Path

import bochscpu
import bochscpu.cpu
import bochscpu.memory

PAGE = 4096
VARIANTS = ("int8", "int8_a8", "int8_a16", "int4", "int4_a8", "int4_a16")
PAGE_FAULT = 14
# CR0: the coprocessor is there. CR4: SSE and XSAVE are on. XCR0: x87, SSE, AVX, masks, both parts of ZMM.
MONITOR, EMULATE = 1 << 1, 1 << 2
OSFXSR, OSXMMEXCPT, OSXSAVE = 1 << 9, 1 << 10, 1 << 18
STATE = 0xE7


class Call(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("phase", "args", "begin", "end")]


class Range(ctypes.Structure):
    _fields_ = [("at", ctypes.c_uint64), ("bytes", ctypes.c_uint64)]


class Emulator:
    """A processor whose virtual addresses are those of this process, of the pages that map() was told."""

    def __init__(self):
        self.session = bochscpu.Session()
        self.session.missing_page_handler = lambda address: self.session.stop()
        self.tables = bochscpu.memory.PageMapLevel4Table()
        self.root, self.next_page = 0x10_0000, 0x1000_0000
        self.mapped, self.committed = {}, 0
        self.stack = ctypes.create_string_buffer(1 << 20)
        # The return address of a call: a page of HLT instructions.
        self.halt = ctypes.create_string_buffer(b"\xf4" * 2 * PAGE, 2 * PAGE)
        self.map(ctypes.addressof(self.stack), len(self.stack))
        self.map(ctypes.addressof(self.halt), len(self.halt))
        # With their data, which goes on in memory without a name. memcpy and memset are in libc.
        named = False
        for line in Path("/proc/self/maps").read_text().splitlines(keepends=True):
            fields = line.split()
            file = fields[5].rsplit("/")[-1] if len(fields) > 5 else ""
            named = file.startswith(("driver.so", "libc.", "libc-")) or (named and not file)
            if named and fields[1][0] == "r":
                begin, end = (int(address, 16) for address in fields[0].split("-"))
                self.map(begin, end - begin, writable="w" in fields[1])

    def map(self, begin, count, writable=True):
        for at in range(begin // PAGE * PAGE, begin + count, PAGE):
            if at not in self.mapped:
                self.mapped[at] = self.next_page
                self.tables.insert(at, self.next_page, int(writable))
                bochscpu.memory.page_insert(self.next_page, at)
                self.next_page += PAGE

    def call(self, function, *arguments):
        if self.committed != len(self.mapped):
            for host, guest in self.tables.commit(self.root):
                bochscpu.memory.page_insert(guest, host)
            self.committed = len(self.mapped)
        state = bochscpu.State()
        bochscpu.cpu.set_long_mode(state)
        state.cr0 = (state.cr0 | MONITOR) & ~EMULATE
        state.cr4 |= OSFXSR | OSXMMEXCPT | OSXSAVE
        state.xcr0, state.cr3, state.rflags = STATE, self.root, 2
        state.mxcsr, state.mxcsr_mask, state.fpcw, state.fptw = 0x1F80, 0xFFFF, 0x37F, 0xFFFF
        # Ring 0, where HLT is allowed.
        state.cs = segment(0x10, 0x209B)
        state.ds = state.ss = state.es = state.fs = state.gs = segment(0x18, 0xC93)
        top = (ctypes.addressof(self.stack) + len(self.stack) - PAGE) // 64 * 64 - 8
        ctypes.c_uint64.from_address(top).value = ctypes.addressof(self.halt) // PAGE * PAGE + PAGE
        state.rsp, state.rip = top, function
        for register, value in zip(("rdi", "rsi", "rdx"), arguments, strict=True):
            setattr(state, register, value)
        self.session.cpu.state = state
        trouble = ["stopped without a reason"]

        def on_exception(session, cpu, vector, error):
            now = session.cpu.state
            trouble[0] = f"exception {vector} at {now.rip:#x}"
            trouble[0] += f", of address {now.cr2:#x}" if vector == PAGE_FAULT else ""
            session.stop()

        def on_halt(session, cpu):
            trouble[0] = ""
            session.stop()

        hook = bochscpu.Hook()
        hook.exception, hook.hlt = on_exception, on_halt
        self.session.run([hook])
        return trouble[0]


def segment(selector, attributes):
    part = bochscpu.Segment()
    part.present, part.selector, part.base, part.limit, part.attr = True, selector, 0, 0xFFFFFFFF, attributes
    return part


def several(kind, function, case):
    """The array that a function of the driver fills."""
    count = function(case, None, 0)
    values = (kind * count)()
    function(case, values, count)
    return values


def main(path, isa, first, count, variants=VARIANTS):
    driver = ctypes.CDLL(path)
    driver.linear_case.restype = ctypes.c_void_p
    driver.linear_case.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64]
    for function in (driver.linear_case_calls, driver.linear_case_memory):
        function.restype, function.argtypes = (
            ctypes.c_uint64,
            [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64],
        )
    driver.linear_case_finish.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64]
    driver.linear_case_finish.restype = None

    emulator, cases, failures, begun = Emulator(), 0, 0, time.perf_counter()
    text = ctypes.create_string_buffer(1000)
    for seed in range(first, first + count):
        for variant in variants:
            case = driver.linear_case(isa.encode(), variant.encode(), seed)
            if not case:
                continue
            for part in several(Range, driver.linear_case_memory, case):
                emulator.map(part.at, part.bytes)
            trouble = ""
            for call in several(Call, driver.linear_case_calls, case):
                trouble = trouble or emulator.call(call.phase, call.args, call.begin, call.end)
            driver.linear_case_finish(case, text, len(text))
            wrong = trouble or text.value.decode()
            cases, failures = cases + 1, failures + bool(wrong)
            if wrong and failures <= 10:
                print(f"{variant} {isa} case {seed}: {trouble}\n{text.value.decode()}")
    print(f"{isa}: {cases} cases, {failures} failed, {time.perf_counter() - begun:.1f} s in BochsCPU")
    return int(failures > 0 or cases == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:] or VARIANTS))
