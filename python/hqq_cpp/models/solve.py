"""From a dense layer to its settings and its packed tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import _core, backends
from .._core import HqqConfig, LayerConfig
from ..find.layers import Layer, dense_matrix


def settings_of(layer: Layer, config: HqqConfig) -> LayerConfig | None:
    """The settings of a layer, or None if it stays dense.

    An embedding does unless a rule names it. A layer with several names stays dense if one of them
    does, and gets the settings of the first that a rule names.
    """
    names = layer.names or (layer.name,)
    if len(names) == 1:
        return _core.settings_of(config, layer.name, layer.role)
    every, ruled = config.__copy__(), config.__copy__()
    every.dynamic_only, ruled.dynamic_only = False, True
    role = "linear" if layer.role == "embedding" else layer.role
    if any(_core.settings_of(every, name, role) is None for name in names):
        return None
    for name in names:
        chosen = _core.settings_of(ruled, name, role)
        if chosen is not None:
            return chosen
    return _core.settings_of(config, layer.name, layer.role)


class Quantized(NamedTuple):
    """The packed tensors of a layer, their errors (a dict, or one per expert) and the settings."""

    tensors: dict[str, torch.Tensor]
    stats: Any
    settings: LayerConfig


def quantize_layer(
    layer: Layer, weight: torch.Tensor, settings: LayerConfig, importance: torch.Tensor | None
) -> Quantized:
    """Solves for the packed tensors of a layer, which are where the solver leaves them.

    Args:
        layer: The layer; its name stands in messages.
        weight: Its parameter.
        settings: As HqqConfig.layer() gives them.
        importance: [in], or [experts, in] for experts, or None.
    """
    matrix = dense_matrix(layer.kind, weight.detach())
    if layer.kind != "experts":
        solved = backends.quantize(matrix, settings, layer.name, importance)
        return Quantized(solved.tensors, solved.stats.to_dict(), settings)
    if backends.kernels_for(matrix) is None:
        matrix = matrix.cpu()
    stacks: dict[str, torch.Tensor] = {}
    all_stats = []
    for e in range(matrix.shape[0]):
        vector = importance if importance is None or importance.ndim == 1 else importance[e]
        solved = backends.quantize(matrix[e], settings, f"{layer.name}.{e}", vector)
        all_stats.append(solved.stats.to_dict())
        for name, tensor in solved.tensors.items():
            if name not in stacks:
                stacks[name] = tensor.new_empty(matrix.shape[0], *tensor.shape)
            stacks[name][e] = tensor
    return Quantized(stacks, all_stats, settings)
