"""Brings the tensors of stored layers together while from_pretrained reads, and makes of them what
the model needs."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import nn

from ...nn.experts import HqqExperts
from .._versions import ConversionOps, WeightConverter, planned_dtype
from .key_map import KeyMap
from .targets import Stored, Target

# One list per part of a target: its layers, with their tensors by the last parts of their names.
_Layers = list[list[tuple[Stored, dict[str, torch.Tensor]]]]


class Slot(NamedTuple):
    """The place of a stored tensor in a target."""

    target: Target
    # Part and last name of the tensor: "0.scale".
    pattern: str


def slots_of(targets: Collection[Target], key_map: KeyMap) -> dict[str, Slot]:
    """Name of a tensor, after all renamings -> its slot."""
    return {
        key_map.renamed(f"{stored.name}.{key}" if stored.name else key): Slot(target, f"{p}.{key}")
        for target in targets
        for p, part in enumerate(target.parts)
        for stored in part
        for key in stored.keys
    }


class Gather(WeightConverter):
    """Collects the tensors of a target, whatever shards they are in.

    Its patterns are no part of names: part and key ("0.scale"), which tell what a tensor is for.
    """

    def __init__(self, slots: dict[str, Slot], operation: Assemble):
        patterns = sorted({slot.pattern for slot in slots.values()})
        # The conversion is small work on packed bytes; its results go to their devices.
        super().__init__(patterns, [".W_q"], [operation], force_cpu=True)
        self.slots = slots

    def __deepcopy__(self, memo: dict) -> Gather:
        return Gather(self.slots, copy.copy(self.operations[0]))

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """(key of the target, pattern), as the loader asks for every key; (source_key, None) for
        others."""
        slot = self.slots.get(source_key)
        if slot is None:
            return source_key, None
        self._was_used = True
        if slot.target.converter is not None:
            # save_pretrained has to undo it.
            slot.target.converter._was_used = True
        return slot.target.key, slot.pattern

    def set_dtype(self, dtype: torch.dtype | None) -> None:
        """Tells the type to which Transformers would cast the dense weight."""
        self.operations[0].dtype = dtype


class Assemble(ConversionOps):
    """The packed tensors of a target's module, or its dense weight, from the tensors of its layers.

    Args:
        targets: The targets that it may be asked for.
    """

    # The type to which Transformers would cast a dense weight.
    dtype: torch.dtype | None = None

    def __init__(self, targets: Collection[Target]):
        self._targets = {target.key: target for target in targets}

    @torch.no_grad()
    def convert(self, input_dict, *, full_layer_name, model=None, config=None, **kwargs):
        target = self._targets[full_layer_name]
        given = {pattern: iter(tensors) for pattern, tensors in input_dict.items()}
        layers = [
            [(stored, {key: next(given[f"{p}.{key}"]) for key in stored.keys}) for stored in part]
            for p, part in enumerate(target.parts)
        ]
        if target.module is None:
            return self._dense(target, layers, model, config)
        return self._packed(model.get_submodule(target.module), target.module, layers)

    def _packed(self, module: nn.Module, name: str, layers: _Layers) -> dict[str, torch.Tensor]:
        if not isinstance(module, HqqExperts):
            packed = [self.packed(*part[0]) for part in layers]
            return {f"{name}.{key}": _rows([q[key] for q in packed]) for key in packed[0]}
        results = {key: torch.empty_like(t, device="cpu") for key, t in module.state_dict().items()}
        for e in range(module.num_experts):
            packed = [self.packed(*part[e]) for part in layers]
            for key, stack in results.items():
                stack[e] = _rows([q[key] for q in packed])
        return {f"{name}.{key}": stack for key, stack in results.items()}

    def _dense(
        self, target: Target, layers: _Layers, model: nn.Module, config: Any
    ) -> dict[str, torch.Tensor]:
        parameter = model.get_parameter(target.parameter)
        dtype = self.dtype or planned_dtype(model, target.parameter)
        dense = [
            [
                tensors[stored.keys[0]].to(dtype)
                if stored.is_dense
                else self.matrix(stored, tensors, dtype)
                for stored, tensors in part
            ]
            for part in layers
        ]
        if target.converter is None:
            return {target.parameter: _as_parameter(dense[0][0], parameter, target.transposed)}
        converter = copy.deepcopy(target.converter)
        for pattern, tensors in zip(converter.source_patterns, dense):
            converter.collected_tensors[pattern] = tensors
        return converter.convert(target.parameter, model=model, config=config)

    @abstractmethod
    def matrix(
        self, stored: Stored, tensors: dict[str, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """The dense weight of a layer, [out, in] or [experts, out, in]."""

    @abstractmethod
    def packed(self, stored: Stored, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of format 1 of a layer."""


def _rows(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _as_parameter(dense: torch.Tensor, parameter: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The matrix of a convolution in its shape, that of a Conv1D as it keeps it; others as they
    are, whose shapes Transformers compares."""
    if transposed:
        return dense.t().contiguous()
    same = parameter.ndim > dense.ndim and parameter.shape[0] == dense.shape[0]
    return dense.reshape(parameter.shape) if same and parameter.numel() == dense.numel() else dense
