"""pe.nn.Linear: torch.nn.Linear on a packed weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..formats import FLOAT, ActivationSpec
from ..ops import linear_prepared
from ..packed import PackedWeight
from ..quantizers import quantize
from ..scheme import Scheme
from .packed_module import PackedModule


class Linear(PackedModule):
    """y = x @ weight.T + bias on a packed weight: x (..., K) float32, bfloat16 or float16 -> y (..., N) in
    x's dtype.

    weight: an (N, K) PackedWeight. bias: (N) or None; it takes part in autograd if its requires_grad is set,
    which it is not at first. input_spec: what happens to x, see ActivationSpec. dtype: what `.weight`
    reports; it follows .half() and the like. Gradients flow to x through the dequantized weight; the weight
    itself is not trainable.
    """

    op = "linear"
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None = None,
        *,
        input_spec: ActivationSpec = FLOAT,
        dtype: torch.dtype = torch.float32,
        name: str = "",
        kernel: str | None = None,
    ) -> None:
        super().__init__(weight, input_spec=input_spec, dtype=dtype, name=name, kernel=kernel)
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"linear {name!r}: bias has shape {tuple(bias.shape)}, weight has N={weight.shape[0]}"
            )
        with torch.inference_mode(False):
            own = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", own)

    @classmethod
    def from_float(
        cls, linear: nn.Linear, scheme: str | Scheme, *, method: str | None = None, name: str = ""
    ) -> Linear:
        """Quantize a float layer, which is left as it is. method: see quantizers.METHODS. Raises ValueError
        if its weight is not finite.
        """
        scheme = Scheme.parse(scheme)
        try:
            weight = quantize(linear.weight, scheme, method)
        except (ValueError, TypeError) as error:
            raise type(error)(f"linear {name!r}: {error}") from None
        return cls.from_packed(linear, weight, scheme, name=name)

    @classmethod
    def from_packed(
        cls, linear: nn.Linear, weight: PackedWeight, scheme: Scheme, *, name: str = ""
    ) -> Linear:
        """As from_float, with codes that have been found already."""
        layer = cls(weight, linear.bias, input_spec=scheme.input_spec, dtype=linear.weight.dtype, name=name)
        return layer.train(linear.training)

    @property
    def in_features(self) -> int:
        return self._prepared.shape[1]

    @property
    def out_features(self) -> int:
        return self._prepared.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        # Straight from the dictionaries: nn.Module.__getattr__ would cost a tenth of a small layer's time.
        layout: Any = self._buffers["layout"]
        return linear_prepared(input, layout, self._parameters["bias"], self._prepared)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format.name}, activations={self.input_spec.name}, "
            f"kernel={self.kernel}"
        )
