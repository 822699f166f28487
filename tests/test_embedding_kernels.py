"""Every embedding kernel of the tables against reference.py: a product of two numbers, so by equality."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES_OF_X,
    INDEX,
    arrays,
    assert_same_bits,
    guarded,
    in_child,
    kernel_cases,
    random_weight,
)
from hypothesis import given
from hypothesis import strategies as st

import pyengine as pe
from pyengine import _C, ops, reference
from pyengine.backends import cpu
from pyengine.formats import parse_format

pytestmark = pytest.mark.usefixtures("poisoned")

CASES = kernel_cases("embedding")
kernels = pytest.mark.parametrize(("kernel", "format", "spec"), CASES)
compiled_kernels = pytest.mark.parametrize(
    ("kernel", "format", "spec"), [case for case in CASES if not case.values[0].fallback]
)
INT8 = parse_format("int8")


def run(kernel, ids, weight, dtype=torch.float32):
    prepared, layout = ops.prepare("embedding", weight, kernel=kernel.name)
    assert prepared.kernel is kernel
    return ops.embedding_prepared(ids, layout, prepared, dtype)


def expected(ids, weight, dtype=torch.float32):
    if (
        weight.format.zero_dtype == "float32"
    ):  # test_packed.py says how far dequantize() is from the reference there
        return weight.dequantize(dtype)[ids.long()]
    return torch.from_numpy(reference.embedding(ids.numpy(), *arrays(weight))).to(dtype)


def test_the_tables_hold_kernels_of_every_supported_instruction_set():
    supported = {isa for op, _, isa, _, runs in _C.kernels() if runs and op == "embedding"}
    assert {case.values[0].isa for case in CASES} == supported | {"torch"}


@pytest.mark.parametrize("dtype", DTYPES_OF_X, ids=str)
@kernels
@given(n=st.integers(1, 40), k=st.integers(0, 40), count=st.integers(0, 9), seed=st.integers(0, 99))
def test_rows_equal_the_reference(kernel, format, spec, dtype, n, k, count, seed):
    weight = random_weight(format, n, k, seed)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, n, count))
    assert_same_bits(run(kernel, ids, weight, dtype), expected(ids, weight, dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@kernels
def test_ids_of_any_shape_and_stride(kernel, format, spec, dtype):
    weight = random_weight(format, 50, 33)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (4, 6))).to(dtype)
    for some in (
        ids,
        ids[:, ::2],
        ids.t(),
        ids[1],
        ids[1, 2],
        ids[:1].expand(3, 6),
        ids[None],
        ids[:0],
        ids[:, :0],
    ):
        y = run(kernel, some, weight)
        assert y.shape == (*some.shape, 33)
        assert_same_bits(y, expected(some, weight))


@kernels
def test_the_first_and_the_last_row_can_be_read(kernel, format, spec):
    weight = random_weight(format, 17, 8)
    ids = torch.tensor([0, 16])
    assert_same_bits(run(kernel, ids, weight), expected(ids, weight))


@pytest.mark.parametrize("bad", [-1, 17, -(2**31), 2**31 - 1, 2**62, -(2**63)])
@kernels
def test_an_id_out_of_range_raises_index_error_with_its_value(kernel, format, spec, bad):
    weight = random_weight(format, 17, 8)
    for ids in ([bad], [3, 4, bad], [[0, bad], [1, 2]]):
        with pytest.raises(IndexError, match=rf"{bad}\b.*\b17 rows"):
            run(kernel, torch.tensor(ids), weight)
    if abs(bad) < 2**31:
        with pytest.raises(IndexError, match=rf"{bad}\b"):
            run(kernel, torch.tensor([bad], dtype=torch.int32), weight)


@kernels
def test_an_empty_table_has_no_row_to_read(kernel, format, spec):
    weight = random_weight(format, 0, 8)
    assert run(kernel, torch.zeros(0, dtype=torch.int64), weight).shape == (0, 8)
    with pytest.raises(IndexError, match=r"0 rows"):
        run(kernel, torch.zeros(1, dtype=torch.int64), weight)


@compiled_kernels
def test_float16_scales_count_like_the_same_scales_in_float32(kernel, format, spec):
    weight = random_weight(replace(format, scale_dtype="float16"), 17, 40)
    ids = torch.tensor([3, 16])
    assert_same_bits(run(kernel, ids, weight), expected(ids, weight))


@compiled_kernels
def test_flush_to_zero_changes_no_bit(kernel, format, spec, flush_denormal):
    weight = random_weight(format, 3, 40)
    scale = torch.full_like(weight.scale, 1e-39 if format.scale_dtype == "float32" else 6e-8)
    weight = replace(weight, scale=scale)
    ids = torch.tensor([0, 2])
    exact = run(kernel, ids, weight)
    flush_denormal(True)
    flushed = run(kernel, ids, weight)
    flush_denormal(False)
    assert_same_bits(exact, flushed)
    assert_same_bits(exact, expected(ids, weight))
    assert ((exact != 0) & (exact.abs() < 1.17e-38)).any() or format.scale_dtype == "float16"


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@compiled_kernels
def test_a_kernel_touches_nothing_outside_its_arrays(kernel, format, spec, at_end):
    def check():
        for n, k, rows in ((1, 1, [0]), (3, 7, [2, 0]), (5, 33, [4]), (2, 64, [1, 1, 0]), (4, 9, [3, 3])):
            weight, ids = random_weight(format, n, k), torch.tensor(rows)
            prepared, layout = ops.prepare("embedding", weight, kernel=kernel.name)
            for dtype in DTYPES_OF_X:
                y = ops.embedding_prepared(ids, layout, prepared, dtype)
                memory = [guarded(t, at_end=at_end) for t in (ids, layout, torch.full_like(y, 7))]
                (ids_at, _), (layout_at, _), (y_at, got) = memory
                group, scale_type, zero = cpu.format_arguments(format)
                rest = (format.bits, group or k, scale_type, zero, 2 if format.encoding == "binary" else 1)
                rest = (layout_at, n, k, y_at, cpu.DTYPE_CODES[dtype], *rest)
                assert _C.embedding(INDEX[kernel.name], ids_at, len(rows), *rest) == -1
                assert got.tobytes() == y.view(torch.uint8).numpy().tobytes()
                bad_at, _ = guarded(torch.tensor([*rows, n]), at_end=at_end)
                assert _C.embedding(INDEX[kernel.name], bad_at, len(rows) + 1, *rest) == len(rows)

    in_child(check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bool, torch.uint8])
def test_ids_of_another_dtype_raise_type_error(dtype):
    with pytest.raises(TypeError, match=f"embedding: indices are {dtype}"):
        pe.ops.embedding(torch.zeros(2).to(dtype), random_weight(INT8, 3, 8))
    layer = pe.nn.Embedding(random_weight(INT8, 3, 8), name="word")
    with pytest.raises(TypeError, match="embedding 'word': indices"):
        layer(torch.zeros(2).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64])
@pytest.mark.parametrize("name", ["int8", "uint3_g32"])
def test_an_output_dtype_that_is_no_float_of_ours_raises_type_error(name, dtype):
    """Kernels store by the size of the dtype: an integer dtype would get the bits of floats."""
    with pytest.raises(TypeError, match=str(dtype)):
        pe.ops.embedding(
            torch.zeros(2, dtype=torch.int64), random_weight(parse_format(name), 3, 8), dtype=dtype
        )


def test_ids_on_another_device_raise_type_error():
    layer = pe.nn.Embedding(random_weight(INT8, 3, 8), name="word")
    with pytest.raises(TypeError, match="embedding 'word': indices are on meta, weight is on cpu"):
        layer(torch.zeros(2, dtype=torch.int64, device="meta"))
