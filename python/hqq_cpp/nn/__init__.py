"""Quantized layers for torch. Importing it imports torch, but not Transformers."""

from .backend import get_backend, set_backend
from .experts import HqqExperts
from .linear import HqqLinear
from .quantize_model import quantize_model_

__all__ = ["HqqExperts", "HqqLinear", "get_backend", "quantize_model_", "set_backend"]
