"""HQQ for Transformers 5: importing this module is all it takes.

    import hqq_cpp.transformers
    from transformers import AutoModelForCausalLM, HqqConfig

    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=HqqConfig(nbits=4))

The import puts our quantizer under the methods "hqq" and "hqq_cpp" of Transformers, which has none
of its own any more. docs/transformers.md has the rest.
"""

from __future__ import annotations

from .. import _transformers_hook
from . import _versions  # noqa: F401  before all others: says which Transformers is needed
from .config import HqqQuantizationConfig
from .quantizer import HqqQuantizer
from .register import register
from .upstream_folder import load_upstream

__all__ = ["HqqQuantizationConfig", "HqqQuantizer", "load_upstream", "register"]

register(hqq=_transformers_hook.takes_hqq())
