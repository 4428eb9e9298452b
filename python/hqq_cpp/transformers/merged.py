"""Experts that Transformers merges while it reads: packed tensors of single experts become those of
all, and save_pretrained cuts them apart again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..format import TENSOR_NAMES
from ._versions import (
    ConversionOps,
    MergeModulelist,
    SplitModulelist,
    WeightConverter,
    copy_converter,
)


@dataclass
class MergedExperts:
    """The experts of a model that were layers of a checkpoint with one matrix per expert."""

    # The model's conversions that merge them.
    converters: list[WeightConverter] = field(default_factory=list)
    # Names of the modules that they became.
    modules: set[str] = field(default_factory=set)

    def add(self, module: str, converter: WeightConverter) -> None:
        """Another module, which a conversion makes."""
        self.modules.add(module)
        if not any(known is converter for known in self.converters):
            self.converters.append(converter)

    def packed_conversions(self, conversions: Iterable[Any]) -> list[WeightConverter]:
        """The conversions among these that merge experts, repeated for every packed tensor."""
        merging = [converter._original_source_patterns for converter in self.converters]
        return [
            _packed_converter(converter, name)
            for converter in conversions
            if isinstance(converter, WeightConverter)
            and converter._original_source_patterns in merging
            # The first pattern that is found in a name wins: "scale_step" before "scale".
            for name in sorted(TENSOR_NAMES, key=len, reverse=True)
        ]


def _packed_converter(converter: WeightConverter, name: str) -> WeightConverter:
    """A conversion of dense weights, made one of their packed tensors of this name."""
    sources = converter._original_source_patterns
    operations = [
        MergePacked(op.dim) if type(op) is MergeModulelist else op for op in converter.operations
    ]
    if name == "col_scale" and len(sources) > 1:
        operations = [operations[0], StackParts()]
    return copy_converter(
        converter,
        [packed_pattern(source, name) for source in sources],
        [packed_pattern(target, name) for target in converter._original_target_patterns],
        operations,
    )


def packed_pattern(pattern: str, tensor: str) -> str:
    """The pattern of a packed tensor, for that of a dense weight."""
    return f"{pattern.removesuffix('.weight')}.{tensor}"


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
