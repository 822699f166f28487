"""pe.nn.Embedding: torch.nn.Embedding on packed rows."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..ops import embedding_prepared
from ..packed import PackedWeight
from ..quantizers import quantize
from ..scheme import Scheme
from .packed_module import PackedModule


class Embedding(PackedModule):
    """y = weight[ids] on a packed table: ids (...) int64 or int32 -> y (..., K) in `dtype`.

    weight: an (N, K) PackedWeight with a scale per row or group. padding_idx is kept for code that reads it;
    the row behind it is stored like any other. Raises IndexError for an id outside [0, N).
    """

    op = "embedding"

    def __init__(
        self,
        weight: PackedWeight,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        name: str = "",
        kernel: str | None = None,
    ) -> None:
        super().__init__(weight, dtype=dtype, name=name, kernel=kernel)
        self.padding_idx = padding_idx

    @classmethod
    def from_float(
        cls, embedding: nn.Embedding, scheme: str | Scheme, *, method: str | None = None, name: str = ""
    ) -> Embedding:
        """Quantize a float table, which is left as it is; of the scheme only the weight's part applies.
        method: see quantizers.METHODS.
        """
        scheme = Scheme.parse(scheme)
        try:
            if embedding.max_norm is not None:
                raise ValueError("max_norm changes the weight at run time, which a packed weight cannot")
            weight = quantize(embedding.weight, replace(scheme, activation_bits=0), method)
        except (ValueError, TypeError) as error:
            raise type(error)(f"embedding {name!r}: {error}") from None
        layer = cls(weight, padding_idx=embedding.padding_idx, dtype=embedding.weight.dtype, name=name)
        return layer.train(embedding.training)

    @property
    def num_embeddings(self) -> int:
        return self._prepared.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self._prepared.shape[1]

    def forward(self, input: Tensor) -> Tensor:
        layout = self._buffers["layout"]
        assert layout is not None
        return embedding_prepared(input, layout, self._prepared, self.dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        size = f"{self.num_embeddings}, {self.embedding_dim}{padding}"
        return f"{size}, format={self.format.name}, kernel={self.kernel}"
