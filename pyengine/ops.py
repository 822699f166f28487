"""The door for tensors: check, select, run. And the same ops for torch.compile and torch.export.

Each op has two ways in. Eager calls on plain tensors go straight to a kernel of the CPU. Everything else
(compilation, export, gradients, tensor subclasses) goes through torch.ops.pyengine.*, which names formats and
layouts but no instruction set, so that an exported program runs on another machine.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import KERNELS, cpu, triton
from .formats import A8, A16, ACTIVATIONS, FLOAT, ActivationSpec, parse_format
from .packed import PackedWeight
from .registry import KernelSpec, Problem, choose

logger = logging.getLogger("pyengine")

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Prepared:
    """A weight made ready for a kernel, all but its tensor: what a layer keeps beside its layout. name is the
    layer's, for error messages. run is what the kernel binds to the problem and the shape."""

    kernel: KernelSpec
    problem: Problem
    shape: tuple[int, int]
    name: str = ""
    run: Callable[..., Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", self.kernel.bind(self.problem, self.shape))

    def unpack(self, layout: Tensor) -> PackedWeight:
        return self.kernel.layout.unpack(layout, self.problem.format, self.shape)


def _where(op: str, name: str) -> str:
    """What an error message begins with: the op and, where it is known, the layer."""
    return f"{op} {name!r}" if name else op


def prepare(
    op: str,
    weight: PackedWeight,
    input_spec: ActivationSpec = FLOAT,
    *,
    name: str = "",
    device: torch.device | None = None,
    kernel: str | None = None,
) -> tuple[Prepared, Tensor]:
    """Choose a kernel and derive its layout.

    kernel forces one by name, for tests and benchmarks. A fallback to the generic backend is logged with the
    layer's name; under PYENGINE_STRICT=1 it raises NotImplementedError.
    """
    device = weight.qdata.device if device is None else device
    problem = Problem(op, weight.format, input_spec, device.type)
    candidates = KERNELS if kernel is None else [k for k in (*cpu.SUPPORTED, *KERNELS) if k.name == kernel]
    chosen = choose(candidates, problem)
    if chosen.fallback and kernel is None:
        message = (
            f"{_where(op, name)}: no kernel for {weight.format.name} with {input_spec.name} activations "
            f"on {device.type}"
        )
        if os.environ.get("PYENGINE_STRICT") == "1":
            raise NotImplementedError(message)
        logger.warning("%s, each call dequantizes the weight", message)
    return Prepared(chosen, problem, weight.shape, name), chosen.layout.pack(weight.to(device))


def _check_linear(
    x: Tensor, layout: Tensor, bias: Tensor | None, prepared: Prepared, activation: str | None
) -> None:
    where, (n, k) = _where("linear", prepared.name), prepared.shape
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{where}: x is {x.dtype}, which is none of float32, bfloat16, float16")
    if x.device != layout.device:
        raise TypeError(f"{where}: x is on {x.device}, weight is on {layout.device}")
    if not x.dim() or x.shape[-1] != k:
        raise ValueError(f"{where}: x has K={x.shape[-1] if x.dim() else 0}, weight has K={k}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"{where}: bias has shape {tuple(bias.shape)}, weight has N={n}")
    if bias is not None and bias.device != layout.device:
        raise TypeError(f"{where}: bias is on {bias.device}, weight is on {layout.device}")
    if activation not in cpu.ACTIVATION_CODES:
        names = ", ".join(map(str, cpu.ACTIVATION_CODES))
        raise ValueError(f"{where}: activation {activation!r} is none of {names}")


_DTYPES = frozenset(FLOAT_DTYPES)
_is_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_autocast_enabled = torch.is_autocast_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack


def _is_plain(x: Tensor) -> bool:
    """Whether nobody watches the operators that run on x: torch.compile, torch.jit.trace, make_fx, torch.func
    and subclasses of Tensor would see nothing of what a kernel does. And whether its memory has its values: a
    lazy negative's has their opposites.
    """
    return (
        type(x) is Tensor
        and not _is_compiling()
        and not _is_tracing()
        and not _dispatch_modes()
        and _transform() is None
        and forward_ad._current_level < 0
        and not x.is_neg()  # last: torch.compile cannot trace it
    )


def _is_transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp...) or forward-mode differentiation is at work."""
    return not _is_compiling() and (_transform() is not None or forward_ad._current_level >= 0)


def linear_prepared(
    x: Tensor,
    layout: Tensor,
    bias: Tensor | None,
    prepared: Prepared,
    activation: str | None = None,
) -> Tensor:
    """pe.ops.linear on a prepared weight."""
    problem = prepared.problem
    if _is_any_autocast_enabled() and _is_autocast_enabled(problem.device) and x.dtype in _DTYPES:
        x = x.to(torch.get_autocast_dtype(problem.device))
    # The usual call; what is wrong or rare is looked into below.
    if (
        prepared.kernel.device == "cpu"
        and _is_plain(x)
        and not (_is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
    ):
        y: Tensor | None = prepared.run(x, layout, bias, activation)
        if y is not None:
            return y
    _check_linear(x, layout, bias, prepared, activation)
    if _is_transformed():
        return _linear_transformed(x, layout, bias, prepared, activation)
    out: Tensor = torch.ops.pyengine.linear(
        x, layout, bias, *prepared.shape, problem.format.name, problem.input_spec.name,
        prepared.kernel.layout.name, activation,
    )  # fmt: skip
    return out


def _linear_transformed(
    x: Tensor, layout: Tensor, bias: Tensor | None, prepared: Prepared, activation: str | None
) -> Tensor:
    """Under torch.func and forward-mode derivatives, for which a custom op has no rules: the kernel's value
    with the derivative of F.linear, from operators that have them.
    """
    if activation is not None:
        raise NotImplementedError(
            f"{_where('linear', prepared.name)}: no derivative through a fused activation; "
            "apply it after the layer"
        )
    problem = prepared.problem
    fixed = None if bias is None else bias.detach()
    value: Tensor = torch.ops.pyengine.linear(
        x.detach(), layout, fixed, *prepared.shape, problem.format.name, problem.input_spec.name,
        prepared.kernel.layout.name, None,
    )  # fmt: skip
    weight = dequantize_prepared(layout, prepared, x.dtype)
    zero = torch.nn.functional.linear(x - x.detach(), weight)
    return value + (zero if bias is None else zero + (bias - bias.detach()).to(x.dtype))


def _check_embedding(where: str, ids: Tensor, layout: Tensor, dtype: torch.dtype) -> None:
    if ids.dtype not in ID_DTYPES:
        raise TypeError(f"{where}: indices are {ids.dtype}, not int64 or int32")
    if ids.device != layout.device:
        raise TypeError(f"{where}: indices are on {ids.device}, weight is on {layout.device}")
    if dtype not in _DTYPES:
        raise TypeError(f"{where}: rows of {dtype}, which is none of float32, bfloat16, float16")


def embedding_prepared(ids: Tensor, layout: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
    """pe.ops.embedding on a prepared table."""
    where = _where("embedding", prepared.name)
    _check_embedding(where, ids, layout, dtype)
    if not (_is_plain(ids) and ids.is_cpu):
        problem = prepared.problem
        out: Tensor = torch.ops.pyengine.embedding(
            ids, layout, *prepared.shape, problem.format.name, prepared.kernel.layout.name, dtype
        )
        return out
    try:
        rows: Tensor = prepared.run(ids, layout, dtype)
    except IndexError as error:
        raise IndexError(str(error).replace("embedding", where, 1)) from None
    return rows


def dequantize_prepared(layout: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
    """The float (N, K) weight of a layout."""
    out: Tensor = torch.ops.pyengine.dequantize(
        layout, *prepared.shape, prepared.problem.format.name, prepared.kernel.layout.name, dtype
    )
    return out


@functools.lru_cache(maxsize=4096)
def _resolve(
    op: str, format_name: str, input_spec: str, layout: str, shape: tuple[int, int], device: str
) -> Prepared:
    """The kernel on this machine for a weight that lies in a layout of that name."""
    problem = Problem(op, parse_format(format_name), ACTIVATIONS[input_spec], device)
    try:
        return Prepared(choose([k for k in KERNELS if k.layout.name == layout], problem), problem, shape)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{error} that reads layout {layout}: a program runs on the kind of device it was exported for"
        ) from None


# ---- the same for torch's dispatcher -------------------------------------------------------------

_library = torch.library.Library("pyengine", "DEF")
_library.define(
    "linear(Tensor x, Tensor layout, Tensor? bias, SymInt n, SymInt k, str format, str input_spec, "
    "str layout_name, str? activation) -> Tensor"
)
_library.define(
    "embedding(Tensor ids, Tensor layout, SymInt n, SymInt k, str format, str layout_name, "
    "ScalarType dtype) -> Tensor"
)
_library.define(
    "dequantize(Tensor layout, SymInt n, SymInt k, str format, str layout_name, ScalarType dtype) -> Tensor"
)


def _check_layout(op: str, layout: Tensor, name: str, format: str, shape: tuple[int, int]) -> None:
    """A kernel reads what the sizes say: an exported program of a stranger may say anything."""
    if name not in _LAYOUTS:
        raise ValueError(f"{op}: layout_name {name!r} is none of {', '.join(_LAYOUTS)}")
    size = _LAYOUTS[name].nbytes(parse_format(format), shape) if min(shape) >= 0 else -1
    if layout.dtype != torch.uint8 or layout.shape != (size,) or not layout.is_contiguous():
        raise ValueError(
            f"{op}: layout is {layout.dtype} {tuple(layout.shape)}, "
            f"{name} of {format} {shape} is torch.uint8 ({size})"
        )


def _linear_impl(
    x: Tensor, layout: Tensor, bias: Tensor | None, n: int, k: int, format: str, input_spec: str,
    layout_name: str, activation: str | None,
) -> Tensor:  # fmt: skip
    _check_layout("linear", layout, layout_name, format, (n, k))
    prepared = _resolve("linear", format, input_spec, layout_name, (n, k), x.device.type)
    _check_linear(x, layout, bias, prepared, activation)
    y: Tensor | None = prepared.run(x, layout, bias, activation)
    if y is None:
        raise RuntimeError(f"linear: {prepared.kernel.name} refused what had been checked")
    return y


def _linear_fake(x: Tensor, layout: Tensor, bias: Tensor | None, n: int, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _embedding_impl(
    ids: Tensor, layout: Tensor, n: int, k: int, format: str, layout_name: str, dtype: torch.dtype
) -> Tensor:
    _check_embedding("embedding", ids, layout, dtype)
    _check_layout("embedding", layout, layout_name, format, (n, k))
    prepared = _resolve("embedding", format, FLOAT.name, layout_name, (n, k), ids.device.type)
    rows: Tensor = prepared.run(ids, layout, dtype)
    return rows


def _embedding_fake(
    ids: Tensor, layout: Tensor, n: int, k: int, f: str, name: str, dtype: torch.dtype
) -> Tensor:
    return layout.new_empty((*ids.shape, k), dtype=dtype)


_LAYOUTS = {kernel.layout.name: kernel.layout for kernel in (*cpu.SUPPORTED, *KERNELS)}


def _dequantize_impl(
    layout: Tensor, n: int, k: int, format: str, layout_name: str, dtype: torch.dtype
) -> Tensor:
    _check_layout("dequantize", layout, layout_name, format, (n, k))
    return _LAYOUTS[layout_name].unpack(layout, parse_format(format), (n, k)).dequantize(dtype)


def _dequantize_fake(layout: Tensor, n: int, k: int, f: str, name: str, dtype: torch.dtype) -> Tensor:
    return layout.new_empty((n, k), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, layout, bias, *_, activation = inputs
    if activation is not None:
        raise NotImplementedError(
            "pyengine::linear: no gradient through a fused activation; apply it after the layer"
        )
    ctx.save_for_backward(layout)
    ctx.arguments = inputs[3:6], inputs[7], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of F.linear with the dequantized weight: the rounding of activations counts as the
    identity.
    """
    (layout,) = ctx.saved_tensors
    (n, k, format), layout_name, dtype = ctx.arguments
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.pyengine.dequantize(layout, n, k, format, layout_name, dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, n).sum(0).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, *([None] * 6)


for _name, _impl, _fake in (
    ("linear", _linear_impl, _linear_fake),
    ("embedding", _embedding_impl, _embedding_fake),
    ("dequantize", _dequantize_impl, _dequantize_fake),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyengine::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "pyengine::linear", _linear_backward, setup_context=_setup_context, lib=_library
)


# ---- functions of packed weights -----------------------------------------------------------------


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    input_spec: ActivationSpec | str = FLOAT,
) -> Tensor:
    """y = activation(x @ weight.T + bias), x: (..., K) float32, bfloat16 or float16 -> y: (..., N) in x's
    dtype.

    weight: an (N, K) PackedWeight. bias: (N). activation: None, "relu", "gelu" (of erf) or "silu".
    input_spec: "float", or "a8" or "a16" to quantize each row of x to int8 or int16 first: y =
    activation((q_x @ q_w.T) * (scale_x * scale_w) + bias). The layout is derived anew on each call; a layer
    (pe.nn.Linear) keeps it.

    Raises TypeError (dtype, device), ValueError (size) and NotImplementedError (no kernel).
    """
    prepared, layout = prepare("linear", weight, _activation_spec(input_spec))
    return linear_prepared(x, layout, bias, prepared, activation)


