"""What the door for tensors refuses: the type of the exception, and a message that names the layer."""

import re

import pytest
import torch
from helpers import random_weight

import pyengine as pe
from pyengine import _C, ops
from pyengine.backends import triton
from pyengine.formats import parse_format

FORMATS = ("int8", "uint3_g32")  # a compiled kernel and the generic backend


@pytest.fixture(params=FORMATS)
def weight(request):
    return random_weight(parse_format(request.param), 5, 128)


@pytest.fixture(params=["float", "a8", "a16"])
def layer(weight, request):
    return pe.nn.Linear(weight, torch.zeros(5), input_spec=ops.ACTIVATIONS[request.param], name="encoder.0.q")


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 64), ValueError, "linear 'encoder.0.q': x has K=64, weight has K=128"),
        (torch.zeros(2, 0), ValueError, "linear 'encoder.0.q': x has K=0, weight has K=128"),
        (torch.zeros(128, 2), ValueError, "linear 'encoder.0.q': x has K=2, weight has K=128"),
        (torch.tensor(1.0), ValueError, "linear 'encoder.0.q': x has K=0, weight has K=128"),
        (torch.zeros(2, 128, dtype=torch.float64), TypeError, "linear 'encoder.0.q': x is torch.float64"),
        (torch.zeros(2, 128, dtype=torch.int8), TypeError, "linear 'encoder.0.q': x is torch.int8"),
        (torch.zeros(2, 128, dtype=torch.int64), TypeError, "linear 'encoder.0.q': x is torch.int64"),
        (torch.zeros(2, 128, dtype=torch.bool), TypeError, "linear 'encoder.0.q': x is torch.bool"),
        (torch.zeros(2, 128, dtype=torch.complex64), TypeError, "linear 'encoder.0.q': x is torch.complex64"),
        (
            torch.zeros(2, 128, device="meta"),
            TypeError,
            "linear 'encoder.0.q': x is on meta, weight is on cpu",
        ),
    ],
)
def test_a_layer_refuses_an_input_by_its_name(layer, x, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}") as caught:
        layer(x)
    assert type(caught.value) is error


@pytest.mark.parametrize("activation", ["tanh", "", "ReLU", 1])
def test_an_unknown_activation_raises_value_error(weight, activation):
    with pytest.raises(ValueError, match=f"linear: activation {activation!r} is none of"):
        ops.linear(torch.zeros(2, 128), weight, activation=activation)


def test_an_unknown_input_spec_raises_value_error(weight):
    with pytest.raises(ValueError, match="'a4' is none of float, a8"):
        ops.linear(torch.zeros(2, 128), weight, input_spec="a4")


@pytest.mark.parametrize("shape", [(4,), (6,), (1,), (5, 1), (1, 5), (0,)])
def test_a_bias_of_another_shape_raises_value_error(weight, shape):
    """A kernel reads N numbers from it, whatever its size."""
    with pytest.raises(ValueError, match="bias"):
        ops.linear(torch.zeros(2, 128), weight, torch.zeros(shape))
    with pytest.raises(ValueError, match="linear 'q': bias has shape"):
        pe.nn.Linear(weight, torch.zeros(shape), name="q")


def test_a_bias_on_another_device_raises_type_error(weight):
    with pytest.raises(TypeError, match="bias is on meta"):
        ops.linear(torch.zeros(2, 128), weight, torch.zeros(5, device="meta"))


@pytest.mark.parametrize("shape", [(4,), (6,), (5, 1), (0,)])
def test_a_bias_that_was_put_in_later_is_checked_as_well(layer, shape):
    x, problem = torch.zeros(2, 128), f"linear 'encoder.0.q': bias has shape {shape}, weight has N=5"
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        torch.func.functional_call(layer, {"bias": torch.zeros(shape)}, (x,))
    layer.bias = torch.nn.Parameter(torch.zeros(shape))
    for guard in (torch.no_grad(), torch.enable_grad()):
        with guard, pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
            layer(x)


def test_a_bias_that_was_moved_away_is_not_left_out(layer):
    layer.bias = torch.nn.Parameter(torch.ones(5, device="meta"), requires_grad=False)
    with pytest.raises(TypeError, match=r"^linear 'encoder.0.q': bias is on meta, weight is on cpu$"):
        layer(torch.zeros(2, 128))


