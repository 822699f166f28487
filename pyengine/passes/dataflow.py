"""Where the inputs of layers come from: a batch is watched on its way through a model, whatever its code."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from ..nn.packed_module import PackedModule
from .calibration import Forward, evaluation
from .select import address, has_hooks, owners

# Operators that give f(x) / s for x / s, where s belongs to a last dimension that they keep.
_CHANNELWISE = {
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.alias.default,
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.clone.default,
    torch.ops.aten._to_copy.default,
}


@dataclass(eq=False)
class Producer:
    """A module that makes the inputs of layers, and makes them divided by s (K,) once the first dimension of
    each of its parameters is. refusal: why that would not do, "" if it does.
    """

    module: nn.Module
    layers: dict[str, Any] = field(default_factory=dict)  # name -> the memory that it reads
    refusal: str = ""

    def refuse(self, reason: str) -> None:
        self.refusal = self.refusal or reason


@dataclass(frozen=True)
class Group:
    """Layers, in the order of their calls, that read one tensor, which a producer makes and nobody else
    reads; or one layer without a producer, and why.
    """

    layers: tuple[str, ...]
    producer: nn.Module | None
    reason: str = ""


def groups(model: nn.Module, layers: Mapping[str, nn.Linear], batch: Any, forward: Forward) -> list[Group]:
    """The layers that a batch calls, grouped by their producers, in the order of first calls.

    A producer is a norm (any module whose parameters are vectors and which passes a scale on, as is tried by
    calling it once more) or a Linear of `layers`. Its output goes to Linears of `layers`, as it is, through
    views, clones and casts that keep its last dimension, or through a product of elements as in
    down(act(gate(x)) * up(x)), and nowhere else: to no other function, and not out of the model. What is not
    seen here (other batches, threads, values made inside of a producer) is what confirmed() is for.
    """
    watch = _Watch(model, layers)
    with evaluation(model), ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks; its operators are seen
            for handle in (
                module.register_forward_pre_hook(watch.enter, with_kwargs=True, prepend=True),
                module.register_forward_hook(watch.leave, with_kwargs=True, always_call=True),
            ):
                hooks.callback(handle.remove)
        with watch:
            result = forward(model, batch)
    watch.finish()
    del result
    return watch.groups()


def divided(module: nn.Module, scales: Tensor) -> dict[str, nn.Parameter]:
    """The module's parameters with the first dimension divided by scales."""
    # A parameter made in inference mode could never be trained or loaded into.
    with torch.inference_mode(False), torch.no_grad():
        return {
            name: nn.Parameter((p / scales.view(-1, *[1] * (p.dim() - 1))).to(p.dtype), p.requires_grad)
            for name, p in module._parameters.items()
            if p is not None
        }


def confirmed(
    model: nn.Module,
    found: Iterable[Group],
    layers: Mapping[str, nn.Linear],
    data: Iterable[Any],
    forward: Forward,
) -> list[Group]:
    """The groups, taken apart where scaling would change what the model computes on any of the batches: each
    producer is divided by powers of two, its layers multiplied, and what layers and model put out compared.
    That rounds nothing, except for denormals of float16.
    """
    found = list(found)
    producers = {id(group.producer) for group in found}
    watched = {id(m): m for m in (model, *layers.values()) if id(m) not in producers}
    for batch in data:
        scaled = [group for group in found if group.producer is not None]
        if not scaled:
            break

        def observed(some: list[Group], batch: Any = batch) -> list[Observation]:
            with _scaled(some, layers):
                return _observed(model, watched.values(), batch, forward)

        expected = observed([])
        if _alike(observed(scaled), expected):
            continue
        changing = [group for group in scaled if not _alike(observed([group]), expected)]
        reason = "the model computes something else if its input is scaled"
        found = [
            part
            for group in found
            for part in ([Group((n,), None, reason) for n in group.layers] if group in changing else [group])
        ]
    return found


Observation = tuple[float, float, float]  # of a tensor: sum over the root of its size, norm, tolerance


