"""The peers by name: what they are, what makes them, how they are checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .contenders import Bound, Contender, Runtime, beyond, exact, relative_error
from .litert_peers import litert_fp32, litert_int4, litert_int8, litert_int8_static
from .onnxruntime_peers import onnxruntime_fp32, onnxruntime_int4, onnxruntime_int8, onnxruntime_qdq
from .openvino_peers import openvino_int4_weights, openvino_int8, openvino_int8_weights
from .torch_peers import torch_fp32, torch_int8


@dataclasses.dataclass(frozen=True)
class Peer:
    """make(linear, cold_bytes): raises where the package is missing. weights, inputs: as of a Contender."""

    make: Callable[[nn.Linear, int], Runtime]
    weights: str
    inputs: str


PEERS = {
    "torch": Peer(torch_fp32, "fp32", "float"),
    "torch_int8_fbgemm": Peer(functools.partial(torch_int8, engine="fbgemm"), "int8", "dynamic"),
    "torch_int8_onednn": Peer(functools.partial(torch_int8, engine="onednn"), "int8", "dynamic"),
    "onnxruntime": Peer(onnxruntime_fp32, "fp32", "float"),
    "onnxruntime_int8": Peer(onnxruntime_int8, "int8", "dynamic"),
    "onnxruntime_qdq": Peer(onnxruntime_qdq, "int8", "static"),
    "onnxruntime_int4": Peer(onnxruntime_int4, "int4", "dynamic"),
    "openvino_int8": Peer(openvino_int8, "int8", "static"),
    "openvino_int8_weights": Peer(openvino_int8_weights, "int8", "float"),
    "openvino_int4_weights": Peer(openvino_int4_weights, "int4", "float"),
    "litert": Peer(litert_fp32, "fp32", "float"),
    "litert_int8": Peer(litert_int8, "int8", "dynamic"),
    "litert_int8_static": Peer(litert_int8_static, "int8", "static"),
    "litert_int4": Peer(litert_int4, "int4", "dynamic"),
}
# Those of torch, which is here wherever we are.
DEFAULT_PEERS = ("torch", "torch_int8_fbgemm", "torch_int8_onednn")

# The limit of our own kernels on such weights with activations of 8 bits, so that percents compare.
_SEQUENCES = {"fp32": "fma", "int8": "int8_pair_sum", "int4": "int4_sum16"}

# The largest relative error of a sound peer: rounding Gaussian weights to one int4 scale per row costs about
# 0.16, int8 about 0.02. Beyond it something else is wrong.
_LARGEST_ERROR = {"int8": 0.1, "int4": 0.3}


def contender(name: str, linear: nn.Linear, cold_bytes: int) -> Contender:
    peer = PEERS[name]
    runtime = peer.make(linear, cold_bytes)
    runtime = dataclasses.replace(runtime, bind=functools.partial(_bind_and_use, runtime.bind))
    problem = functools.partial(_problem, linear, _LARGEST_ERROR.get(peer.weights))
    return Contender(name, False, peer.weights, peer.inputs, _SEQUENCES[peer.weights], runtime, problem)


def _bind_and_use(bind: Callable[[Tensor, int], Bound], x: Tensor, count: int) -> Bound:
    """The first call of a session allocates memory and may compile."""
    calls, result = bind(x, count)
    for call in calls:
        call()
    return calls, result


def _problem(linear: nn.Linear, largest: float | None, x: Tensor, y: Tensor) -> str:
    expected = exact(linear, x)
    if largest is None:
        magnitude = F.linear(x.abs(), linear.weight.abs(), linear.bias.abs()).double()
        return beyond(y, expected, magnitude * (x.shape[1] + 8) * 2.0**-24)
    error = relative_error(y, expected)
    return "" if error <= largest else f"relative error {error:.2g} is above {largest}"
