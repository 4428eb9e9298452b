"""The names of a model's layers, and what in a config fits none of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parameter import is_lazy

from .._core import HqqConfig
from ..nn.base import QuantizedModule
from .layers import places_of


def layer_names(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names without '.weight': of all matrices, those that stay dense too, and of other weights.

    A layer with several names, such as a tied one, has them all.
    """
    layers: list[str] = []
    others: list[str] = []
    for place in places_of(model).values():
        if isinstance(place.module, QuantizedModule):
            layers += place.paths
            continue
        for key, parameter in place.module._parameters.items():
            if parameter is None:
                continue
            kind = layers if is_lazy(parameter) or parameter.ndim >= 2 else others
            paths = (f"{path}.{key}" if path else key for path in place.paths)
            kind += (path.removesuffix(".weight") for path in paths)
    return layers, others


def unmatched_names(model: nn.Module, config: HqqConfig, importance: Iterable[str] = ()) -> str:
    """One sentence about rules, skip_modules and importance vectors that fit no layer of a model,
    with the nearest names; empty if all fit."""
    layers, others = layer_names(model)
    return ". ".join(config.unmatched_names(layers, others, list(importance)))
