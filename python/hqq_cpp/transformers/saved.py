"""Reading and writing quantized checkpoints through from_pretrained and save_pretrained: format
1."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from .. import _core
from ..errors import FormatError
from ..nn import layers as nn_layers
from ..nn.dequantize import TENSOR_NAMES, dtype_name
from ..nn.experts import HqqExperts
from ..nn.linear import HqqLinear
from ..nn.quantize_model import empty_module, put_module
from ._versions import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    copy_converter,
    get_model_conversion_mapping,
    rename_source_key,
)
from .ties import tie_packed, tied_layers

# Keys of a shard's metadata and of its descriptions; docs/format.md.
_METADATA = "hqq_cpp"
_NOT_SETTINGS = ("tensor", "shape", "dtype", "parts")


class _Found(NamedTuple):
    """A quantized layer of the files, for a parameter of the model."""

    settings: dict[str, Any]
    parts: int
    has_bias: bool


def replace_layers(model, quantizer, files: list[str]) -> None:
    """Puts empty quantized modules where the files have quantized layers."""
    keys, described = _read_headers(files)
    found = _layers_in_model(model, quantizer, keys, described)
    layers = {layer.parameter: layer for layer in nn_layers.find_layers(model)}
    state = model.state_dict()
    for parameter in [name for name in found if name not in layers]:
        if parameter in state:
            raise FormatError(
                f"[from_pretrained] {parameter} is quantized in the checkpoint, but in "
                f"{type(model).__name__} it is no linear layer that can be quantized"
            )
        # A layer of another head, say: Transformers reports its tensors as unexpected.
        del found[parameter]
    for parameter, (settings, parts, has_bias) in found.items():
        layer = layers[parameter]
        module = empty_module(layer, settings)
        if parts > 1:
            module = HqqExperts.empty(
                settings, layer.shape, parts=parts, dtype=layer.dtype, device="meta"
            )
        if has_bias:
            add_bias(module)
        put_module(model, layer, module)
    tie_packed(model)
    if not found:
        raise FormatError(
            "[from_pretrained] config.json says that the checkpoint is quantized, but its files "
            f"hold no W_q of a layer of {type(model).__name__}: remove quantization_config from "
            "config.json, or quantize again"
        )


def add_bias(module: HqqLinear | HqqExperts) -> None:
    """A bias that is still to be read, for a layer whose architecture has none: hqq adds some
    when it calibrates."""
    if isinstance(module, HqqLinear) and module.bias is None:
        bias = torch.empty(module.out_features, dtype=module.compute_dtype, device="meta")
        module.register_parameter("bias", torch.nn.Parameter(bias, requires_grad=False))


def _read_headers(files: list[str]) -> tuple[set[str], dict[str, dict]]:
    keys: set[str] = set()
    described: dict[str, dict] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise FormatError(
                f"[from_pretrained] {file} is no safetensors file; quantized checkpoints are "
                "stored in those"
            )
        with safe_open(file, framework="pt") as opened:
            keys |= set(opened.keys())
            text = (opened.metadata() or {}).get(_METADATA)
        if text is not None:
            try:
                described |= json.loads(text)["layers"]
            except (ValueError, KeyError, TypeError):
                raise FormatError(
                    f"[from_pretrained] {file}: metadata hqq_cpp is no description of layers"
                ) from None
    return keys, described


def _layers_in_model(model, quantizer, keys, described) -> dict[str, _Found]:
    """Parameter of the model -> what the files have for it."""
    conversions = get_model_conversion_mapping(model, None, None)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state = model.state_dict()
    config = quantizer.quantization_config.config
    found: dict[str, _Found] = {}
    quantizer.merged = {}
    quantizer.merged_layers = {}
    quantizer.merged_parameters = set()
    for name in sorted(key.removesuffix(".W_q") for key in keys if key.endswith(".W_q")):
        description = described.get(name)
        dense = f"{name}.weight" if description is None else description["tensor"]
        parameter, pattern = rename_source_key(
            dense, renamings, converters, model.base_model_prefix, state
        )
        if parameter not in state and description is None:
            # Experts are stored without ".weight".
            parameter, pattern = rename_source_key(
                name, renamings, converters, model.base_model_prefix, state
            )
        if description is None:
            settings = config.layer(parameter.removesuffix(".weight")) or config.layer(name)
            if settings is None:
                raise FormatError(
                    f"[from_pretrained] {name} is quantized in the files, but config.json leaves "
                    "it unquantized"
                )
            balanced = f"{name}.col_scale" in keys
            settings |= {"balance": "sinkhorn" if balanced else "none"}
        else:
            settings = _core.HqqConfig().layer("x") | {
                k: v for k, v in description.items() if k not in _NOT_SETTINGS
            }
        parts = 1 if description is None else description.get("parts", 1)
        if pattern is not None:
            converter = next(c for c in converters if pattern in c.source_patterns)
            parts = len(converter.source_patterns)
            quantizer.merged[id(converter)] = converter
            quantizer.merged_parameters.add(parameter)
            *_, rows, cols = state[parameter].shape
            quantizer.merged_layers[name] = description or (
                settings
                | {
                    "tensor": dense,
                    "shape": [rows // parts, cols],
                    "dtype": dtype_name(state[parameter].dtype),
                }
            )
        previous = found.get(parameter)
        if previous is not None and previous.settings != settings:
            differ = [k for k in settings if previous.settings[k] != settings[k]]
            raise FormatError(
                f"[from_pretrained] the experts of {parameter} are stored with different settings "
                f"({differ[0]} {previous.settings[differ[0]]} and {settings[differ[0]]}); "
                f"Transformers keeps them in one tensor, which needs the same for all"
            )
        found[parameter] = _Found(settings, parts, f"{name}.bias" in keys)
    return found


class StackParts(ConversionOps):
    """col_scale of the parts of merged experts: several [experts, in] to one [experts, parts,
    in]."""

    @torch.no_grad()
    def convert(self, input_dict, *, source_patterns, target_patterns, **kwargs):
        tensors = [input_dict[source] for source in source_patterns]
        tensors = [t[0] if isinstance(t, list) else t for t in tensors]
        return {target_patterns[0]: torch.stack(tensors, 1)}

    @property
    def reverse_op(self):
        return UnstackParts()


class UnstackParts(ConversionOps):
    """The way back, for save_pretrained."""

    @torch.no_grad()
    def convert(self, input_dict, *, source_patterns, target_patterns, **kwargs):
        ((_, tensor),) = input_dict.items()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        return dict(zip(target_patterns, (t.contiguous() for t in tensor.unbind(1))))

    @property
    def reverse_op(self):
        return StackParts()


def update_conversions(quantizer, conversions, model):
    """The model's conversions, with those that merge experts repeated for every packed tensor."""
    added = []
    for converter in conversions:
        if not isinstance(converter, WeightConverter):
            continue
        sources = converter._original_source_patterns
        if not any(
            sources == merged._original_source_patterns for merged in quantizer.merged.values()
        ):
            continue
        # The first pattern that is found in a name wins: "scale_step" before "scale".
        for name in sorted(TENSOR_NAMES, key=len, reverse=True):
            operations = list(converter.operations)
            if name == "col_scale" and len(sources) > 1:
                operations = [operations[0], StackParts()]
            added.append(
                copy_converter(
                    converter,
                    [source.removesuffix(".weight") + f".{name}" for source in sources],
                    [f"{target}.{name}" for target in converter._original_target_patterns],
                    operations,
                )
            )
    quantizer.packed_patterns = {p for c in added for p in c.source_patterns}
    return added + conversions


