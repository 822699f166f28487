"""AWQ: the scales it chooses, and where it may put them."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers import assert_same_bits
from models import assert_unchanged, identities
from prenorm import GROUPS, WIDTH, OnePlusNorm, RMSNorm, batches, decoder, linears, with_forward
from torch import nn

import pyengine as pe
from pyengine import quantizers
from pyengine.passes.calibration import feed
from pyengine.passes.dataflow import confirmed, divided, groups
from pyengine.scheme import Scheme


@pytest.fixture(autouse=True)
def coarse(monkeypatch, request):
    """A grid of four steps, where the scales themselves are not what a test is about."""
    if "grid" not in request.node.name:
        monkeypatch.setattr(quantizers, "AWQ_GRID", 4)


def reasons(model, batch, forward=feed, without=()):
    """name -> why the layer is not scaled, None if it is."""
    layers = {name: layer for name, layer in linears(model).items() if name not in without}
    found = groups(model, layers, batch, forward)
    return {
        name: group.reason if group.producer is None else None for group in found for name in group.layers
    }


# ---- the scales --------------------------------------------------------------------------------------------


def test_the_scale_is_the_best_of_the_papers_grid():
    """Tried out on the inputs themselves, in float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 48)) * np.where(np.arange(48) % 16 == 3, 25, rng.uniform(0.5, 2, 48))
    weights = [torch.from_numpy(rng.normal(size=(n, 48))).float() for n in (10, 24)]
    schemes = [Scheme.parse("w4_g32_asym"), Scheme.parse("w3_g16")]
    mean, least = np.abs(x).mean(0), np.inf
    for step in range(21):
        scales = mean ** (step / 20)
        scales = scales / np.sqrt(scales.max() * scales.min())
        error = 0.0
        for weight, scheme in zip(weights, schemes, strict=True):
            s = torch.from_numpy(scales).float()
            found = quantizers.mse(weight * s, scheme.format).dequantize() / s
            error += np.square(x @ (weight - found).double().numpy().T).sum()
        if step == 0:
            plain = error
        if error < least:
            least, best, wanted = error, step, scales
    assert 0 < best < 20
    assert least < 0.5 * plain
    rows = torch.from_numpy(x).float()
    scales, packed = quantizers.awq(weights, schemes, rows.t() @ rows, rows.abs().sum(0))
    torch.testing.assert_close(scales.double(), torch.from_numpy(wanted), rtol=1e-5, atol=0)
    for weight, scheme, found in zip(weights, schemes, packed, strict=True):
        assert_same_bits(found.qdata, quantizers.mse(weight * scales, scheme.format).qdata)


def test_silent_channels_and_silence_have_finite_scales():
    weight = torch.randn(8, 32)
    for x in (torch.zeros(5, 32), torch.randn(5, 32) * (torch.arange(32) % 2)):
        scales, (packed,) = quantizers.awq([weight], [Scheme.parse("w4")], x.t() @ x, x.abs().sum(0))
        assert torch.isfinite(scales).all()
        assert (scales > 0).all()
        assert torch.isfinite(packed.dequantize()).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_there_is_no_scale_for_inputs_that_are_not_finite(bad):
    moments, sums = torch.eye(32), torch.ones(32)
    for statistics in ((moments * bad, sums), (moments, sums * bad)):
        assert quantizers.awq([torch.randn(8, 32)], [Scheme.parse("w4")], *statistics) is None


# ---- where they go -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, RMSNorm])
def test_groups_are_the_layers_that_read_one_norm_or_one_gated_product(norm):
    model = decoder(norm)
    found = groups(model, linears(model), batches()[0], feed)
    wanted = {
        tuple(f"block.{name}" for name in names): producer and model.get_submodule(f"block.{producer}")
        for names, producer in GROUPS.items()
    }
    assert {group.layers: group.producer for group in found} == {**wanted, ("head",): model.norm}
    assert [group.layers[0] for group in found] == ["block.q", "block.o", "block.gate", "block.down", "head"]


