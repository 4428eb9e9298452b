"""Keeps diffusers informed of models that were quantized, or made dense again, in place."""

from __future__ import annotations

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .._core import HqqConfig
from ..find.layers import quantized_layers
from .quantizer import HqqQuantizer, attach


def on_quantized(model: nn.Module, config: HqqConfig) -> None:
    """Has save_pretrained save every model of diffusers in `model` that has quantized layers. Any may
    be saved alone, and each has a config of its own, read off its layers."""
    for part in _models(model):
        if any(quantized_layers(part)):
            attach(part)


def on_dequantized(model: nn.Module) -> None:
    """Takes the marks of quantized models off those whose layers are dense again."""
    for part in _models(model):
        if isinstance(getattr(part, "hf_quantizer", None), HqqQuantizer):
            del part.hf_quantizer, part.quantization_method
            config = {k: v for k, v in part.config.items() if k != "quantization_config"}
            part._internal_dict = type(part.config)(config)


def _models(model: nn.Module) -> list[nn.Module]:
    return [part for part in model.modules() if isinstance(part, ModelMixin)]