def drop_conversions(model) -> None:
    """save_pretrained would undo the merging of experts on packed tensors of experts that were
    merged dense."""
    conversions = getattr(model, "_weight_conversions", None) or []
    quantized = [
        name for name, module in nn_layers.quantized_layers(model) if isinstance(module, HqqExperts)
    ]

    def touches(conversion) -> bool:
        if not isinstance(conversion, WeightConverter):
            return False
        if any(target.rpartition(".")[2] in TENSOR_NAMES for target in conversion.target_patterns):
            return False
        reverse = conversion.reverse_transform()
        return any(reverse.rename_source_key(name)[1] is not None for name in quantized)

    model._weight_conversions = [c for c in conversions if not touches(c)]


def not_quantized(model) -> list[str]:
    """Names of the weights of two and more dimensions that stayed dense."""
    packed = {
        f"{name}.{tensor}"
        for name, _ in nn_layers.quantized_layers(model)
        for tensor in TENSOR_NAMES
    }
    return [
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and name not in packed
    ]


def metadata(model) -> dict[str, str]:
    """What the shards of save_pretrained say about their layers, under the names in the files."""
    layers = dict(model.hf_quantizer.merged_layers)
    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [c.reverse_transform() for c in conversions if isinstance(c, WeightRenaming)][::-1]
    tied = tied_layers(model)
    for name, module in nn_layers.quantized_layers(model):
        if name in tied:
            continue
        fused = isinstance(module, HqqExperts)
        if name in model.hf_quantizer.merged_parameters:
            continue  # save_pretrained cuts it into the layers of merged_layers again
        tensor = apply_renamings(name if fused else f"{name}.weight", renamings)
        layers[tensor.removesuffix(".weight")] = dict(module.layer_config) | {
            "tensor": tensor,
            "shape": list(module.dense_shape),
            "dtype": dtype_name(module.compute_dtype),
        }
    return {_METADATA: json.dumps({"format_version": _core.FORMAT_VERSION, "layers": layers})}
