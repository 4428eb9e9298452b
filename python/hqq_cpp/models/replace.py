"""Puts quantized modules where dense layers were."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from .._core import LayerConfig
from ..find.kinds import Kind, kind_of
from ..find.layers import Layer, parent_of
from ..find.subclasses import class_for
from ..format import TENSOR_NAMES
from ..nn.base import Replaced
from ..nn.carry import carry_over
from ..nn.conv import HqqPointwiseConv2d
from ..nn.embedding import HqqEmbedding
from ..nn.experts import HqqExperts
from ..nn.linear import HqqLinear
from .solve import Quantized


def empty_module(
    layer: Layer, settings: LayerConfig, parts: int = 1
) -> HqqLinear | HqqEmbedding | HqqExperts:
    """The quantized module for a layer, on device meta, with the layer's bias.

    Args:
        layer: The layer.
        settings: As HqqConfig.layer() gives them, with balance decided.
        parts: Equal parts of an expert's rows that were quantized one by one.
    """
    module = _empty_module(layer, settings, parts)
    weight = layer.module._parameters[layer.parameter.rpartition(".")[2]]
    module.replaced = Replaced(layer.kind, type(layer.module), weight.requires_grad)
    return module


def _empty_module(
    layer: Layer, settings: LayerConfig, parts: int
) -> HqqLinear | HqqEmbedding | HqqExperts:
    if layer.kind == "experts":
        return HqqExperts.empty(
            settings, layer.shape, parts=parts, dtype=layer.dtype, device="meta"
        )
    if layer.kind == "embedding":
        return HqqEmbedding.empty_like(layer.module, settings)
    bias = layer.module._parameters.get("bias")
    if layer.kind == "linear":
        cls = class_for(HqqLinear, type(layer.module))
    else:
        cls = HqqPointwiseConv2d if layer.kind == "conv2d" else HqqLinear
    return cls.empty(
        settings, *layer.shape, False if bias is None else bias, dtype=layer.dtype, device="meta"
    )


def put_module(model: nn.Module, layer: Layer, module: nn.Module) -> None:
    """Puts the quantized module wherever the layer was, and layers that share its parameters
    wherever those tied to it were. They get the hooks and attributes of the old ones."""
    owner, last = parent_of(model, layer.name)
    if layer.kind == "experts":
        del owner._parameters[last]
        module.train(layer.module.training)
        setattr(owner, last, module)
        return
    taken = {id(layer.module): _take_place(owner, last, layer.module, module)}
    for name in layer.tied:
        owner, last = parent_of(model, name)
        old = owner._modules[last]
        kind = cast(Kind, kind_of(old))  # only layers are tied to layers
        tied = Layer(name, f"{name}.weight", old, kind.name, kind.shape, old.weight.dtype)
        taken[id(old)] = _take_place(owner, last, old, empty_module(tied, module.layer_config))
    for name in layer.aliases:
        owner, last = parent_of(model, name)
        owner._modules[last] = taken.get(id(owner._modules[last]), owner._modules[last])
    share_parameters(model, layer, module)


def _take_place(owner: nn.Module, name: str, old: nn.Module, module: nn.Module) -> nn.Module:
    carry_over(old, module)
    setattr(owner, name, module)
    return module


def share_parameters(model: nn.Module, layer: Layer, module: nn.Module) -> None:
    """Gives the layers tied to another its packed tensors."""
    for name in layer.tied:
        tied = model.get_submodule(name)
        for key in TENSOR_NAMES:
            tied.register_parameter(key, module._parameters[key])
        tied.place_marker()


def store_quantized(
    model: nn.Module, layer: Layer, quantized: Quantized, device: torch.device
) -> nn.Module:
    """Replaces a layer by its quantized form."""
    module = empty_module(layer, quantized.settings)
    module.set_packed(quantized.tensors, device)
    module.quantize_stats = quantized.stats
    put_module(model, layer, module)
    return module
