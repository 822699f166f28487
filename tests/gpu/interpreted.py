"""The Triton kernels in Triton's interpreter, against the reference and against the CPU kernels."""

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES_OF_X,
    U32,
    arrays,
    assert_same_bits,
    assert_within,
    expected_linear,
    inputs,
    random_weight,
    rows_at_the_edges_of_codes,
    weight_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine import ops, reference
from pyengine.backends import triton
from pyengine.formats import ACTIVATIONS, parse_format
from pyengine.kernels import device
from pyengine.registry import Problem

# The largest and the smallest numbers are tried, and NumPy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
INT8, INT4 = triton.KERNELS
NIBBLES = (
    *("int4_g32", "int4_g64", "int4_g128", "int4_g256", "int4", "int3_g32", "int2_g64", "ternary"),
    *("uint4_g32", "uint4_g64", "uint4_g128", "uint4", "uint3_g32", "uint1_g32", "binary_g32", "int4_f16"),
)
# (M, K, N): a block and its neighbours, less than one, more rows than a block has, several tiles and a rest.
SHAPES = ((1, 128, 16), (5, 100, 17), (3, 31, 1), (1, 1, 33), (17, 300, 65), (2, 520, 70))


def run(kernel, x, weight, bias=None, activation=None):
    spec = ACTIVATIONS["a8" if kernel is INT8 else "float"]
    problem = Problem("linear", weight.format, spec, "cuda")
    assert kernel.serves(problem)
    y = kernel.bind(problem, weight.shape)(x, kernel.layout.pack(weight), bias, activation)
    return y, spec


def check(kernel, x, weight, bias=None, activation=None):
    y, spec = run(kernel, x, weight, bias, activation)
    assert y.dtype == x.dtype
    assert_within(y, *expected_linear(kernel, x, weight, bias, spec, activation))
    return y


def hostile_rows(k, largest=1e37):
    """NaN, infinity, denormals, zeros, one outlier, the largest and the smallest numbers."""
    x = inputs(9, k, seed=3)
    x[1, k // 2], x[2, 0], x[3, -1] = float("nan"), float("inf"), float("-inf")
    x[4], x[5], x[6, 0] = x[4] * 1e-40, 0.0, 1e4
    x[7], x[8] = x[7] * largest, x[8] * 1e-37
    return x


CASES = [("int8", INT8), ("int8_f16", INT8), *((name, INT4) for name in NIBBLES)]


@pytest.mark.parametrize("dtype", DTYPES_OF_X, ids=str)
@pytest.mark.parametrize(("name", "kernel"), CASES, ids=[name for name, _ in CASES])
def test_every_format_and_shape(name, kernel, dtype):
    format = parse_format(name)
    for m, k, n in SHAPES:
        check(kernel, inputs(m, k, dtype), random_weight(format, n, k), torch.randn(n))


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@pytest.mark.parametrize(("name", "kernel"), [("int8", INT8), ("uint4_g32", INT4)])
def test_epilogue(name, kernel, activation):
    weight, x = random_weight(parse_format(name), 33, 160), inputs(4, 160)
    for bias in (None, torch.randn(33), torch.randn(33).half(), torch.randn(66)[::2]):
        check(kernel, x, weight, bias, activation)


@pytest.mark.parametrize(("name", "kernel"), [("int8", INT8), ("int4_g32", INT4), ("uint4", INT4)])
def test_hostile_values(name, kernel):
    weight = random_weight(parse_format(name), 20, 200)
    weight.scale[3], weight.scale[4] = 0.0, torch.finfo(weight.scale.dtype).max
    # A group's sum is scaled at its end: codes times x must add up in float32 before.
    check(kernel, hostile_rows(200, 1e37 if kernel is INT8 else 1e30), weight)


@pytest.mark.parametrize(("name", "kernel"), [("int8", INT8), ("uint4_g32", INT4)])
def test_empty(name, kernel):
    format = parse_format(name)
    for m, k, n in ((0, 64, 16), (2, 64, 0), (2, 0, 3)):
        y, _ = run(kernel, torch.ones(m, k), random_weight(format, n, k), torch.arange(float(n)))
        assert y.tolist() == torch.arange(float(n)).expand(m, n).tolist()
    y, _ = run(kernel, inputs(6, 64).view(2, 3, 64), random_weight(format, 16, 64))
    assert_same_bits(y.view(6, 16), run(kernel, inputs(6, 64), random_weight(format, 16, 64))[0])


@pytest.mark.parametrize("kind", ["full", "extreme", "lowest", "small"])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 31, 1), (7, 333, 35), (40, 1024, 16)])
def test_integer_sums_equal_those_of_the_cpu(m, k, n, kind):
    weight = random_weight(parse_format("int8"), n, k, kind=kind)
    generator = torch.Generator().manual_seed(m)
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
    if kind == "extreme":
        x = torch.where(x < 0, -127, 127).to(torch.int8)
    y = torch.full((m, n), 7, dtype=torch.int32)
    triton.linear_into(y, INT8, weight.format, x, INT8.layout.pack(weight), weight.shape)
    assert torch.equal(y, ops.linear_int32(x, weight))


