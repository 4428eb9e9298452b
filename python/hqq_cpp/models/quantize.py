"""quantize_model_: quantization of any torch model in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from .._core import HqqConfig, LayerConfig
from ..find.layers import Layer, find_layers, survey
from ..find.names import unmatched_names
from ..importance.collect import collect_importance
from ..importance.source import ImportanceSource, check_importance
from . import listeners
from .messages import ON_META, listed, nothing_to_quantize, stays_dense
from .replace import empty_module, store_quantized
from .solve import Quantized, quantize_layer, settings_of


def quantize_model_(
    model: nn.Module,
    config: Any = None,
    *,
    filter: Callable[[str, nn.Module], bool] | None = None,
    importance: Any = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> nn.Module:
    """Quantizes the linear layers of any torch model in place, one after the other.

    nn.Linear and subclasses that compute the same, Transformers' Conv1D, convolutions 1x1 and fused
    experts; embeddings that a rule of config names, together with the layers that are tied to them.
    A module at several places, and modules with one weight, are one layer. Hooks, attributes and
    the training flag of a layer go to the one that takes its place. Routers, adapters of peft and
    other embeddings stay as they are, and so do layers that cannot be quantized (a forward of their
    own, other convolutions, weights that are empty, not initialized, on device meta, computed, or
    of a type without a solver): one warning names them.

    Args:
        model: Any module with linear layers below it.
        config: An HqqConfig, a dict that HqqConfig.from_dict reads, or None for the defaults.
        filter: Called with name and module of every layer that the config would quantize; False
            leaves it as it is. For fused experts the name is that of the parameter.
        importance: Layer name -> [in_features] (experts: [experts, in_features]), a safetensors
            file of such, or 'random': run the model on random input first (collect_importance).
            None: config.importance.
        progress: Called with the name of a layer, its number from 1, and how many there are.

    Returns:
        The same model.

    Raises:
        ValueError: If nothing is left to quantize, or a layer cannot be quantized as asked: weights
            that are NaN or Inf or outside of what meta_dtype holds, importance that does not fit.
            All layers are checked before the first is changed; where a check cannot see it, the
            message says which layers are quantized already.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
        >>> hqq_cpp.quantize_model_(net, {"nbits": 4}, filter=lambda name, module: name != "1")
        Sequential(
          (0): HqqLinear(in_features=64, out_features=32, bias=True, nbits=4, ...)
          (1): Linear(in_features=32, out_features=8, bias=True)
        )
    """
    config = HqqConfig.from_dict(config)
    chosen, dense = _choose_layers(model, config, filter)
    if not chosen:
        warnings.warn(nothing_to_quantize(model, dense, config), stacklevel=2)
        return model
    if dense:
        warnings.warn(stays_dense(dense), stacklevel=2)
    source = _importance_of(model, config, importance)
    if unmatched := unmatched_names(model, config, source.names(find_layers(model))):
        warnings.warn(f"[quantize] {unmatched}", stacklevel=2)
    chosen = [(layer, source.resolve(layer, settings)) for layer, settings in chosen]
    solved = _check_all(chosen, source)
    for number, (layer, settings) in enumerate(chosen, 1):
        device = model.get_parameter(layer.parameter).device
        quantized = solved.pop(layer.name, None)
        if quantized is None:
            before = [one.name for one, _ in chosen[: number - 1]]
            quantized = _solve_next(layer, settings, source, before)
        store_quantized(model, layer, quantized, device)
        if progress is not None:
            progress(layer.name, number, len(chosen))
    listeners.quantized(model, config)
    return model


def _importance_of(model: nn.Module, config: HqqConfig, importance: Any) -> ImportanceSource:
    """The vectors that are given, or else those of the config; 'random' ones are collected now."""
    importance = config.importance if importance is None else importance
    if isinstance(importance, str) and importance == "random":
        importance = collect_importance(model)
    return ImportanceSource(config, importance or {})


def _choose_layers(
    model: nn.Module, config: HqqConfig, filter: Callable[[str, nn.Module], bool] | None = None
) -> tuple[list[tuple[Layer, LayerConfig]], list[Layer]]:
    """(layer, settings) of what is to be quantized, and the layers that would be, but cannot."""
    chosen, dense = [], []
    for layer in survey(model):
        settings = settings_of(layer, config) if layer.name else None
        if settings is None:
            continue
        # Filters look at in_features and the like.
        if filter is not None and layer.kind not in ("convolution", "upstream"):
            if not filter(layer.name, layer.module):
                continue
        weight = layer.module._parameters.get(layer.parameter.rpartition(".")[2])
        if not layer.obstacle and weight.is_meta:
            layer = layer._replace(obstacle=ON_META)
        if layer.obstacle:
            dense.append(layer)
        else:
            chosen.append((layer, settings))
    return chosen, dense


# Outside of these a scale may not fit float16, and the solver has the last word.
_PLAIN_WEIGHTS = (1e-3, 1e4)


def _check_all(
    chosen: list[tuple[Layer, LayerConfig]], source: ImportanceSource
) -> dict[str, Quantized]:
    """Refuses what the solver would refuse, before anything is changed. Layers whose weights are
    not finite, or very large or small, are solved here; this is the result."""
    solved = {}
    for layer, settings in chosen:
        importance = source.get(layer)
        check_importance(layer.name, importance)
        empty_module(layer, settings)
        weight = layer.module._parameters[layer.parameter.rpartition(".")[2]].detach()
        least, most = weight.aminmax()
        largest = max(-float(least), float(most))
        if not _PLAIN_WEIGHTS[0] <= largest <= _PLAIN_WEIGHTS[1] and largest != 0:
            solved[layer.name] = quantize_layer(layer, weight, settings, importance)
    return solved


def _solve_next(
    layer: Layer, settings: LayerConfig, source: ImportanceSource, before: list[str]
) -> Quantized:
    weight = layer.module._parameters[layer.parameter.rpartition(".")[2]]
    try:
        return quantize_layer(layer, weight, settings, source.get(layer))
    except ValueError as error:
        if not before:
            raise
        raise ValueError(
            f"{error} ({len(before)} layers are quantized already: {listed(before)})"
        ) from error
