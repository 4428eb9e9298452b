"""Quantized layers for torch. Importing it imports torch, but not Transformers."""

from .backend import get_backend, set_backend
from .experts import HqqExperts
from .linear import HqqLinear
from .quantize_model import quantize_model_
from .report import HqqReport, ReportRow, hqq_report

__all__ = [
    "HqqExperts",
    "HqqLinear",
    "HqqReport",
    "ReportRow",
    "get_backend",
    "hqq_report",
    "quantize_model_",
    "set_backend",
]
