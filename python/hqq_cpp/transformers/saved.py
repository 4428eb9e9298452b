"""Reading and writing quantized checkpoints through from_pretrained and save_pretrained: format
1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..errors import FormatError
from ..find import layers as nn_layers
from ..models import described
from ..nn.dequantize import TENSOR_NAMES
from ..nn.experts import HqqExperts
from ._versions import (
    ConversionOps,
    MergeModulelist,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    copy_converter,
)
from .gather import Assemble, Gather, slots_of
from .headers import (
    Headers,
    check_described,
    empty_stored,
    read_headers,
    stored_layers,
)
from .key_map import KeyMap, PackedNames
from .targets import find_targets, put_modules
from .ties import tied_layers


def replace_layers(model, quantizer, files: list[str], conversions: list) -> list:
    """Puts empty quantized modules where the files have quantized layers.

    Args:
        model: The model, on device meta.
        quantizer: Gets what saving has to know.
        files: Of the checkpoint.
        conversions: How Transformers reads the dense model.

    Returns:
        How it has to read this one.

    Raises:
        FormatError: If there is no such layer, or one is broken or incomplete.
    """
    headers = read_headers(files)
    key_map = KeyMap(model, conversions)
    stored = stored_layers(headers, key_map, quantizer.quantization_config.config)
    if not stored:
        raise FormatError(
            "[from_pretrained] config.json says that the checkpoint is quantized, but its files "
            f"hold no W_q of a layer of {type(model).__name__}: remove quantization_config from "
            "config.json, or quantize again"
        )
    check_described(headers, key_map)
    targets = find_targets(stored, key_map)
    packed = {f"{layer.name}.{key}" for layer in stored for key in layer.keys}
    put = put_modules(model, targets, headers.keys - packed, key_map)
    for target, module in put:
        if target.converter is not None and isinstance(module, HqqExperts):
            quantizer.add_merged(target)
    names = PackedNames(_packed_names(put, headers, stored, key_map))
    conversions = [*update_conversions(quantizer, conversions, model), names]
    read_as_they_are = {target.parameter for target, _ in put if target.converter is None}
    read_as_they_are |= quantizer.merged_parameters
    gathered = [t for t in targets.values() if t.parameter not in read_as_they_are]
    if not gathered:
        return conversions
    return [Gather(slots_of(gathered, key_map), FromFormat1(gathered)), *conversions]


def _packed_names(put, headers: Headers, stored, key_map: KeyMap) -> dict[str, str]:
    """Name of a packed tensor after the model's renamings -> the one it has in the model.

    Tensors that the model ignores when they are dense get the name of the dense one.
    """
    names = {}
    for target, _ in put:
        if target.converter is None:
            layer = target.layers[0]
            for key in layer.keys:
                names[key_map.renamed(f"{layer.name}.{key}")] = f"{target.module}.{key}"
    there = {layer.name for layer in stored}
    for name, tensors in headers.packed.items():
        if name not in there and key_map.is_ignored(dense := key_map.renamed(f"{name}.weight")):
            names |= {key_map.renamed(f"{name}.{key}"): dense for key in tensors}
    return names


class FromFormat1(Assemble):
    """Takes the tensors of format 1."""

    def matrix(self, stored, tensors, dtype):
        """W_r in the type of the model."""
        module = empty_stored(stored.settings, stored.shape, stored.parts)
        module.set_packed(tensors, "cpu")
        return module.dequantize(dtype=dtype)

    def packed(self, stored, tensors):
        """As they are."""
        return tensors


class MergePacked(MergeModulelist):
    """Packed tensors of single experts to one of all experts."""

    @property
    def reverse_op(self):
        return SplitPacked(self.dim)


class SplitPacked(SplitModulelist):
    """The way back. Transformers' own drops all dimensions of size 1 before 5.23, as scale has."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        experts = {}
        for source, tensors in input_dict.items():
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            count = tensor.size(self.dim)
            names = self.get_target_patterns(input_dict, source, target_patterns, count)
            experts.update(zip(names, tensor.unbind(self.dim)))
        return experts

    @property
    def reverse_op(self):
        return MergePacked(self.dim)


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
            operations = [
                MergePacked(op.dim) if type(op) is MergeModulelist else op
                for op in converter.operations
            ]
            if name == "col_scale" and len(sources) > 1:
                operations = [operations[0], StackParts()]
            added.append(
                copy_converter(
                    converter,
                    [_packed_pattern(source, name) for source in sources],
                    [_packed_pattern(t, name) for t in converter._original_target_patterns],
                    operations,
                )
            )
    quantizer.packed_patterns = {p for c in added for p in c.source_patterns}
    return added + conversions


