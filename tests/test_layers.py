"""pe.nn.Linear and pe.nn.Embedding as modules: what code that meets any torch.nn layer may do to them."""

import copy
import io
import logging
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import U32, assert_same_bits, assert_within, expected_linear, inputs
from torch.autograd import forward_ad

import pyengine as pe
from pyengine.formats import parse_format

# An integer kernel, a float kernel, and the generic backend in both of its ways.
SCHEMES = ("w8a8", "w8", "w4a8_g32_asym", "w4_g32", "w8a16")
N, K = 24, 72


def float_linear(bias=True, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(K, N, bias=bias)


def linear(scheme="w8a8", *, bias=True, seed=0):
    return pe.nn.Linear.from_float(float_linear(bias, seed), scheme, name="block.fc")


def embedding(scheme="w8", *, padding_idx=None, seed=0):
    torch.manual_seed(seed)
    return pe.nn.Embedding.from_float(
        torch.nn.Embedding(N, K, padding_idx=padding_idx), scheme, name="block.emb"
    )


def assert_right(layer, x):
    """The layer's output lies within the computed bound around the reference of its canonical weight."""
    spec, bias = layer.input_spec, layer.bias
    y, bound = expected_linear(
        layer.prepared.kernel, x.reshape(-1, K), layer.packed(), None if bias is None else bias.detach(), spec
    )
    out = layer(x)
    assert out.dtype == x.dtype
    assert_within(out.reshape(-1, N), y, bound)


def assert_same_layer(layer, other):
    for name, tensor in layer.state_dict().items():
        assert_same_bits(tensor, other.state_dict()[name])


def product_bound(a, b):
    """How far two orders of the sums in a @ b may be apart: each is off by n units of |a| @ |b| at most."""
    return 2 * a.shape[-1] * U32 * (a.abs().double() @ b.abs().double())


# ---- what a layer computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_computes_what_its_packed_weight_means(scheme, bias, dtype):
    assert_right(linear(scheme, bias=bias), inputs(5, K, dtype))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_keeps_the_leading_dimensions_of_its_input(scheme):
    layer = linear(scheme)
    rows = inputs(12, K)
    expected = layer(rows)
    for shape in ((K,), (1, K), (0, K), (2, 0, K), (12, K), (2, 3, 2, K), (*[1] * 70, K)):
        x = rows[: torch.Size(shape[:-1]).numel()].reshape(shape)
        assert layer(x).shape == F.linear(x, layer.weight).shape
        if 0 not in shape:
            assert_right(layer, x)
    transposed = rows.t().contiguous().t()
    assert not transposed.is_contiguous()
    assert_same_bits(layer(transposed), expected)


@pytest.mark.parametrize("scheme", ["w8", "w4_g32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embedding_gives_rows_of_the_dequantized_table(scheme, dtype):
    table = embedding(scheme).to(dtype)
    expected = table.packed().dequantize(dtype)
    for ids in (torch.tensor([[0, N - 1], [3, 3]]), torch.tensor(5), torch.empty(0, dtype=torch.long)):
        assert_same_bits(table(ids), expected[ids])
        assert_same_bits(table(ids.int()), expected[ids])


def test_from_float_leaves_the_source_as_it_is_and_keeps_its_mode():
    source = float_linear().eval()
    before = copy.deepcopy(source.state_dict())
    assert not pe.nn.Linear.from_float(source, "w8").training
    assert pe.nn.Linear.from_float(source.train(), "w8").training
    for name, tensor in before.items():
        assert_same_bits(source.state_dict()[name], tensor)
    layer = pe.nn.Linear.from_float(source, "w8")
    with torch.no_grad():
        source.bias.zero_()
    assert_same_bits(layer.bias, before["bias"])


def test_layers_answer_to_the_attributes_of_torch_layers():
    layer, table = linear(), embedding(padding_idx=3)
    assert (layer.in_features, layer.out_features, tuple(layer.bias.shape)) == (K, N, (N,))
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (N, K, 3)
    assert linear(bias=False).bias is None
    assert not layer.bias.requires_grad
    for text in (repr(layer), repr(table)):
        assert "int8" in text
        assert layer.kernel in text or table.kernel in text


@pytest.mark.parametrize("make", [linear, embedding])
def test_reading_weight_gives_the_dequantized_tensor_and_is_logged_once(make, caplog):
    layer = make()
    caplog.set_level(logging.INFO, "pyengine")
    for _ in range(3):
        assert_same_bits(layer.weight, layer.packed().dequantize())
    assert [r.name for r in caplog.records if layer.name in r.getMessage()] == ["pyengine"]


def test_no_kernel_warns_once_with_the_name_and_is_an_error_when_strict(monkeypatch, caplog):
    layer = linear("w6_g32")
    layer(inputs(2, K))
    layer(inputs(2, K))
    assert [r.levelname for r in caplog.records if "'block.fc'" in r.getMessage()] == ["WARNING"]
    monkeypatch.setenv("PYENGINE_STRICT", "1")
    with pytest.raises(NotImplementedError, match=r"linear 'block\.fc': no kernel for int6_g32"):
        linear("w6_g32")
    linear("w8a8")


# ---- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (torch.zeros(2, K + 1), ValueError, f"x has K={K + 1}, weight has K={K}"),
        (torch.zeros(()), ValueError, "x has K=0"),
        (torch.zeros(2, K, dtype=torch.float64), TypeError, "x is torch.float64"),
        (torch.zeros(2, K, dtype=torch.int64), TypeError, "x is torch.int64"),
        (torch.zeros(2, K, device="meta"), TypeError, "x is on meta"),
    ],
)
def test_linear_refuses_an_input_that_does_not_fit_and_names_itself(x, error, text):
    for guard in (torch.no_grad(), torch.enable_grad(), torch.autocast("cpu")):
        with guard, pytest.raises(error, match=r"linear 'block\.fc'.*" + text):
            linear()(x)


@pytest.mark.parametrize("scheme", ["w8", "w4_g32"])
def test_embedding_refuses_ids_and_names_itself(scheme):
    table = embedding(scheme)
    for bad in (N, -1, 2**40):
        with pytest.raises(IndexError, match=r"embedding 'block\.emb'"):
            table(torch.tensor([0, bad]))
    with pytest.raises(TypeError, match=r"embedding 'block\.emb'.*torch.float32"):
        table(torch.zeros(2))


def test_building_a_layer_refuses_what_it_cannot_hold_and_names_it():
    source = float_linear()
    weight = linear().packed()
    with pytest.raises(ValueError, match=r"linear 'x': bias has shape \(3,\), weight has N=24"):
        pe.nn.Linear(weight, torch.zeros(3), name="x")
    with torch.no_grad():
        source.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="linear 'x': weight has values that are not finite"):
        pe.nn.Linear.from_float(source, "w8", name="x")
    with pytest.raises(ValueError, match="linear 'x': weight is on the meta device"):
        pe.nn.Linear.from_float(torch.nn.Linear(4, 4, device="meta"), "w8", name="x")
    with pytest.raises(ValueError, match="embedding 'x': max_norm"):
        pe.nn.Embedding.from_float(torch.nn.Embedding(4, 8, max_norm=1.0), "w8", name="x")


