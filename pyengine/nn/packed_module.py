"""PackedModule: what every layer with a packed weight does alike."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..formats import FLOAT, ActivationSpec, FormatError, WeightFormat
from ..ops import Prepared, dequantize_prepared, prepare
from ..packed import DTYPES, PackedWeight

logger = logging.getLogger("pyengine")


class PackedModule(nn.Module):
    """A module whose weight is one layout, in the non-persistent buffer `layout`.

    The layout is derived from a PackedWeight when the module is built or moved to another device;
    state_dict() and pickles hold the canonical bytes (qdata, scale, zero), never the layout.
    """

    op: ClassVar[str]
    layout: Tensor
    dtype: torch.dtype
    name: str

    def __init__(
        self,
        weight: PackedWeight,
        *,
        input_spec: ActivationSpec = FLOAT,
        dtype: torch.dtype = torch.float32,
        name: str = "",
        kernel: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.dtype = dtype
        self._reached = False
        self._set_weight(weight, input_spec, kernel=kernel)

    def _set_weight(
        self,
        weight: PackedWeight,
        input_spec: ActivationSpec,
        device: torch.device | None = None,
        kernel: str | None = None,
    ) -> None:
        # A tensor made in inference mode could never be saved for a backward pass.
        with torch.inference_mode(False):
            self._prepared, layout = prepare(
                self.op, weight, input_spec, name=self.name, device=device, kernel=kernel
            )
        self.register_buffer("layout", layout, persistent=False)

    @property
    def prepared(self) -> Prepared:
        return self._prepared

    @property
    def format(self) -> WeightFormat:
        return self._prepared.problem.format

    @property
    def input_spec(self) -> ActivationSpec:
        return self._prepared.problem.input_spec

    @property
    def kernel(self) -> str:
        """Name of the kernel that runs this layer."""
        return self._prepared.kernel.name

    def packed(self) -> PackedWeight:
        """The canonical weight, turned back from the layout. On the meta device it has shapes only."""
        if self.layout.is_meta:
            return PackedWeight.trusted(self.format, self._prepared.shape, self._meta_tensors())
        return self._prepared.unpack(self.layout)

    def _meta_tensors(self) -> dict[str, Tensor]:
        format, (n, k) = self.format, self._prepared.shape
        parts = {"qdata": ("uint8", format.row_bytes(k)), "scale": (format.scale_dtype, format.groups(k))}
        if format.zero_dtype is not None:
            parts["zero"] = (format.zero_dtype, format.groups(k))
        return {
            name: torch.empty(n, width, dtype=DTYPES[dtype], device="meta")
            for name, (dtype, width) in parts.items()
        }

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (N, K), computed anew each time, for code that reaches into a layer."""
        if not torch.compiler.is_compiling() and not self._reached:
            self._reached = True
            logger.info("%s %r: weight was read, which dequantizes it each time", self.op, self.name)
        return dequantize_prepared(self.layout, self._prepared, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        """Casts and moves: the layout keeps its bytes under .half() and .type(), and is derived anew on
        another device. From the meta device (to_empty) comes a weight of zeros, until a state_dict is loaded.
        """
        before = self.layout
        probe = fn(torch.empty(0, dtype=self.dtype, device=before.device))
        moved = probe.device != before.device and "meta" not in (probe.device.type, before.device.type)
        weight = self.packed() if moved else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = probe.dtype if probe.dtype.is_floating_point else self.dtype
        if weight is not None:
            self._set_weight(weight, self.input_spec, device=probe.device)
        elif self.layout.dtype != before.dtype:
            self.layout = before
        elif before.is_meta and not self.layout.is_meta:
            self.layout.zero_()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.packed().tensors().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        names = ["qdata", "scale", *(["zero"] if self.format.zero_dtype else [])]
        tensors = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        others = {
            key: value for key, value in state_dict.items() if key not in {prefix + name for name in names}
        }
        weight = None
        if len(tensors) == len(names):
            try:
                # Scales may be of either dtype: rounding decides on it by their values.
                kind = "float16" if tensors["scale"].dtype == torch.float16 else "float32"
                weight = PackedWeight(replace(self.format, scale_dtype=kind), self._prepared.shape, **tensors)
            except FormatError as error:  # then the bias stays too: the layer is loaded whole or not at all
                error_msgs.append(f"{self.op} {prefix.rstrip('.')!r}: {error}")
                return
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys.extend(prefix + name for name in names if name not in tensors)
        if weight is not None:
            assign = local_metadata.get("assign_to_params_buffers", False)
            device = weight.qdata.device if assign else self.layout.device
            if device.type != "meta":
                self._set_weight(weight, self.input_spec, device=device)

    def __getstate__(self) -> dict[str, Any]:
        if self.layout.is_meta:
            raise RuntimeError(f"{self.op} {self.name!r} is on the meta device: it has no weight to copy")
        state = dict(self.__dict__)
        state["_buffers"] = {name: t for name, t in self._buffers.items() if name != "layout"}
        state["_prepared"] = (self.packed(), self.input_spec)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        weight, input_spec = state["_prepared"]
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._set_weight(weight, input_spec)
