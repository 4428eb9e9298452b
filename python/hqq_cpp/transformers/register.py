"""Puts our classes where Transformers looks for them."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.quantizers import auto

from .. import peft
from .._transformers_hook import METHOD, recognize_folders
from ..models.report import hqq_report
from . import cache, config, resize
from ._versions import ALL_EXPERTS_FUNCTIONS, compare_shapes
from .experts import EXPERTS_FUNCTION, experts_forward
from .quantizer import HqqQuantizer


def register(hqq: bool = True) -> None:
    """Registers quantizer, configurations, experts function, cache and adapters. Doing it again
    changes nothing.

    Args:
        hqq: Take over the names of Transformers too: the method "hqq", HqqConfig and the cache
            "hqq". False is for a Transformers that has a working HQQ of its own.
    """
    # register_quantizer() refuses a name that exists, and Transformers' own "hqq" does.
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = HqqQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = config.HqqQuantizationConfig
    recognize_folders()
    compare_shapes(HqqQuantizer)
    if hqq:
        auto.AUTO_QUANTIZER_MAPPING["hqq"] = HqqQuantizer
        config.take_over()
        cache.register()
    PreTrainedModel.hqq_report = hqq_report
    resize.register()
    peft.register()
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, experts_forward)