def test_sums_beyond_int32_are_split(monkeypatch):
    monkeypatch.setattr(triton, "SPAN", 256)
    weight, x = random_weight(parse_format("int8"), 17, 700), inputs(5, 700)
    y, _ = run(INT8, x, weight)
    q, scale_x = reference.quantize_rows(x.numpy())
    codes, scale, *_ = arrays(weight)
    spans = [
        q[:, k : k + 256].astype(np.int64) @ (codes[:, k : k + 256].astype(np.int64) - 128).T
        for k in (0, 256, 512)
    ]
    factor = scale_x.astype(np.float64)[:, None] * scale[:, 0]
    # To float, scale * scale, product, three additions.
    bound = 6 * U32 * sum(map(np.abs, spans)) * factor
    assert_within(y, sum(spans) * factor, bound)


def test_a_span_holds_the_largest_codes():
    assert triton.SPAN * 127 * 128 < 2**31
    k = triton.SPAN
    weight = weight_of(parse_format("int8"), np.full((1, k), -128), [[1.0]])
    y = torch.zeros(1, 1, dtype=torch.int32)
    x = torch.full((1, k), 127, dtype=torch.int8)
    triton.linear_into(y, INT8, weight.format, x, INT8.layout.pack(weight), weight.shape)
    assert y.item() == -128 * 127 * k


def test_rows_are_quantized_as_the_reference_says():
    for x in (
        rows_at_the_edges_of_codes(ACTIVATIONS["a8"]),
        hostile_rows(100),
        inputs(3, 1030),
        hostile_rows(40).half().float(),
    ):
        codes, scale = triton.quantize_rows(x, -(-x.shape[1] // 128) * 128)
        expected, expected_scale = reference.quantize_rows(x.numpy())
        np.testing.assert_array_equal(codes[:, : x.shape[1]].numpy(), expected)
        assert not codes[:, x.shape[1] :].any()
        np.testing.assert_array_equal(scale.numpy().view(np.uint32)[~np.isnan(expected_scale)],
                                      expected_scale.view(np.uint32)[~np.isnan(expected_scale)])  # fmt: skip
        np.testing.assert_array_equal(np.isnan(scale.numpy()), np.isnan(expected_scale))


def test_a_row_does_not_depend_on_its_batch():
    weight, x = random_weight(parse_format("int8"), 40, 300), inputs(40, 300)
    whole, _ = run(INT8, x, weight)
    for rows in (slice(3, 4), slice(0, 17), slice(5, 40)):
        assert_same_bits(whole[rows], run(INT8, x[rows], weight)[0])


@pytest.mark.parametrize(("name", "kernel"), [("int8", INT8), ("int4_g32", INT4), ("uint4", INT4)])
def test_nothing_beyond_the_tensors_is_read_or_written(name, kernel):
    weight, spec = random_weight(parse_format(name), 19, 70), ACTIVATIONS["a8" if kernel is INT8 else "float"]
    problem, x = Problem("linear", weight.format, spec, "cuda"), inputs(3, 70)
    layout = kernel.layout.pack(weight)

    def between(tensor, filling):
        """A copy of the tensor in the middle of memory full of the filling."""
        whole = torch.full((tensor.numel() + 8192,), filling, dtype=tensor.dtype)
        whole[4096:-4096] = tensor.reshape(-1)
        return whole, whole[4096:-4096].view(tensor.shape)

    _, surrounded = between(x, float("nan"))
    _, layout_inside = between(layout, 0xFF)
    memory, y = between(torch.zeros(3, 19), 5.0)
    launch = kernel.bind.args[0]
    launch(problem, surrounded, layout_inside, None, y, weight.shape, None)
    assert_same_bits(y, run(kernel, x, weight)[0])
    assert (memory[:4096] == 5).all()
    assert (memory[-4096:] == 5).all()


@settings(max_examples=40)
@given(data=st.data())
def test_anything(data):
    name, kernel = data.draw(st.sampled_from(CASES))
    m, n = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 90))
    k = data.draw(st.integers(1, 400))
    x = inputs(m, k, data.draw(st.sampled_from(DTYPES_OF_X)), seed=data.draw(st.integers(0, 99)))
    x = x * 10 ** data.draw(st.integers(-3, 3))
    activation = data.draw(st.sampled_from((None, "relu", "gelu", "silu")))
    bias = torch.randn(n) if data.draw(st.booleans()) else None
    check(kernel, x, random_weight(parse_format(name), n, k, seed=m), bias, activation)


