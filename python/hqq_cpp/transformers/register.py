"""Puts our classes where Transformers looks for them."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import auto
from transformers.utils.quantization_config import HqqConfig

from .. import peft
from ..nn.report import hqq_report
from . import config, kv_cache, legacy
from .experts import EXPERTS_FUNCTION, experts_forward
from .quantizer import HqqQuantizer, model_dtype


def register() -> None:
    """Registers quantizer, configurations, experts function, cache and adapters. Doing it again
    changes nothing."""
    # register_quantizer() refuses a name that exists, and Transformers' own "hqq" does.
    auto.AUTO_QUANTIZER_MAPPING["hqq"] = HqqQuantizer
    auto.AUTO_QUANTIZER_MAPPING["hqq_cpp"] = HqqQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["hqq_cpp"] = config.HqqConfig
    config.take_over()
    HqqConfig.from_dict = classmethod(legacy.read_config)
    PreTrainedModel.hqq_report = hqq_report
    PreTrainedModel.dtype = property(model_dtype)
    kv_cache.register()
    peft.register()
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, experts_forward)
