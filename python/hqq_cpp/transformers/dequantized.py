"""What Transformers knows of a model whose layers became dense again."""

from __future__ import annotations

from transformers import PreTrainedModel

from . import ties
from .quantizer import HqqQuantizer


def forget(model: PreTrainedModel) -> None:
    """Takes the marks of a quantized model off one whose layers are dense."""
    if not isinstance(model.hf_quantizer, HqqQuantizer):
        return
    ties.tie_dense(model)
    model.hf_quantizer.remove_quantization_config(model)
    vars(model).pop("hqq_quantized", None)
