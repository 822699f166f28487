"""The Triton kernels compiled ahead of time for GPUs that this machine lacks: they build, and what was
built has the instructions it is meant to have, fits, and spills nothing.
"""

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pyengine.kernels import linear, tuning

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that a program may have.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_kernel(kernel, target, pointers, **constants):
    """As a launch on aligned tensors with sizes that are multiples of 16 would."""
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    names = [parameter.name for parameter in kernel.params]
    signature = {
        parameter.name: "constexpr"
        if parameter.is_constexpr or parameter.name in constants
        else f"*{pointers[parameter.name]}"
        if parameter.name in pointers
        else "i32"
        for parameter in kernel.params
    }
    # M is any number, and TILES is a small one.
    aligned = [n for n in names if signature[n] != "constexpr" and n not in ("M", "TILES")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def sass(compiled, tmp_path):
    """The machine code of NVIDIA's, and (registers, bytes of stack, bytes of local memory)."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    command = [TOOLS / "cuobjdump", "-res-usage", "-sass", file]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout + done.stderr)
    return done.stdout, tuple(map(int, usage.groups()))


def main_loop(code):
    """The opcodes between the last backward branch that has matrix products, and its target."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", code, re.M)
    addresses = [int(address, 16) for address, _, _ in lines]
    loops = []
    for i, (address, opcode, rest) in enumerate(lines):
        to = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        if to and int(to[1], 16) < int(address, 16):
            body = [opcode for _, opcode, _ in lines[addresses.index(int(to[1], 16)) : i + 1]]
            if any("MMA" in opcode for opcode in body):
                loops.append(body)
    return min(loops, key=len)


def check(compiled, target, tmp_path, product):
    """product: what the matrix instruction is called, in PTX or in AMD's assembly."""
    assert compiled.metadata.shared <= SHARED[target]
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        assert int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1]) == 0
        assert product in text
        return None
    assert product in compiled.asm["ptx"]
    code, (_, stack, local) = sass(compiled, tmp_path)
    assert (stack, local) == (0, 0)
    assert not re.search(r"\b(LDL|STL)\b", code)
    # Weights and activations are copied 16 bytes at a time.
    assert re.search(r"LDGSTS[.\w]*\.128|LDG[.\w]*\.128", code)
    return code


INT8_PRODUCT = {"sm_80": "s32.s8.s8.s32", "sm_90": "s32.s8.s8", "gfx942": "v_mfma_i32"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", [limit or 4096 for limit in tuning.W8A8])
def test_w8a8(rows, target, tmp_path):
    pointers = {"x": "i8", "scale_x": "fp32", "weight": "i8", "scale_w": "fp32", "bias": "fp32", "y": "fp16"}
    compiled = compile_kernel(
        linear.linear_w8a8,
        target,
        pointers,
        SPAN=1 << 17,
        LONG=False,
        ACTIVATION="gelu",
        HAS_BIAS=True,
        **tuning.blocks(tuning.W8A8, rows, amd=target == "gfx942"),
    )
    code = check(compiled, target, tmp_path, INT8_PRODUCT[target])
    if target == "sm_80":
        assert not [opcode for opcode in main_loop(code) if opcode.startswith("PRMT")]


FLOAT_PRODUCT = {
    ("fp16", "sm_80"): "f32.f16.f16.f32",
    ("bf16", "sm_80"): "f32.bf16.bf16.f32",
    ("fp16", "sm_90"): "f32.f16.f16",
    ("bf16", "sm_90"): "f32.bf16.bf16",
    ("fp16", "gfx942"): "v_mfma_f32",
    ("bf16", "gfx942"): "v_mfma_f32",
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("group", "asymmetric"), [(128, False), (32, True)], ids=str)
def test_w4a16_of_float32(group, asymmetric, target, tmp_path):
    pointers = {"x": "fp32", "weight": "i16", "scale": "fp16", "zero": "fp16", "bias": "fp32", "y": "fp32"}
    compiled = compile_kernel(
        linear.linear_w4a16, target, pointers, GROUP=group, SLICES=min(group, 128) // 32,
        HAS_ZERO=asymmetric, ACTIVATION=None, HAS_BIAS=True, WHOLE=True, PTX=target != "gfx942",
        **({} if asymmetric else {"zero": None}),
        **tuning.blocks(tuning.W4A32, 4096, amd=target == "gfx942"),
    )  # fmt: skip
    check(compiled, target, tmp_path, "v_mfma_f32" if target == "gfx942" else "fma.rn.f32")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("group", "asymmetric"), [(128, False), (32, True), (0, False)], ids=str)
@pytest.mark.parametrize("rows", [limit or 4096 for limit in tuning.W4A16])
def test_w4a16(rows, group, asymmetric, dtype, target, tmp_path):
    pointers = {"x": dtype, "weight": "i16", "scale": "fp16", "bias": "fp32", "y": dtype}
    absent = {} if asymmetric else {"zero": None}
    blocks = tuning.blocks(tuning.W4A16, rows, amd=target == "gfx942")
    compiled = compile_kernel(
        linear.linear_w4a16, target, {**pointers, "zero": "fp16"}, GROUP=group,
        SLICES=min(group or 128, 128) // 32, HAS_ZERO=asymmetric, ACTIVATION=None, HAS_BIAS=True, WHOLE=True,
        PTX=target != "gfx942", **absent, **blocks,
    )  # fmt: skip
    code = check(compiled, target, tmp_path, FLOAT_PRODUCT[dtype, target])
    if code:
        loop = main_loop(code)
        # Scales and zero points are converted once per group; a weight is not.
        weights = blocks["BN"] * 128 // (32 * blocks["num_warps"])
        assert sum(bool(re.match("I2F|F2F|F2I|I2I", opcode)) for opcode in loop) <= weights // 8
        if (rows, dtype, target) == (16, "fp16", "sm_80"):
            # 2.7 instructions of the whole loop per weight, where the usual formulations take 8.
            assert (
                len(loop)
                <= {(0, False): 2.4, (128, False): 2.8, (32, True): 4.6}[group, asymmetric] * weights
            )


@pytest.mark.parametrize("target", TARGETS)
def test_quantize_rows(target):
    compiled = compile_kernel(
        linear.quantize_rows,
        target,
        {"x": "bf16", "codes": "i8", "scales": "fp32"},
        BLOCK=1024,
        num_warps=4,
        **tuning.ALWAYS,
    )
    if target != "gfx942":
        # The division is the exact one.
        assert "div.rn.f32" in compiled.asm["ptx"]
