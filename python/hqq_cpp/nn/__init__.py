"""Quantized layers for torch. Importing it imports torch, but not Transformers."""

from ..backends import get_backend, set_backend
from .embedding import HqqEmbedding
from .experts import HqqExperts
from .linear import HqqLinear

__all__ = ["HqqEmbedding", "HqqExperts", "HqqLinear", "get_backend", "set_backend"]
