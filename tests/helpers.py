"""What the tests of the lower floors share: weights of every kind, computed error bounds, bare kernel calls,
and memory that ends at a page nobody may touch."""

import ctypes
import mmap
import os
import signal
import sys
import traceback

import numpy as np
import pytest
import torch

from pyengine import _C, ops, reference
from pyengine.backends import cpu
from pyengine.backends import torch as generic
from pyengine.formats import ACTIVATIONS, FORMATS, parse_format
from pyengine.packed import DTYPES, PackedWeight, pack_codes
from pyengine.registry import Problem

DTYPES_OF_X = (torch.float32, torch.bfloat16, torch.float16)
EVERY_FORMAT = {
    name: parse_format(name) for name in (*FORMATS, "int8_f16", "int8_g32_f32", "uint4_g32_zf32", "int3")
}
# Two lengths of groups whose zero points are not whole: kernels treat them differently.
COMPILED_FORMATS = {**FORMATS, **{name: parse_format(name) for name in ("uint4_g32_zf32", "uint3_g64_zf32")}}
# Of the generic backend, which serves everything, these stand for all.
GENERIC_FORMATS = (
    "int4_g32",
    "uint4_g128",
    "uint3_g32",
    "int8_g32",
    "ternary",
    "binary_g32",
    "uint4_g32_zf32",
)

U32 = 2.0**-24  # unit roundoff of float32: half the distance from 1 to the next number
TINY32 = 2.0**-149  # the smallest denormal: what a product or quotient may lose by underflow, twice over
UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of the cast from float32
TINY = {torch.float32: 0.0, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


def kernel_cases(op, *, integer=False):
    """(kernel, format, input_spec) of every kernel in the tables that serves it: a new row brings its own
    tests.

    integer: only kernels with exact sums of codes.
    """
    cases = []
    for kernel in (*cpu.SUPPORTED, *generic.KERNELS):
        for name, format in COMPILED_FORMATS.items() if not kernel.fallback else EVERY_FORMAT.items():
            for spec in ACTIVATIONS.values():
                if kernel.op != op or not kernel.serves(Problem(op, format, spec, "cpu")):
                    continue
                if kernel.fallback and (
                    integer or name not in GENERIC_FORMATS or (op == "embedding" and spec.bits)
                ):
                    continue
                if integer and (not spec.bits or format.zero_dtype == "float32"):
                    continue
                label = f"{kernel.name}-{name}" + (f"-{spec.name}" if kernel.fallback else "")
                cases.append(pytest.param(kernel, format, spec, id=label))
    return cases


# ---- weights -----------------------------------------------------------------------------------------------


def weight_of(format, values, scale):
    """A symmetric weight from what its codes stand for."""
    codes = torch.as_tensor(values) + 2 ** (format.bits - 1)
    scale = (
        torch.as_tensor(scale)
        .to(DTYPES[format.scale_dtype])
        .expand(len(codes), format.groups(codes.shape[1]))
    )
    return PackedWeight(
        format, tuple(codes.shape), pack_codes(codes.to(torch.uint8), format.bits), scale.contiguous()
    )


def random_weight(format, n, k, seed=0, kind="full"):
    """kind, for 8-bit codes: full: every code, also the -128 of imported weights. small: up to 63.
    extreme: -127 and 127. lowest: -128 throughout.
    """
    rng = np.random.default_rng([n, k, seed])
    top = 3 if format.encoding == "ternary" else 2**format.bits
    codes = rng.integers(0, top, (n, k))
    if format.encoding == "int" and format.bits == 8 and kind != "full":
        sign = rng.choice([-1, 1], (n, k))
        codes = (
            128
            + {
                "small": lambda: rng.integers(-63, 64, (n, k)),
                "extreme": lambda: 127 * sign,
                "lowest": lambda: np.full((n, k), -128),
            }[kind]()
        )
    shape = n, format.groups(k)
    # Scales such that the weights are of the size of one, with room for float16.
    scale = torch.from_numpy(rng.uniform(0.5, 1.5, shape) / max(top / 2, 1)).to(DTYPES[format.scale_dtype])
    zero = None
    if format.zero_dtype is not None:
        zero = torch.from_numpy(rng.integers(0, top, shape)).to(DTYPES[format.zero_dtype])
        zero = zero + 0.25 if zero.is_floating_point() else zero
    packed = pack_codes(torch.from_numpy(codes.astype(np.uint8)), format.bits)
    return PackedWeight(format, (n, k), packed, scale, zero)


def arrays(weight):
    """The arguments (codes, scale, zero, format) of the functions of reference.py, unpacked by
    reference.py."""
    codes = reference.unpack_codes(weight.qdata.numpy(), weight.format.bits, weight.shape[1])
    zero = None if weight.zero is None else weight.zero.numpy()
    return codes, weight.scale.numpy(), zero, weight.format


def inputs(m, k, dtype=torch.float32, seed=0):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(1000 * m + k + seed)).to(dtype)


def rows_at_the_edges_of_codes(spec, count=200):
    """(count, 382): an amax each, and the floats around amax * (j + 1/2) / largest for 127 codes j, where one
    rounding decides the code."""
    amax = np.linspace(1, 2, count, dtype=np.float32)[:, None]
    edges = np.arange(0, spec.largest, spec.largest // 127)[:127] + 0.5
    edge = (amax.astype(np.float64) * edges / spec.largest).astype(np.float32)
    around = [np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.float32(3))]
    return torch.from_numpy(np.concatenate([amax, *around], axis=1))


