"""OpenVINO: int8 with static activations; int8 and int4 weights with activations as the runtime likes them.

Models read their input where it lies. Those with static activations are compiled for one number of rows,
which is faster; of the others, which take any number, it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .contenders import MAX_SESSIONS, Bound, Runtime, copies
from .weights import Rounded, int4, int8


def openvino_int8(linear: nn.Linear, cold_bytes: int) -> Runtime:
    """Activations quantized with one static scale, by FakeQuantize."""
    import openvino.opset13 as op

    rounded = int8(linear)

    def bind(x: Tensor, count: int) -> Bound:
        scale = float(x.abs().max()) / 127

        def quantized(parameter: Any) -> Any:
            low, high = op.constant(np.float32(-128 * scale)), op.constant(np.float32(127 * scale))
            return op.fake_quantize(parameter, low, high, low, high, 256)

        models = [_compiled(linear, len(x), _int8_weight(rounded), quantized) for _ in range(count)]
        return _bind(models, x)

    number = copies(rounded.nbytes, cold_bytes, MAX_SESSIONS)
    return Runtime(_kernel("MatMul FakeQuantize int8"), rounded.nbytes, number, bind)


def openvino_int8_weights(linear: nn.Linear, cold_bytes: int) -> Runtime:
    return _of_weights("MatMul int8 weights", linear, cold_bytes, int8(linear), _int8_weight)


def openvino_int4_weights(linear: nn.Linear, cold_bytes: int) -> Runtime:
    return _of_weights("MatMul int4 weights g32", linear, cold_bytes, int4(linear, 32), _int4_weight)


def _of_weights(
    kernel: str, linear: nn.Linear, cold_bytes: int, rounded: Rounded, weight: Callable[[Rounded], Any]
) -> Runtime:
    number = copies(rounded.nbytes, cold_bytes, MAX_SESSIONS)
    models = [_compiled(linear, -1, weight(rounded)) for _ in range(number)]

    def bind(x: Tensor, count: int) -> Bound:
        return _bind(models[:count], x)

    return Runtime(_kernel(kernel), rounded.nbytes, number, bind)


def _kernel(name: str) -> str:
    import openvino

    return f"openvino {openvino.__version__.partition('-')[0]} {name}"


def _int8_weight(rounded: Rounded) -> Any:
    import openvino.opset13 as op

    return op.multiply(op.convert(op.constant(rounded.codes), np.float32), op.constant(rounded.scale))


def _int4_weight(rounded: Rounded) -> Any:
    import openvino
    import openvino.opset13 as op

    n, groups = rounded.scale.shape
    shape = openvino.Shape([n, groups, rounded.codes.shape[1] * 2 // groups])
    nibbles = openvino.Tensor(rounded.signed_nibbles, shape, openvino.Type.i4)
    codes = op.constant(nibbles, shared_memory=False)
    weight = op.multiply(op.convert(codes, np.float32), op.constant(rounded.scale[:, :, None]))
    return op.reshape(weight, op.constant(np.array([n, -1])), False)


def _compiled(
    linear: nn.Linear, rows: int, weight: Any, inputs: Callable[[Any], Any] = lambda parameter: parameter
) -> Any:
    """The model of matmul(inputs(x), weight) + bias for x of so many rows, or any number where it is -1."""
    import openvino
    import openvino.opset13 as op

    parameter = op.parameter([rows, linear.in_features], np.float32)
    product = op.matmul(inputs(parameter), weight, False, True)
    y = op.add(product, op.constant(linear.bias.numpy()[None]))
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return openvino.Core().compile_model(openvino.Model([y], [parameter], "linear"), "CPU", options)


def _bind(models: Sequence[Any], x: Tensor) -> Bound:
    import openvino

    requests = [model.create_infer_request() for model in models]
    for request in requests:
        request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    return (
        [request.infer for request in requests],
        lambda: torch.from_numpy(requests[0].get_output_tensor().data.copy()),
    )
