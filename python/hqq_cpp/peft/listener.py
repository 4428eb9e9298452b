"""Adapters that were made before their layers were quantized, or dequantized."""

from __future__ import annotations

from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import quantization_utils
from torch import nn

from .._core import HqqConfig
from ..nn.linear import HqqLinear
from .backend import HqqBackend
from .lora import HqqLoraLinear
from .patches import apply


def on_quantized(model: nn.Module, config: HqqConfig) -> None:
    """Called when layers of a model were quantized."""
    _follow(model)


def on_dequantized(model: nn.Module) -> None:
    """Called when the layers of a model became dense."""
    _follow(model)


def _follow(model: nn.Module) -> None:
    """Has every adapter merge as the base layer that it has now asks for.

    LoRA on nn.Linear becomes HqqLoraLinear and back; tuners with a backend get another one.
    """
    tuners = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if tuners:
        apply()
    for module in tuners:
        is_quantized = isinstance(module.get_base_layer(), HqqLinear)
        if type(module) is Linear and is_quantized:
            # [out, in], also where it was a Conv1D.
            module.fan_in_fan_out = False
            module.__class__, module._before = HqqLoraLinear, None
            module.quantization_backend = HqqBackend()
        elif type(module) is HqqLoraLinear and not is_quantized:
            module.__class__ = Linear
            del module.quantization_backend
        elif "quantization_backend" in vars(module):
            if isinstance(module.quantization_backend, HqqBackend) != is_quantized:
                base = module.get_base_layer()
                module.quantization_backend = quantization_utils.resolve_quantization_backend(base)
