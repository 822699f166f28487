"""Each peer computes the layer, on copies of its own; what is not installed is skipped by name."""

import pytest
import torch
from torch import nn

from pyengine import bench
from pyengine.bench import contenders, peers

PACKAGES = {
    "torch": (),
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("openvino",),
    "litert": ("ai_edge_litert", "flatbuffers"),
}
# Relative to the float layer in float64. Sums of two products that saturate cost more than rounding.
ERRORS = {"fp32": (0, 1e-6), "int8": (1e-3, 0.1), "int4": (0.05, 0.2)}
M, K, N = 5, 64, 48


def skip_without_packages(name):
    for package in PACKAGES[name.split("_")[0]]:
        pytest.importorskip(package)


def built(name, cold_bytes=0):
    skip_without_packages(name)
    torch.manual_seed(0)
    linear = nn.Linear(K, N).requires_grad_(False)
    linear.weight.normal_()
    linear.bias.normal_(std=10)
    return linear, peers.contender(name, linear, cold_bytes)


@pytest.mark.parametrize("name", bench.PEERS)
def test_a_peer_computes_the_layer_as_well_as_its_numbers_allow(name):
    with torch.inference_mode():
        linear, peer = built(name)
        for rows in (M, 1):
            x = torch.randn(rows, K)
            y = peer.compute(x)
            assert y.shape == (rows, N)
            error = contenders.relative_error(y, contenders.exact(linear, x))
            least, most = ERRORS[peer.weights]
            assert least <= error <= most
            assert peer.problem(x, y) == ""
            assert peer.problem(x, y + 100) != ""


@pytest.mark.parametrize("name", bench.PEERS)
def test_every_copy_of_a_peer_computes_the_same(name):
    with torch.inference_mode():
        _, peer = built(name, cold_bytes=20_000)
        x = torch.randn(M, K)
        assert peer.runtime.copies >= 2
        calls, result = peer.runtime.bind(x, peer.runtime.copies)
        assert len(calls) == peer.runtime.copies
        assert torch.equal(result(), peer.compute(x))


@pytest.mark.parametrize("name", [name for name, peer in bench.PEERS.items() if peer.inputs == "static"])
def test_a_static_peer_takes_its_range_from_the_activations(name):
    with torch.inference_mode():
        linear, peer = built(name)
        for size in (1e-3, 1e3):
            x = torch.randn(M, K) * size
            linear.bias.copy_(torch.randn(N) * size)
            assert contenders.relative_error(peer.compute(x), contenders.exact(linear, x)) < 0.1


@pytest.mark.parametrize(("engine", "other"), [("fbgemm", "onednn"), ("onednn", "fbgemm")])
def test_torchs_engine_is_put_back(engine, other, monkeypatch):
    monkeypatch.setattr(torch.backends.quantized, "engine", other)
    _, peer = built(f"torch_int8_{engine}")
    assert engine in peer.runtime.kernel
    assert torch.backends.quantized.engine == other


@pytest.mark.parametrize("engine", ["fbgemm", "onednn"])
def test_what_torch_packed_runs_whatever_the_engine_is_then(engine):
    x = torch.randn(M, K)
    with torch.inference_mode():
        _, peer = built(f"torch_int8_{engine}")
        expected, before = peer.compute(x).clone(), torch.backends.quantized.engine
        try:
            for other in torch.backends.quantized.supported_engines:
                torch.backends.quantized.engine = other
                assert torch.equal(peer.compute(x), expected)
        finally:
            torch.backends.quantized.engine = before


@pytest.mark.parametrize("name", ["onnxruntime_int4", "openvino_int4_weights"])
def test_groups_that_do_not_fit_are_said(name):
    skip_without_packages(name)
    with torch.inference_mode(), pytest.raises(NotImplementedError, match="K=40 is no multiple of 32"):
        peers.contender(name, nn.Linear(40, 8).requires_grad_(False), 0)
