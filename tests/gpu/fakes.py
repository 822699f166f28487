"""Moving layers to a GPU that is not there: fake CUDA tensors have shapes and devices, and no memory."""

import ctypes
import glob
import os

import pytest
import torch
from helpers import random_weight
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pyengine as pe
from pyengine import ops
from pyengine.backends import KERNELS, triton
from pyengine.formats import ACTIVATIONS, parse_format
from pyengine.packed import PackedWeight
from pyengine.registry import Problem, choose

CUDA, META = 1, 14  # as c10::DeviceType counts


def lend_device_guard():
    """A torch built without CUDA has no device guard for it and cannot index even a fake tensor: that of
    the meta device, which does nothing, stands in.
    """
    (library,) = glob.glob(os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so"))
    symbol = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * 16).in_dll(ctypes.CDLL(library), symbol)
    guards[CUDA] = guards[CUDA] or guards[META]


lend_device_guard()


def fake(mode, weight):
    tensors = {name: mode.from_tensor(tensor) for name, tensor in weight.tensors().items()}
    return PackedWeight.trusted(weight.format, weight.shape, tensors)


CASES = [
    ("int8", "a8", "linear_int8_a8_triton", "rows16x128"),
    ("int4_g32", "float", "linear_int4_triton", "planes16x128"),
    ("uint4_g128", "float", "linear_int4_triton", "planes16x128"),
    ("int8", "float", "linear_torch", "canonical"),
    ("int4_g32", "a8", "linear_torch", "canonical"),
    ("uint4_g32_zf32", "float", "linear_torch", "canonical"),
    ("int4_g16", "float", "linear_torch", "canonical"),
]


@pytest.mark.parametrize(("name", "activations", "kernel", "layout"), CASES)
def test_moving_to_a_gpu_derives_the_layout_there(name, activations, kernel, layout, monkeypatch):
    weight, spec = random_weight(parse_format(name), 40, 200), ACTIVATIONS[activations]
    layer = pe.nn.Linear(weight, torch.randn(40), input_spec=spec)
    bytes_on_gpu = triton.KERNELS[0 if name == "int8" else 1].layout.nbytes(weight.format, weight.shape)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        # Turning the CPU's layout back reads its memory, and fake tensors have none.
        monkeypatch.setattr(layer, "packed", lambda: fake(mode, weight))
        layer.to("cuda:0")
        assert (layer.kernel, layer.prepared.kernel.layout.name) == (kernel, layout)
        assert layer.layout.device.type == layer.bias.device.type == "cuda"
        assert layer.layout.dtype == torch.uint8
        if layout != "canonical":
            assert layer.layout.numel() == bytes_on_gpu
        y = layer(torch.empty(2, 3, 200, dtype=torch.float16, device="cuda:0"))
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 40), torch.float16, "cuda")


def test_without_triton_the_generic_backend_runs(monkeypatch, caplog):
    monkeypatch.setattr(triton, "available", lambda: False)
    weight = random_weight(parse_format("int8"), 16, 32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        prepared, _ = ops.prepare(
            "linear", fake(mode, weight), ACTIVATIONS["a8"], name="head", device=torch.device("cuda:0")
        )
    assert prepared.kernel.fallback
    assert "linear 'head': no kernel for int8 with a8 activations on cuda" in caplog.text


@pytest.mark.parametrize(
    ("capabilities", "served"), [([(8, 0)], True), ([(9, 0), (7, 5)], False), ([], True)]
)
def test_gpus_that_triton_does_not_compile_for_get_the_generic_backend(capabilities, served, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(triton, "available", triton.available.__wrapped__)
    problem = Problem("linear", parse_format("int8"), ACTIVATIONS["a8"], "cuda")
    assert choose(KERNELS, problem).name == ("linear_int8_a8_triton" if served else "linear_torch")


def test_a_layer_of_a_gpu_is_not_run_on_another_device(monkeypatch):
    layer = pe.nn.Linear.from_float(nn.Linear(32, 16), "w8a8", name="head")
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(TypeError, match="linear 'head': x is on cuda"),
    ):
        layer(torch.empty(1, 32, device="cuda:0"))
