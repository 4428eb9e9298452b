"""HQQ for diffusers: importing this module, or hqq_cpp before or after diffusers, is all it takes.

    import hqq_cpp
    from diffusers import AutoModel

    model = AutoModel.from_pretrained(folder, quantization_config=hqq_cpp.HqqConfig(nbits=4))
    model.save_pretrained("small")  # and from_pretrained("small") again

The import puts our quantizer under the method "hqq_cpp" of diffusers. docs/other-libraries.md has the
rest.
"""

from __future__ import annotations

from .config import HqqQuantizationConfig
from .quantizer import HqqQuantizer
from .register import register

__all__ = ["HqqQuantizationConfig", "HqqQuantizer", "register"]

register()
