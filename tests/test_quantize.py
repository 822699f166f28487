"""quantize_ and compress: which layers change, which stay and why, and that nothing happens by halves."""

import json
import re

import pytest
import torch
from helpers import assert_same_bits
from models import ALL, Model, assert_unchanged, identities, ids, left, make, names
from torch import nn

import pyengine as pe
from pyengine import nn as packed_nn

# ---- what is replaced --------------------------------------------------------------------------------


def test_every_linear_and_embedding_is_replaced_in_place():
    model, reference = make(), make()
    report = pe.quantize_(model, "w8")
    assert names(report) == ALL
    assert report.left == ()
    assert {type(model.get_submodule(name)) for name in ALL} == {pe.nn.Linear, pe.nn.Embedding}
    for name in ALL:
        expected = type(model.get_submodule(name)).from_float(reference.get_submodule(name), "w8")
        assert_same_bits(model.get_submodule(name).weight, expected.weight)
        assert model.get_submodule(name).name == name
    assert torch.equal(model.norm.weight, reference.norm.weight)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_kept_on_every_layer(training):
    model = make().train(training)
    model.blocks[0].up.train(not training)
    before = {name: m.training for name, m in model.named_modules()}
    pe.quantize_(model, "w8a8")
    assert {name: m.training for name, m in model.named_modules()} == before


def test_quantizing_twice_changes_nothing_and_says_so():
    model = make()
    pe.quantize_(model, "w8a8")
    before = identities(model)
    report = pe.quantize_(model, "w4_g32")
    assert report.changes == ()
    assert left(report) == dict.fromkeys(ALL, "already packed")
    assert [(name, id(m)) for name, m in model.named_modules()] == before[0]


def test_compress_leaves_the_original_untouched():
    model = make()
    before, expected = identities(model), model(ids())
    compressed, report = pe.compress(model, "w8a8", exclude="blocks.1.*")
    assert_unchanged(model, before)
    assert_same_bits(model(ids()), expected)
    assert type(compressed) is Model
    assert names(report) == ALL[:3]
    assert type(compressed.emb) is pe.nn.Embedding
    assert compressed.norm.weight.data_ptr() != model.norm.weight.data_ptr()


def test_a_module_at_two_names_stays_one_module():
    model = make()
    model.blocks[1].up = model.blocks[0].up
    model.again = model.blocks[0]
    report = pe.quantize_(model, "w8a8")
    assert model.blocks[1].up is model.blocks[0].up is model.again.up
    assert type(model.blocks[1].up) is pe.nn.Linear
    assert names(report) == ["emb", "blocks.0.up", "blocks.0.down", "blocks.1.down"]
    assert report.aliases == {
        "blocks.1.up": "blocks.0.up", "again.up": "blocks.0.up", "again.down": "blocks.0.down",
    }  # fmt: skip
    assert model(ids()).shape == (4, 5, 16)


def test_the_weights_of_an_embedding_ignore_the_activations_of_the_scheme():
    model = make()
    report = pe.quantize_(model, "w8a8")
    by_name = {change.name: change.after for change in report.changes}
    assert (by_name["emb"], by_name["blocks.0.up"]) == ("int8", "int8 a8")


@pytest.mark.parametrize(
    ("scheme", "error"),
    [
        ("int8", ValueError),
        ("w9", ValueError),
        (8, TypeError),
        ("w8a8_static", NotImplementedError),
        ("wt", NotImplementedError),
        ({"emb": "w8", "*": "nonsense"}, ValueError),
    ],
)
def test_a_bad_scheme_is_refused_before_anything_changes(scheme, error):
    model = make()
    before = identities(model)
    with pytest.raises(error, match="scheme"):
        pe.quantize_(model, scheme)
    assert_unchanged(model, before)


