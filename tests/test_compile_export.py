"""torch.compile, torch.export and other tracers: they see the ops, never the kernels behind them."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import U32, assert_same_bits
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import pyengine as pe
from pyengine.backends import cpu

SCHEMES = ("w8a8", "w8", "w4_g32")
K = 64


class Tagger(torch.nn.Module):
    """Tokens -> scores, by one embedding and two linear layers."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, K)
        self.up = torch.nn.Linear(K, 96)
        self.down = torch.nn.Linear(96, 10, bias=False)

    def forward(self, ids):
        return self.down(torch.relu(self.up(self.embedding(ids))))


def tagger(scheme):
    torch.manual_seed(0)
    model = Tagger().eval()
    pe.quantize_(model, scheme)
    return model


def tokens(*shape, seed=0):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def linear(scheme="w8a8", bias=True):
    torch.manual_seed(0)
    return pe.nn.Linear.from_float(torch.nn.Linear(K, 24, bias=bias), scheme, name="block.fc")


def rows(m=5, seed=0):
    return torch.randn(m, K, generator=torch.Generator().manual_seed(seed))


def compiled(model, backend="eager", **options):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend, **options)


# ---- the ops -----------------------------------------------------------------------------------------


def op_arguments(layer):
    prepared = layer.prepared
    format, layout_name = prepared.problem.format.name, prepared.kernel.layout.name
    return prepared.shape, format, prepared.problem.input_spec.name, layout_name


@pytest.mark.parametrize("scheme", [*SCHEMES, "w4a8_g32_asym", "w8a16", "w4a16_g32_asym"])
def test_opcheck_of_linear(scheme):
    layer = linear(scheme)
    shape, format, spec, layout_name = op_arguments(layer)
    trained = layer.bias.detach().clone().requires_grad_()
    inputs = [rows(), rows().requires_grad_(), rows().bfloat16(), rows(60).reshape(3, 4, 5, K), rows(0)]
    inputs += [rows(12).reshape(3, 4, K).transpose(0, 1), rows(K).t()[:, :K], rows()[0]]
    for x, bias in [(x, layer.bias) for x in inputs] + [(rows(), None), (rows().requires_grad_(), trained)]:
        arguments = (x, layer.layout, bias, *shape, format, spec, layout_name, None)
        torch.library.opcheck(torch.ops.pyengine.linear.default, arguments)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck_of_embedding_and_dequantize(scheme):
    torch.manual_seed(0)
    table = pe.nn.Embedding.from_float(torch.nn.Embedding(50, K), scheme, name="block.emb")
    shape, format, _, layout_name = op_arguments(table)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for ids in (tokens(7), tokens(2, 3), tokens(6, 4).t(), tokens(0), tokens(4).int()):
            arguments = (ids, table.layout, *shape, format, layout_name, dtype)
            torch.library.opcheck(torch.ops.pyengine.embedding.default, arguments)
        for layer in (table, linear(scheme)):
            size, own, _, layout = op_arguments(layer)
            arguments = (layer.layout, *size, own, layout, dtype)
            torch.library.opcheck(torch.ops.pyengine.dequantize.default, arguments)


# ---- torch.compile -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_compiles_to_one_graph_with_the_same_result(scheme, backend):
    model = tagger(scheme)
    ids = tokens(2, 7)
    expected = model(ids)
    fast = compiled(model, backend)
    with torch.no_grad():
        assert_same_bits(fast(ids), expected)
    assert_same_bits(fast(ids), expected)
    assert_same_bits(fast(tokens(3, 9, seed=1)), model(tokens(3, 9, seed=1)))


def test_the_compiled_graph_calls_the_ops():
    graphs = []

    def look(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(tagger("w8a8"), fullgraph=True, backend=look)(tokens(2, 7))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [name for name in called if "pyengine" in name] == [
        "pyengine.embedding", "pyengine.linear", "pyengine.linear",
    ]  # fmt: skip


def test_dynamic_shapes_compile_once():
    calls = []

    def count(graph, example_inputs):
        calls.append(graph)
        return graph

    model = tagger("w8a8")
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend=count, dynamic=True)
    for shape in ((2, 7), (3, 9), (5, 4)):
        assert_same_bits(fast(tokens(*shape)), model(tokens(*shape)))
    assert len(calls) == 1


