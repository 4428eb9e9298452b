"""Quantized layers for torch. Importing it imports torch, but not Transformers."""

from . import _versions  # noqa: F401  before all others: says which torch is needed
from .backend import get_backend, set_backend
from .embedding import HqqEmbedding
from .experts import HqqExperts
from .linear import HqqLinear

__all__ = ["HqqEmbedding", "HqqExperts", "HqqLinear", "get_backend", "set_backend"]
