"""The generic backend: that it is the last resort, and says so. Its numbers are checked in
test_linear_kernels.py and test_embedding_kernels.py, beside those of the other kernels."""

import logging

import numpy as np
import pytest
import torch
from helpers import inputs, random_weight, rows_at_the_edges_of_codes
from hypothesis import given
from hypothesis import strategies as st

import pyengine as pe
from pyengine import reference
from pyengine.backends import KERNELS
from pyengine.backends import torch as generic
from pyengine.formats import A8, A16, FLOAT, parse_format
from pyengine.registry import Problem, choose

# A format for which nobody will ever write a kernel.
ODD = parse_format("uint5_g48_zf32")
any_float = st.one_of(
    st.floats(width=32), st.integers(-254, 254).map(lambda i: i / 2), st.sampled_from([3.7e-37, 1e38])
)


integer_specs = pytest.mark.parametrize("spec", [A8, A16], ids=["a8", "a16"])


def assert_quantizes_like_the_reference(x, spec):
    codes, scale = generic.quantize_rows(x, spec)
    expected_codes, expected_scale = reference.quantize_rows(x.numpy(), spec)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    np.testing.assert_array_equal(scale.numpy()[:, 0], expected_scale)


@integer_specs
@given(data=st.data(), k=st.sampled_from([0, 1, 7, 33]))
def test_row_quantizer_equals_the_reference_to_the_bit(spec, data, k):
    rows = data.draw(st.lists(st.lists(any_float, min_size=k, max_size=k), min_size=1, max_size=3))
    assert_quantizes_like_the_reference(torch.tensor(rows, dtype=torch.float32).view(len(rows), k), spec)


@integer_specs
def test_row_quantizer_equals_the_reference_on_rows_of_every_size(spec):
    assert_quantizes_like_the_reference(inputs(2000, 33) * torch.logspace(-37, 36, 2000)[:, None], spec)


@integer_specs
def test_row_quantizer_divides_the_largest_code_by_amax(spec):
    """In one rounding: torch computes `127 / amax` as 127 * (1 / amax), which is off by one unit for every
    fourth."""
    assert_quantizes_like_the_reference(rows_at_the_edges_of_codes(spec), spec)


def test_every_dense_format_has_an_answer_on_every_device():
    for name in ("int2_g32", "uint7_zf32", "binary", "ternary_g64", "int8_g32_f32"):
        for op, spec in (("linear", FLOAT), ("linear", A8), ("linear", A16), ("embedding", FLOAT)):
            for device in ("cpu", "cuda", "meta", "xpu"):
                assert choose(KERNELS, Problem(op, parse_format(name), spec, device)).op == op


def test_the_fallback_comes_last():
    flags = [kernel.fallback for kernel in KERNELS]
    assert flags == sorted(flags)
    assert any(flags)
    assert not all(flags)


@pytest.mark.parametrize("spec", [FLOAT, A8, A16], ids=["float", "a8", "a16"])
def test_a_fallback_is_logged_with_the_name_of_the_layer(spec, caplog, monkeypatch):
    monkeypatch.delenv("PYENGINE_STRICT", raising=False)
    with caplog.at_level(logging.WARNING, logger="pyengine"):
        layer = pe.nn.Linear(random_weight(ODD, 5, 100), input_spec=spec, name="encoder.0.q")
        layer(torch.zeros(1, 100))
        layer(torch.zeros(1, 100))
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "linear 'encoder.0.q'" in message
    assert ODD.name in message
    assert spec.name in message
    assert layer.kernel == "linear_torch"


def test_a_kernel_that_serves_logs_nothing(caplog, monkeypatch):
    monkeypatch.setenv("PYENGINE_STRICT", "1")
    with caplog.at_level(logging.WARNING, logger="pyengine"):
        layer = pe.nn.Linear(random_weight(parse_format("int8"), 5, 100), input_spec=A8, name="q")
        table = pe.nn.Embedding(random_weight(parse_format("int8"), 5, 100), name="word")
    assert not caplog.records
    assert layer.kernel.startswith("linear_int8_a8_")
    assert table.kernel.startswith("embedding_int8_")


def test_strict_makes_a_fallback_an_error_with_the_name_of_the_layer(monkeypatch):
    monkeypatch.setenv("PYENGINE_STRICT", "1")
    with pytest.raises(NotImplementedError, match=rf"linear 'encoder\.0\.q'.*{ODD.name}"):
        pe.nn.Linear(random_weight(ODD, 5, 100), name="encoder.0.q")
    with pytest.raises(NotImplementedError, match=rf"embedding 'word'.*{ODD.name}"):
        pe.nn.Embedding(random_weight(ODD, 5, 100), name="word")
    with pytest.raises(NotImplementedError, match=ODD.name):
        pe.ops.linear(torch.zeros(1, 100), random_weight(ODD, 5, 100))


def test_strict_does_not_forbid_a_fallback_that_is_asked_for(monkeypatch):
    monkeypatch.setenv("PYENGINE_STRICT", "1")
    layer = pe.nn.Linear(random_weight(ODD, 5, 100), name="q", kernel="linear_torch")
    assert layer.kernel == "linear_torch"
