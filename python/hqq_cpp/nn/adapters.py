"""Which modules are adapters: small trainable parts, which are never quantized."""

from __future__ import annotations

import functools
import re

from torch import nn

# A module of peft's has the model, or the layer that it adapts, under one of these names. All else
# below it is its own; so is the original of modules_to_save, of which it makes more copies.
_BASE_NAMES = {
    "base_model", "model", "lora_model", "base_layer", "token_adapter", "quant_linear_module",
}  # fmt: skip
# Names that peft gives its parts, for code that copies peft.
_ADAPTER_NAME = re.compile(
    "(lora|hada|lokr|oft|boft|vera|pvera|ia3|vblora|randlora|fourierft|shira|delora|gralora)_."
)


def is_adapter_part(parent: nn.Module, name: str) -> bool:
    """Whether the child `name` of a module is a part of an adapter, and not what it adapts."""
    return _is_of_peft(type(parent)) and name not in _BASE_NAMES or bool(_ADAPTER_NAME.match(name))


def is_merged(parent: nn.Module) -> bool:
    """Whether an adapter is merged into the layer that `parent` adapts."""
    return _is_of_peft(type(parent)) and bool(getattr(parent, "merged_adapters", None))


@functools.cache
def _is_of_peft(cls: type[nn.Module]) -> bool:
    return any(part.__module__.partition(".")[0] == "peft" for part in cls.__mro__)
