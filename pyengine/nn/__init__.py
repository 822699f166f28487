"""Drop-in layers that hold packed weights."""

from .embedding import Embedding
from .linear import Linear

__all__ = ["Embedding", "Linear"]
