"""Puts our classes where diffusers looks for them."""

from __future__ import annotations

from diffusers.quantizers import auto

from .._transformers_hook import METHOD
from .config import HqqQuantizationConfig
from .quantizer import HqqQuantizer


def register() -> None:
    """Registers quantizer and configuration. Doing it again changes nothing."""
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = HqqQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = HqqQuantizationConfig
