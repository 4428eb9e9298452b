"""Which modules are adapters: small trainable parts, which are never quantized."""

from __future__ import annotations

from torch import nn

from .. import _core
from .._cached import cached

# A module of peft's has the model, or the layer that it adapts, under one of these names. All else
# below it is its own; so is the original of modules_to_save, of which it makes more copies.
_BASE_NAMES = {
    "base_model", "model", "lora_model", "base_layer", "token_adapter", "quant_linear_module",
}  # fmt: skip


def is_adapter_part(parent: nn.Module, name: str) -> bool:
    """Whether the child `name` of a module is a part of an adapter, and not what it adapts."""
    # Code that copies peft copies its names.
    is_pefts = _is_of_peft(type(parent)) and name not in _BASE_NAMES
    return is_pefts or _core.is_adapter_name(name)


def is_merged(parent: nn.Module) -> bool:
    """Whether an adapter is merged into the layer that `parent` adapts."""
    return _is_of_peft(type(parent)) and bool(getattr(parent, "merged_adapters", None))


@cached
def _is_of_peft(cls: type[nn.Module]) -> bool:
    return any(part.__module__.partition(".")[0] == "peft" for part in cls.__mro__)