def _observed(
    model: nn.Module, watched: Iterable[nn.Module], batch: Any, forward: Forward
) -> list[Observation]:
    """Of every tensor that the watched modules and `forward` put out."""
    seen: list[Observation] = []

    def note(output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.numel():
                wide = leaf.detach().double()
                tolerance = 1e-3 if leaf.dtype == torch.float16 else 1e-5
                norm = float(torch.linalg.vector_norm(wide))
                seen.append((float(wide.sum()) / math.sqrt(leaf.numel()), norm, tolerance))

    with ExitStack() as hooks, evaluation(model):
        for module in watched:
            hooks.callback(module.register_forward_hook(lambda *call: note(call[-1])).remove)
        note(forward(model, batch))
    return seen


@contextmanager
def _scaled(found: list[Group], layers: Mapping[str, nn.Linear]) -> Iterator[None]:
    old: list[tuple[nn.Module, dict[str, Any]]] = []

    def change(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        old.append((module, module._parameters))
        module._parameters = {**module._parameters, **parameters}

    try:
        for group in found:
            assert group.producer is not None
            weight = layers[group.layers[0]].weight
            scales = (2.0 ** (torch.arange(weight.shape[1]) % 3 - 1)).to(weight)
            change(group.producer, divided(group.producer, scales))
            for name in group.layers:
                change(layers[name], {"weight": nn.Parameter(layers[name].weight.detach() * scales, False)})
        yield
    finally:
        for module, parameters in reversed(old):
            module._parameters = parameters


def _alike(seen: list[Observation], wanted: list[Observation]) -> bool:
    def near(a: Observation, b: Observation) -> bool:
        bound = b[2] * max(b[1], a[1])
        return all(
            x == y or abs(x - y) <= bound or (math.isnan(x) and math.isnan(y))
            for x, y in zip(a, b, strict=True)
        )

    return len(seen) == len(wanted) and all(map(near, seen, wanted))


class _Watch(TorchDispatchMode):
    """Follows the outputs of producers, by the tensor objects themselves, through operators and modules."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layers = layers
        self._names = {id(layer): name for name, layer in layers.items()}
        self._modules = {id(module): name for name, module in model.named_modules()}
        owned = owners(model.modules())
        self._producers = {
            id(module): Producer(module)
            for module in model.modules()
            if id(module) in self._names or _is_norm_like(module, owned)
        }
        self._parameters = {
            id(p): producer for producer in self._producers.values() for p in producer.module.parameters()
        }
        self._source = WeakTensorKeyDictionary()  # a tensor -> its producer
        self._origin = WeakTensorKeyDictionary()  # any other tensor -> what made it
        self._inputs: dict[str, list[Producer | str]] = {}
        self._misused: dict[int, str] = {}
        self._stack: list[nn.Module] = []
        self._results: list[Any] = []
        self._trying = False

    # ---- hooks of modules

    def enter(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self._trying:
            return
        self._stack.append(module)
        tensors = [leaf for leaf in tree_leaves((inputs, keywords)) if isinstance(leaf, Tensor)]
        name = self._names.get(id(module))
        if name is not None:
            producer = self._source.get(tensors[0])
            if producer is not None:
                x = tensors[0]
                reads = x.data_ptr(), x.shape, x.stride(), x.dtype
                if any(other != reads for other in producer.layers.values()):
                    producer.refuse("other layers read its input in another form")
                producer.layers.setdefault(name, reads)
            self._inputs.setdefault(name, []).append(producer or self._origin.get(tensors[0], "outside"))
        elif isinstance(module, (nn.Linear, PackedModule)):  # kernels read past the operators
            for tensor in tensors:
                self._refuse(tensor, f"its input also goes to {self._shown(module)}")

    def leave(
        self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> None:
        if self._trying:
            return
        self._stack.pop()
        if not self._stack:
            self._results.append(output)
        producer = self._producers.get(id(module))
        if producer is not None and isinstance(output, Tensor):
            if id(module) not in self._names and not self._passes_scales_on(module, inputs, keywords, output):
                producer.refuse(f"its input comes from {self._shown(module)}, which passes no scales on")
            self._follow(output, producer)

    def _passes_scales_on(
        self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Tensor
    ) -> bool:
        """Whether the module gives output / s with its parameters divided by s. The s tried are powers of
        two, so that nothing is rounded and only denormals may differ.
        """
        parameters = module._parameters
        size = next(len(p) for p in parameters.values() if p is not None)
        if not output.is_floating_point() or output.shape[-1:] != (size,):
            return False
        scales = (2.0 ** (torch.arange(size) % 5 - 2)).to(output.device)
        self._trying = True
        try:
            module._parameters = {**parameters, **divided(module, scales)}
            other = module(*inputs, **keywords)
        finally:
            module._parameters = parameters
            self._trying = False
        tiny = torch.finfo(output.dtype).tiny
        wanted = (output / scales).to(output.dtype)
        return torch.allclose(other, wanted, rtol=0, atol=4 * tiny, equal_nan=True)

    # ---- operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._trying:
            return result
        module = self._stack[-1] if self._stack else None
        operator = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            producer = self._parameters.get(id(tensor))
            if producer is not None and producer.module is not module:
                # Who reads a weight past its module would find it scaled.
                producer.refuse(f"its input comes from a module whose weight also goes to {operator}")
                self._misused[id(producer.module)] = operator
        for tensor in dict.fromkeys(tensors):
            producer = self._source.get(tensor)
            if producer is None or id(module) in self._names:
                continue
            factors = sum(self._source.get(item) is producer for item in tensors)
            if func in _CHANNELWISE and factors == 1 and _keeps_channels(tensor, result):
                self._follow(result, producer)
            else:
                self._refuse(tensor, f"its input also goes to {operator}")
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf not in self._source:
                self._origin[leaf] = operator
        return result

    def _follow(self, tensor: Tensor, producer: Producer) -> None:
        before = self._source.get(tensor)
        if before is not None and before is not producer:
            before.refuse("its input is scaled by two modules")
        self._source[tensor] = producer

    def _refuse(self, tensor: Tensor, reason: str) -> None:
        producer = self._source.get(tensor)
        if producer is not None:
            producer.refuse(reason)

    def _shown(self, module: nn.Module) -> str:
        return f"{type(module).__name__} {self._modules[id(module)]!r}"

    # ---- afterwards

    def finish(self) -> None:
        """What is still alive is a result, or kept for later."""
        for producer in self._source.values():
            producer.refuse("its input is also returned or kept")

    def groups(self) -> list[Group]:
        """In the order of first calls."""
        for name, inputs in self._inputs.items():
            for producer in (item for item in inputs if isinstance(item, Producer)):
                operator = self._misused.get(id(self._layers[name]))
                if operator is not None:
                    producer.refuse(f"the weight of {name!r} also goes to {operator}")
                if len(set(inputs)) > 1:
                    producer.refuse("its input comes from several places")
        found = []
        for name, (item, *_) in self._inputs.items():
            if isinstance(item, str):
                found.append(Group((name,), None, f"its input comes from {item}"))
            elif item.refusal:
                found.append(Group((name,), None, item.refusal))
            elif name == next(iter(item.layers)):
                found.append(Group(tuple(item.layers), item.module))
        return found


def _is_norm_like(module: nn.Module, owned: Mapping[int, list[nn.Module]]) -> bool:
    """Without children and hooks, and with parameters of its own that are vectors of one length."""
    parameters = list(module.parameters(recurse=False))
    lengths = {len(p) if p.dim() == 1 else None for p in parameters}
    if isinstance(module, torch.jit.ScriptModule):
        return False
    alone = not list(module.children()) and not any(len(owned[address(p)]) > 1 for p in parameters)
    return alone and len(lengths) == 1 and not lengths & {None, 0} and not has_hooks(module)


def _keeps_channels(tensor: Tensor, result: Tensor) -> bool:
    """Whether the result has the tensor's last dimension, and numbers that a scale can pass through."""
    floats = tensor.is_floating_point() and result.is_floating_point()
    return floats and tensor.dim() > 0 and tensor.shape[-1:] == result.shape[-1:]
