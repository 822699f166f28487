"""AWQ on a whole model: what it gains, and that nothing else of the model changes."""

import copy

import pytest
import torch
from helpers import assert_same_bits
from models import assert_unchanged, identities
from prenorm import WIDTH, Decoder, batches, decoder, with_forward
from torch import nn

import pyengine as pe
from pyengine import quantizers
from pyengine.passes.calibration import feed
from pyengine.scheme import Scheme


@pytest.fixture(autouse=True)
def coarse(monkeypatch, request):
    """A grid of four steps, where the scales themselves are not what a test is about."""
    if "grid" not in request.node.name:
        monkeypatch.setattr(quantizers, "AWQ_GRID", 4)


def test_awq_loses_less_output_than_no_data_and_says_so():
    model, data = decoder(), batches()
    test = torch.randint(0, 50, (16, 12), generator=torch.Generator().manual_seed(9))
    expected, errors = model(test), {}
    for method in ("mse", "awq"):
        options = {"calibration_data": data} if method == "awq" else {}
        packed, report = pe.compress(model, {"embed": None, "*": "w4_g32_asym"}, method=method, **options)
        errors[method] = ((packed(test) - expected).norm() / expected.norm()).item()
    print(errors)
    assert errors["awq"] < 0.85 * errors["mse"]
    notes = {change.name: change.note for change in report.changes}
    assert notes.pop("block.o") == "awq: not scaled, its input comes from view"
    for name, note in notes.items():
        after, before = (float(word.rstrip("%,")) for word in note.split() if "%" in word)
        assert note == f"awq: output error {after}%, without data {before}%"
        assert after < (0.8 if name != "block.down" else 1) * before, (name, note)
    assert packed.pyengine_recipe == [
        {"pass": "quantize", "scheme": "embed: float, *: w4_g32_asym", "method": "awq"}
    ]


def test_the_layers_of_a_packed_model_read_scaled_inputs(tmp_path):
    """With 8 bits next to nothing is lost, so that scales that do not cancel would be seen; and a file holds
    it all."""
    model, ids = decoder(), batches()[0]
    packed, report = pe.compress(model, {"embed": None, "*": "w8"}, method="awq", calibration_data=batches())
    assert sum("output error" in change.note for change in report.changes) == 7
    old, new = model.block, packed.block
    for ratio in (
        new.norm1.weight / old.norm1.weight,
        new.norm2.weight / old.norm2.weight,
        new.up.bias / old.up.bias,
    ):
        assert ratio.max() > 1.2 * ratio.min()
    step = old.q.weight.abs().max() / 127
    assert (new.q.weight * (new.norm1.weight / old.norm1.weight) - old.q.weight).abs().max() < 4 * step
    assert (packed(ids) - model(ids)).norm() < 0.01 * model(ids).norm()
    pe.save(packed, tmp_path / "m.safetensors")
    assert_same_bits(pe.load(tmp_path / "m.safetensors", Decoder)(ids), packed(ids))


def test_the_model_itself_and_what_awq_does_not_touch_stay_as_they_are():
    model = decoder()
    before = identities(model)
    pe.compress(model, "w4_g32", method="awq", calibration_data=batches())
    assert_unchanged(model, before)
    packed = copy.deepcopy(model)
    pe.quantize_(packed, "w4_g32_asym", exclude="block.*", method="awq", calibration_data=batches())
    for name in ("block.norm1", "block.norm2", "block.up"):
        assert_same_bits(packed.get_submodule(name).weight, model.get_submodule(name).weight)
    assert not packed.norm.weight.equal(model.norm.weight)
    assert packed.norm.weight.requires_grad


def test_layers_that_cannot_be_calibrated_fall_back_with_a_warning_that_names_them(caplog):
    model = decoder()
    model.spare = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        model.block.norm2.bias[3] = float("inf")
    before = {name: p.clone() for name, p in model.named_parameters() if "norm" in name}
    report = pe.quantize_(model, "w4_g32", method="awq", calibration_data=batches())
    notes = {change.name: change.note for change in report.changes}
    for name in ("block.gate", "block.up", "block.down", "head"):
        assert notes[name] == "awq impossible: without data"
        assert f"linear '{name}': no awq on its inputs, its codes are found without data" in caplog.text
    assert notes["block.q"].startswith("awq: output error")
    assert notes["spare"] == "not called in calibration: without data"
    assert "linear 'spare': calibration never calls it" in caplog.text
    for name in ("block.norm2.weight", "block.norm2.bias", "norm.weight"):
        assert_same_bits(model.get_parameter(name), before[name])


def hooks(model):
    return [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["watching", "calibration", "codes", "hanging"])
def test_an_interruption_leaves_the_model_as_it_was_to_the_bit(stage, error, monkeypatch):
    model, calls, data = decoder(), 0, batches()
    before, hooked = identities(model), hooks(model)

    def stop_at(limit, function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise error("stop")
            return function(*args, **kwargs)

        return wrapped

    forward = feed
    if stage in ("watching", "calibration"):
        forward = stop_at(0 if stage == "watching" else 2, feed)
    elif stage == "codes":
        monkeypatch.setattr("pyengine.passes.calibrated.awq", stop_at(2, quantizers.awq))
    else:
        monkeypatch.setattr(pe.nn.Linear, "from_packed", stop_at(4, pe.nn.Linear.from_packed))
    with pytest.raises(error, match="stop"):
        pe.quantize_(model, "w4_g32", method="awq", calibration_data=data, forward=forward)
    assert_unchanged(model, before)
    assert hooks(model) == hooked


def test_an_exception_inside_of_the_watched_model_leaves_no_hooks():
    def forward(net, x):
        net.a(net.norm(x))
        raise RuntimeError("stop")

    net = with_forward(forward)
    before, hooked = identities(net), hooks(net)
    with pytest.raises(RuntimeError, match="stop"):
        pe.quantize_(net, "w4_g32", method="awq", calibration_data=[torch.randn(3, WIDTH)])
    assert_unchanged(net, before)
    assert hooks(net) == hooked


def test_awq_needs_calibration_data():
    with pytest.raises(ValueError, match="method 'awq' needs calibration_data"):
        pe.quantize_(decoder(), "w4_g32", method="awq")
    with pytest.raises(ValueError, match="awq needs calibration data"):
        quantizers.quantize(torch.zeros(4, 4), Scheme(), "awq")
    model = decoder()
    with torch.no_grad():
        model.block.v.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"linear 'block\.v': weight has values that are not finite"):
        pe.quantize_(model, "w4_g32", method="awq", calibration_data=batches())
