"""pyengine: an inference engine for compressed neural networks in PyTorch.

import pyengine as pe
report = pe.quantize_(model, "w8a8")
pe.save(model, "model.safetensors")
model = pe.load("model.safetensors", make_model)
"""

try:
    from . import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the extension pyengine._C is not built. In a checkout: `pip install -e .`. If it is installed, "
        "Python finds the checkout's folder first: run from another directory"
    ) from error

from . import nn, ops
from ._version import __version__
from .formats import ActivationSpec, FormatError, WeightFormat
from .io import load, save
from .packed import PackedWeight
from .passes import compress, quantize_
from .report import Report
from .scheme import Scheme

__all__ = [
    "ActivationSpec",
    "FormatError",
    "PackedWeight",
    "Report",
    "Scheme",
    "WeightFormat",
    "__version__",
    "compress",
    "load",
    "nn",
    "ops",
    "quantize_",
    "save",
]
