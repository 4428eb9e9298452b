"""For save_pretrained: the metadata of the files, and conversions that can be undone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..find.layers import quantized_layers
from ..format import TENSOR_NAMES
from ..models import described
from ..nn.experts import HqqExperts
from ._versions import WeightConverter, WeightRenaming, apply_renamings
from .loaders.gather import Gather
from .loaders.key_map import PackedNames
from .merged import packed_pattern
from .ties import tied_layers


def drop_conversions(model) -> None:
    """Forgets what only loading needs. save_pretrained would also undo the merging of experts on
    packed tensors of experts that were merged dense."""
    conversions = getattr(model, "_weight_conversions", None) or []
    quantized = [name for name, module in quantized_layers(model) if isinstance(module, HqqExperts)]

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
    """The descriptions of the layers for the shards of save_pretrained, under the names in the files."""
    layers: dict[str, dict[str, Any]] = {}
    transposed: list[str] = []
    conversions = [
        conversion.reverse_transform()
        for conversion in (getattr(model, "_weight_conversions", None) or [])[::-1]
    ]
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    tied = tied_layers(model)
    for name, module in quantized_layers(model):
        if name in tied:
            continue
        dense, shape = name, module.dense_shape
        if not isinstance(module, HqqExperts):
            dense = f"{name}.weight"
        saved = [(f"{name}.W_q", dense)]
        if name in model.hf_quantizer.merged.modules:
            converters = model.hf_quantizer.merged.converters
            saved = list(_cut(name, module, conversions, converters))
            shape = (module.out_features // module.parts, module.in_features)
        for packed, tensor in saved:
            layer = apply_renamings(packed, renamings).removesuffix(".W_q")
            layers[layer] = described.describe(module, apply_renamings(tensor, renamings), shape)
            if described.is_transposed(module):
                transposed.append(layer)
    return described.metadata_of(layers, transposed)


def _cut(
    name: str, module: HqqExperts, conversions: list, converters: Iterable[WeightConverter]
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
            for converter in converters
            for source, packed in zip(converter._original_source_patterns, cut)
            if packed == packed_pattern(source, "W_q")
        )
        for target in conversion.target_patterns:
            part = renamed.replace(conversion.target_patterns[0], target)
            for expert in range(module.num_experts):
                packed = part.replace("*", str(expert))
                yield packed, packed.removesuffix(".W_q") + suffix
        return
