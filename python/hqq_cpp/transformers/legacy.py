"""Checkpoints of Transformers 4 and of upstream hqq: quant_method "hqq", up to 20 tensors a layer.

The small tensors say what a layer is, so modules are put in place before anything large is read.
While the weights are read, one converter gathers the tensors of each layer from all shards and
turns them into format 1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import logging

from .. import _core
from ..config import HqqConfig as _Settings
from ..errors import FormatError
from ..nn import layers as nn_layers
from ..nn import upstream
from ..nn.dequantize import dtype_name, weight_of
from ..nn.experts import HqqExperts
from ..nn.quantize_model import empty_module, put_module
from ..nn.take_over import config_of_layers
from . import config as _config
from . import saved
from ._versions import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)
from .ties import tie_packed
from .upstream_folder import UpstreamSource, load_pickle

logger = logging.get_logger("transformers.hqq_cpp")


@dataclass
class Stored:
    """A layer as the files have it."""

    name: str
    keys: list[str] = field(default_factory=list)
    small: dict[str, torch.Tensor] = field(default_factory=dict)
    has_bias: bool = False
    shape: tuple[int, int] = (0, 0)
    # None: format 1 cannot hold it, for this reason.
    settings: dict[str, Any] | None = None
    reason: str = ""


@dataclass
class Target:
    """A parameter of the model, and the stored layers it is made of."""

    parameter: str
    # Of the quantized module; None: the parameter stays dense.
    module: str | None = None
    converter: WeightConverter | None = None
    # One list per pattern of the converter; its layers in the order in which Transformers hands
    # over tensors.
    parts: list[list[Stored]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """What the loader calls the result."""
        return self.parameter if self.module is None else f"{self.module}.W_q"


# Before the weights are read.


def replace_layers(model: nn.Module, quantizer: Any, files: list[str]) -> None:
    """Puts empty quantized modules where the files have quantized layers, and sets
    quantizer.gather.

    Raises:
        FormatError: If there is no such layer, or one is broken or of another shape than the
            model's.
    """
    source = quantizer.quantization_config
    tensors = source.tensors if isinstance(source, UpstreamSource) else None
    stored = _read_layers(files if tensors is None else [tensors])
    if not stored:
        raise FormatError(
            "[from_pretrained] config.json says that the checkpoint is quantized by hqq, but its "
            "files hold no W_q: remove quantization_config from config.json, or quantize again"
        )
    targets, slots = _targets(model, stored)
    if not targets:
        raise FormatError(
            f"[from_pretrained] none of the {len(stored)} quantized layers of the checkpoint, such "
            f"as {next(iter(stored))}, is one of {type(model).__name__}"
        )
    layers = {layer.parameter: layer for layer in nn_layers.find_layers(model)}
    dense: dict[str, str] = {}
    for target in targets.values():
        layer = layers.get(target.parameter)
        settings, reason = _settings_of(target, layer, model)
        if settings is None:
            dense[target.parameter] = reason
            continue
        module = empty_module(layer, settings)
        if isinstance(module, HqqExperts):
            module = HqqExperts.empty(
                settings, layer.shape, parts=len(target.parts), dtype=layer.dtype, device="meta"
            )
            _save_one_by_one(quantizer, target, layer.dtype)
        if target.parts[0][0].has_bias:
            saved.add_bias(module)
        put_module(model, layer, module)
        target.module = layer.name
    tie_packed(model)
    if dense:
        name, reason = next(iter(dense.items()))
        logger.warning(
            f"{len(dense)} of {len(targets)} quantized weights become dense ones, which take more "
            "memory: "
            f"{name} ({reason})" + (", ..." if len(dense) > 1 else "")
        )
    quantizer.gather = Gather(targets, slots)
    if isinstance(source, UpstreamSource) or quantizer.unread_config is not None:
        skip = (quantizer.unread_config or {}).get("skip_modules") or []
        quantizer.quantization_config = _config.HqqConfig(_config_of(targets.values(), skip))


def _read_layers(sources: Iterable[str | Mapping[str, torch.Tensor]]) -> dict[str, Stored]:
    """Layer name -> what the small tensors of files or state dicts say, in natural order."""
    sources = [_Source(source) for source in sources]
    names = {key.removesuffix(".W_q") for s in sources for key in s.keys if key.endswith(".W_q")}
    stored = {name: Stored(name) for name in sorted(names, key=dot_natural_key)}
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


def _targets(model: nn.Module, stored: dict[str, Stored]):
    """(key of the loader's target by parameter, renamed layer name -> (parameter, part)) of
    stored layers."""
    conversions = get_model_conversion_mapping(model, None, None)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state = model.state_dict()
    targets: dict[str, Target] = {}
    slots: dict[str, tuple[str, int]] = {}
    for name, layer in stored.items():
        parameter, pattern = rename_source_key(
            f"{name}.weight", renamings, converters, model.base_model_prefix, state
        )
        if parameter not in state:
            continue  # Transformers reports it as unexpected, unless the model says that it ignores it
        target = targets.setdefault(parameter, Target(parameter))
        part = 0
        if pattern is not None:
            target.converter = next(c for c in converters if pattern in c.source_patterns)
            part = target.converter.source_patterns.index(pattern)
        while len(target.parts) <= part:
            target.parts.append([])
        target.parts[part].append(layer)
        slots[apply_renamings(f"{name}.W_q", renamings).removesuffix(".W_q")] = (parameter, part)
    return targets, slots


def _settings_of(target: Target, layer: nn_layers.Layer | None, model: nn.Module):
    """(settings of the quantized module, "") or (None, why there is none)."""
    first = target.parts[0][0] if target.parts[0] else None
    everyone = [stored for part in target.parts for stored in part]
    if first is None or any(len(part) != len(target.parts[0]) for part in target.parts):
        raise FormatError(
            f"[from_pretrained] {target.parameter} is made of several layers, some of which the "
            f"checkpoint does not have quantized; it has {everyone[0].name}"
        )
    if layer is None:
        return None, "the model needs it dense"
    for stored in everyone:
        if stored.settings is None:
            return None, stored.reason
    if any(stored.settings != first.settings for stored in everyone):
        return None, "the layers that Transformers merges into it have different settings"
    settings = dict(first.settings)
    if target.converter is None:
        shape = first.shape
    elif not _merges_rows(target.converter, layer.kind):
        return None, "Transformers changes it while it reads"
    elif layer.kind == "linear" and settings["axis"] == 0:
        return None, "rows that share groups cannot be merged"
    else:
        rows = sum(part[0].shape[0] for part in target.parts)
        shape = (len(target.parts[0]), rows, first.shape[1])[-len(layer.shape) :]
    same = all(stored.shape == part[0].shape for part in target.parts for stored in part)
    if tuple(shape) != layer.shape or not same:
        raise FormatError(
            f"[{first.name}] is stored with the shape {list(first.shape)}, which makes "
            f"{list(shape)}; {type(model).__name__} needs {list(layer.shape)} for "
            f"{target.parameter}"
        )
    return settings, ""


def _merges_rows(converter: WeightConverter, kind: str) -> bool:
    """Whether a conversion stacks experts, and puts rows below each other."""
    operations = list(converter.operations)
    if kind == "experts":
        if not operations or type(operations[0]) is not MergeModulelist or operations[0].dim != 0:
            return False
        operations = operations[1:]
    rows = 1 if kind == "experts" else 0
    return all(type(op) is Concatenate and op.dim == rows for op in operations)


def _save_one_by_one(quantizer: Any, target: Target, dtype: torch.dtype) -> None:
    """Lets save_pretrained cut merged experts into layers again, as saved.py has it."""
    quantizer.merged[id(target.converter)] = target.converter
    quantizer.merged_parameters.add(target.parameter)
    for stored in (stored for part in target.parts for stored in part):
        quantizer.merged_layers[stored.name] = stored.settings | {
            "tensor": f"{stored.name}.weight",
            "shape": list(stored.shape),
            "dtype": dtype_name(dtype),
        }


def _config_of(targets: Iterable[Target], skip_modules: list[str]) -> _Settings:
    """A config that gives every quantized layer its settings."""
    found = {t.module: t.parts[0][0].settings for t in targets if t.module is not None}
    return config_of_layers(found, skip_modules)


# While the weights are read.


class Gather(WeightConverter):
    """Brings the tensors of a layer together, whatever shards they are in.

    Its patterns are no part of names: part and key ("0.scale"), which tell what a tensor is for.
    """

    __slots__ = ("targets", "slots")

    def __init__(self, targets: dict[str, Target], slots: dict[str, tuple[str, int]]):
        most = max(len(target.parts) for target in targets.values())
        patterns = [f"{part}.{key}" for part in range(most) for key in sorted(upstream.KEYS)]
        by_key = {target.key: target for target in targets.values()}
        # The conversion is small work on packed bytes; its results go to their devices.
        super().__init__(patterns, [".W_q"], [ToFormat1(by_key)], force_cpu=True)
        self.targets = targets
        self.slots = slots

    def __deepcopy__(self, memo: dict) -> Gather:
        return Gather(self.targets, self.slots)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """(key of the target, pattern), as the loader asks for every key; (source_key, None) for
        others."""
        name, _, key = source_key.rpartition(".")
        slot = self.slots.get(name)
        if slot is None or key not in upstream.KEYS:
            return source_key, None
        parameter, part = slot
        self._was_used = True
        return self.targets[parameter].key, f"{part}.{key}"


class ToFormat1(ConversionOps):
    """The packed tensors of a module, or the dense weight, from the tensors of upstream's
    layers."""

    def __init__(self, targets: dict[str, Target]):
        self._targets = targets

    @torch.no_grad()
    def convert(self, input_dict, *, full_layer_name, model=None, config=None, **kwargs):
        target = self._targets[full_layer_name]
        given = {pattern: iter(tensors) for pattern, tensors in input_dict.items()}
        layers = [
            [
                (stored.name, {key: next(given[f"{p}.{key}"]) for key in stored.keys})
                for stored in part
            ]
            for p, part in enumerate(target.parts)
        ]
        if target.module is None:
            return self._dense(target, layers, model, config)
        module = model.get_submodule(target.module)
        if not isinstance(module, HqqExperts):
            packed = [_convert(*part[0]) for part in layers]
            results = {key: _rows([q[key] for q in packed]) for key in packed[0]}
        else:
            results = {
                key: torch.empty_like(t, device="cpu") for key, t in module.named_parameters()
            }
            for e in range(module.num_experts):
                packed = [_convert(*part[e]) for part in layers]
                for key, stack in results.items():
                    stack[e] = _rows([q[key] for q in packed])
        return {f"{target.module}.{key}": tensor for key, tensor in results.items()}

    def _dense(self, target: Target, layers, model, config):
        parameter = model.get_parameter(target.parameter)
        dense = [
            [
                upstream.dequantize(upstream.decode(tensors), torch.float32, name).to(
                    parameter.dtype
                )
                for name, tensors in part
            ]
            for part in layers
        ]
        if target.converter is None:
            return {target.parameter: dense[0][0]}
        converter = copy.deepcopy(target.converter)
        for pattern, tensors in zip(converter.source_patterns, dense):
            converter.collected_tensors[pattern] = tensors
        return converter.convert(target.parameter, model=model, config=config)


def _rows(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _convert(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W_q, scale and zero of format 1."""
    aligned = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        aligned[key] = tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor
    weight = weight_of(_core.from_upstream(aligned, name))._asdict()
    return {key: tensor for key, tensor in weight.items() if tensor is not None}


def finish(model: nn.Module, quantizer: Any) -> None:
    """Forgets how the model was read: it is saved in format 1."""
    conversions = [c for c in model._weight_conversions if not isinstance(c, Gather)]
    merging = list(quantizer.merged.values())
    added = saved.update_conversions(quantizer, merging, model)[: -len(merging) or None]
    model._weight_conversions = conversions + added
    quantizer.gather = None


# quantization_config.


def read_config(cls: type, config: dict[str, Any]) -> Any:
    """HqqConfig.from_dict of Transformers, also for files of its first versions, which lack keys.

    A dict that a user writes has the arguments of HqqConfig instead of quant_config.
    """
    settings = {
        k: v
        for k, v in config.items()
        if k not in ("quant_method", "quant_config", "show_progress")
    }
    if "quant_config" not in config:
        return cls(**settings)
    read = cls()
    read.quant_config = config["quant_config"]
    read.skip_modules = config.get("skip_modules", read.skip_modules)
    return read
