"""Adapters that were made before their layers were quantized, or dequantized."""

from __future__ import annotations

from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn

from ..nn.linear import HqqLinear
from .backend import HqqBackend
from .lora import HqqLoraLinear


def follow(model: nn.Module) -> None:
    """Has every adapter merge into its base layer as its kind asks for.

    What LoRA knows of nn.Linear becomes HqqLoraLinear and back; others keep their class and change
    their backend.
    """
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        is_quantized = isinstance(module.get_base_layer(), HqqLinear)
        if type(module) is Linear and is_quantized:
            # [out, in], also where it was a Conv1D.
            module.fan_in_fan_out = False
            module.__class__, module._before = HqqLoraLinear, None
        elif type(module) is HqqLoraLinear and not is_quantized:
            module.__class__ = Linear
        elif isinstance(module.quantization_backend, HqqBackend) == is_quantized:
            continue
        module.quantization_backend = resolve_quantization_backend(module.get_base_layer())
