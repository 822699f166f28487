"""ONNX Runtime: float32, dynamic and static int8, and int4 weights in groups of 32.

Sessions run on inputs and outputs that are bound beforehand, for any number of rows. On AVX2 int8 weights are
faster than uint8 ones and lose accuracy, since sums of two products saturate in 16 bits: the error shows it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .contenders import MAX_SESSIONS, Bound, Call, Runtime, copies
from .weights import int4, int8

Node = tuple[str, Sequence[str], Sequence[str], Mapping[str, Any]]


def onnxruntime_fp32(linear: nn.Linear, cold_bytes: int) -> Runtime:
    nodes: list[Node] = [("Gemm", ["x", "weight", "bias"], ["y"], {"transB": 1})]
    parts = {"weight": linear.weight.numpy(), "bias": linear.bias.numpy()}
    return _of_one_model(linear, cold_bytes, linear.weight.nbytes, "Gemm float32", nodes, parts)


def onnxruntime_int8(linear: nn.Linear, cold_bytes: int) -> Runtime:
    """What quantize_dynamic writes; the runtime fuses it to DynamicQuantizeMatMul."""
    from onnx import TensorProto

    nodes: list[Node] = [
        ("DynamicQuantizeLinear", ["x"], ["codes", "x_scale", "x_zero"], {}),
        ("MatMulInteger", ["codes", "weight", "x_zero", "zero"], ["sum"], {}),
        ("Cast", ["sum"], ["float_sum"], {"to": TensorProto.FLOAT}),
        ("Mul", ["x_scale", "scale"], ["factor"], {}),
        ("Mul", ["float_sum", "factor"], ["product"], {}),
        ("Add", ["product", "bias"], ["y"], {}),
    ]
    size, parts = _int8_parts(linear)
    return _of_one_model(linear, cold_bytes, size, "DynamicQuantizeMatMul", nodes, parts)


def onnxruntime_qdq(linear: nn.Linear, cold_bytes: int) -> Runtime:
    """Activations with one static scale, an output in float: the runtime fuses it to QGemm."""
    nodes: list[Node] = [
        ("QuantizeLinear", ["x", "x_scale", "x_zero"], ["codes"], {}),
        ("DequantizeLinear", ["codes", "x_scale", "x_zero"], ["x_float"], {}),
        ("DequantizeLinear", ["weight", "scale", "zero"], ["weight_float"], {"axis": 1}),
        ("DequantizeLinear", ["bias_codes", "bias_scale", "bias_zero"], ["bias_float"], {"axis": 0}),
        ("Gemm", ["x_float", "weight_float", "bias_float"], ["y"], {}),
    ]
    size, parts = _int8_parts(linear)
    bias = parts.pop("bias")

    def bind(x: Tensor, count: int) -> Bound:
        x_scale = np.float32(x.abs().max() / 127)
        bias_scale = parts["scale"] * x_scale
        static = {
            "x_scale": x_scale,
            "x_zero": np.int8(0),
            "bias_codes": np.rint(bias / bias_scale).astype(np.int32),
            "bias_scale": bias_scale,
            "bias_zero": np.zeros(len(bias), np.int32),
        }
        model = _model(linear, nodes, {**parts, **static})
        return _bind([_session(model) for _ in range(count)], linear.out_features, x)

    return Runtime(_kernel("QGemm"), size, copies(size, cold_bytes, MAX_SESSIONS), bind)


def onnxruntime_int4(linear: nn.Linear, cold_bytes: int) -> Runtime:
    """MatMulNBits, accuracy level 4: activations quantized to int8."""
    weight, (n, k) = int4(linear, 32), linear.weight.shape
    about = {"domain": "com.microsoft", "K": k, "N": n, "bits": 4, "block_size": 32, "accuracy_level": 4}
    nodes: list[Node] = [("MatMulNBits", ["x", "weight", "scale", "", "", "bias"], ["y"], about)]
    parts = {
        "weight": weight.codes.reshape(n, -1, 16),
        "scale": weight.scale,
        "bias": linear.bias.numpy(),
    }
    return _of_one_model(linear, cold_bytes, weight.nbytes, "MatMulNBits g32", nodes, parts)


def _int8_parts(linear: nn.Linear) -> tuple[int, dict[str, Any]]:
    weight = int8(linear)
    parts = {
        "weight": np.ascontiguousarray(weight.codes.T),
        "scale": weight.scale[:, 0],
        "zero": np.zeros(linear.out_features, np.int8),
        "bias": linear.bias.numpy(),
    }
    return weight.nbytes, parts


def _of_one_model(
    linear: nn.Linear,
    cold_bytes: int,
    size: int,
    kernel: str,
    nodes: Sequence[Node],
    parts: Mapping[str, Any],
) -> Runtime:
    model = _model(linear, nodes, parts)
    sessions = [_session(model) for _ in range(copies(size, cold_bytes, MAX_SESSIONS))]

    def bind(x: Tensor, count: int) -> Bound:
        return _bind(sessions[:count], linear.out_features, x)

    return Runtime(_kernel(kernel), size, len(sessions), bind)


def _kernel(name: str) -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__} {name}"


def _model(linear: nn.Linear, nodes: Sequence[Node], parts: Mapping[str, Any]) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    made = [helper.make_node(op, inputs, outputs, **about) for op, inputs, outputs, about in nodes]
    graph = helper.make_graph(
        made, "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", linear.in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", linear.out_features])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in parts.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


def _session(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    # Its threads may spin while it runs. Afterwards they would take the processor from the next contender and
    # from the other sessions of this one, for longer than anyone can wait.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _bind(sessions: Sequence[Any], n: int, x: Tensor) -> Bound:
    import onnxruntime

    outputs = [np.full((len(x), n), np.nan, np.float32) for _ in sessions]
    calls: list[Call] = []
    for session, y in zip(sessions, outputs, strict=True):
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()))
        binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(y))
        calls.append(functools.partial(session.run_with_iobinding, binding))
    return calls, lambda: torch.from_numpy(outputs[0])
