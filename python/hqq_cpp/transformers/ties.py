"""Tied weights: what Transformers knows about dense ones, for packed ones."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from ..find import layers as nn_layers
from ..format import TENSOR_NAMES
from ..nn.base import QuantizedModule


def tie_packed(model: nn.Module) -> None:
    """Has Transformers tie the packed tensors of layers whose weights it ties.

    Loading, tie_weights() and save_pretrained(), which stores them once, go by these names.
    """
    for part in _pretrained(model):
        packed = _with_packed(part, part.all_tied_weights_keys)
        if packed != part.all_tied_weights_keys:
            part.all_tied_weights_keys = packed
            # Regular expressions: "scale" must not stand for "scale_step" as well.
            part._tied_weights_keys = {
                f"{re.escape(target)}$": f"{re.escape(source)}$"
                for target, source in packed.items()
            }


def tie_dense(model: nn.Module) -> None:
    """The inverse, for a model whose layers become dense again."""
    for part in _pretrained(model):
        dense = _with_dense(part.all_tied_weights_keys)
        if dense != part.all_tied_weights_keys:
            part.all_tied_weights_keys = part._tied_weights_keys = dense


def tied_layers(model: nn.Module) -> set[str]:
    """Names of the quantized layers whose tensors are stored under another name."""
    names = getattr(model, "all_tied_weights_keys", None) or {}
    return {name.removesuffix(".W_q") for name in names if name.endswith(".W_q")}


def untile_tied(model: nn.Module) -> None:
    """Format 1 in memory, so that save_pretrained sees that tied layers share it."""
    for name in tied_layers(model):
        model.get_submodule(name).untile_()


def _pretrained(model: nn.Module) -> list[PreTrainedModel]:
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return [part for part in parts if getattr(part, "all_tied_weights_keys", None)]


def _with_packed(part: nn.Module, ties: dict[str, str]) -> dict[str, str]:
    """{target: source} with the packed tensors in the place of weights that are packed now."""
    packed: dict[str, str] = {}
    for target, source in ties.items():
        layer = _quantized_layer(part, target)
        if layer is None or _quantized_layer(part, source) is None:
            packed[target] = source
            continue
        prefixes = [name.removesuffix("weight") for name in (target, source)]
        for name in TENSOR_NAMES:
            if layer._parameters[name] is not None:
                packed[prefixes[0] + name] = prefixes[1] + name
    return packed


def _with_dense(ties: dict[str, str]) -> dict[str, str]:
    dense: dict[str, str] = {}
    for target, source in ties.items():
        path, _, last = target.rpartition(".")
        if last == "W_q":
            dense[f"{path}.weight"] = f"{source.removesuffix('W_q')}weight"
        elif last not in TENSOR_NAMES:
            dense[target] = source
    return dense


def _quantized_layer(part: nn.Module, parameter: str) -> QuantizedModule | None:
    owner, last = nn_layers.parent_of(part, parameter)
    return owner if last == "weight" and isinstance(owner, QuantizedModule) else None
