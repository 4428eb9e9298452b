"""Loaders: how from_pretrained reads a dense checkpoint, one in format 1, and one of upstream hqq."""

from __future__ import annotations

from typing import Any

from ..config import HqqQuantizationConfig, is_hqq
from ..upstream_folder import UpstreamSource
from .dense import DenseLoader
from .format1 import Format1Loader
from .loader import Loader
from .upstream import UpstreamLoader

__all__ = ["Loader", "choose_loader"]


def choose_loader(quantization_config: Any, pre_quantized: bool) -> Loader:
    """The loader of a checkpoint.

    Args:
        quantization_config: From config.json, or what the caller of from_pretrained passed.
        pre_quantized: Whether it is from config.json.

    Raises:
        ValueError: If the settings cannot be read.
    """
    if isinstance(quantization_config, UpstreamSource):
        return UpstreamLoader(quantization_config)
    if pre_quantized and is_hqq(quantization_config):
        return UpstreamLoader(quantization_config)
    if not isinstance(quantization_config, HqqQuantizationConfig):
        quantization_config = HqqQuantizationConfig(quantization_config)
    return (Format1Loader if pre_quantized else DenseLoader)(quantization_config)
