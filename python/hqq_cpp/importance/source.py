"""The importance vectors that a config asks for, and which of them a layer gets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from .. import _core
from .._core import HqqConfig, LayerConfig
from ..checkpoints import load_safetensors
from ..find.layers import Layer

# Projections of a single expert that have the input of a fused one.
_SINGLE_NAMES = {
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"),
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "w3"),
    "down_proj": ("down_proj", "w2"),
}


class ImportanceSource:
    """The importance vectors of a config: none, a mapping, or a file that is read when asked."""

    def __init__(self, config: HqqConfig, vectors: Mapping[str, Any] | None = None):
        source = config.importance if vectors is None else vectors
        if isinstance(source, str) and source == "random":
            raise ValueError(
                "[quantize] importance 'random' needs the float model to run: use quantize_model_, "
                "or the file that 'hqq-cpp importance MODEL_DIR FILE' writes"
            )
        if isinstance(source, (str, os.PathLike)):
            source = load_safetensors(source)
        self._vectors: Mapping[str, Any] = source or {}

    def get(self, layer: Layer) -> torch.Tensor | None:
        """[in] or [experts, in] in float32, or None.

        Raises:
            ValueError: If it does not fit the layer.
        """
        names = layer.names or (layer.name,)
        vector = next((self._vectors[name] for name in names if name in self._vectors), None)
        if vector is None and layer.kind == "experts":
            vector = self._of_single_experts(layer)
        if vector is None:
            return None
        # Nothing that makes a new tensor: loaders call this with meta as the default device.
        if not isinstance(vector, torch.Tensor):
            vector = torch.from_dlpack(vector)
        vector = vector.detach().float().cpu()
        wanted = [layer.shape[-1:]]
        if layer.kind == "experts":
            if layer.module.is_transposed:
                return None  # its columns are outputs
            wanted.append((layer.shape[0], layer.shape[-1]))
        if tuple(vector.shape) not in wanted:
            raise ValueError(
                f"[{layer.name}] importance has the shape {list(vector.shape)}; it must be "
                + " or ".join(str(list(shape)) for shape in wanted)
            )
        return vector

    def names(self, layers: Iterable[Layer]) -> list[str]:
        """Names of the vectors, but for those that stand for fused experts of these layers."""
        single: set[str] = set()
        if self._vectors:
            for layer in layers:
                if layer.kind == "experts":
                    single.update(*self._names_of_single_experts(layer))
        return [name for name in self._vectors if name not in single]

    def _names_of_single_experts(self, layer: Layer) -> Iterator[list[str]]:
        """Names of vectors for all experts of a layer, as in a checkpoint with one matrix per
        expert."""
        path, _, last = layer.name.rpartition(".")
        for prefix in (path, path.replace(".mlp.experts", ".block_sparse_moe.experts")):
            for name in _SINGLE_NAMES[last]:
                keys = [f"{prefix}.{expert}.{name}" for expert in range(layer.shape[0])]
                if all(key in self._vectors for key in keys):
                    yield keys

    def _of_single_experts(self, layer: Layer) -> torch.Tensor | None:
        """[experts, in] from vectors of single experts."""
        for keys in self._names_of_single_experts(layer):
            vectors = [self._vectors[key] for key in keys]
            return torch.stack(
                [v if isinstance(v, torch.Tensor) else torch.from_dlpack(v) for v in vectors]
            )
        return None

    def resolve(self, layer: Layer, settings: LayerConfig) -> LayerConfig:
        """Settings with balance 'auto' decided, as the library decides it."""
        if settings.balance != "auto":
            return settings
        has_importance = self.get(layer) is not None
        return settings.replace(balance=_core.resolve_balance("auto", has_importance))


def check_importance(name: str, importance: torch.Tensor | None) -> None:
    """Refuses what the solver would refuse of an importance of the right shape.

    Raises:
        ValueError: If it is negative, NaN or Inf somewhere, or zero everywhere.
    """
    if importance is None:
        return
    if not (torch.isfinite(importance) & (importance >= 0)).all():
        raise ValueError(f"[{name}] importance must be finite and >= 0 everywhere")
    if not importance.any(-1).all():
        raise ValueError(f"[{name}] importance is all zeros; at least one value must be > 0")
