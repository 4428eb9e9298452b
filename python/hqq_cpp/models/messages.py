"""Sentences about layers that stay dense, and checks before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .._core import HqqConfig
from ..find.layers import Layer, quantized_layers, survey
from ..find.names import unmatched_names

ON_META = "the weight is on device meta"
# While loading: files may have the weight under any of its names, or several times.
SHARED = "the weight is shared: quantize_model_ can take it once it is loaded"
# Names that a message lists before it counts.
_MOST_NAMES = 4


def listed(names: Sequence[str]) -> str:
    """'a, b and 3 more'."""
    text = ", ".join(names[:_MOST_NAMES])
    more = len(names) - _MOST_NAMES
    return text if more <= 0 else f"{text} and {more} more"


def _are(names: Sequence[str]) -> str:
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'}"


def stays_dense(layers: Sequence[Layer]) -> str:
    """One warning for all layers that the settings would quantize, but that cannot be."""
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        reasons.setdefault(layer.obstacle, []).append(layer.name)
    parts = (
        f"{listed(names)} ({reason}{f', {len(names)} layers' if len(names) > 1 else ''})"
        for reason, names in reasons.items()
    )
    one = len(layers) == 1
    start = "1 layer stays as it is" if one else f"{len(layers)} layers stay as they are"
    return f"[quantize] {start}: {'; '.join(parts)}"


def nothing_to_quantize(model: nn.Module, dense: Sequence[Layer], config: HqqConfig) -> str:
    """The warning for a model in which quantize_model_ finds nothing to do.

    Raises:
        ValueError: Unless each of the layers that would be quantized has a reason of its own not to
            be.
    """
    start = f"[quantize] there is nothing to quantize below {type(model).__name__}: "
    if any(layer.obstacle == ON_META for layer in dense):
        raise ValueError(
            start + "the weights are on device meta; load them first (from_pretrained with a "
            "quantization_config quantizes while it loads)"
        )
    quantized = [path or "(the module itself)" for path, _ in quantized_layers(model)]
    upstream = [layer.name for layer in dense if layer.kind == "upstream"]
    if upstream:
        raise ValueError(
            start + f"{_are(upstream)} quantized already, by the package hqq; hqq_cpp.take_over_ "
            "takes such layers over"
        )
    if quantized:
        raise ValueError(
            start + f"{_are(quantized)} quantized already; start from the dense model "
            "(hqq_cpp.dequantize_model_ makes it dense again)"
        )
    if dense:
        return start + stays_dense(dense).removeprefix("[quantize] ")
    found = [layer.name or "(the module itself)" for layer in survey(model)]
    unmatched = unmatched_names(model, config)
    raise ValueError(
        start + f"its layers are {listed(found) or 'none'}, and the config or the filter leaves "
        "them out (quantize_linear takes a single layer)" + (f". {unmatched}" if unmatched else "")
    )
