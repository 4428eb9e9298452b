"""Descriptions of quantized layers in files (docs/format.md): made from a model, and read back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .. import _core
from .._core import HqqConfig, LayerConfig
from .._transformers_hook import METHOD
from ..checkpoints import safetensors_metadata
from ..errors import FormatError
from ..find.layers import find_layers, quantized_layers
from ..format import TENSOR_NAMES, dtype_name
from ..nn.base import QuantizedModule
from ..nn.experts import HqqExperts

# Key of a shard's metadata.
METADATA = "hqq_cpp"
# The keys of a description that are no settings.
NOT_SETTINGS = ("tensor", "shape", "dtype", "parts")


class Description(NamedTuple):
    """A quantized layer, as a file describes it."""

    # The name of the dense weight.
    tensor: str
    shape: tuple[int, ...]
    dtype: str
    settings: LayerConfig


def describe(
    module: QuantizedModule, tensor: str, shape: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """The description of a layer.

    Args:
        module: The layer.
        tensor: Name that its dense weight would have in the file.
        shape: Of the stored matrix, if it is but a part of the layer.
    """
    description = module.layer_config.to_dict() | {
        "tensor": tensor,
        "shape": list(shape or module.dense_shape),
        "dtype": dtype_name(module.compute_dtype),
    }
    if isinstance(module, HqqExperts) and shape in (None, module.dense_shape) and module.parts > 1:
        description["parts"] = module.parts
    return description


def is_transposed(module: QuantizedModule) -> bool:
    """Whether the dense weight is stored as [in, out]: that of a Conv1D."""
    return module.replaced is not None and module.replaced.kind == "conv1d"


def describe_all(layers: dict[str, QuantizedModule]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(name -> description, transposed layers) for files that have the names of the model."""
    descriptions = {
        name: describe(module, name if isinstance(module, HqqExperts) else f"{name}.weight")
        for name, module in layers.items()
    }
    return descriptions, [name for name, module in layers.items() if is_transposed(module)]


def metadata_of(layers: dict[str, dict[str, Any]], transposed: list[str]) -> dict[str, str]:
    """The metadata of a shard.

    Args:
        layers: Name -> description.
        transposed: Layers of which is_transposed() is true. The shape in the description is [out,
            in], and nothing else would tell for a square one.
    """
    description = {"format_version": _core.FORMAT_VERSION, "layers": layers}
    if transposed:
        description["transposed"] = transposed
    return {METADATA: json.dumps(description)}


def read_descriptions(files: Iterable[Path]) -> tuple[dict[str, Description], set[str]]:
    """(layer -> description, layers that took the place of a Conv1D) of safetensors files.

    Raises:
        FormatError: If a description cannot be read.
    """
    layers: dict[str, Description] = {}
    transposed: set[str] = set()
    for file in files:
        text = safetensors_metadata(file).get(METADATA)
        if text is None:
            continue
        try:
            read = _core.parse_json(text, "metadata hqq_cpp")
            transposed.update(read.get("transposed", ()))
            for name, fields in read["layers"].items():
                settings = {k: v for k, v in fields.items() if k not in NOT_SETTINGS}
                config = LayerConfig.from_dict(settings)
                shape = tuple(map(int, fields["shape"]))
                if fields.get("parts", 1) != 1:
                    raise ValueError("parts")
                layers[name] = Description(fields["tensor"], shape, fields["dtype"], config)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                f"[load] {file}: metadata hqq_cpp is no description of layers ({error})"
            ) from None
    return layers, transposed


def not_quantized(model: nn.Module) -> list[str]:
    """Names of the weights of two and more dimensions that stayed dense."""
    packed = {f"{name}.{tensor}" for name, _ in quantized_layers(model) for tensor in TENSOR_NAMES}
    return [
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and name not in packed
    ]


def config_of(model: nn.Module) -> HqqConfig:
    """A config that gives every layer of a model the settings it has, by the names it has here."""
    layers = dict(quantized_layers(model))
    settings = {name: module.layer_config for name, module in layers.items()}
    # Embeddings are quantized only where a rule names them.
    ruled = [name for name, module in layers.items() if isinstance(module, nn.Embedding)]
    dense = [layer.name for layer in find_layers(model) if layer.kind != "embedding"]
    return config_of_layers(settings, dense, ruled)


def config_of_layers(
    settings: dict[str, LayerConfig],
    skip_modules: list[str] | None = None,
    ruled: Collection[str] = (),
) -> HqqConfig:
    """A config that gives every layer (name -> settings) its settings: those most have, and rules
    for the others and for those in `ruled`."""
    skip = ["lm_head"] if skip_modules is None else skip_modules
    if not settings:
        return HqqConfig(skip_modules=skip)
    common, _ = Counter(settings.values()).most_common(1)[0]
    others: dict[str, Any] = {
        name: one for name, one in settings.items() if one != common or name in ruled
    }
    return HqqConfig(**common.to_dict(), dynamic_config=others, skip_modules=skip)


def quantization_config(config: HqqConfig, dense: list[str] | None) -> dict[str, Any]:
    """The quantization_config of a config.json.

    Args:
        config: The settings.
        dense: The result of not_quantized(), if it is known.
    """
    # No quant_method: without us, Transformers is to refuse the folder.
    settings = {"quantizer": METHOD, "format_version": _core.FORMAT_VERSION} | config.to_dict()
    return settings if dense is None else settings | {"not_quantized": dense}
