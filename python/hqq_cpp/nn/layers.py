"""Which weights of a model can be quantized, and under which names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from .. import _core
from .embedding import HqqEmbedding
from .experts import HqqExperts
from .linear import HqqLinear
from .module import QuantizedModule

# Kinds whose settings are not those of a linear layer.
_ROLES = {"embedding": "embedding", "experts": "experts"}
_EXPERT_PARAMETERS = ("gate_up_proj", "down_proj", "gate_proj", "up_proj")


class Layer(NamedTuple):
    """A weight that can be quantized."""

    # Of the layer, as rules of an HqqConfig see it: "model.layers.0.mlp.experts.down_proj".
    name: str
    # Of its parameter: name + ".weight", or the name itself for fused experts.
    parameter: str
    module: nn.Module
    kind: str  # "linear", "conv1d", "conv2d", "embedding" or "experts"
    # [experts,] out, in. As stored: experts that keep their matrices transposed are taken as they
    # are.
    shape: tuple[int, ...]
    dtype: torch.dtype
    # Embeddings: the other layers with the same weight, which become quantized with it.
    tied: tuple[str, ...] = ()
    # What settings depend on: "linear", "head", "embedding" or "experts" (_core.Roles).
    role: str = "linear"


def find_layers(model: nn.Module) -> Iterator[Layer]:
    """All weights of a model that can be quantized, in its order.

    nn.Linear and subclasses of it that do not read their weight elsewhere; Transformers' Conv1D,
    which keeps its weight transposed; convolutions 1x1; fused experts [experts, out, in] of
    Transformers; embeddings, with the linear layers that are tied to them. Other weights that are
    used twice are left out, and so are routers and layers that are quantized already.
    """
    sharers = _sharers(model)
    roles = find_roles(model)
    for name, module in model.named_modules():
        for layer in _layers_of(name, module):
            role = roles.role(layer.parameter)
            if role == "router":
                continue
            # The module tells what a layer is; names tell what it is for.
            is_head = layer.kind == "linear" and role == "head"
            layer = layer._replace(role="head" if is_head else _ROLES.get(layer.kind, "linear"))
            names = sharers[layer.parameter]
            if len(names) == 1:
                yield layer
            elif layer.kind == "embedding":
                kinds = {other: _kind_at(model, other) for other in names}
                first = next(other for other, kind in kinds.items() if kind == "embedding")
                if first == layer.parameter and set(kinds.values()) <= {"linear", "embedding"}:
                    tied = (other.removesuffix(".weight") for other in names if other != first)
                    yield layer._replace(tied=tuple(tied))


def find_roles(model: nn.Module) -> _core.Roles:
    """What the names, shapes and types of a model's parameters say that they are: the rule of
    hqq-cpp quantize."""
    return _core.Roles(
        (name, tuple(parameter.shape), str(parameter.dtype))
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not nn.parameter.is_lazy(parameter)
    )


def _sharers(model: nn.Module) -> dict[str, list[str]]:
    """The name of every parameter -> the names of all with the same memory."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    sharers = {name: names for names in groups.values() for name in names}
    # Transformers ties at the end of from_pretrained.
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        names, others = sharers.get(source), sharers.get(target)
        if names is not None and others is not None and names is not others:
            names += others
            sharers |= dict.fromkeys(others, names)
    return sharers


def _kind_at(model: nn.Module, parameter: str) -> str | None:
    """The kind of the layer whose weight a parameter is."""
    owner, last = parent_of(model, parameter)
    return kind_of(owner)[0] if last == "weight" else None


def _layers_of(name: str, module: nn.Module) -> Iterator[Layer]:
    kind, shape = kind_of(module)
    if kind is not None:
        parameter = f"{name}.weight" if name else "weight"
        yield Layer(name, parameter, module, kind, shape, module.weight.dtype)
    elif is_experts(module):
        for key in _EXPERT_PARAMETERS:
            weight = module._parameters.get(key)
            if weight is not None and weight.ndim == 3:
                path = f"{name}.{key}"
                yield Layer(path, path, module, "experts", tuple(weight.shape), weight.dtype)


def kind_of(module: nn.Module) -> tuple[str | None, tuple[int, ...]]:
    """What sort of layer a module is, and [out, in]; (None, ()) if it is none or
    quantized."""
    if isinstance(module, QuantizedModule) or "weight" not in module._parameters:
        return None, ()
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None, ()  # nn.MultiheadAttention multiplies with its weight itself
    weight = module._parameters["weight"]
    if isinstance(module, nn.Linear):
        return "linear", tuple(weight.shape)
    if isinstance(module, nn.Embedding):
        return "embedding", tuple(weight.shape)
    if isinstance(module, nn.Conv2d):
        plain = module.kernel_size == module.stride == module.dilation == (1, 1)
        if plain and module.groups == 1 and module.padding in ((0, 0), "valid", "same"):
            return "conv2d", tuple(weight.shape[:2])
        return None, ()
    # By its name, so that Transformers is not imported for a model that is none of its.
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}
    if "transformers.pytorch_utils.Conv1D" in names:
        return "conv1d", (weight.shape[1], weight.shape[0])
    return None, ()


def is_experts(module: nn.Module) -> bool:
    """Whether Transformers' experts interface runs this module, and its parameters can be
    replaced."""
    return all(hasattr(module, name) for name in ("_apply_gate", "is_transposed", "has_gate"))


def dense_matrix(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """The matrix [out, in] (or [experts, out, in]) of a layer's parameter."""
    if kind == "conv1d":
        return weight.t()
    return weight.flatten(1) if kind == "conv2d" else weight


def quantized_layers(
    model: nn.Module,
) -> Iterator[tuple[str, HqqLinear | HqqEmbedding | HqqExperts]]:
    """(name, module) of all quantized layers of a model."""
    for name, module in model.named_modules():
        if isinstance(module, (HqqLinear, HqqEmbedding, HqqExperts)):
            yield name, module


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds `name`, and the last component of the name."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last