def llama():
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def t5():
    config = hf.T5Config(
        vocab_size=50, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return hf.T5ForConditionalGeneration(config).eval()


# Model, how a batch is fed, layers that can be scaled, and those that cannot.
ZOO = {
    "layer norm": (decoder, feed, 7, 1),
    "torch's rms": (lambda: decoder(nn.RMSNorm), feed, 7, 1),
    "own rms": (lambda: decoder(RMSNorm), feed, 7, 1),
    "llama": (llama, lambda model, ids: model(input_ids=ids).logits, 13, 2),
    # The encoder's result goes to the cross-attention, and out of the model.
    "t5": (t5, lambda model, ids: model(input_ids=ids, decoder_input_ids=ids).logits, 13, 5),
}


@pytest.mark.parametrize("name", ZOO)
def test_moving_scales_into_producers_leaves_the_function_as_it_is(name):
    make, forward, scaled, left = ZOO[name]
    model, ids = make(), batches()[0]
    layers = linears(model)
    if name == "t5":  # its head is tied with the table
        del layers["lm_head"]
    with torch.no_grad():
        expected = forward(model, ids)
    count, generator = [0, 0], torch.Generator().manual_seed(2)
    for group in groups(model, layers, ids, forward):
        count[group.producer is None] += len(group.layers)
        if group.producer is not None:
            scales = torch.rand(layers[group.layers[0]].in_features, generator=generator) * 10 + 0.1
            group.producer._parameters.update(divided(group.producer, scales))
            for layer in (layers[name] for name in group.layers):
                layer.weight.data *= scales
    assert count == [scaled, left]
    with torch.no_grad():
        y = forward(model, ids)
    assert not y.equal(expected)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def keep(net, x):
    net.cache = net.norm(x)
    return net.a(net.cache)


def written_to(net, x):
    y = net.norm(x)
    z = net.a(y)
    y += 1
    return z


def two_norms(net, x):
    return net.a(net.norm(x)) + net.a(net.other(x))


# Forward of a net, why its layer `a` is not scaled (None: it is), and what the net has besides.
CASES = {
    "alone": (lambda net, x: net.a(net.norm(x)), None),
    "two layers": (lambda net, x: net.a(y := net.norm(x)) + net.b(y), None),
    "two forms": (
        lambda net, x: net.a(y := net.norm(x)) + net.b(y * 0.5),
        "other layers read its input in another form",
    ),
    "dropout": (lambda net, x: net.a(F.dropout(net.norm(x), 0.5, net.training)), None),
    "view": (lambda net, x: net.a(net.norm(x).view(-1, WIDTH)), None),
    "linear behind linear": (lambda net, x: net.a(net.b(x)), None),
    "gated twice": (lambda net, x: net.a(net.b(x) * x.sigmoid() * x), None),
    "layer scale": (lambda net, x: net.a(net.norm(x) * 0.5), None),
    "residual": (lambda net, x: net.norm(x) + net.a(net.norm(x)), "its input also goes to add"),
    "returned": (lambda net, x: (net.a(y := net.norm(x)), {"y": y}), "its input is also returned or kept"),
    "kept": (keep, "its input is also returned or kept"),
    "written to": (written_to, "its input also goes to add_"),
    "function": (
        lambda net, x: net.a(y := net.norm(x)) + torch.cumsum(y, 0),
        "its input also goes to cumsum",
    ),
    "nonlinear": (lambda net, x: net.a(F.gelu(net.norm(x))), "its input comes from gelu"),
    "other shape": (lambda net, x: net.a(net.norm(x).transpose(0, 1)), "its input comes from transpose"),
    "squared": (lambda net, x: net.a((y := net.b(x)) * y), "its input comes from mul"),
    "squared by a view": (
        lambda net, x: net.a((y := net.b(x)) * y.view(y.shape)),
        "its input comes from mul",
    ),
    "shifted": (lambda net, x: net.a((y := net.norm(x))[1:] * y[:-1]), "its input comes from mul"),
    "cut to whole numbers": (
        lambda net, x: net.a(net.norm(x).int().float()),
        "its input comes from _to_copy",
    ),
    "mask": (lambda net, x: net.a(x.cos() * net.norm(x).bool()), "its input comes from mul"),
    "the model's own input": (lambda net, x: net.a(x), "its input comes from outside"),
    "two norms": (two_norms, "its input comes from several places", {"other": nn.LayerNorm(WIDTH)}),
    "packed": (
        lambda net, x: net.a(y := net.norm(x)) + net.ours(y),
        "its input also goes to Linear 'ours'",
        {"ours": pe.nn.Linear.from_float(nn.Linear(WIDTH, WIDTH), "w8a8")},
    ),
    "weight read elsewhere": (
        lambda net, x: net.a(net.norm(x)) + net.a.weight.sum(),
        "the weight of 'a' also goes to sum",
    ),
    "producer's weight read elsewhere": (
        lambda net, x: net.a(net.norm(x)) + net.norm.weight.sum(),
        "its input comes from a module whose weight also goes to sum",
    ),
    "no parameters": (
        lambda net, x: net.a(net.plain(x)),
        "its input comes from native_layer_norm",
        {"plain": nn.LayerNorm(WIDTH, elementwise_affine=False)},
    ),
    "one plus": (
        lambda net, x: net.a(net.other(x)),
        "its input comes from OnePlusNorm 'other', which passes no scales on",
        {"other": OnePlusNorm(WIDTH)},
    ),
    "activation": (
        lambda net, x: net.a(net.other(x)),
        "its input comes from PReLU 'other', which passes no scales on",
        {"other": nn.PReLU(WIDTH)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_scaled_only_where_nobody_else_sees_its_input(case):
    forward, reason, children = (*CASES[case], {})[:3]
    net = with_forward(forward, **children)
    assert reasons(net, torch.randn(3, WIDTH, WIDTH))["a"] == reason


class Noted(nn.LayerNorm):
    """Keeps a number that is made of its output."""

    def forward(self, x):
        y = super().forward(x)
        self.size = y.abs().sum(-1, keepdim=True)
        return y


def in_a_thread(net, x):
    y = net.norm(x)
    with ThreadPoolExecutor(1) as pool:
        size = pool.submit(lambda: y.abs().sum(-1, keepdim=True)).result()
    return net.a(y) + size


def of_some_batches(net, x):
    y = net.norm(x)
    return net.a(y) + y.abs().sum() if len(x) > 3 else net.a(y)


UNSEEN = {
    "inside of the producer": (lambda net, x: net.a(net.norm(x)) + net.norm.size, Noted),
    "thread": (in_a_thread, nn.LayerNorm),
    "another batch": (of_some_batches, nn.LayerNorm),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_what_watching_one_batch_does_not_see_shows_in_what_the_model_computes(case):
    forward, norm = UNSEEN[case]
    net, data = with_forward(forward, norm), [torch.randn(rows, WIDTH) for rows in (3, 4)]
    layers = linears(net)
    found = groups(net, layers, data[0], feed)
    assert found[0].producer is net.norm
    before = identities(net)
    (group,) = confirmed(net, found, layers, data, feed)
    assert group.reason == "the model computes something else if its input is scaled"
    assert_unchanged(net, before)
    plain = with_forward(lambda net, x: net.a(net.norm(x)))
    found = groups(plain, linears(plain), data[0], feed)
    assert confirmed(plain, found, linears(plain), data, feed) == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_that_change_nothing_are_confirmed_in_every_dtype(dtype):
    model, data = decoder().to(dtype), batches()
    found = groups(model, linears(model), data[0], feed)
    assert sum(group.producer is not None for group in found) == 4
    assert confirmed(model, found, linears(model), data, feed) == found


def test_in_inference_mode_parameters_stay_such_as_can_be_trained():
    net = with_forward(lambda net, x: net.a(net.norm(x)))
    net.norm.weight.data[::4] *= 30
    with torch.inference_mode():
        pe.quantize_(net, "w4_g32", include="a", method="awq", calibration_data=[torch.randn(9, WIDTH)])
    assert not net.norm.weight.equal(torch.ones(WIDTH))
    net(torch.randn(2, WIDTH)).sum().backward()
    assert net.norm.weight.grad is not None


def test_scripted_modules_and_layers_of_no_inputs_are_not_in_the_way():
    scripted = torch.jit.script(nn.LayerNorm(WIDTH))
    net = nn.Sequential(
        scripted, nn.Linear(WIDTH, 0), nn.Linear(0, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8)
    )
    report = pe.quantize_(net, "w4_g32", method="awq", calibration_data=[torch.randn(9, WIDTH)])
    notes = {change.name: change.note for change in report.changes}
    assert notes["1"] == "awq: not scaled, its input comes from native_layer_norm"
    assert "output error" in notes["4"]


def test_a_float_layer_that_reads_the_same_input_is_in_the_way():
    net = with_forward(lambda net, x: net.a(y := net.norm(x)) + net.b(y))
    x = torch.randn(3, WIDTH)
    assert reasons(net, x) == {"a": None, "b": None}
    assert reasons(net, x, without="b") == {"a": "its input also goes to Linear 'b'"}


def test_a_norm_that_is_tied_or_hooked_is_left_alone():
    net = with_forward(lambda net, x: net.a(net.norm(x)), other=nn.LayerNorm(WIDTH))
    net.other.weight = net.norm.weight
    assert reasons(net, torch.randn(3, WIDTH)) == {"a": "its input comes from native_layer_norm"}
    net = with_forward(lambda net, x: net.a(net.norm(x)))
    net.norm.register_forward_hook(lambda *_: None)
    assert reasons(net, torch.randn(3, WIDTH)) == {"a": "its input comes from native_layer_norm"}


def test_models_that_hand_out_their_norms_keep_them():
    config = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    torch.manual_seed(0)
    bert = hf.BertModel(hf.BertConfig(**config, num_attention_heads=4)).eval()
    found = reasons(bert, {"input_ids": batches()[0]})
    assert found["encoder.layer.0.attention.self.query"] == "its input also goes to add"
    assert found["encoder.layer.0.output.dense"] == "its input comes from gelu"
    assert None not in found.values()
    gemma = hf.GemmaForCausalLM(
        hf.GemmaConfig(**config, num_attention_heads=4, num_key_value_heads=4, head_dim=16)
    )
    found = reasons(gemma.eval(), {"input_ids": batches()[0]}, without="lm_head")
    name = "model.layers.0.mlp.gate_proj"
    assert found[name].endswith("'model.layers.0.post_attention_layernorm', which passes no scales on")
    assert found["model.layers.0.mlp.down_proj"] is None