def drop_conversions(model) -> None:
    """Forgets what only loading needs. save_pretrained would also undo the merging of experts on
    packed tensors of experts that were merged dense."""
    conversions = getattr(model, "_weight_conversions", None) or []
    quantized = [
        name for name, module in nn_layers.quantized_layers(model) if isinstance(module, HqqExperts)
    ]

    def touches(conversion) -> bool:
        if isinstance(conversion, (Gather, PackedNames)):
            return True
        if not isinstance(conversion, WeightConverter):
            return False
        if any(target.rpartition(".")[2] in TENSOR_NAMES for target in conversion.target_patterns):
            return False
        reverse = conversion.reverse_transform()
        return any(reverse.rename_source_key(name)[1] is not None for name in quantized)

    model._weight_conversions = [c for c in conversions if not touches(c)]


def metadata(model) -> dict[str, str]:
    """What the shards of save_pretrained say about their layers, under the names in the files."""
    layers: dict[str, dict[str, Any]] = {}
    transposed: list[str] = []
    conversions = [
        conversion.reverse_transform()
        for conversion in (getattr(model, "_weight_conversions", None) or [])[::-1]
    ]
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    tied = tied_layers(model)
    for name, module in nn_layers.quantized_layers(model):
        if name in tied:
            continue
        dense, shape = name, module.dense_shape
        if not isinstance(module, HqqExperts):
            dense = f"{name}.weight"
        saved = [(f"{name}.W_q", dense)]
        if name in model.hf_quantizer.merged_parameters:
            merged = model.hf_quantizer.merged.values()
            saved = list(_cut(name, module, conversions, merged))
            shape = (module.out_features // module.parts, module.in_features)
        for packed, tensor in saved:
            layer = apply_renamings(packed, renamings).removesuffix(".W_q")
            layers[layer] = described.describe(module, apply_renamings(tensor, renamings), shape)
            if described.is_transposed(module):
                transposed.append(layer)
    return described.metadata_of(layers, transposed)


def _cut(
    name: str, module: HqqExperts, conversions: list, merged: Iterable[WeightConverter]
) -> Iterator[tuple[str, str]]:
    """(W_q, dense weight) of the layers into which save_pretrained cuts merged experts, before
    it renames them."""
    for conversion in conversions:
        if not isinstance(conversion, WeightConverter):
            continue
        renamed, pattern = conversion.rename_source_key(f"{name}.W_q")
        if pattern is None:
            continue
        cut = conversion._original_target_patterns
        suffix = next(
            source.removeprefix(packed.removesuffix(".W_q"))
            for converter in merged
            for source, packed in zip(converter._original_source_patterns, cut)
            if packed == _packed_pattern(source, "W_q")
        )
        for target in conversion.target_patterns:
            part = renamed.replace(conversion.target_patterns[0], target)
            for expert in range(module.num_experts):
                packed = part.replace("*", str(expert))
                yield packed, packed.removesuffix(".W_q") + suffix
        return


def _packed_pattern(pattern: str, tensor: str) -> str:
    """Of a packed tensor, for the pattern of a dense weight."""
    return f"{pattern.removesuffix('.weight')}.{tensor}"