# ---- casts and moves ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.type(torch.float16), torch.float16),
    ],
)
def test_casts_keep_codes_and_scales_and_change_what_weight_reports(scheme, cast, dtype):
    layer, source = linear(scheme), linear(scheme)
    assert cast(layer) is layer
    packed, before = layer.packed(), source.packed()
    assert packed.format == before.format
    for name, tensor in before.tensors().items():
        assert_same_bits(packed.tensors()[name], tensor)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert_right(layer, inputs(5, K, dtype))
    table = cast(embedding())
    assert table(torch.tensor([1])).dtype == dtype
    assert_same_bits(table.packed().scale, embedding().packed().scale)


def test_double_is_refused_by_name_when_the_layer_runs():
    with pytest.raises(TypeError, match=r"linear 'block\.fc': x is torch.float64"):
        linear().double()(inputs(2, K).double())
    with pytest.raises(TypeError, match=r"embedding 'block\.emb': rows of torch.float64"):
        embedding().double()(torch.tensor([1]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_survives_the_meta_device_and_is_filled_again(scheme):
    source, layer = linear(scheme), linear(scheme).to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    for name, tensor in source.state_dict().items():
        empty = layer.state_dict()[name]
        assert (empty.shape, empty.dtype) == (tensor.shape, tensor.dtype)
    assert layer.weight.shape == (N, K)
    out = layer(torch.empty(5, K, device="meta"))
    assert (out.device.type, out.shape) == ("meta", (5, N))
    with pytest.raises(TypeError, match=r"linear 'block\.fc': x is on cpu, weight is on meta"):
        layer(inputs(5, K))
    with pytest.raises(RuntimeError, match=r"linear 'block\.fc' is on the meta device"):
        copy.deepcopy(layer)
    layer.to_empty(device="cpu")
    assert torch.count_nonzero(layer.weight) == 0
    layer.load_state_dict(source.state_dict())
    assert_same_bits(layer(inputs(5, K)), source(inputs(5, K)))
    assigned = linear(scheme, seed=1).to("meta")
    assigned.load_state_dict(source.state_dict(), assign=True)
    assert_same_bits(assigned(inputs(5, K)), source(inputs(5, K)))


def test_embedding_survives_the_meta_device():
    source, table = embedding(), embedding(seed=1).to("meta")
    assert table(torch.zeros(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, K)
    table.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert_same_bits(table(torch.arange(N)), source(torch.arange(N)))


def test_share_memory_shares_the_layout_and_changes_no_result():
    layer, expected = linear(), linear()(inputs(5, K))
    assert layer.share_memory() is layer
    assert layer.layout.is_shared()
    assert_same_bits(layer(inputs(5, K)), expected)


# ---- copies and state --------------------------------------------------------------------------------


def through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_a_copy_is_the_same_layer(scheme, duplicate):
    layer = linear(scheme).bfloat16().eval()
    layer.bias.requires_grad_()
    twin = duplicate(layer)
    assert type(twin) is pe.nn.Linear
    assert (twin.kernel, twin.name, twin.dtype, twin.training) == (
        layer.kernel,
        layer.name,
        layer.dtype,
        False,
    )
    assert twin.bias.requires_grad
    assert_same_layer(layer, twin)
    x = inputs(5, K)
    assert_same_bits(twin(x), layer(x))
    expected = layer(x).detach()
    twin.load_state_dict(linear(scheme, seed=1).state_dict())
    if duplicate is not copy.copy:  # which shares the bias, as copies of every torch module do
        assert_same_bits(layer(x), expected)
    table = duplicate(embedding(padding_idx=2))
    assert_same_bits(table(torch.arange(N)), embedding(padding_idx=2)(torch.arange(N)))
    assert table.padding_idx == 2


def test_a_pickle_holds_canonical_bytes_and_no_layout():
    layer = linear()
    data = pickle.dumps(layer)
    packed = layer.packed()
    assert packed.qdata.numpy().tobytes() in data
    assert layer.layout.numpy().tobytes() not in data


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_holds_canonical_bytes_that_load_into_another_layer(scheme):
    source, target = linear(scheme), linear(scheme, seed=1)
    state = source.state_dict()
    wanted = {"bias", "qdata", "scale"} | ({"zero"} if "asym" in scheme else set())
    assert set(state) == wanted
    x = inputs(5, K)
    assert not torch.equal(target(x), source(x))
    result = target.load_state_dict({k: v.clone() for k, v in state.items()}, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_bits(target(x), source(x))


CORRUPT = {
    "another format": (lambda s: linear("w4_g32", seed=1).state_dict(), "qdata has shape"),
    "another shape": (lambda s: s | {"qdata": s["qdata"][:, 1:].contiguous()}, "qdata has shape"),
    "negative scale": (lambda s: s | {"scale": -s["scale"]}, "scale has values that are negative"),
    "NaN in the scale": (lambda s: s | {"scale": s["scale"] * float("nan")}, "scale .* not finite"),
    "codes of a wrong type": (lambda s: s | {"qdata": s["qdata"].float()}, "qdata is torch.float32"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_state_is_refused_by_name_and_leaves_the_layer_whole(case):
    change, text = CORRUPT[case]
    model = torch.nn.ModuleDict({"fc": linear()})
    bad = {f"fc.{name}": t for name, t in change(linear(seed=1).state_dict()).items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"linear 'fc': {text}"):
            model.load_state_dict(bad, strict=strict)
        assert_same_layer(model["fc"], linear())
        assert_same_bits(model["fc"](inputs(5, K)), linear()(inputs(5, K)))


def test_state_with_other_names_is_refused_by_name():
    model = torch.nn.ModuleDict({"fc": linear()})
    state = model.state_dict()
    without = {name: t for name, t in state.items() if name != "fc.scale"}
    with pytest.raises(RuntimeError, match=r"Missing key.*fc\.scale"):
        model.load_state_dict(without)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*fc\.zero"):
        model.load_state_dict(state | {"fc.zero": torch.zeros(N, 1)})
    floats = {f"fc.{name}": t for name, t in float_linear(seed=1).state_dict().items()}
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*fc\.qdata.*Unexpected key.*fc\.weight"):
        model.load_state_dict(floats)
    assert model.load_state_dict(without, strict=False).missing_keys == ["fc.scale"]


def test_scales_of_either_type_load():
    half = parse_format("int8_f16")
    source = pe.nn.Linear.from_float(
        float_linear(seed=1), pe.Scheme(8, 8, scale_dtype="float16"), name="half"
    )
    assert source.format == half
    layer = linear()
    layer.load_state_dict(source.state_dict())
    assert layer.format == half
    assert_same_bits(layer(inputs(5, K)), source(inputs(5, K)))


# ---- gradients, modes, transforms --------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(5, K), (K,), (2, 3, K)])
def test_gradients_to_input_and_bias_are_those_of_f_linear_on_the_dequantized_weight(scheme, shape):
    layer = linear(scheme)
    layer.bias.requires_grad_()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    seed = torch.randn(*shape[:-1], N, generator=torch.Generator().manual_seed(2))
    layer(x).backward(seed)
    assert_same_bits(layer(x), layer(x.detach()))
    twin, bias = x.detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_()
    weight = layer.weight
    F.linear(twin, weight, bias).backward(seed)
    assert ((x.grad - twin.grad).abs() <= product_bound(seed, weight)).all()
    rows = seed.reshape(-1, N)
    assert ((layer.bias.grad - bias.grad).abs() <= 2 * len(rows) * U32 * rows.abs().sum(0)).all()
    assert not layer(x.detach().requires_grad_(False)).isnan().any()
    assert not any(name == "weight" for name, _ in layer.named_parameters())


def test_only_what_asks_for_a_gradient_gets_one():
    layer, x = linear(), inputs(5, K)
    assert not layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x.clone().requires_grad_()).requires_grad
    assert layer(x.clone().requires_grad_()).requires_grad
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((N,), 5.0))


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32", "w4_g32"])
def test_autocast_gives_the_output_type_of_f_linear(scheme, amp, dtype):
    layer, x = linear(scheme), inputs(5, K, dtype)

    def compare():
        out = layer(x)
        assert out.dtype == F.linear(x, torch.zeros(N, K, dtype=dtype)).dtype
        return out

    with torch.autocast("cpu", dtype=amp):
        inside = compare()
        assert inside.dtype == amp
        with torch.autocast("cpu", enabled=False):
            nested = compare()
        assert_same_bits(compare(), inside)
        rows = embedding()(torch.tensor([1]))
        assert rows.dtype == torch.float32
    assert_same_bits(inside, layer(x.to(amp)))
    assert_same_bits(nested, layer(x))
    trained = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=amp):
        layer(trained).sum().backward()
    assert trained.grad.dtype == dtype
    assert torch.count_nonzero(trained.grad) > 0


def test_inference_mode_gives_the_same_and_layers_made_in_it_stay_usable_for_training():
    x, expected = inputs(5, K), linear()(inputs(5, K))
    with torch.inference_mode():
        assert_same_bits(linear()(x), expected)
        made, loaded = linear(), linear(seed=1)
        loaded.load_state_dict(made.state_dict())
    for layer in (made, loaded):
        layer.bias.requires_grad_()
        trained = x.clone().requires_grad_()
        layer(trained).sum().backward()
        assert trained.grad.shape == x.shape
        assert layer.bias.grad is not None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_eight_threads_agree(scheme):
    layer, xs = linear(scheme), [inputs(m, K, seed=m) for m in range(1, 9)]
    expected = [layer(x) for x in xs]
    start, results = threading.Barrier(8), [[] for _ in xs]

    def work(i):
        start.wait()
        results[i] += [layer(xs[i]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outs, y in zip(results, expected, strict=True):
        assert len(outs) == 20
        for out in outs:
            assert_same_bits(out, y)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torch_func_transforms_give_the_kernels_value_and_the_derivative_of_f_linear(scheme):
    layer, x, v = linear(scheme), inputs(5, K), inputs(5, K, seed=9)
    weight, expected = layer.weight, linear(scheme)(inputs(5, K))
    one_by_one = torch.stack([layer(row) for row in x])
    assert_same_bits(torch.vmap(layer)(x), one_by_one)
    gradient = torch.func.grad(lambda x: (layer(x) * expected).sum())(x)
    assert ((gradient - expected @ weight).abs() <= product_bound(expected, weight)).all()
    y, tangent = torch.func.jvp(layer, (x,), (v,))
    assert_same_bits(y, expected)
    assert ((tangent - v @ weight.t()).abs() <= product_bound(v, weight.t())).all()
    assert torch.equal(torch.vmap(torch.func.jacrev(layer))(x), weight.expand(5, N, K))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v)))
    assert_same_bits(dual.primal, expected)
    assert ((dual.tangent - v @ weight.t()).abs() <= product_bound(v, weight.t())).all()
    biases = torch.stack([layer.bias.detach(), torch.zeros(N)])
    many = torch.vmap(lambda b: torch.func.functional_call(layer, {"bias": b}, (x,)))(biases)
    assert_same_bits(many[0], expected)
    assert not torch.equal(many[1], expected)


def test_embedding_under_vmap():
    table, ids = embedding(), torch.tensor([[1, 2], [3, 23]])
    assert_same_bits(torch.vmap(table)(ids), table(ids))


def test_a_lazy_negative_is_negative():
    x = torch.randn(3, 32)
    layer = pe.nn.Linear.from_float(torch.nn.Linear(32, 5), "w8a8")
    with torch.no_grad():
        assert_same_bits(layer(torch._neg_view(x)), layer(-x))
