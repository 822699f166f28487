"""Passes: functions from a model to a model. Each checks first, then changes, and returns a Report."""

from .compress import compress
from .quantize import quantize_

__all__ = ["compress", "quantize_"]
