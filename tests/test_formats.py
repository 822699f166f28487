"""The spec as values: names, what is a format and what is not, schemes."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyengine as pe
from pyengine import formats
from pyengine.formats import FORMATS, FormatError, Sparsity, WeightFormat, parse_format
from pyengine.scheme import Scheme

encodings = st.one_of(
    st.tuples(st.just("int"), st.integers(2, 8), st.none()),
    st.tuples(st.just("uint"), st.integers(1, 8), st.sampled_from(["uint8", "float32"])),
    st.just(("binary", 1, None)),
    st.just(("ternary", 2, None)),
)


@given(encodings, st.integers(0, 10**9 - 1), st.sampled_from(["float16", "float32"]))
def test_name_and_parse_format_are_inverse(encoding, group_size, scale_dtype):
    kind, bits, zero = encoding
    format = WeightFormat(kind, bits, group_size, scale_dtype, zero)
    assert parse_format(format.name) == format


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("int8", WeightFormat("int", 8, 0, "float32")),
        ("int8_f16", WeightFormat("int", 8, 0, "float16")),
        ("int4_g32", WeightFormat("int", 4, 32, "float16")),
        ("int4_g32_f32", WeightFormat("int", 4, 32, "float32")),
        ("uint4_g128", WeightFormat("uint", 4, 128, "float16", "uint8")),
        ("uint4_g32_zf32", WeightFormat("uint", 4, 32, "float16", "float32")),
        ("ternary", WeightFormat("ternary", 2)),
        ("binary_g32", WeightFormat("binary", 1, 32, "float16")),
    ],
)
def test_the_names_are_those_of_the_documentation(name, format):
    assert parse_format(name) == format
    assert format.name == name


def test_the_listed_formats_carry_their_own_names():
    assert len(FORMATS) >= 14
    assert {name: format.name for name, format in FORMATS.items()} == {name: name for name in FORMATS}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "int",
        "int0",
        "int1",
        "int9",
        "int8 ",
        "INT8",
        "uint0",
        "binary2",
        "ternary_zf32",
        "int8_g0",
        "int8_g",
        "fp8",
        "int8_zf32",
        "int4_g32_zf32",
        "binary_g32_zf32",
        "int4_g032",
        "int4_f16_g32",
        "int8\n",
        "codebook4",
        "int8_2of4",
    ],
)
def test_an_unknown_format_is_refused_by_name(name):
    with pytest.raises(FormatError, match=re.escape(repr(name))):
        parse_format(name)


@pytest.mark.parametrize(
    "arguments",
    [
        {"encoding": "fp4"},
        {"encoding": "int", "bits": 1},
        {"encoding": "int", "bits": 9},
        {"encoding": "uint", "bits": 0, "zero_dtype": "uint8"},
        {"encoding": "binary", "bits": 2},
        {"encoding": "ternary", "bits": 1},
        {"group_size": -1},
        {"scale_dtype": "bfloat16"},
        {"zero_dtype": "uint8"},
        {"encoding": "uint", "bits": 4},
        {"encoding": "uint", "bits": 4, "zero_dtype": "int8"},
    ],
)
def test_a_format_that_makes_no_sense_is_refused(arguments):
    with pytest.raises(ValueError, match=r"\w+"):
        WeightFormat(**arguments)


@pytest.mark.parametrize(
    ("group_size", "k", "groups"),
    [(0, 100, 1), (0, 0, 1), (32, 0, 1), (32, 1, 1), (32, 32, 1), (32, 33, 2), (7, 100, 15)],
)
def test_the_last_group_may_be_short_and_no_codes_have_one_scale(group_size, k, groups):
    assert WeightFormat(group_size=group_size).groups(k) == groups


@pytest.mark.parametrize(
    ("bits", "k", "size"), [(8, 3, 3), (4, 3, 2), (3, 8, 3), (3, 9, 4), (1, 0, 0), (1, 9, 2)]
)
def test_a_row_is_padded_to_whole_bytes(bits, k, size):
    assert WeightFormat("uint", bits, zero_dtype="uint8").row_bytes(k) == size


@pytest.mark.parametrize(
    "format",
    [
        WeightFormat("int", 4, 32, sparsity=Sparsity(pattern=(2, 4))),
        WeightFormat(sparsity=Sparsity(block=(4, 4))),
        WeightFormat("codebook", 4),
        WeightFormat("float", 16),
    ],
)
def test_what_has_no_code_yet_is_refused_by_name(format):
    with pytest.raises(NotImplementedError, match=re.escape(format.name)):
        format.require_dense()


@pytest.mark.parametrize(
    "arguments",
    [("int",), ("float", 8), ("dynamic", 4), ("dynamic", 0), ("static", 7), ("dynamic", 8, True, "column")],
)
def test_an_activation_spec_that_makes_no_sense_is_refused(arguments):
    with pytest.raises(ValueError, match=r"activation|granularity"):
        pe.ActivationSpec(*arguments)


def test_activation_specs_carry_their_own_names():
    names = {name: spec.name for name, spec in formats.ACTIVATIONS.items()}
    assert names == {"float": "float", "a8": "a8", "a16": "a16"}
    assert pe.ActivationSpec("static", 8).name == "a8_static"
    assert pe.ActivationSpec("dynamic", 16).name == "a16"


# ---- schemes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "largest", "span"), [(formats.A8, 127, 2**17), (formats.A16, 32767, 512)])
def test_a_span_is_the_longest_that_int32_holds(spec, largest, span):
    assert (spec.largest, spec.span) == (largest, span)
    assert span * largest * 128 < 2**31 <= 2 * span * largest * 128


@given(st.integers(1, 8), st.sampled_from([0, 8, 16]), st.integers(0, 999_999), st.booleans())
def test_name_and_scheme_parse_are_inverse(bits, activation_bits, group_size, symmetric):
    if bits == 1 and symmetric:
        return
    scheme = Scheme(bits, activation_bits, group_size, symmetric)
    assert Scheme.parse(scheme.name) == scheme
    assert Scheme.parse(scheme) is scheme


@pytest.mark.parametrize(
    ("text", "format", "activations"),
    [
        ("w8", "int8", "float"),
        ("w8a8", "int8", "a8"),
        ("w8a8_g32", "int8_g32", "a8"),
        ("w8a8_asym", "uint8", "a8"),
        ("w4", "int4", "float"),
        ("w4_g32", "int4_g32", "float"),
        ("w4_g128_asym", "uint4_g128", "float"),
        ("w4a8_g32_asym", "uint4_g32", "a8"),
        ("w1_asym", "uint1", "float"),
        ("w8a16", "int8", "a16"),
        ("w4a16_g32_asym", "uint4_g32", "a16"),
    ],
)
def test_a_scheme_says_what_its_text_says(text, format, activations):
    scheme = Scheme.parse(text)
    assert (scheme.format.name, scheme.input_spec.name) == (format, activations)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "w",
        "w0",
        "w9",
        "w16",
        "8",
        "W8",
        "w8a4",
        "w8a",
        "w8_g",
        "w8_g0",
        "w8_g-1",
        "w8_asym_g32",
        "w8 a8",
        "w8a8\n",
        "w1",
        "w1a8",
        "w8_static",
        "int8",
        "w4_g1000000",
    ],
)
def test_a_text_that_is_no_scheme_raises_value_error(text):
    with pytest.raises(ValueError, match="scheme"):
        Scheme.parse(text)


@pytest.mark.parametrize("text", ["wt", "wb", "wc4", "w8a8_static", "w8a16_static"])
def test_a_scheme_without_code_is_refused_by_name(text):
    with pytest.raises(NotImplementedError, match=rf"{text}\b"):
        Scheme.parse(text)


@pytest.mark.parametrize("thing", [None, 8, b"w8", WeightFormat()])
def test_a_scheme_of_another_type_raises_type_error(thing):
    with pytest.raises(TypeError, match=type(thing).__name__):
        Scheme.parse(thing)


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 0},
        {"bits": 9},
        {"activation_bits": 4},
        {"group_size": -32},
        {"scale_dtype": "bfloat16"},
        {"numerics": "best"},
    ],
)
def test_a_scheme_that_makes_no_sense_is_refused(arguments):
    with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
        Scheme(**arguments)