# ---- comparison --------------------------------------------------------------------------------------------


def expected_linear(kernel, x, weight, bias=None, spec=ACTIVATIONS["float"], activation=None):
    """(y, bound): the reference in float64, and how far a kernel may be away from it.

    The bound is the standard one of error analysis: a sum of n terms that takes n + c float32 operations is
    off by at most (n + c) * U32 * (the sum of the terms' magnitudes), to first order. Integer sums are
    exact, so that there only their segments count as terms.
    """
    codes, scale, zero, format = arrays(weight)
    rows = x.float().numpy()
    k = codes.shape[1]
    with np.errstate(all="ignore"):
        floats = reference.dequantize(codes, scale, zero, format).astype(np.float64)
        if spec.bits and not kernel.fallback:
            q, scale_x = reference.quantize_rows(rows, spec)
            sums = np.abs(reference.linear_int32(q, codes, format, zero, spec))
            groups = [group for group, _, _ in reference.segments(format, k, spec)]
            factors = scale_x[:, None, None] * scale.astype(np.float64)[:, groups]
            size = (sums * factors).sum(-1)
            # To float, scale * scale, product; additions of segments.
            steps = 3 + sums.shape[-1]
            lost = TINY32 * (sums.sum(-1) + steps)  # scale * scale underflows, and is multiplied by the sum
        elif spec.bits:
            q, scale_x = reference.quantize_rows(rows, spec)
            size = np.abs(q).astype(np.float64) @ np.abs(floats).T * scale_x[:, None]
            steps = k + 4
            lost = TINY32 * (np.abs(q).sum(1, dtype=np.float64)[:, None] + steps) * (1 + scale_x[:, None])
        else:
            wide = np.abs(rows.astype(np.float64))
            size = wide @ np.abs(floats).T
            steps = 2 * k + 4  # a multiplication and an addition each, where they are not fused
            lost = TINY32 * (wide.sum(1)[:, None] + steps * (1 + scale.max(initial=0)))
        bound = steps * U32 * size + lost
        biased = None if bias is None else bias.float().numpy()
        y = reference.linear(rows, *arrays(weight), bias=biased, input_spec=spec)
        bound = bound + U32 * np.abs(y) * 1.01
        if activation in ("gelu", "silu"):
            # Neither is steeper than 1.13, and the kernels approximate erf and exp to better than 1e-6.
            bound = 1.13 * bound + 1e-6 * np.abs(y)
        y = reference.activate(y, activation)
        bound = 1.01 * (bound + UNIT[x.dtype] * np.abs(y) + TINY[x.dtype])
    return y, bound


def assert_within(y, expected, bound):
    """|y - expected| <= bound; NaN where NaN is expected; infinity where y's dtype ends."""
    got = y.detach().to(torch.float64).numpy()
    assert got.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    limit = torch.finfo(y.dtype).max
    with np.errstate(invalid="ignore"):
        beyond = np.isinf(expected) | (np.abs(expected) - bound > limit)
        near = ~beyond & (np.abs(expected) + bound >= limit)
        np.testing.assert_array_equal(got[beyond], np.sign(expected[beyond]) * np.inf)
        inside = ~(beyond | near | np.isnan(expected))
        excess = np.abs(got - expected)[inside] - bound[inside]
    assert not (excess > 0).any(), f"up to {excess.max():.3g} beyond the bound, {np.sum(excess > 0)} elements"


def assert_same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert (
        a.detach()
        .contiguous()
        .view(-1)
        .view(torch.uint8)
        .equal(b.detach().contiguous().view(-1).view(torch.uint8))
    )


# ---- kernels -----------------------------------------------------------------------------------------------


def run_linear(kernel, x, weight, bias=None, spec=ACTIVATIONS["float"], activation=None):
    """y by the kernel of that name, through the door that layers use."""
    prepared, layout = ops.prepare("linear", weight, spec, kernel=kernel.name)
    assert prepared.kernel is kernel
    return ops.linear_prepared(x, layout, bias, prepared, activation)


INDEX = {f"{op}_{variant}_{isa}": index for op, variant, isa, index, _ in _C.kernels()}


# ---- processes ---------------------------------------------------------------------------------------------


def in_child(function, seconds=60):
    """Runs function() in a forked child and fails if that raises, crashes or hangs.

    The child must not let torch use threads: its pool does not survive a fork.
    """
    sys.stdout.flush()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, (
        f"the child died of {signal.Signals(-code).name}" if code < 0 else "the child raised, see above"
    )


def guarded(content, *, at_end):
    """The address of a copy of a tensor's or array's bytes that ends (or begins) at a page without access,
    and the bytes themselves. An access beyond it kills the process. The memory is never freed: meant for
    children."""
    content = content.contiguous().view(-1).view(torch.uint8).numpy() if torch.is_tensor(content) else content
    page = mmap.PAGESIZE
    inner = max(1, -(-content.nbytes // page)) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (start, start + page + inner):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0, os.strerror(
            ctypes.get_errno()
        )
    offset = page + (inner - content.nbytes if at_end else 0)
    view = np.frombuffer(memory, np.uint8, content.nbytes, offset)
    view[:] = content.view(np.uint8).reshape(-1)
    return start + offset, view
