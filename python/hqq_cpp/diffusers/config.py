"""The configuration as diffusers wants it."""

from __future__ import annotations

from enum import Enum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from .. import _core
from .._transformers_hook import METHOD
from ..models import described


class Method(str, Enum):
    """diffusers reads the method's value."""

    HQQ_CPP = METHOD


class HqqQuantizationConfig(QuantizationConfigMixin):
    """How a model is quantized, as ``model.config.quantization_config`` holds it.

    Args:
        config: An hqq_cpp.HqqConfig, or anything that HqqConfig.from_dict reads.
        not_quantized: Weights of two and more dimensions that were left as they are.
    """

    def __init__(self, config: Any = None, *, not_quantized: list[str] | None = None):
        self.quant_method = Method.HQQ_CPP
        self.config = _core.HqqConfig.from_dict(config)
        self.not_quantized = not_quantized

    @classmethod
    def from_dict(cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs):
        """Reads the quantization_config of a config.json."""
        read = cls(config, not_quantized=config.get("not_quantized"))
        return (read, kwargs) if return_unused_kwargs else read

    def to_dict(self) -> dict[str, Any]:
        """The dict that config.json gets. Without us, diffusers refuses a method that it does not know."""
        settings = described.quantization_config(self.config, self.not_quantized)
        return {"quant_method": METHOD, **settings}

    def __repr__(self) -> str:
        return f"{self.config!r}"
