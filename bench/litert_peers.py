"""LiteRT with XNNPACK: float32, dynamic and static int8, and int4 weights with one scale per row.

Models are written for one number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .contenders import MAX_SESSIONS, Bound, Runtime, copies
from .weights import int4, int8


def litert_fp32(linear: nn.Linear, cold_bytes: int) -> Runtime:
    weight = linear.weight.numpy()
    return _float_activations("FLOAT32", linear, cold_bytes, weight.nbytes, weight)


def litert_int8(linear: nn.Linear, cold_bytes: int) -> Runtime:
    """Activations quantized per row as they come."""
    weight = int8(linear)
    return _float_activations("INT8", linear, cold_bytes, weight.nbytes, weight.codes, weight.scale[:, 0])


def litert_int4(linear: nn.Linear, cold_bytes: int) -> Runtime:
    """Activations quantized to int8 per row as they come."""
    weight = int4(linear)
    codes, scale = weight.signed_nibbles, weight.scale[:, 0]
    return _float_activations("INT4", linear, cold_bytes, weight.nbytes, codes, scale)


def litert_int8_static(linear: nn.Linear, cold_bytes: int) -> Runtime:
    """Input and output quantized with one static scale each; the clock runs over both conversions too."""
    weight = int8(linear)
    scale = weight.scale[:, 0]

    def model(x: Tensor) -> bytes:
        graph, (m, k), n = _Graph(), x.shape, linear.out_features
        x_scale, y_scale = (np.array([part.abs().max() / 127], np.float32) for part in (x, linear(x)))
        bias_scale = scale * x_scale
        bias = np.rint(linear.bias.numpy() / bias_scale).astype(np.int32)
        tensors = (
            graph.tensor("FLOAT32", (m, k)),
            graph.tensor("INT8", (m, k), scale=x_scale),
            graph.tensor("INT8", (n, k), weight.codes, scale),
            graph.tensor("INT32", (n,), bias, bias_scale),
            graph.tensor("INT8", (m, n), scale=y_scale),
            graph.tensor("FLOAT32", (m, n)),
        )
        graph.operator("QUANTIZE", tensors[:1], tensors[1:2], 1)
        graph.operator("FULLY_CONNECTED", tensors[1:4], tensors[4:5], 12)
        graph.operator("DEQUANTIZE", tensors[4:5], tensors[5:], 2)
        return graph.serialized(tensors[0], tensors[5])

    return _runtime("INT8 static", weight.nbytes, cold_bytes, model)


def _float_activations(
    kind: str, linear: nn.Linear, cold_bytes: int, size: int, codes: Any, scale: Any = None
) -> Runtime:
    def model(x: Tensor) -> bytes:
        graph, (m, k), n = _Graph(), x.shape, linear.out_features
        tensors = (
            graph.tensor("FLOAT32", (m, k)),
            graph.tensor(kind, (n, k), codes, scale),
            graph.tensor("FLOAT32", (n,), linear.bias.numpy()),
            graph.tensor("FLOAT32", (m, n)),
        )
        graph.operator("FULLY_CONNECTED", tensors[:3], tensors[3:], 1 if scale is None else 12)
        return graph.serialized(tensors[0], tensors[3])

    return _runtime(kind, size, cold_bytes, model)


def _runtime(kernel: str, size: int, cold_bytes: int, model: Callable[[Tensor], bytes]) -> Runtime:
    import ai_edge_litert
    import flatbuffers  # noqa: F401  said here where it is missing, not when a model is written

    def bind(x: Tensor, count: int) -> Bound:
        written = model(x)
        interpreters = [_interpreter(written, x) for _ in range(count)]
        first = interpreters[0]
        return (
            [each.invoke for each in interpreters],
            lambda: torch.from_numpy(first.get_tensor(first.get_output_details()[0]["index"])),
        )

    version = getattr(ai_edge_litert, "__version__", "")
    number = copies(size, cold_bytes, MAX_SESSIONS)
    return Runtime(f"LiteRT {version} FULLY_CONNECTED {kernel}", size, number, bind)


def _interpreter(model: bytes, x: Tensor) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    made = Interpreter(model_content=model, num_threads=torch.get_num_threads())
    made.allocate_tensors()
    made.set_tensor(made.get_input_details()[0]["index"], x.numpy())
    return made


class _Graph:
    """A model under construction. Tensors are named by their index."""

    def __init__(self) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema: Any = schema
        self.model, self.graph = schema.ModelT(), schema.SubGraphT()
        self.model.version, self.model.subgraphs = 3, [self.graph]
        self.model.buffers, self.model.operatorCodes = [schema.BufferT()], []
        self.graph.tensors, self.graph.operators = [], []

    def tensor(self, kind: str, shape: Sequence[int], data: Any = None, scale: Any = None) -> int:
        made = self.schema.TensorT()
        made.name, made.shape = f"t{len(self.graph.tensors)}", list(shape)
        made.type, made.buffer = getattr(self.schema.TensorType, kind), 0
        if data is not None:
            buffer = self.schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            self.model.buffers.append(buffer)
            made.buffer = len(self.model.buffers) - 1
        if scale is not None:
            quantization = self.schema.QuantizationParametersT()
            quantization.scale, quantization.zeroPoint = scale, np.zeros(len(scale), np.int64)
            quantization.quantizedDimension = 0
            made.quantization = quantization
        self.graph.tensors.append(made)
        return len(self.graph.tensors) - 1

    def operator(self, op: str, inputs: Sequence[int], outputs: Sequence[int], version: int) -> None:
        code, made = self.schema.OperatorCodeT(), self.schema.OperatorT()
        code.builtinCode = code.deprecatedBuiltinCode = getattr(self.schema.BuiltinOperator, op)
        code.version = version
        self.model.operatorCodes.append(code)
        made.opcodeIndex = len(self.model.operatorCodes) - 1
        made.inputs, made.outputs = list(inputs), list(outputs)
        if op == "FULLY_CONNECTED":
            made.builtinOptionsType = self.schema.BuiltinOptions.FullyConnectedOptions
            made.builtinOptions = self.schema.FullyConnectedOptionsT()
            made.builtinOptions.asymmetricQuantizeInputs = True
        self.graph.operators.append(made)

    def serialized(self, x: int, y: int) -> bytes:
        import flatbuffers

        self.graph.inputs, self.graph.outputs = [x], [y]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())