# ---- all or nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name_and_nothing_changes(value):
    model = make()
    with torch.no_grad():
        model.blocks[1].down.weight[3, 5] = value
    before = identities(model)
    with pytest.raises(ValueError, match=r"linear 'blocks\.1\.down': weight has values that are not finite"):
        pe.quantize_(model, "w8a8")
    assert_unchanged(model, before)


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = Model()
    before = identities(model)
    with pytest.raises(ValueError, match="layer 'emb' is on the meta device"):
        pe.quantize_(model, "w8")
    assert_unchanged(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interruption_while_layers_are_built_leaves_the_model_as_it_was(error, after, monkeypatch):
    model, build = make(), packed_nn.Linear.from_float
    before, calls = identities(model), []

    def from_float(*args, **kwargs):
        calls.append(kwargs["name"])
        if len(calls) > after:
            raise error("stop")
        return build(*args, **kwargs)

    monkeypatch.setattr(packed_nn.Linear, "from_float", from_float)
    with pytest.raises(error, match="stop"):
        pe.quantize_(model, "w8a8")
    assert len(calls) == after + 1
    assert_unchanged(model, before)


class Tripwire(dict):
    """The children of a module, of which one cannot be replaced at first."""

    def __init__(self, children, name, error):
        super().__init__(children)
        self.name, self.error = name, error

    def __setitem__(self, name, module):
        if name == self.name and self.error:
            error, self.error = self.error, None
            raise error("stop")
        super().__setitem__(name, module)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["up", "down"])
def test_an_interruption_while_layers_are_hung_in_puts_the_old_ones_back(error, name):
    model = make()
    model.twin = model.blocks[0].up
    block = model.blocks[1]
    block._modules = Tripwire(block._modules, name, error)
    before, expected = identities(model), model(ids())
    with pytest.raises(error, match="stop"):
        pe.quantize_(model, "w8a8")
    assert block._modules.error is None
    assert_unchanged(model, before)
    assert_same_bits(model(ids()), expected)
    assert names(pe.quantize_(model, "w8a8")) == ALL


# ---- the report --------------------------------------------------------------------------------------


def stored_bytes(layer):
    return sum(t.numel() * t.element_size() for t in layer.state_dict().values())


@pytest.mark.parametrize("scheme", ["w8a8", "w4_g32", "w4a8_g32_asym", "w6_g32"])
def test_the_reports_bytes_are_those_of_the_tensors(scheme):
    model, reference = make(), make()
    report = pe.quantize_(model, scheme)
    for change in report.changes:
        old, new = reference.get_submodule(change.name), model.get_submodule(change.name)
        assert change.bytes_before == stored_bytes(old)
        assert change.bytes_file == stored_bytes(new)
        bias = getattr(new, "bias", None)
        assert change.bytes_runtime == new.layout.nbytes + (0 if bias is None else bias.nbytes)
        assert change.kernel == new.kernel
    for what in ("bytes_before", "bytes_file", "bytes_runtime"):
        assert report.total(what) == sum(getattr(change, what) for change in report.changes) > 0
    fallbacks = tuple(ALL) if scheme == "w6_g32" else ()
    assert report.fallbacks == fallbacks


def test_to_json_is_a_document_with_everything():
    model = make()
    model.conv, model.twin = nn.Conv2d(2, 2, 1), model.emb
    report = pe.quantize_(model, {"emb": "w8", "*": "w8a8"})
    value = json.loads(report.to_json())
    assert set(value) == {"title", "changes", "left", "aliases", "totals"}
    assert [change["name"] for change in value["changes"]] == ALL
    assert value["left"] == [
        {"name": "conv", "kind": "Conv2d", "reason": "convolutions are not implemented yet"}
    ]
    assert value["aliases"] == {"twin": "emb"}
    assert value["totals"]["bytes_file"] == report.total("bytes_file")


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_table_fits_the_terminal_and_names_every_layer(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")
    model = make()
    model.add_module("[bold]odd", nn.Conv1d(4, 4, 1))
    model.a_layer_with_quite_a_long_name_that_no_column_of_a_narrow_terminal_can_hold = nn.Linear(16, 16)
    text = str(pe.quantize_(model, {"*.up": "w6_g32", "*": "w8a8"}))
    assert max(map(len, text.splitlines())) <= min(max(columns, 80), 130)
    assert "\x1b" not in text
    flat = re.sub(r"[\s│┃]", "", text)
    for word in ("6changed", "1leftastheywere", "[bold]odd", "convolutionsarenotimplementedyet"):
        assert word in flat, word
    if columns == 200:
        for name in ALL:
            assert name in text
        assert "(fallback)" in text


def test_scales_that_float16_cannot_hold_are_noted():
    model = nn.Sequential(nn.Linear(64, 4))
    with torch.no_grad():
        model[0].weight *= 1e-6
    (change,) = pe.quantize_(model, "w4_g32").changes
    assert "float32" in change.note
    assert change.after == "int4_g32_f32"


def test_progress_is_silent_away_from_a_terminal(capsys):
    for progress in (None, False):
        pe.quantize_(make(), "w8", progress=progress)
    assert capsys.readouterr() == ("", "")
