"""Quantized layers for torch. Importing it imports torch, but not Transformers."""

from ..backends import get_backend, set_backend
from .embedding import HqqEmbedding
from .experts import HqqExperts
from .explanation import Explanation, explain
from .linear import HqqLinear

__all__ = [
    "Explanation",
    "HqqEmbedding",
    "HqqExperts",
    "HqqLinear",
    "explain",
    "get_backend",
    "set_backend",
]