# ---- what the interpreter does not run ---------------------------------------------------------------------


def halves(kind, words):
    """The two numbers in each register, in float64: the low half first."""
    parts = np.stack((words & 0xFFFF, words >> 16), -1).astype(np.uint16)
    if kind == "f16x2":
        return parts.view(np.float16).astype(np.float64)
    return (parts.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def registers(kind, numbers):
    if kind == "f16x2":
        parts = numbers.astype(np.float16).view(np.uint16)
    else:
        parts = (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        np.testing.assert_array_equal(halves(kind, parts[..., 0].astype(np.uint32))[..., 0], numbers[..., 0])
    return parts[..., 0].astype(np.uint32) | parts[..., 1].astype(np.uint32) << 16


def execute(ptx, kind, word):
    """$0 of a few lines of PTX, for an array of $1."""

    def lop3(a, b, c, table):
        assert (table == 0xEA).all()
        return (a & b) | c

    def fma(a, b, c):
        return registers(kind, halves(kind, a) * halves(kind, b) + halves(kind, c))

    operations = {
        "mov.b32": lambda a: a,
        "shr.u32": lambda a, b: a >> b,
        "lop3.b32": lop3,
        f"sub.{kind}": lambda a, b: registers(kind, halves(kind, a) - halves(kind, b)),
        f"fma.rn.{kind}": fma,
    }
    values = {"$1": word}
    for line in filter(None, (part.strip() for part in ptx.strip("{} ").split(";"))):
        opcode, _, operands = line.partition(" ")
        if opcode == ".reg":
            continue
        target, *sources = [operand.strip() for operand in operands.split(",")]
        arguments = [values[s] if s in values else np.full_like(word, int(s, 0)) for s in sources]
        values[target] = operations[opcode](*arguments)
    return values["$0"]


@pytest.mark.parametrize(
    ("kind", "planes"), [("f16x2", device.FLOAT16_PLANES), ("bf16x2", device.BFLOAT16_PLANES)]
)
def test_ptx_and_its_twin_unpack_alike(kind, planes):
    """Every word, beside another one in the register."""
    words = np.arange(1 << 16, dtype=np.uint32)
    others = words[::-1] * 40503 & 0xFFFF
    for j, ptx in enumerate(planes.value):
        got = halves(kind, execute(ptx, kind, words | others << 16))
        for half, word in enumerate((words, others)):
            np.testing.assert_array_equal(got[:, half], (word >> 4 * j & 15).astype(np.int64) - 8)
