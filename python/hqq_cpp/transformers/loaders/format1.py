"""Checkpoints in format 1, which `hqq-cpp quantize`, save_model and save_pretrained write."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...errors import FormatError
from ...nn.experts import HqqExperts
from .gather import Assemble, Gather, slots_of
from .headers import Headers, check_described, empty_stored, read_headers, stored_layers
from .key_map import KeyMap, PackedNames
from .stored import StoredLoader
from .targets import Stored, Target, find_targets, put_modules


class Format1Loader(StoredLoader):
    """Reads packed tensors as they are. What the model needs in another form is gathered."""

    def replace_layers(
        self, model: PreTrainedModel, files: list[str], conversions: list[Any]
    ) -> list[Any]:
        """See StoredLoader."""
        headers = read_headers(files)
        key_map = KeyMap(model, conversions)
        stored = stored_layers(headers, key_map, self.quantization_config.config)
        if not stored:
            raise FormatError(
                "[from_pretrained] config.json says that the checkpoint is quantized, but its "
                f"files hold no W_q of a layer of {type(model).__name__}: remove "
                "quantization_config from config.json, or quantize again"
            )
        check_described(headers, key_map)
        targets = find_targets(stored, key_map)
        packed = {f"{layer.name}.{key}" for layer in stored for key in layer.keys}
        put = put_modules(model, targets, headers.keys - packed, key_map)
        as_they_are = set()
        for target, module in put:
            if target.converter is None:
                as_they_are.add(target.parameter)
            elif isinstance(module, HqqExperts):
                self.merged.add(target.parameter, target.converter)
                as_they_are.add(target.parameter)
        merging = self.merged.packed_conversions(conversions)
        self._packed_patterns = {p for converter in merging for p in converter.source_patterns}
        names = PackedNames(_packed_names(put, headers, stored, key_map))
        conversions = [*merging, *conversions, names]
        gathered = [t for t in targets.values() if t.parameter not in as_they_are]
        if not gathered:
            return conversions
        return [Gather(slots_of(gathered, key_map), FromFormat1(gathered)), *conversions]


def _packed_names(
    put: list[tuple[Target, nn.Module]], headers: Headers, stored: list[Stored], key_map: KeyMap
) -> dict[str, str]:
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
        """The dequantized weight in the type of the model."""
        module = empty_stored(stored.settings, stored.shape, stored.parts)
        module.set_packed(tensors, "cpu")
        return module.dequantize(dtype=dtype)

    def packed(self, stored, tensors):
        """The tensors themselves."""
        return tensors
