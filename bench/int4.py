"""Peers with int4 weights: ONNX Runtime's MatMulNBits and LiteRT's fully connected layer (XNNPACK).

Both quantize activations to int8 as they come. Their packages are the [peers] extra; without them the peer is
reported as missing. Their weights are ours, rounded to nearest and repacked.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyengine.formats import parse_format
from pyengine.packed import PackedWeight

from .contenders import Call, Contender, copies, exact, relative_error

# Rounding Gaussian weights to one int4 scale per row costs about 0.16: beyond this something else is wrong.
INT4_LIMIT = 0.3

# A copy is a session or interpreter of its own. So many are more than a last-level cache at our sizes.
MAX_INT4_COPIES = 128


def _problem(linear: nn.Linear, x: Tensor, y: Tensor) -> str:
    error = relative_error(y, exact(linear, x))
    return "" if error <= INT4_LIMIT else f"relative error {error:.2g} is above {INT4_LIMIT}"


def onnxruntime_int4(linear: nn.Linear, cold_bytes: int) -> Contender:
    """MatMulNBits, groups of 32, accuracy level 4: int8 arithmetic."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    packed = PackedWeight.quantize(linear.weight, parse_format("int4_g32"))
    (n, k), bias = packed.shape, linear.bias
    parts = {
        "w": packed.qdata.numpy().reshape(n, -1, 16),
        "scale": packed.scale.float().numpy(),
        "bias": bias.numpy(),
    }
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "scale", "", "", "bias"], ["y"], domain="com.microsoft",
        K=k, N=n, bits=4, block_size=32, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(value, name) for name, value in parts.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    size = packed.nbytes
    sessions = [
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(min(copies(size, cold_bytes), MAX_INT4_COPIES))
    ]

    def bind(x: Tensor) -> list[Call]:
        return [_bound(session, x) for session in sessions]

    def _bound(session: Any, x: Tensor) -> Call:
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()))
        y = np.empty((len(x), n), np.float32)
        binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(y))
        return functools.partial(session.run_with_iobinding, binding)

    def compute(x: Tensor) -> Tensor:
        return torch.from_numpy(sessions[0].run(None, {"x": x.numpy()})[0])

    kernel = f"onnxruntime {onnxruntime.__version__} MatMulNBits g32"
    return Contender(
        "onnxruntime_int4", False, kernel, size, bind, compute, functools.partial(_problem, linear)
    )


def litert_int4(linear: nn.Linear, cold_bytes: int) -> Contender:
    """FULLY_CONNECTED with int4 weights, one scale per row, and float activations (dynamic range)."""
    import ai_edge_litert
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.interpreter import Interpreter

    packed = PackedWeight.quantize(linear.weight, parse_format("int4"))
    n, k = packed.shape

    def tensor(name: str, shape: tuple[int, ...], kind: int, data: Any = None, scale: Any = None) -> Any:
        made = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name, list(shape), kind, 0
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            buffers.append(buffer)
            made.buffer = len(buffers) - 1
        if scale is not None:
            made.quantization = schema.QuantizationParametersT()
            made.quantization.scale, made.quantization.zeroPoint = scale, np.zeros(len(scale), np.int64)
            made.quantization.quantizedDimension = 0
        return made

    def build(m: int) -> bytes:
        buffers[:] = [schema.BufferT()]
        types, graph, model = schema.TensorType, schema.SubGraphT(), schema.ModelT()
        # Offset binary to two's complement: the highest bit of each nibble.
        codes, scale = packed.qdata.numpy() ^ 0x88, packed.scale.numpy()[:, 0]
        graph.tensors = [
            tensor("x", (m, k), types.FLOAT32),
            tensor("w", (n, k), types.INT4, codes, scale),
            tensor("bias", (n,), types.FLOAT32, linear.bias.numpy()),
            tensor("y", (m, n), types.FLOAT32),
        ]
        code, operator = schema.OperatorCodeT(), schema.OperatorT()
        code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FULLY_CONNECTED
        code.version = 12
        operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0, 1, 2], [3]
        operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
        operator.builtinOptions = schema.FullyConnectedOptionsT()
        operator.builtinOptions.asymmetricQuantizeInputs = True
        graph.operators, graph.inputs, graph.outputs = [operator], [0], [3]
        model.version, model.buffers, model.subgraphs, model.operatorCodes = 3, buffers, [graph], [code]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    buffers: list[Any] = []
    size = packed.nbytes
    number = min(copies(size, cold_bytes), MAX_INT4_COPIES)

    def interpreter(model: bytes, x: Tensor) -> Any:
        made = Interpreter(model_content=model, num_threads=torch.get_num_threads())
        made.allocate_tensors()
        made.set_tensor(made.get_input_details()[0]["index"], x.numpy())
        return made

    def bind(x: Tensor) -> list[Call]:
        model = build(len(x))
        return [interpreter(model, x).invoke for _ in range(number)]

    def compute(x: Tensor) -> Tensor:
        made = interpreter(build(len(x)), x)
        made.invoke()
        return torch.from_numpy(made.get_tensor(made.get_output_details()[0]["index"]))

    kernel = f"LiteRT {getattr(ai_edge_litert, '__version__', '')} FULLY_CONNECTED int4 per row"
    return Contender("litert_int4", False, kernel, size, bind, compute, functools.partial(_problem, linear))
