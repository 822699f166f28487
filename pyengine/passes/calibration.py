"""Running a model on calibration data: how a batch is fed, and what is kept of the inputs of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import memory

T = TypeVar("T")
Forward = Callable[[nn.Module, Any], Any]


def require_reiterable(data: Any) -> Iterable[Any]:
    """Raises ValueError for what can be gone through once only, and TypeError for what cannot at all."""
    if not isinstance(data, Iterable):
        raise TypeError(f"calibration_data is a {type(data).__name__}, which cannot be iterated over")
    if iter(data) is data:
        raise ValueError(
            f"calibration_data is a {type(data).__name__}, which can be gone through only once: "
            "pass a list, a DataLoader, or an object whose __iter__ starts anew"
        )
    return data


def feed(model: nn.Module, batch: Any) -> Any:
    """The default of `forward`: a tensor is the argument, a tuple or list the arguments, a dict the
    keywords.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and all(isinstance(item, Tensor) for item in batch):
        return model(*batch)
    raise TypeError(f"a calibration batch is a {type(batch).__name__}: say by `forward` how it is fed")


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """In eval mode, without gradients; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def call_order(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, forward: Forward) -> list[str]:
    """Names of the layers in the order of their first calls; those that are not called are left out."""
    order: dict[str, None] = {}
    with ExitStack() as hooks, evaluation(model):
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
            hooks.callback(handle.remove)
        forward(model, batch)
    return list(order)


class SecondMoments:
    """moments: H = sum over rows x of a layer's input of x x^T, (K, K) float32; magnitudes: sum |x|, (K,)
    float32; for each of some Linear layers, streamed. A NaN or infinity in an input stays in them.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        self._layers = layers
        self.moments = {
            name: memory.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
            for name, layer in layers.items()
        }
        self.magnitudes = {
            name: torch.zeros(layer.in_features, device=layer.weight.device) for name, layer in layers.items()
        }

    def _add(self, name: str, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = inputs[0] if inputs else keywords["input"]
        rows = x.detach().view(1, -1).float() if x.dim() == 1 else x.detach().flatten(0, -2).float()
        self.moments[name].addmm_(rows.t(), rows)
        self.magnitudes[name] += torch.linalg.vector_norm(rows, ord=1, dim=0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, layer in self._layers.items():
                handle = layer.register_forward_pre_hook(
                    lambda _, inputs, keywords, name=name: self._add(name, inputs, keywords), with_kwargs=True
                )
                hooks.callback(handle.remove)
            yield


def in_chunks(items: Iterable[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Neighbours together as long as their sizes sum up to at most `limit`, at least one each."""
    chunks: list[list[T]] = []
    total = 0
    for item in items:
        if not chunks or total + size(item) > limit:
            chunks.append([])
            total = 0
        chunks[-1].append(item)
        total += size(item)
    return chunks
