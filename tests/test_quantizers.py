"""How codes are found: each method against what it says it minimizes, and against the others."""

import numpy as np
import pytest
import torch
from helpers import arrays, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pyengine as pe
from pyengine import io, quantizers, reference
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


# ---- with calibration data ---------------------------------------------------------------------------------


def correlated_inputs(rows, k, seed=0):
    rng = np.random.default_rng([rows, k, seed])
    mix = rng.normal(size=(k, k)) * rng.uniform(0.05, 3, k)
    return torch.from_numpy(rng.normal(size=(rows, k)) @ mix).float()


def lost_output(x, weight, packed):
    return float((x.double() @ (weight - packed.dequantize()).double().t()).square().sum())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "name", ["int4_g32", "uint4_g32", "int3_g32", "uint2_g32", "int4", "uint4_g128", "int8"]
)
def test_gptq_loses_less_output_than_the_search_without_data(name, act_order):
    format = parse_format(name)
    for n, k in ((24, 96), (7, 300), (16, 31)):
        weight, x = weights(n, k), correlated_inputs(2000, k)
        packed, lost = quantizers.gptq(weight, format, x.t() @ x, act_order=act_order)
        assert lost == pytest.approx(lost_output(x, weight, packed), rel=1e-3)
        plain = quantizers.mse(weight, format)
        assert packed.format == format
        assert lost_output(x, weight, packed) < 0.8 * lost_output(x, weight, plain), (n, k)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("name", "k"), [("int4_f16", 40), ("int4_f16", 300), ("uint4_g32", 300)])
