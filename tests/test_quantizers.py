"""How codes are found: each method against what it says it minimizes, and against the others."""

import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pyengine as pe
from pyengine import io, quantizers
from pyengine.formats import parse_format
from pyengine.packed import PackedWeight, grouped

SEARCHED = ("int2_g32", "int4", "int4_g32", "int8", "uint1_g32", "uint3_g32", "uint4", "uint4_g128")


def weights(n, k, seed=0):
    """Rows of different sizes, with a few outliers, all-zero groups and one-sided ones."""
    rng = np.random.default_rng([n, k, seed])
    w = rng.normal(size=(n, k)) * rng.uniform(0.1, 10, (n, 1))
    w[rng.random((n, k)) < 0.02] *= 6
    w[::5] = np.abs(w[::5])
    w[1::5, : k // 2] = 0
    return torch.from_numpy(w).float()


def group_errors(weight, packed, power=2.0, noise=0.0):
    """noise: what float32 may add to each error, as a share of the row's largest weight."""
    error = (weight - packed.dequantize()).abs() + noise * weight.abs().amax(1, keepdim=True)
    return grouped(error**power, packed.format).sum(-1)


@pytest.mark.parametrize("name", SEARCHED)
@given(n=st.integers(1, 9), k=st.integers(1, 140), seed=st.integers(0, 99))
def test_mse_is_in_no_group_worse_than_rounding(name, n, k, seed):
    format, weight = parse_format(name), weights(n, k, seed)
    searched, rounded = quantizers.mse(weight, format), PackedWeight.quantize(weight, format)
    assert searched.shape == rounded.shape
    assert searched.format == rounded.format
    before, after = group_errors(weight, rounded), group_errors(weight, searched)
    assert (after <= before * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("name", ["int4_g32", "uint4_g32", "int3_g32_f32", "uint3_g32_f32"])
def test_mse_comes_close_to_the_best_of_all_scales_and_zero_points(name):
    """Against 1500 scales, for uint each with every zero point."""
    format = parse_format(name)
    weight = weights(24, 32, seed=3)
    after = group_errors(weight, quantizers.mse(weight, format))[:, 0].double()
    low, high = weight.amin(1), weight.amax(1)
    least = torch.full((24,), float("inf"), dtype=torch.float64)
    zeros = (
        [None] if format.encoding == "int" else [torch.full((24, 1), float(z)) for z in range(2**format.bits)]
    )
    for share in np.linspace(0.2, 1.3, 1500 if zeros == [None] else 300):
        whole = torch.maximum(high, -low) if format.encoding == "int" else (high - low) / 2
        scale = (whole * share / (2 ** (format.bits - 1) - 0.5))[:, None]
        for zero in zeros:
            tried = group_errors(weight, PackedWeight.encode(weight, format, scale, zero))[:, 0].double()
            least = torch.minimum(least, tried)
    assert (least > 0).sum() >= 20
    # The range is shrunk as a whole, where the best may cut off one end: that leaves a few percent.
    assert float(after.sum() / least.sum()) < 1.08, after / least
    rounded = group_errors(weight, PackedWeight.quantize(weight, format)).sum()
    assert rounded > 1.02 * after.sum()


def test_mse_finds_a_weight_that_lies_on_a_grid():
    """Scale and codes known: the outermost codes are there, so that the range alone gives the scale."""
    for name, codes in (("int4_g32", range(-7, 8)), ("uint4_g32", range(-3, 13))):
        values = torch.tensor([*codes, *[0] * (32 - len(codes))], dtype=torch.float32)
        weight = torch.stack([values * 0.25, values.flip(0) * 2.0])
        assert quantizers.mse(weight, parse_format(name)).dequantize().equal(weight)


@pytest.mark.parametrize("name", ["uint2_g32", "uint4_g32", "uint4"])
@given(n=st.integers(1, 9), k=st.integers(1, 140), seed=st.integers(0, 99))
def test_hqq_is_in_no_group_worse_than_rounding_by_its_own_measure(name, n, k, seed):
    format, weight = parse_format(name), weights(n, k, seed)
    found, rounded = quantizers.hqq(weight, format), PackedWeight.quantize(weight, format)
    assert (group_errors(weight, found, 0.7) <= group_errors(weight, rounded, 0.7, noise=1e-6)).all()


def test_hqq_moves_zero_points_as_its_formula_says():
    """The iteration of the authors' text, in NumPy, on groups whose zero points do move."""
    format = parse_format("uint2_g32_f32")
    rng = np.random.default_rng(5)
    weight = torch.from_numpy(rng.exponential(size=(64, 32)) - 0.2).float()
    w = weight.double().numpy()
    low, high = np.minimum(w.min(1), 0)[:, None], np.maximum(w.max(1), 0)[:, None]
    scale = (high - low) / 3
    start = zero = np.clip(np.rint(-low / scale), 0, 3)
    beta = 10.0
    for _ in range(20):
        q = np.clip(np.rint(w / scale + zero), 0, 3)
        rest = w - scale * (q - zero)
        with np.errstate(divide="ignore"):
            shrunk = np.sign(rest) * np.maximum(0, np.abs(rest) - np.abs(rest) ** -0.3 / beta)
        zero = (q - (w - shrunk) / scale).mean(1, keepdims=True)
        beta *= 1.01

    def lp(z):
        q = np.clip(np.rint(w / scale + z), 0, 3)
        return (np.abs(w - scale * (q - z)) ** 0.7).sum(1, keepdims=True)

    wanted = np.where(lp(zero) < lp(start), zero, start)
    assert (wanted != start).mean() > 0.5
    packed = quantizers.hqq(weight, format)
    assert packed.format.zero_dtype == "float32"
    # A weight between two codes may go either way in another precision.
    assert (np.abs(packed.zero.numpy() - wanted) < 1e-4).mean() > 0.95


def test_all_zero_groups_have_scale_zero_and_stay_zero():
    weight = torch.zeros(3, 64)
    weight[0, :32] = 26.25  # of 7 and of 15 steps that float16 holds
    for name, method in (("int4_g32", "mse"), ("uint4_g32", "mse"), ("uint4_g32", "hqq")):
        packed = getattr(quantizers, method)(weight, parse_format(name))
        assert packed.dequantize().equal(weight)
        assert not packed.scale[1:].any()


def test_the_default_is_a_search_for_up_to_four_bits_and_rounding_above():
    linear = nn.Linear(64, 8)
    for scheme, method in (("w4_g32", "mse"), ("w3_asym", "mse"), ("w5_g32", "round"), ("w8a8", "round")):
        default, named, other = (
            pe.nn.Linear.from_float(linear, scheme, method=m)
            for m in (None, method, "round" if method == "mse" else "mse")
        )
        assert_same_bits(default.layout, named.layout)
        assert not default.layout.equal(other.layout)


def test_rows_do_not_depend_on_one_another(monkeypatch):
    weight = weights(50, 96)
    for find in (quantizers.mse, quantizers.hqq):
        whole = find(weight, parse_format("uint4_g32"))
        monkeypatch.setattr("pyengine.packed._BLOCK", 96 * 7)
        for key, tensor in find(weight, parse_format("uint4_g32")).tensors().items():
            assert_same_bits(tensor, whole.tensors()[key])
        monkeypatch.undo()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refusals_name_the_layer_and_change_nothing(bad):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    layers = list(model)
    with pytest.raises(
        ValueError, match="linear '0': hqq optimizes zero points, which int4_g32 does not have"
    ):
        pe.quantize_(model, "w4_g32", method="hqq")
    with pytest.raises(ValueError, match="method 'best' is none of round, mse, hqq"):
        pe.quantize_(model, "w4_g32", method="best")
    with torch.no_grad():
        model[1].weight[3, 4] = bad
    for method in ("round", "mse", "hqq"):
        with pytest.raises(ValueError, match="linear '1': weight has values that are not finite"):
            pe.quantize_(model, "w4_g32_asym", method=method)
    assert list(model) == layers


def test_the_method_is_in_the_recipe_if_it_was_named(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32))
    pe.quantize_(model, "w4_g32_asym", method="hqq")
    pe.save(model, tmp_path / "m.safetensors")
    (step,) = io.describe(tmp_path / "m.safetensors")["recipe"]
    assert step == {"pass": "quantize", "scheme": "w4_g32_asym", "method": "hqq"}
