"""What Transformers knows of a model whose layers became dense again."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from . import ties
from .experts import EXPERTS_FUNCTION
from .quantizer import HqqQuantizer


def forget(model: nn.Module) -> None:
    """Takes the marks of quantized models off those in `model`, whose layers are dense."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in parts:
        if isinstance(getattr(part, "hf_quantizer", None), HqqQuantizer):
            ties.tie_dense(part)
            part.hf_quantizer.remove_quantization_config(part)
            vars(part).pop("hqq_quantized", None)
    # What the model would have been given when it was made.
    function = parts[0].get_correct_experts_implementation(None) if parts else "eager"
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) == EXPERTS_FUNCTION:
            config._experts_implementation = function
