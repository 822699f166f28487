"""compress: the passes in the right order, on a copy of the model."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from ..report import Report
from .calibration import Forward
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
    calibration_data: Iterable[Any] | None = None,
    forward: Forward | None = None,
    act_order: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> tuple[Model, Report]:
    """A compressed copy of the model, and what was done. The model itself stays as it is; see quantize_."""
    compressed = copy.deepcopy(model)
    report = quantize_(
        compressed,
        scheme,
        include=include,
        exclude=exclude,
        method=method,
        calibration_data=calibration_data,
        forward=forward,
        act_order=act_order,
        checkpoint=checkpoint,
        progress=progress,
    )
    return compressed, report