def test_an_input_on_another_device_raises_type_error(weight):
    with pytest.raises(TypeError, match="x is on meta, weight is on cpu"):
        ops.linear(torch.zeros(2, 128, device="meta"), weight)


def test_the_operator_itself_checks_what_decides_how_much_is_read_and_written():
    weight = random_weight(parse_format("int8"), 5, 64)
    prepared, layout = ops.prepare("linear", weight)
    rest = (5, 64, "int8", "float", prepared.kernel.layout.name, None)
    for x in (torch.zeros(4, 128), torch.zeros(4, 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"^linear: x has K=(128|1|0), weight has K=64$"):
            torch.ops.pyengine.linear(x, layout, None, *rest)
    with pytest.raises(ValueError, match=r"^linear: bias has shape \(4,\), weight has N=5$"):
        torch.ops.pyengine.linear(torch.zeros(4, 64), layout, torch.zeros(4), *rest)


@pytest.mark.parametrize("format", FORMATS)
def test_the_operators_compare_a_layout_with_its_sizes(format):
    """An exported program says sizes and brings a layout: they may be a stranger's."""
    prepared, layout = ops.prepare("linear", random_weight(parse_format(format), 5, 64))
    name, x, ids = prepared.kernel.layout.name, torch.zeros(4, 64), torch.tensor([0])
    for bad in (layout[:-1], layout[:0], layout.new_zeros(2 * len(layout))[::2], layout.float()):
        for call in (
            lambda bad=bad: torch.ops.pyengine.linear(x, bad, None, 5, 64, format, "float", name, None),
            lambda bad=bad: torch.ops.pyengine.dequantize(bad, 5, 64, format, name, torch.float32),
        ):
            with pytest.raises(ValueError, match=re.escape(f"of {format} (5, 64) is torch.uint8")):
                call()
    for shape in ((1 << 20, 64), (-1, 64)):
        with pytest.raises(ValueError, match=r"embedding: layout is torch\.uint8"):
            torch.ops.pyengine.embedding(ids, layout, *shape, format, name, torch.float32)
    with pytest.raises(ValueError, match="dequantize: layout_name 'rows9' is none"):
        torch.ops.pyengine.dequantize(layout, 5, 64, format, "rows9", torch.float32)


def test_a_layout_of_another_kind_of_device_is_named():
    """As in a program that was exported on a GPU."""
    weight = random_weight(parse_format("int4_g32"), 16, 128)
    layout = triton.PLANES_LAYOUT.pack(weight)
    x, name = torch.zeros(1, 128), "planes16x128"
    with pytest.raises(NotImplementedError, match="on cpu that reads layout planes16x128"):
        torch.ops.pyengine.linear(x, layout, None, 16, 128, "int4_g32", "float", name, None)
    torch.testing.assert_close(
        torch.ops.pyengine.dequantize(layout, 16, 128, "int4_g32", name, torch.float32), weight.dequantize()
    )


def test_integer_sums_want_one_device():
    x = torch.empty(2, 64, dtype=torch.int8, device="meta")
    with pytest.raises(TypeError, match="linear_int32: x is on meta, weight is on cpu"):
        ops.linear_int32(x, random_weight(parse_format("int8"), 5, 64))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float64])
def test_the_embedding_operator_refuses_rows_that_a_kernel_would_write_past(dtype):
    """int8 rows have a quarter of the bytes that float32 ones have."""
    prepared, layout = ops.prepare("embedding", random_weight(parse_format("int8"), 5, 64))
    name = prepared.kernel.layout.name
    with pytest.raises(TypeError, match=f"embedding: rows of {dtype}"):
        torch.ops.pyengine.embedding(torch.tensor([0]), layout, 5, 64, "int8", name, dtype)
    with pytest.raises(TypeError, match=r"embedding: indices are torch\.float32"):
        torch.ops.pyengine.embedding(torch.zeros(1), layout, 5, 64, "int8", name, torch.float32)


def test_an_unknown_kernel_is_refused(weight):
    with pytest.raises(NotImplementedError, match=f"linear with {weight.format.name}"):
        ops.prepare("linear", weight, kernel="linear_int9_portable")