def embedding(ids: Tensor, weight: PackedWeight, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of the table: ids (...) int64 or int32 -> (..., K). Raises IndexError for an id outside [0, N)."""
    prepared, layout = prepare("embedding", weight)
    return embedding_prepared(ids, layout, prepared, dtype)


def linear_int32(x: Tensor, weight: PackedWeight, *, kernel: str | None = None) -> Tensor:
    """The bare sums q_x @ q_w.T of an integer kernel: x (M, K) codes, int8 in [-127, 127] or int16 in
    [-32767, 32767] -> (M, N) int32. q_w is a code without its zero point; where the weight has groups, their
    sums are added up unscaled.

    Equal on every kernel and to reference.linear_int32; for tests of exactness. K up to 131,072 or 512.
    """
    spec = {torch.int8: A8, torch.int16: A16}.get(x.dtype)
    if spec is None or x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"linear_int32: x is {x.dtype} {tuple(x.shape)}, weight has K={weight.shape[1]}")
    if x.device != weight.qdata.device:
        raise TypeError(f"linear_int32: x is on {x.device}, weight is on {weight.qdata.device}")
    if weight.shape[1] > spec.span:
        raise ValueError(
            f"linear_int32: K={weight.shape[1]} is above {spec.span}, where int32 sums may overflow"
        )
    top = spec.largest
    if bool((x < -top).any()):
        raise ValueError(f"linear_int32: x has the code {-top - 1}; codes lie in [{-top}, {top}]")
    prepared, layout = prepare("linear", weight, spec, kernel=kernel)
    if prepared.kernel.fallback or weight.format.zero_dtype == "float32":
        raise NotImplementedError(f"linear_int32: no integer kernel for {weight.format.name}")
    y = x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.int32)
    into = cpu.linear_into if prepared.kernel.device == "cpu" else triton.linear_into
    return into(y, prepared.kernel, weight.format, x.contiguous(), layout, weight.shape)


def _activation_spec(spec: ActivationSpec | str) -> ActivationSpec:
    if isinstance(spec, ActivationSpec):
        return spec
    if spec not in ACTIVATIONS:
        raise ValueError(f"input_spec {spec!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[spec]
