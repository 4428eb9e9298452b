"""What a module takes over from the one whose place it takes: hooks, attributes, the training
flag."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from .._cached import cached
from .._core import HqqConfig
from .base import QuantizedModule

# What every module has.
_MACHINERY = frozenset(vars(nn.Module()))
_HOOKS = tuple(name for name in _MACHINERY if "hook" in name and name != "_is_full_backward_hook")
# accelerate wraps forward, keeps the one it found and says with what.
ACCELERATE = frozenset({"_hf_hook", "_old_forward", "forward"})
# Says whether Transformers has initialized the other module.
_NOT_CARRIED = frozenset({"_is_hf_initialized"})


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that torch's machinery does not know."""
    return {name: value for name, value in vars(module).items() if name not in _MACHINERY}


def attribute_obstacle(module: nn.Module, base: type[nn.Module], quantized: type) -> str:
    """Why the attributes of `module` cannot go to a module of class `quantized`; empty if they can.

    Args:
        module: A dense layer.
        base: The class of torch that it is one of.
        quantized: What is to take its place: HqqLinear or HqqEmbedding.
    """
    attributes = attributes_of(module).keys() - _NOT_CARRIED
    if "_hf_hook" in attributes:
        kept = getattr(module._old_forward, "__func__", None)
        if kept is not type(module).forward:
            return "its forward was replaced"
        attributes -= ACCELERATE
    parts = module._parameters.keys() - {"weight", "bias"} | module._modules.keys()
    for name in sorted(attributes | module._buffers.keys() | parts):
        if name == "forward":
            return "its forward was replaced"
        if name in _standard(base):
            continue
        if name in own_names(quantized) or hasattr(quantized, name):
            return f"its attribute '{name}' has a meaning in quantized layers"
    return ""


def carry_over(source: nn.Module, target: nn.Module) -> None:
    """Gives `target`, which takes the place of `source`, its hooks, its training flag and what it
    has beyond its class. What `target` has already stays.

    Handles of hooks still remove them.
    """
    for name in _HOOKS:
        hooks = vars(source)[name]
        hooks.update(vars(target)[name])
        vars(target)[name] = hooks
    target._is_full_backward_hook = source._is_full_backward_hook
    for hook in target._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False) and hook.module() is source:
            hook.module = weakref.ref(target)
    target.training = source.training
    left = ACCELERATE | _NOT_CARRIED
    if isinstance(source, QuantizedModule):
        left |= own_names(type(source))
    for name, value in attributes_of(source).items():
        if name not in left and name not in vars(target):
            setattr(target, name, value)
    target._buffers.update(source._buffers)
    target._non_persistent_buffers_set |= source._non_persistent_buffers_set
    _carry_parts(source, target)
    hook = vars(source).get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(target, hook)


def _carry_parts(source: nn.Module, target: nn.Module) -> None:
    """Parameters and modules beyond those of the class, as subclasses of nn.Embedding have them."""
    for name, module in source._modules.items():
        target._modules.setdefault(name, module)
    standard = {"weight", "bias"}
    if isinstance(source, QuantizedModule):
        standard |= own_names(type(source))
    for name, parameter in source._parameters.items():
        if name not in standard:
            target._parameters.setdefault(name, parameter)


@cached
def _standard(base: type[nn.Module]) -> frozenset[str]:
    """Attributes that a layer of torch sets when it is made."""
    with torch.device("meta"):
        return frozenset(attributes_of(base(*(1, 1, 1) if issubclass(base, nn.Conv2d) else (1, 1))))


@cached
def own_names(quantized: type[QuantizedModule]) -> frozenset[str]:
    """Attributes and parameters that a quantized layer has for itself."""
    config = HqqConfig(balance="sinkhorn", quant_zero=True, quant_scale=True).layer("x")
    layer = quantized.empty(config, 1, 1, device="meta")
    names = {"weight", "bias", *attributes_of(layer), *layer._parameters}
    for cls in quantized.__mro__:
        if issubclass(cls, QuantizedModule):
            names |= vars(cls).keys()
    return frozenset(names)
