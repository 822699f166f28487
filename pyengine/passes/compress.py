"""compress: the passes in the right order, on a copy of the model."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from ..report import Report
from .quantize import Schemes, quantize_
from .select import Patterns

Model = TypeVar("Model", bound=nn.Module)


def compress(
    model: Model,
    scheme: Schemes,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    method: str | None = None,
    progress: bool | None = None,
) -> tuple[Model, Report]:
    """A compressed copy of the model, and what was done. The model itself stays as it is; see quantize_."""
    compressed = copy.deepcopy(model)
    report = quantize_(compressed, scheme, include=include, exclude=exclude, method=method, progress=progress)
    return compressed, report
