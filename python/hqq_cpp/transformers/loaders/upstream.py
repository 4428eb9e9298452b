"""Checkpoints of Transformers 4 and of upstream hqq: quant_method "hqq", up to 20 tensors a layer.

The small tensors say what a layer is, so modules are put in place before anything large is read.
While the weights are read, one converter gathers the tensors of each layer from all shards and
turns them into format 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from ... import _core
from ..._core import HqqConfig
from ...errors import FormatError
from ...format import tensors_of
from ...models import upstream
from ...models.described import config_of_layers
from ...nn.experts import HqqExperts
from .._versions import KEEPS_FLOAT_CODES, dot_natural_key
from ..config import HqqQuantizationConfig
from ..upstream_folder import UpstreamSource, load_pickle
from .gather import Assemble, Gather, slots_of
from .key_map import KeyMap
from .stored import StoredLoader
from .targets import Stored, Target, find_targets, put_modules


class UpstreamLoader(StoredLoader):
    """Turns upstream's tensors into those of format 1, layer by layer.

    Args:
        source: The quantization_config of the checkpoint, or what stands in for it.
    """

    def __init__(self, source: Any):
        # The state dict of a folder that has no safetensors files.
        self._tensors: Mapping[str, torch.Tensor] | None = None
        # None: config.json has the settings. Else they are read off the layers, but for these.
        self._skip_modules: list[str] | None = None
        if isinstance(source, UpstreamSource):
            self._tensors, self._skip_modules = source.tensors, []
        elif not isinstance(source, HqqQuantizationConfig):
            try:
                source = HqqQuantizationConfig(source)
            except ValueError:  # the files say the same
                self._skip_modules = source.to_dict().get("skip_modules") or []
                source = HqqQuantizationConfig()
        super().__init__(source)

    def _has_tensors(self) -> bool:
        return self._tensors is not None

    def replace_layers(
        self, model: PreTrainedModel, files: list[str], conversions: list[Any]
    ) -> list[Any]:
        """See StoredLoader."""
        sources = [_Source(one) for one in (files if self._tensors is None else [self._tensors])]
        stored = _read_layers(sources)
        _check_layers(stored)
        key_map = KeyMap(model, conversions)
        targets = find_targets(stored.values(), key_map)
        if not targets:
            raise FormatError(
                f"[from_pretrained] none of the {len(stored)} quantized layers of the checkpoint, "
                f"such as {next(iter(stored))}, is one of {type(model).__name__}"
            )
        others = (key for s in sources for key in s.keys if key.rpartition(".")[0] not in stored)
        for target, module in put_modules(model, targets, others, key_map):
            if isinstance(module, HqqExperts) and target.converter is not None:
                self.merged.add(target.parameter, target.converter)
        if self._skip_modules is not None:
            config = _config_of(targets.values(), self._skip_modules)
            self.quantization_config = HqqQuantizationConfig(config)
        self._tensors = None
        gathered = list(targets.values())
        return [Gather(slots_of(gathered, key_map), FromUpstream(gathered)), *conversions]

    def finish(self, model: PreTrainedModel) -> None:
        """Merged experts are saved in format 1, cut into layers again."""
        super().finish(model)
        added = self.merged.packed_conversions(self.merged.converters)
        model._weight_conversions = [*(getattr(model, "_weight_conversions", None) or []), *added]


@dataclass
class StoredUpstream(Stored):
    """A layer with upstream's up to 20 tensors; of the large ones only the form is known."""

    small: dict[str, torch.Tensor] = field(default_factory=dict)


def _check_layers(stored: dict[str, StoredUpstream]) -> None:
    """Refuses files without a layer, and codes that this Transformers would round."""
    if not stored:
        raise FormatError(
            "[from_pretrained] config.json says that the checkpoint is quantized by hqq, but its "
            "files hold no W_q: remove quantization_config from config.json, or quantize again"
        )
    for name, layer in stored.items():
        if layer.small["W_q"].is_floating_point() and not KEEPS_FLOAT_CODES:
            raise FormatError(
                f"[from_pretrained] {name} is stored with view_as_float, and Transformers before "
                "5.21 would round its codes: take a newer one, or convert the folder "
                "(hqq-cpp convert --to hqq_cpp)"
            )


def _read_layers(sources: list[_Source]) -> dict[str, StoredUpstream]:
    """Layer name -> what the small tensors of files or state dicts say, in natural order."""
    names = {key.removesuffix(".W_q") for s in sources for key in s.keys if key.endswith(".W_q")}
    stored = {
        name: StoredUpstream(name, f"{name}.weight") for name in sorted(names, key=dot_natural_key)
    }
    for source in sources:
        for key in source.keys:
            name, _, last = key.rpartition(".")
            layer = stored.get(name)
            if layer is None:
                continue
            layer.has_bias |= last == "bias"
            if last in upstream.KEYS:
                layer.keys.append(last)
                layer.small[last] = source.small(key, last)
    for layer in stored.values():
        stand_ins = {
            key: torch.empty(value.shape, dtype=value.dtype, device="cpu")
            if value.is_meta
            else value
            for key, value in layer.small.items()
        }
        try:
            layer.settings, layer.shape = _core.parse_upstream(stand_ins, layer.name)
        except FormatError:
            raise
        except ValueError as error:
            layer.reason = str(error)
            layer.shape = tuple(int(n) for n in layer.small["shape"].tolist())
    return stored


class _Source:
    """A file, or a state dict, of which only small tensors are read."""

    def __init__(self, source: str | Mapping[str, torch.Tensor]):
        self._tensors: Mapping[str, torch.Tensor] | None = None
        self._file: Any = None
        if not isinstance(source, str):
            self._tensors = source
        elif source.endswith(".safetensors"):
            self._file = safe_open(source, framework="pt")
        else:
            self._tensors = load_pickle(source)
        self.keys = list(self._file.keys() if self._tensors is None else self._tensors)

    def small(self, key: str, last: str) -> torch.Tensor:
        """A tensor; on device meta where only its form matters."""
        tensor = self._file.get_tensor(key) if self._tensors is None else self._tensors[key]
        if not isinstance(tensor, torch.Tensor):
            raise FormatError(
                f"[from_pretrained] {key} is a {type(tensor).__name__}; a state dict of hqq must "
                "hold tensors"
            )
        large = last in ("W_q", "scale", "zero", "zero_scale")
        return tensor.to("meta") if large else tensor.clone()


def _config_of(targets: Iterable[Target], skip_modules: list[str]) -> HqqConfig:
    """A config that gives every quantized layer its settings."""
    found = {
        target.module: settings
        for target in targets
        if target.module is not None and (settings := target.layers[0].settings) is not None
    }
    return config_of_layers(found, skip_modules)


class FromUpstream(Assemble):
    """Takes the tensors of upstream's layers."""

    def matrix(self, stored, tensors, dtype):
        """The dequantized weight in the type of the model."""
        decoded = upstream.decode(tensors)
        return upstream.dequantize(decoded, torch.float32, stored.name).to(dtype)

    def packed(self, stored, tensors):
        """The tensors W_q, scale and zero of format 1."""
        aligned = {}
        for key, tensor in tensors.items():
            tensor = tensor.detach().cpu().contiguous()
            aligned[key] = tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor
        weight = tensors_of(_core.from_upstream(aligned, stored.name))._asdict()
        return {key: tensor for key, tensor in weight.items() if tensor is not None}
