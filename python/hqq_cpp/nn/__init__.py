"""Quantized layers for torch. Importing it imports torch, but not Transformers."""

from ..backends import get_backend, set_backend
from .dequantize_model import dequantize_model_
from .embedding import HqqEmbedding
from .experts import HqqExperts
from .importance import collect_importance
from .importance_folder import collect_importance_folder
from .linear import HqqLinear
from .loading import load_model
from .quantize_model import quantize_model_
from .report import HqqReport, ReportRow, hqq_report
from .saving import save_model
from .take_over import from_upstream, take_over_

__all__ = [
    "HqqEmbedding",
    "HqqExperts",
    "HqqLinear",
    "HqqReport",
    "ReportRow",
    "collect_importance",
    "collect_importance_folder",
    "dequantize_model_",
    "from_upstream",
    "get_backend",
    "hqq_report",
    "load_model",
    "quantize_model_",
    "save_model",
    "set_backend",
    "take_over_",
]
