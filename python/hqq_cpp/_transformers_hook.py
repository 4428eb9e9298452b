"""Lets Transformers load folders that hqq_cpp wrote, though nobody imported hqq_cpp.transformers.

Our quantization_config names us in ``quantizer`` and has no ``quant_method``: Transformers alone
refuses that, where it would pass over an unknown method and load random weights. Until such a
folder comes, nothing of torch or Transformers is imported or changed but two look-ups.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from typing import Any

from ._after_import import after_import

METHOD = "hqq_cpp"
_MARK = "_hqq_cpp"
# True while hqq_cpp.transformers is imported because a folder needs it.
_is_automatic = False


def install() -> None:
    """Asks for our part to be added to Transformers; ``HQQ_CPP_NO_HOOK=1`` prevents it."""
    if os.environ.get("HQQ_CPP_NO_HOOK", "") in ("", "0"):
        after_import("transformers.quantizers.auto", recognize_folders)


def is_ours(settings: Any) -> bool:
    """Whether a quantization_config is one that we wrote, in today's spelling or in the first."""
    if not isinstance(settings, dict):
        return False
    # vLLM puts "" where there is none.
    method = settings.get("quant_method") or settings.get("quantizer")
    return method == METHOD


def recognize_folders() -> None:
    """Makes Transformers see whose folder it loads. Doing it again changes nothing."""
    auto = sys.modules["transformers.quantizers.auto"]
    for home, name in (
        (auto.AutoQuantizationConfig, "from_dict"),
        (auto.AutoHfQuantizer, "supports_quant_method"),
    ):
        original = getattr(home, name)
        if not hasattr(original, _MARK):
            setattr(home, name, staticmethod(_with_method(original)))


def _with_method(original: Any) -> Any:
    @functools.wraps(original)
    def look_up(settings: Any, *args: Any, **kwargs: Any) -> Any:
        if is_ours(settings):
            _import_ours()
            settings = settings | {"quant_method": METHOD}
        elif isinstance(settings, dict) and settings.get("quant_method") == "hqq" and not has_hqq():
            _import_ours()
        return original(settings, *args, **kwargs)

    setattr(look_up, _MARK, True)
    return look_up


def _import_ours() -> None:
    global _is_automatic
    before, _is_automatic = _is_automatic, True
    try:
        importlib.import_module("hqq_cpp.transformers")
    finally:
        _is_automatic = before


def takes_hqq() -> bool:
    """Whether the method "hqq" is to be ours: whoever imports hqq_cpp.transformers wants that; a
    folder that brought us only where Transformers could not read "hqq" otherwise."""
    return not (_is_automatic and has_hqq())


def has_hqq() -> bool:
    """Whether somebody's quantizer for "hqq" works. That of Transformers 5.17 to 5.24 has neither
    operations that quantize nor any that load."""
    auto = sys.modules["transformers.quantizers.auto"]
    base = sys.modules["transformers.quantizers.base"].HfQuantizer
    quantizer = auto.AUTO_QUANTIZER_MAPPING.get("hqq")
    parts = ("get_quantize_ops", "get_weight_conversions", "get_load_operations")
    return quantizer is not None and any(
        getattr(quantizer, part, None) is not getattr(base, part, None) for part in parts
    )
