"""Predicts which parameter from_pretrained makes of each name in a checkpoint."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from .._versions import WeightConverter, WeightRenaming, apply_renamings, rename_source_key


class Place(NamedTuple):
    """Where a tensor of a checkpoint goes."""

    # Name in the model's state dict, of the first result where a conversion has several.
    parameter: str
    # The conversion that makes it, and which of its sources the tensor is; None: it is read as
    # it is.
    converter: WeightConverter | None = None
    part: int = 0


class KeyMap:
    """The names of a checkpoint and of a model whose weights are still dense.

    Args:
        model: The model, on device meta.
        conversions: Those of the load, the caller's key_mapping among them.
    """

    def __init__(self, model: nn.Module, conversions: Iterable[Any]):
        self._conversions = list(conversions)
        # Some remember what they were asked, and the loader goes by that.
        self._asked = copy.deepcopy(self._conversions)
        self._renamings = [c for c in self._asked if isinstance(c, WeightRenaming)]
        self._converters = [c for c in self._asked if isinstance(c, WeightConverter)]
        self._by_pattern = {
            pattern: (original, asked.source_patterns.index(pattern))
            for original, asked in zip(self._conversions, self._asked)
            if isinstance(asked, WeightConverter)
            for pattern in asked.source_patterns
        }
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()
        patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._ignored = re.compile("|".join(f"({pattern})" for pattern in patterns) or "(?!)")

    def place(self, key: str) -> Place | None:
        """Where the tensor `key` of the checkpoint goes; None if the model has no place for it."""
        name, pattern = self._rename(key, self._renamings, self._converters)
        if name not in self._state and key in self._state:
            name, pattern = self._rename(key, [], [])
        if name not in self._state:
            return None
        return Place(name) if pattern is None else Place(name, *self._by_pattern[pattern])

    def _rename(self, key: str, renamings: list, converters: list) -> tuple[str, str | None]:
        return rename_source_key(key, renamings, converters, self._prefix, self._state)

    def renamed(self, key: str) -> str:
        """`key` after all renamings: what conversions are asked for."""
        return apply_renamings(key, self._renamings)

    def shape(self, place: Place) -> tuple[int, ...]:
        """Shape of one of the tensors that a merged parameter is made of, or of the parameter."""
        shape = tuple(self._state[place.parameter].shape)
        if place.converter is None:
            return shape
        return shape[-2] // len(place.converter.source_patterns), shape[-1]

    def is_ignored(self, key: str) -> bool:
        """Whether the model expects that a checkpoint may have `key` for nothing."""
        return self._ignored.search(key) is not None


class PackedNames(WeightRenaming):
    """Names that packed tensors have in the model, where a renaming goes by "weight"; the last
    of the renamings."""

    def __init__(self, names: dict[str, str]):
        super().__init__([".W_q"], [".W_q"])
        self.names = names

    def __deepcopy__(self, memo: dict) -> PackedNames:
        return self

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """(the name in the model, None), as the loader asks for every key."""
        return self.names.get(source_key, source_key), None
