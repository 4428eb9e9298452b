"""Keeps Transformers informed of models that were quantized, or made dense again, in place."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from .._core import HqqConfig
from ..find.layers import quantized_layers
from ..models import described
from . import ties
from .config import HqqQuantizationConfig
from .experts import EXPERTS_FUNCTION
from .quantizer import HqqQuantizer, finish


def on_quantized(model: nn.Module, config: HqqConfig) -> None:
    """Has save_pretrained save the model, or else every model of Transformers inside of it. Their
    settings are read off their layers then: rules for the whole name them differently."""
    for part in _outermost(model):
        if part is model:
            _attach(part, config)
        elif any(quantized_layers(part)):
            _attach(part, described.config_of(part))


def _attach(model: PreTrainedModel, config: HqqConfig) -> None:
    quantization_config = HqqQuantizationConfig(config)
    model.hf_quantizer = HqqQuantizer(quantization_config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = quantization_config.quant_method
    model.config.quantization_config = quantization_config
    finish(model, quantization_config)


def _outermost(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Models of Transformers that are in no other, each once."""
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, PreTrainedModel):
            yield module
        else:
            waiting += module.children()


def on_dequantized(model: nn.Module) -> None:
    """Takes the marks of quantized models off those in `model`, whose layers are dense."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in parts:
        if isinstance(getattr(part, "hf_quantizer", None), HqqQuantizer):
            ties.tie_dense(part)
            part.hf_quantizer.remove_quantization_config(part)
            vars(part).pop("hqq_quantized", None)
    # The function that the model would have got when it was made.
    function = parts[0].get_correct_experts_implementation(None) if parts else "eager"
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and (
            getattr(config, "_experts_implementation", None) == EXPERTS_FUNCTION
        ):
            config._experts_implementation = function