def test_gptq_is_the_papers_algorithm(name, k, act_order):
    """Written down again, without blocks: column after column, and the inverse made smaller by Gaussian
    elimination (equation 3 of the paper) instead of by its Cholesky factor. Scales are taken as found."""
    format = parse_format(name)
    weight, x = weights(5, k, seed=2), correlated_inputs(10 * k, k)
    packed, _ = quantizers.gptq(weight, format, x.t() @ x, act_order=act_order)
    _, scale, zero, _ = arrays(packed)
    scale = reference.spread_groups(scale.astype(np.float64), format, k)
    step = np.where(scale > 0, scale, np.inf)
    offset = np.full((5, k), 8) if zero is None else reference.spread_groups(zero.astype(int), format, k)
    w, h = weight.double().numpy().copy(), (x.t() @ x).double().numpy()
    inverse = np.linalg.inv(h + 0.01 * np.diag(h).mean() * np.eye(k))
    codes = np.zeros((5, k))
    for j in np.argsort(-np.diag(h), kind="stable") if act_order else range(k):
        codes[:, j] = np.clip(np.rint(w[:, j] / step[:, j]) + offset[:, j], 0, 15)
        error = (w[:, j] - (codes[:, j] - offset[:, j]) * scale[:, j]) / inverse[j, j]
        w -= error[:, None] * inverse[j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    got = packed.codes().numpy()
    assert (got == codes).mean() > 0.98  # float32 may take the other of two codes now and then
    nearest = np.rint(weight.double().numpy() / step) + offset
    assert (nearest.clip(0, 15) == got).mean() < 0.9


def test_gptq_on_inputs_without_correlation_is_the_search():
    """H = I: nothing can be made good."""
    weight = weights(9, 96)
    for name in ("int4_g32", "uint4_g32"):
        format = parse_format(name)
        (found, _), plain = quantizers.gptq(weight, format, torch.eye(96)), quantizers.mse(weight, format)
        for key, tensor in plain.tensors().items():
            assert_same_bits(found.tensors()[key], tensor)


@pytest.mark.parametrize("kind", ["one row", "zeros", "duplicated", "tiny", "huge", "nan", "inf"])
def test_gptq_never_fails(kind):
    format, weight, x = parse_format("uint4_g32"), weights(8, 64), correlated_inputs(500, 64)
    x = {
        "one row": x[:1], "zeros": torch.zeros(4, 64), "duplicated": x[:, :1].expand(500, 64),
        "tiny": x * 1e-18, "huge": x * 1e15, "nan": x * float("nan"), "inf": x * float("inf"),
    }[kind]  # fmt: skip
    found = quantizers.gptq(weight, format, x.t() @ x)
    if kind in ("nan", "inf"):
        assert found is None
    else:
        packed, lost = found
        assert np.isfinite(lost)
        error = group_errors(weight, packed).sum() / weight.square().sum()
        assert error < 0.05


@pytest.mark.parametrize("act_order", [False, True])
def test_gptqs_error_is_that_of_the_output_also_where_an_input_is_silent(act_order):
    format, weight, x = parse_format("int4_g32"), weights(24, 96), correlated_inputs(500, 96) / 300
    x[:, 40] = 0
    packed, lost = quantizers.gptq(weight, format, x.t() @ x, act_order=act_order)
    assert lost == pytest.approx(lost_output(x, weight, packed), rel=1e-3)


@pytest.mark.parametrize("act_order", [False, True])
def test_damping_that_is_too_small_grows_from_the_same_moments(act_order):
    format, weight, x = parse_format("int4_g32"), weights(24, 96), correlated_inputs(40, 96)
    moments = x.t() @ x

    def codes(damping):
        return quantizers.gptq(weight, format, moments.clone(), act_order=act_order, damping=damping)[0].qdata

    damped = moments + 1e-9 * moments.diagonal().mean() * torch.eye(96)
    assert int(torch.linalg.cholesky_ex(damped)[1])
    assert any(codes(1e-9).equal(codes(1e-9 * 10**step)) for step in range(1, 5))


class Branches(nn.Module):
    """One layer is called twice, one never, one only after the others although it was registered first."""

    def __init__(self):
        super().__init__()
        self.last, self.first, self.twice, self.never = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        return self.last(self.twice(torch.relu(self.twice(self.first(x)))))


def calibration(batches=4):
    return [correlated_inputs(64, 64, seed=i) / 10 for i in range(batches)]


def test_quantize_calibrates_in_the_order_of_calls_and_each_layer_behind_quantized_ones(monkeypatch):
    model, data, seen = Branches().train(), calibration(), []
    real = quantizers.gptq

    def spy(weight, format, moments, **options):
        seen.append((weight, moments.clone()))
        return real(weight, format, moments, **options)

    monkeypatch.setattr("pyengine.passes.calibrated.gptq", spy)
    order = [model.first.weight, model.twice.weight, model.last.weight]
    floats = {name: layer.weight.detach().clone() for name, layer in model.named_children()}
    report = pe.quantize_(model, "w4_g32_asym", calibration_data=data, progress=False)
    assert [id(weight) for weight, _ in seen] == [id(weight) for weight in order]
    x = torch.cat(data)
    for name, inputs in (
        ("first", [x]),
        ("twice", [model.first(x), torch.relu(model.twice(model.first(x)))]),
        ("last", [model.twice(torch.relu(model.twice(model.first(x))))]),
    ):
        moments = seen[["first", "twice", "last"].index(name)][1]
        rows = torch.cat(inputs)
        # Layers of one chunk see the float ones before them: the sums are near, and exact for the first.
        error = (rows.t() @ rows - moments).norm() / moments.norm()
        assert error < (1e-4 if name == "first" else 0.1), (name, error)
        plain = quantizers.mse(floats[name], model.get_submodule(name).format)
        assert lost_output(rows, floats[name], model.get_submodule(name).packed()) < lost_output(
            rows, floats[name], plain
        )
    notes = {change.name: change.note for change in report.changes}
    assert notes["never"] == "not called in calibration: without data"
    assert notes["twice"].startswith("gptq: output error ")
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.pyengine_recipe == [{"pass": "quantize", "scheme": "w4_g32_asym", "method": "gptq"}]


def test_calibration_may_be_fed_by_a_function_and_serves_the_layers_it_is_for():
    class Net(nn.Sequential):
        pass

    model = Net(nn.Embedding(32, 64), nn.Linear(64, 64), nn.Linear(64, 8))
    data = [(torch.arange(32), "label")] * 2
    with pytest.raises(TypeError, match="a calibration batch is a tuple: say by `forward`"):
        pe.quantize_(model, "w4_g32", calibration_data=data)
    assert type(model[1]) is nn.Linear
    report = pe.quantize_(
        model, {"2": "w8a8", "*": "w4_g32"}, calibration_data=data, forward=lambda m, batch: m(batch[0])
    )
    assert [change.note.partition(":")[0] for change in report.changes] == ["", "gptq", ""]


def test_layers_whose_inputs_are_not_finite_fall_back_with_a_warning_that_names_them(caplog):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    report = pe.quantize_(model, "w4_g32", calibration_data=[torch.full((2, 64), float("inf"))])
    assert [change.note for change in report.changes] == ["gptq impossible: without data"] * 2
    assert "linear '0': no gptq on its inputs" in caplog.text
    assert "linear '1': no gptq on its inputs" in caplog.text


def test_calibration_data_is_checked_before_work_starts():
    model = nn.Sequential(nn.Linear(64, 64))
    for data, error, message in (
        (iter([torch.zeros(1, 64)]), ValueError, "can be gone through only once"),
        (7, TypeError, "calibration_data is a int"),
        ([], ValueError, "calibration_data is empty"),
    ):
        with pytest.raises(error, match=message):
            pe.quantize_(model, "w4_g32", calibration_data=data)
    with pytest.raises(ValueError, match="method 'gptq' needs calibration_data"):
        pe.quantize_(model, "w4_g32", method="gptq")
    assert type(model[0]) is nn.Linear


def test_an_interruption_in_calibration_leaves_the_model_as_it_was():
    model, calls = Branches(), 0
    layers, hooks = dict(model.named_children()), [len(m._forward_pre_hooks) for m in model.modules()]

    def forward(model, batch):
        nonlocal calls
        calls += 1
        if calls > 6:
            raise KeyboardInterrupt
        model(batch)

    with pytest.raises(KeyboardInterrupt):
        pe.quantize_(model, "w4_g32", calibration_data=calibration(), forward=forward)
    assert dict(model.named_children()) == layers
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not hasattr(model, "pyengine_recipe")
