"""Every linear kernel of the tables against reference.py: integers by equality, floats by computed bounds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES_OF_X,
    EVERY_FORMAT,
    arrays,
    assert_same_bits,
    assert_within,
    expected_linear,
    in_child,
    inputs,
    kernel_cases,
    random_weight,
    rows_at_the_edges_of_codes,
    run_linear,
    weight_of,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyengine import _C, ops, reference
from pyengine.backends import cpu
from pyengine.formats import ACTIVATIONS, WeightFormat, parse_format
from pyengine.packed import PackedWeight
from pyengine.registry import Problem

pytestmark = pytest.mark.usefixtures("poisoned")

CASES = kernel_cases("linear")
INTEGER_CASES = kernel_cases("linear", integer=True)
COMPILED_CASES = [case for case in CASES if not case.values[0].fallback]
kernels = pytest.mark.parametrize(("kernel", "format", "spec"), CASES)
integer_kernels = pytest.mark.parametrize(("kernel", "format", "spec"), INTEGER_CASES)
# Of the formats that can hold any small whole number with one scale.
symmetric_kernels = pytest.mark.parametrize(
    ("kernel", "format", "spec"), [case for case in INTEGER_CASES if case.values[1].encoding == "int"]
)
compiled_kernels = pytest.mark.parametrize(("kernel", "format", "spec"), COMPILED_CASES)
INT8 = parse_format("int8")


def test_the_tables_hold_kernels_of_every_supported_instruction_set():
    supported = {isa for op, _, isa, _, runs in _C.kernels() if runs and op == "linear"}
    assert {case.values[0].isa for case in INTEGER_CASES} == supported
    assert {case.values[0].isa for case in CASES} == supported | {"torch"}


# ---- integer sums ------------------------------------------------------------------------------------------


def random_codes(m, k, spec, seed=0, extreme=False):
    rng, top = np.random.default_rng([m, k, seed]), spec.largest
    codes = rng.choice([-top, top], (m, k)) if extreme else rng.integers(-top, top + 1, (m, k))
    return codes.astype(f"int{spec.bits}")


def assert_exact(kernel, weight, q, rows):
    codes, _, zero, format = arrays(weight)
    expected = reference.linear_int32(q, codes, format, zero).sum(-1)
    for m in rows:
        sums = ops.linear_int32(torch.from_numpy(q[:m]), weight, kernel=kernel.name)
        assert sums.dtype == torch.int32
        np.testing.assert_array_equal(sums.numpy(), expected[:m])


KINDS = ("full", "small", "extreme", "lowest")


def kinds_of(format):
    """Of the weights that random_weight() makes: they differ for signed codes of 8 bits only."""
    return KINDS if format.encoding == "int" and format.bits == 8 else KINDS[:1]


@pytest.mark.parametrize(
    ("kernel", "format", "spec", "kind", "k"),
    [
        pytest.param(*case.values, kind, k, id=f"{case.id}-{kind}-{k}")
        for case in INTEGER_CASES
        for kind in kinds_of(case.values[1])
        for k in ((1, 7, 8, 31, 33, 100, 1100) if kind == "full" else (7, 33, 1100))
    ],
)
def test_integer_sums_equal_the_reference(kernel, format, spec, kind, k):
    """More shapes than here go through tests/native."""
    k = min(k, spec.span)
    for n in (1, 17, 65):
        q = random_codes(7, k, spec, seed=n, extreme=kind != "full")
        assert_exact(kernel, random_weight(format, n, k, kind=kind), q, rows=range(8) if k < 1000 else (1, 7))


@integer_kernels
@given(
    m=st.integers(0, 9),
    k=st.integers(1, 70),
    n=st.integers(0, 70),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
def test_integer_sums_equal_the_reference_at_any_shape(kernel, format, spec, m, k, n, kind, seed):
    assert_exact(kernel, random_weight(format, n, k, seed, kind), random_codes(m, k, spec, seed), rows=[m])


CODES = st.lists(st.integers(-128, 127), min_size=16, max_size=16)


@integer_kernels
@given(values=CODES, size=st.floats(0.5, 1.5), flip=st.integers(0, 2**16 - 1))
@example(values=[-128] * 16, size=1.0, flip=0)
@example(values=[127] * 16, size=1.0, flip=0)
@example(values=[1] * 16, size=1.5, flip=0)
@example(values=[90, 0, 0, 0] * 4, size=1.0, flip=0)
def test_sixteen_codes_never_overflow(kernel, format, spec, values, size, flip):
    """Activations proportional to the weights, up to the most that their squares allow: `size` 1 is the limit
    of csrc/kernels/linear/panels.h, up to which eight products are added in 16 bits."""
    weight = weight_of(format, [values], [[1.0]]) if format == INT8 else random_weight(format, 1, 16)
    t = np.maximum(np.abs(values), np.abs(np.invert(values))).reshape(4, 2, 2)
    row = size * 32767 / (t**2).sum((0, 2))[:, None] * t
    row = np.minimum(np.rint(row), min(spec.largest, 127))
    signs = [1 if (v >= 0) ^ (flip >> i & 1) else -1 for i, v in enumerate(values)]
    q = (row.reshape(1, 16) * signs).astype(f"int{spec.bits}")
    assert_exact(kernel, weight, q, rows=[1])
    assert_exact(kernel, weight, np.full((1, 16), spec.largest, q.dtype) * np.array(signs, q.dtype), rows=[1])


@pytest.mark.parametrize("sign", [-1, 1])
@integer_kernels
def test_the_longest_sum_of_the_largest_products_fits_int32(kernel, format, spec, sign):
    """Weights of -128, where the format has them, times codes of one sign."""
    weight = random_weight(format, 1, spec.span, kind="lowest")
    q = np.full((4, spec.span), sign * spec.largest, f"int{spec.bits}")
    assert_exact(kernel, weight, q, rows=[1, 4])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 9, dtype=torch.int8), "K=8"),
        (torch.zeros(8, dtype=torch.int8), "K=8"),
        (torch.zeros(2, 8), "torch.float32"),
        (torch.full((2, 8), -128, dtype=torch.int8), "-128"),
        (torch.zeros(2, 9, dtype=torch.int16), "K=8"),
        (torch.full((2, 8), -32768, dtype=torch.int16), "-32768"),
    ],
)
def test_linear_int32_refuses_what_has_no_exact_sum(x, message):
    with pytest.raises(ValueError, match=message):
        ops.linear_int32(x, random_weight(INT8, 3, 8))


def test_linear_int32_without_an_integer_kernel_raises_not_implemented():
    weight = random_weight(EVERY_FORMAT["uint4_g32_zf32"], 3, 8)
    with pytest.raises(NotImplementedError, match="uint4_g32_zf32"):
        ops.linear_int32(torch.zeros(2, 8, dtype=torch.int8), weight)


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("value", [127, -128, -1])
@symmetric_kernels
def test_k_beyond_the_int32_bound_gives_the_right_float_answer(kernel, format, spec, value, m):
    k, lowest = 140_000, -(2 ** (format.bits - 1))
    weight = weight_of(format, np.full((2, k), min(max(value, lowest), -lowest - 1)), [[0.01], [0.02]])
    x = torch.ones(m, k)
    assert_within(run_linear(kernel, x, weight, None, spec), *expected_linear(kernel, x, weight, None, spec))
    codes = torch.ones(1, k, dtype=getattr(torch, f"int{spec.bits}"))
    with pytest.raises(ValueError, match={8: "131072", 16: "512"}[spec.bits]):
        ops.linear_int32(codes, weight, kernel=kernel.name)


# ---- the row quantizer -------------------------------------------------------------------------------------


def quantized_by(kernel, x, format, spec):
    """codes * scale of each row of x, as float32: what a kernel makes of an identity matrix with scales of
    one."""
    k = x.shape[1]
    identity = weight_of(format, torch.eye(k, dtype=torch.int64), [[1.0]])
    _, layout = ops.prepare("linear", identity, spec, kernel=kernel.name)
    y = x.new_empty((len(x), k), dtype=torch.float32)
    return cpu.linear_into(y, kernel, format, x.contiguous(), layout, (k, k))


def assert_quantizes_like_the_reference(kernel, x, format, spec):
    q, scale = reference.quantize_rows(x.float().numpy(), spec)
    # The product of a code and a scale names the code: one multiplication in float32, rounded as the
    # kernel's.
    with np.errstate(over="ignore"):
        expected = q.astype(np.float32) * scale[:, None]
    np.testing.assert_array_equal(quantized_by(kernel, x, format, spec).numpy(), expected)


any_float = st.one_of(
    st.floats(width=32),
    st.sampled_from(
        [
            *(0.0, 127.0, 0.5, 1.5, -2.5, 63.5, 1e-45, 3.7e-37, 3.8e-37, 3e38, float("inf"), float("nan")),
            *(32767.0, -32767.0, 16383.5, 9.6e-35, 9.7e-35),
        ]
    ),
    st.integers(-254, 254).map(lambda i: i / 2),
)


@symmetric_kernels
@given(data=st.data(), k=st.sampled_from([1, 7, 8, 31, 32, 33, 70]))
def test_row_quantizer_equals_the_reference_to_the_bit(kernel, format, spec, data, k):
    rows = data.draw(st.lists(st.lists(any_float, min_size=k, max_size=k), min_size=1, max_size=3))
    assert_quantizes_like_the_reference(kernel, torch.tensor(rows, dtype=torch.float32), format, spec)


@pytest.mark.parametrize("dtype", DTYPES_OF_X)
@symmetric_kernels
def test_row_quantizer_equals_the_reference_on_many_rows(kernel, format, spec, dtype):
    """Rows of random numbers of every size, and 16-bit numbers of every exponent, NaN and infinity
    included."""
    x = inputs(2000, 33) * torch.logspace(-37, 36, 2000)[:, None]
    if dtype != torch.float32:
        bits = torch.randint(-(2**15), 2**15, (2000, 33), generator=torch.Generator().manual_seed(1))
        x = torch.cat([x.to(dtype), bits.to(torch.int16).view(dtype)])
    assert_quantizes_like_the_reference(kernel, x.to(dtype), format, spec)


@symmetric_kernels
def test_row_quantizer_equals_the_reference_at_the_edges_of_codes(kernel, format, spec):
    assert_quantizes_like_the_reference(kernel, rows_at_the_edges_of_codes(spec), format, spec)


@symmetric_kernels
def test_halves_round_to_even(kernel, format, spec):
    x = torch.tensor([[spec.largest, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5, -126.5]])
    expected = [[spec.largest, 0, 2, 2, 0, -2, -2, 126, 126, -126]]
    assert quantized_by(kernel, x, format, spec).tolist() == expected


# ---- float outputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        *((activation, torch.float32) for activation in (None, "relu", "gelu", "silu")),
        *[("gelu", torch.bfloat16), ("silu", torch.float16)],
    ],
    ids=str,
)
@kernels
def test_outputs_are_within_the_bound(kernel, format, spec, activation, dtype):
    for m, k, n in ((1, 33, 17), (3, 7, 1), (4, 100, 65), (7, 300, 33), (1, 64, 80), (5, 600, 18)):
        for bias in (None, torch.linspace(-2, 2, n)):
            weight = random_weight(format, n, k)
            x = inputs(m, k, dtype)
            y = run_linear(kernel, x, weight, bias, spec, activation)
            assert y.dtype == dtype
            assert_within(y, *expected_linear(kernel, x, weight, bias, spec, activation))


ENCODINGS = [
    *(("int", bits, None) for bits in range(2, 9)),
    *(("uint", bits, zero) for bits in range(1, 9) for zero in ("uint8", "float32")),
    *[("binary", 1, None), ("ternary", 2, None)],
]
ANY_FORMAT = [
    WeightFormat(encoding, bits, group, scale, zero)
    for encoding, bits, zero in ENCODINGS
    for group in (0, 8, 32, 64, 128)
    for scale in ("float16", "float32")
]
COMPILED = [kernel for kernel in cpu.SUPPORTED if kernel.op == "linear"]


@pytest.mark.parametrize("kernel", COMPILED, ids=lambda kernel: kernel.name)
@settings(max_examples=200)
@given(
    data=st.data(), m=st.integers(1, 6), k=st.integers(1, 150), n=st.integers(1, 40), seed=st.integers(0, 99)
)
def test_any_format_that_a_kernel_serves_is_within_the_bound_at_any_shape(kernel, data, m, k, n, seed):
    """Not the named formats alone: every encoding, width, group, and type of scales and zero points."""
    spec = ACTIVATIONS[next((a for a in ("a8", "a16") if f"_{a}_" in kernel.name), "float")]
    served = [f for f in ANY_FORMAT if kernel.serves(Problem("linear", f, spec, "cpu"))]
    weight = random_weight(data.draw(st.sampled_from(served)), n, k, seed)
    x, bias = inputs(m, k, seed=seed) * 10.0 ** data.draw(st.integers(-6, 6)), torch.linspace(-2, 2, n)
    assert_within(run_linear(kernel, x, weight, bias, spec), *expected_linear(kernel, x, weight, bias, spec))
    if spec.bits and weight.format.zero_dtype != "float32":
        assert_exact(kernel, weight, random_codes(m, k, spec, seed), rows=[m])


@compiled_kernels
def test_float16_scales_count_like_the_same_scales_in_float32(kernel, format, spec):
    weight = random_weight(replace(format, scale_dtype="float16"), 17, 40)
    wide = PackedWeight(
        replace(format, scale_dtype="float32"), weight.shape, weight.qdata, weight.scale.float(), weight.zero
    )
    x = inputs(3, 40)
    assert_same_bits(run_linear(kernel, x, weight, None, spec), run_linear(kernel, x, wide, None, spec))


@pytest.mark.parametrize("dtype", DTYPES_OF_X, ids=str)
@kernels
def test_bias_of_another_dtype_or_stride_counts_the_same(kernel, format, spec, dtype):
    weight, x = random_weight(format, 17, 40), inputs(3, 40, dtype)
    bias = torch.linspace(-2, 2, 34).to(dtype)[::2]
    y = run_linear(kernel, x, weight, bias, spec)
    assert_same_bits(y, run_linear(kernel, x, weight, bias.float().contiguous(), spec))


@pytest.mark.parametrize(
    ("bad", "activation"),
    [
        *((float(bad), None) for bad in ("nan", "inf", "-inf")),
        *((float("nan"), activation) for activation in ("relu", "gelu", "silu")),
        *[(float("inf"), "gelu"), (float("-inf"), "silu"), (float("-inf"), "relu")],
    ],
)
@kernels
def test_nan_and_infinity_fill_their_row_and_no_other(kernel, format, spec, bad, activation):
    weight, bias = random_weight(format, 33, 40), torch.ones(33)
    for m, row, column in ((1, 0, 39), (5, 3, 0), (6, 0, 33)):
        clean = inputs(m, 40)
        x = clean.clone()
        x[row, column] = bad
        y = run_linear(kernel, x, weight, bias, spec, activation)
        others = torch.arange(m) != row
        assert_same_bits(y[others], run_linear(kernel, clean, weight, bias, spec, activation)[others])
        if spec.bits or bad != bad:
            assert y[row].isnan().all()
        else:  # float activations: what infinity times each weight is
            assert_within(y, *expected_linear(kernel, x, weight, bias, spec, activation))


@kernels
def test_rows_of_every_size_are_within_the_bound(kernel, format, spec):
    weight, bias = random_weight(format, 33, 40), torch.linspace(-1, 1, 33)
    for size in (0.0, 1e-45, 1e-40, 3e-37, 1e-36, 1e-30, 1e30, 3e35):
        x = inputs(5, 40).clamp(-3, 3) / 3 * size
        x[1] = 1
        x[2, 1:] = 0  # one outlier in a row of zeros
        for b in (bias, None):
            y = run_linear(kernel, x, weight, b, spec)
            assert_within(y, *expected_linear(kernel, x, weight, b, spec))
        assert size or not y[[0, 2, 3, 4]].any()


@pytest.mark.parametrize("m", [1, 6])
@kernels
def test_a_huge_outlier_does_not_make_infinity_or_nan(kernel, format, spec, m):
    """Compiled kernels with float activations scale the sum, not the weights: they overflow from 2**128 /
    128 on."""
    weight = random_weight(format, 17, 40)
    x = inputs(m, 40)
    x[0, 7] = 1e38 if spec.bits or kernel.fallback else 2e36
    y = run_linear(kernel, x, weight, None, spec)
    assert_within(y, *expected_linear(kernel, x, weight, None, spec))


@kernels
def test_values_beyond_the_dtype_become_infinity(kernel, format, spec):
    weight = random_weight(format, 33, 40)
    x = torch.full((3, 40), 6e4, dtype=torch.float16)
    y = run_linear(kernel, x, weight, None, spec)
    assert y.isinf().any()
    assert_within(y, *expected_linear(kernel, x, weight, None, spec))


@compiled_kernels
def test_flush_to_zero_changes_no_bit(kernel, format, spec, flush_denormal):
    weight = random_weight(format, 33, 40)
    small = weight_of(format, torch.eye(40, dtype=torch.int64), [[1e-38]]) if format == INT8 else weight
    for dtype in DTYPES_OF_X:
        sizes = torch.tensor([3e-36, 1e-36, 4e-37, 3e-37, 1e-38, 1e-40, 1.0, 2e-6])[:, None]
        x = (inputs(8, 40).clamp(-1, 1) * sizes).to(dtype)
        for w in (weight, small):
            for activation in (None, "gelu", "silu"):
                flush_denormal(False)
                exact = run_linear(kernel, x, w, None, spec, activation)
                flush_denormal(True)
                flushed = run_linear(kernel, x, w, None, spec, activation)
                # torch's own guard against this setting must still be up behind the call.
                assert float(torch.tensor(1e-40) * 1.0) == 0
                flush_denormal(False)
                assert_same_bits(exact, flushed)
        denormal = (exact != 0) & (exact.abs() < 1.17e-38)
        assert dtype == torch.float16 or format != INT8 or bool(denormal.any())


@kernels
def test_all_zero_weight_rows_give_exactly_the_bias(kernel, format, spec):
    """Scale 0 means zeros, whatever the codes."""
    weight, bias = random_weight(format, 33, 40), torch.linspace(-2, 2, 33)
    scale = weight.scale.clone()
    scale[::3] = 0
    zeros = PackedWeight(format, weight.shape, weight.qdata, scale, weight.zero)
    for m in (1, 5):
        x = inputs(m, 40) * 1e6
        assert run_linear(kernel, x, zeros, bias, spec)[:, ::3].equal(bias[::3].expand(m, 11))
        assert not run_linear(kernel, x, zeros, None, spec)[:, ::3].any()
        # The other rows are untouched.
        assert_same_bits(run_linear(kernel, x, zeros, bias, spec)[:, 1::3],
                         run_linear(kernel, x, weight, bias, spec)[:, 1::3])  # fmt: skip


@kernels
def test_pruned_weight_quantized_by_us_gives_the_bias(kernel, format, spec):
    if format.encoding not in ("int", "uint") or format.zero_dtype == "float32":
        with pytest.raises(NotImplementedError, match="rounding quantizer"):
            PackedWeight.quantize(torch.zeros(17, 40), format)
        return
    weight = PackedWeight.quantize(torch.zeros(17, 40), format)
    assert weight.format == format
    bias = torch.linspace(-2, 2, 17)
    assert run_linear(kernel, inputs(3, 40), weight, bias, spec).equal(bias.expand(3, 17))


# ---- shapes ------------------------------------------------------------------------------------------------


@kernels
def test_leading_dimensions_pass_through(kernel, format, spec):
    weight, bias = random_weight(format, 17, 40), torch.linspace(-2, 2, 17)
    x = inputs(6, 40)
    y = run_linear(kernel, x, weight, bias, spec)
    assert_same_bits(run_linear(kernel, x.view(2, 3, 40), weight, bias, spec), y.view(2, 3, 17))
    assert_same_bits(run_linear(kernel, x.view(1, 3, 2, 40), weight, bias, spec), y.view(1, 3, 2, 17))
    one = run_linear(kernel, x[4], weight, bias, spec)
    assert one.shape == (17,)
    assert_within(one[None], *expected_linear(kernel, x[4:5], weight, bias, spec))


@kernels
def test_strided_inputs_give_the_bits_of_their_copies(kernel, format, spec):
    weight = random_weight(format, 17, 40)
    wide = inputs(12, 80)
    for x in (wide[:, ::2], wide[::3, 20:60], inputs(40, 5).t(), inputs(1, 40).expand(5, 40), wide[0, ::2]):
        assert not x.is_contiguous()
        y, copied = (run_linear(kernel, v, weight, None, spec) for v in (x, x.contiguous()))
        if kernel.fallback:  # torch's own operator may add in another order
            y, copied = y.view(-1, 17), x.reshape(-1, 40)
            assert_within(y, *expected_linear(kernel, copied, weight, None, spec))
        else:
            assert_same_bits(y, copied)


@kernels
def test_empty_batches_and_no_outputs(kernel, format, spec):
    weight, bias = random_weight(format, 17, 40), torch.ones(17)
    for shape in ((0, 40), (2, 0, 40), (0, 3, 40)):
        assert run_linear(kernel, torch.zeros(shape), weight, bias, spec).shape == (*shape[:-1], 17)
    none = random_weight(format, 0, 40)
    for shape in ((3, 40), (40,), (0, 40)):
        assert run_linear(kernel, torch.zeros(shape), none, None, spec).shape == (*shape[:-1], 0)


@kernels
def test_without_inputs_the_output_is_the_bias(kernel, format, spec):
    """K = 0, in a child: an integer division by zero would end the process."""

    def check():
        for n in (1, 17):
            weight, bias = random_weight(format, n, 0), torch.linspace(-2, 2, n)
            assert run_linear(kernel, torch.zeros(3, 0), weight, bias, spec).equal(bias.expand(3, n))
            assert run_linear(kernel, torch.zeros(0), weight, None, spec).equal(torch.zeros(n))

    in_child(check)


@pytest.mark.parametrize("dtype", DTYPES_OF_X, ids=str)
@compiled_kernels
def test_a_row_does_not_depend_on_its_batch(kernel, format, spec, dtype):
    """To the bit: tiles of every height, both sides of the block of 256 rows, K beyond one widened block of
    256 and beyond two spans of 512."""
    for k, n in ((300, 70), (13, 5), (1100, 5)):
        weight, x, bias = random_weight(format, n, k), inputs(300, k, dtype), torch.linspace(-1, 1, n)
        prepared, layout = ops.prepare("linear", weight, spec, kernel=kernel.name)
        whole = ops.linear_prepared(x, layout, bias, prepared, "gelu")
        for rows in [
            *(slice(0, m) for m in range(1, 9)),
            slice(1, 2),
            slice(250, 261),
            slice(299, 300),
            slice(43, 300),
        ]:
            assert_same_bits(ops.linear_prepared(x[rows], layout, bias, prepared, "gelu"), whole[rows])