def test_a_forced_kernel_that_does_not_serve_the_format_is_refused():
    with pytest.raises(NotImplementedError, match="int4_g32"):
        ops.prepare("linear", random_weight(parse_format("int4_g32"), 5, 128), kernel="linear_int8_portable")
    with pytest.raises(NotImplementedError, match="a8"):
        ops.prepare("linear", random_weight(parse_format("int8"), 5, 128), ops.ACTIVATIONS["a8"],
                    kernel="linear_int8_portable")  # fmt: skip


# ---- the binding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [len(_C.kernels()), 10**6])
def test_a_wrong_kernel_index_raises_index_error(index):
    with pytest.raises(IndexError, match=f"no kernel at index {index}"):
        _C.linear(index, *[0] * 14)
    with pytest.raises(IndexError, match=f"no kernel at index {index}"):
        _C.embedding(index, *[0] * 12)
    with pytest.raises(IndexError, match=f"no kernel at index {index}"):
        _C.bind_linear(index, *[0] * 6)


def freed(tensor):
    """The same tensor without its memory."""
    tensor.untyped_storage().resize_(0)
    return tensor


TENSORS = {"x": torch.ones(2, 128), "layout": torch.zeros(0), "bias": torch.ones(5), "activation": 0}


@pytest.mark.parametrize(
    "unusual",
    [
        {"x": torch.ones(2, 127)},
        {"x": torch.tensor(1.0)},
        {"x": torch.ones(128, 2).T},
        {"x": torch.ones(2, 128, dtype=torch.float64)},
        {"x": torch.ones(2, 128, dtype=torch.int32)},
        {"x": torch.ones(2, 128, device="meta")},
        {"x": torch.ones(2, 128).to_sparse()},
        {"x": freed(torch.ones(2, 128))},
        {"x": None},
        {"layout": torch.zeros(1, dtype=torch.uint8)},
        {"layout": torch.zeros(2176, dtype=torch.int8)},
        {"layout": torch.zeros(4352, dtype=torch.uint8)[::2]},
        {"layout": torch.zeros(34, 64, dtype=torch.uint8)},
        {"layout": torch.zeros(2176, dtype=torch.uint8, device="meta")},
        {"bias": torch.ones(4)},
        {"bias": torch.ones(10)[::2]},
        {"bias": torch.ones(5, 1)},
        {"bias": torch.ones(5, dtype=torch.float16)},
        {"bias": torch.ones(5, device="meta")},
        {"layout": freed(torch.zeros(2176, dtype=torch.uint8))},
        {"bias": freed(torch.ones(5))},
        {"bias": torch._efficientzerotensor(5)},
        {"bias": 7},
        {"activation": -1},
        {"activation": 4},
    ],
    ids=lambda unusual: "-".join(f"{name}-{getattr(t, 'shape', t)}" for name, t in unusual.items()),
)
def test_a_bound_kernel_looks_at_all_that_it_reads(unusual):
    weight = random_weight(parse_format("int8"), 5, 128)
    prepared, layout = ops.prepare("linear", weight, kernel="linear_int8_portable")
    assert layout.numel() == 2176
    call = _C.bind_linear(0, 5, 128, 128, 0, 128, layout.numel())
    usual = {**TENSORS, "layout": layout}
    assert call(*usual.values()).equal(prepared.run(usual["x"], layout, usual["bias"], None))
    assert call(*{**usual, **unusual}.values()) is None
    with pytest.raises(TypeError):
        call(*list(usual.values())[:3])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((-1, *[0] * 14), IndexError),
        ((0,) * 14, TypeError),
        ((0,) * 16, TypeError),
        ((0, None, *[0] * 13), TypeError),
        ((0, 1.5, *[0] * 13), TypeError),
        ((0, 1 << 64, *[0] * 13), OverflowError),
    ],
)
def test_the_binding_refuses_what_are_not_its_integers(arguments, error):
    with pytest.raises(error):
        _C.linear(*arguments)


def test_an_unknown_instruction_set_is_not_supported():
    assert not _C.isa_supported("avx512_nonsense")
    assert _C.isa_supported("portable")
