"""The quantized key-value cache: ``QuantizedCache(backend="hqq")`` of Transformers."""

from __future__ import annotations

from .layer import HqqCacheLayer, register

__all__ = ["HqqCacheLayer", "register"]