def test_inductor_compiles_a_layer():
    layer = linear()

    def block(x):
        return torch.relu(layer(x * 2))

    fast = compiled(block, "inductor")
    with torch.no_grad():
        assert_same_bits(fast(rows()), block(rows()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_under_compile_are_those_of_f_linear_on_the_dequantized_weight(scheme, backend):
    layer = linear(scheme)
    layer.bias.requires_grad_()
    x, twin = rows().requires_grad_(), rows().requires_grad_()
    fast = compiled(layer, backend)
    y = fast(x)
    assert_same_bits(y, layer(x.detach()))
    seed = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
    y.backward(seed)
    weight, bias = layer.weight, layer.bias.detach().clone().requires_grad_()
    F.linear(twin, weight, bias).backward(seed)
    # Either sum of 24 products is off by at most 24 units of the sum of magnitudes.
    assert ((x.grad - twin.grad).abs() <= 2 * 24 * U32 * (seed.abs() @ weight.abs())).all()
    assert ((layer.bias.grad - bias.grad).abs() <= 2 * 5 * U32 * seed.abs().sum(0)).all()


def test_autocast_under_compile_gives_the_same_type_and_bits():
    layer = linear()

    def block(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = layer(x)
            with torch.autocast("cpu", enabled=False):
                return inside, layer(x)

    for out, expected, dtype in zip(
        compiled(block)(rows()), block(rows()), (torch.bfloat16, torch.float32), strict=True
    ):
        assert out.dtype == dtype
        assert_same_bits(out, expected)


def test_reading_weight_under_compile_gives_the_dequantized_tensor():
    layer = linear()
    fast = compiled(lambda x: x @ layer.weight.t(), "aot_eager")
    assert_same_bits(fast(rows()), rows() @ layer.weight.t())


@pytest.mark.parametrize("change", ["load_state_dict", "half"])
def test_a_compiled_layer_follows_a_change_of_its_weight(change):
    torch.manual_seed(1)
    layer, other = linear(), pe.nn.Linear.from_float(torch.nn.Linear(K, 24), "w8a8")
    fast = compiled(layer)
    before = fast(rows())
    if change == "half":
        layer.half()
        assert_same_bits(fast(rows().half()), layer(rows().half()))
    else:
        layer.load_state_dict(other.state_dict())
        assert_same_bits(fast(rows()), other(rows()))
        assert not torch.equal(before, other(rows()))


def test_errors_under_compile_name_the_layer():
    with pytest.raises(Exception, match=r"linear 'block\.fc': x has K=3"):
        compiled(linear())(torch.zeros(2, 3))


# ---- torch.export ------------------------------------------------------------------------------------

RUN_EXPORTED = """
import sys, torch, pyengine
program, data, want_isa = sys.argv[1:]
from pyengine.backends import cpu
assert cpu.ALLOWED_ISAS[0] == want_isa, cpu.ALLOWED_ISAS
saved = torch.load(data)
y = torch.export.load(program).module()(saved["ids"])
torch.save(y, data + ".out")
"""


def rounding_of_another_isa(model, ids):
    """Other instruction sets add K products in another order: each result is off by K + 2 units of the sum
    of magnitudes, and the second layer carries on what the first is off by. Where activations become
    integers, that may tip one code of a row over.
    """
    up, down = model.up.weight.abs(), model.down.weight.abs()
    rows = model.embedding(ids)
    hidden = torch.relu(model.up(rows))
    first = 2 * (K + 2) * U32 * (rows.abs() @ up.t() + model.up.bias.abs())
    bound = 2 * (96 + 2) * U32 * (hidden @ down.t()) + first @ down.t()
    if model.down.input_spec.bits:
        bound += hidden.amax(-1, keepdim=True) / 127 * down.amax(1)
    return bound


@pytest.mark.parametrize(
    ("scheme", "isa"),
    [("w8a8", None), ("w8a8", "portable"), ("w8", None), ("w8", "portable"), ("w4_g32", None)],
)
def test_an_exported_program_runs_in_a_fresh_process(scheme, isa, tmp_path):
    """Also on a processor without the instruction set that the program was exported on."""
    model, ids = tagger(scheme), tokens(4, 9, seed=1)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (tokens(2, 9),), dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("pyengine.linear" in name for name in targets) == 2
    assert not any("avx" in str(node) for node in program.graph.nodes)
    assert_same_bits(program.module()(ids), model(ids))
    file, data = str(tmp_path / "model.pt2"), str(tmp_path / "data.pt")
    torch.export.save(program, file)
    torch.save({"ids": ids}, data)
    environment = {**os.environ, **({"PYENGINE_ISA": isa} if isa else {})}
    command = [sys.executable, "-c", RUN_EXPORTED, file, data, isa or cpu.ALLOWED_ISAS[0]]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    y, expected = torch.load(data + ".out"), model(ids)
    if isa is None:
        assert_same_bits(y, expected)
    else:
        assert ((y - expected).abs() <= rounding_of_another_isa(model, ids)).all()


# ---- other tracers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
def test_jit_trace_records_the_ops_and_bakes_no_result(scheme):
    model = tagger(scheme)
    traced = torch.jit.trace(model, tokens(2, 7))
    assert str(traced.inlined_graph).count("pyengine::linear") == 2
    assert_same_bits(traced(tokens(2, 7, seed=1)), model(tokens(2, 7, seed=1)))
    assert_same_bits(traced(tokens(3, 5, seed=2)), model(tokens(3, 5, seed=2)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_make_fx_records_the_ops_and_bakes_no_result(scheme):
    model = tagger(scheme)
    graph = make_fx(model, tracing_mode="real")(tokens(2, 7))
    assert sum("pyengine.linear" in str(node.target) for node in graph.graph.nodes) == 2
    assert_same_bits(graph(tokens(2, 7, seed=1)), model(tokens(2, 7, seed=1)))


def test_a_dispatch_mode_sees_the_ops():
    """Such as profilers, counters and selective checkpointing."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    seen, model = [], tagger("w8a8")
    with Watch():
        out = model(tokens(2, 7))
    assert_same_bits(out, model(tokens(2, 7)))
    assert seen.count("pyengine::linear") == 2
    assert seen.count("pyengine::embedding") == 1
    with FlopCounterMode(display=False):
        assert_same_bits(model(tokens(2, 7)), out)


def test_checkpointing_gives_the_same_gradient():
    layer, x, twin = linear(), rows().requires_grad_(), rows().requires_grad_()
    layer(x).square().sum().backward()
    for reentrant in (False, True):
        twin.grad = None
        torch.utils.checkpoint.checkpoint(layer, twin, use_reentrant=reentrant).square().sum().backward()
        assert_same_bits(x.grad, twin.grad)


def test_symbolic_trace_is_refused():
    """torch.fx.symbolic_trace cannot follow the checks; a model with our layers as leaves it can."""
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(torch.nn.Sequential(linear()))

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, pe.nn.Linear) or super().is_leaf_module(m, name)

    model = torch.nn.Sequential(linear(), torch.nn.ReLU())
    graph = torch.fx.GraphModule(model, Leaves().trace(model))
    assert_same_bits(graph(rows()), model(rows()))
