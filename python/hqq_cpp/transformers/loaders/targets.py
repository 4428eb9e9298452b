"""Stored layers and the parameters of the model that they are for: which become quantized
modules, which dense weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..._core import LayerConfig
from ...errors import FormatError
from ...find import layers as nn_layers
from ...models.replace import empty_module, put_module
from ...nn.linear import HqqLinear
from .._versions import Concatenate, MergeModulelist, WeightConverter, dot_natural_key
from ..ties import tie_packed
from .key_map import KeyMap
from .marks import leave_bias_to_model

logger = logging.get_logger("transformers.hqq_cpp")

_NAMES_IN_WARNINGS = 3


@dataclass
class Stored:
    """A layer as the files have it."""

    # The names of its tensors begin with this.
    name: str
    # Name of its dense weight.
    tensor: str = ""
    # Last parts of the names of its tensors.
    keys: list[str] = field(default_factory=list)
    shape: tuple[int, ...] = (0, 0)
    # None: it is dense, or format 1 cannot hold it, for this reason.
    settings: LayerConfig | None = None
    reason: str = ""
    has_bias: bool = False
    # Parts of the rows of experts with factors of their own.
    parts: int = 1
    is_dense: bool = False


@dataclass
class Target:
    """A parameter of the model, and the stored layers it is made of."""

    parameter: str
    converter: WeightConverter | None = None
    # One list per pattern of the converter; its layers in the order in which Transformers hands
    # over tensors.
    parts: list[list[Stored]] = field(default_factory=list)
    # The quantized module; None: the parameter stays dense.
    module: str | None = None
    # The parameter of a Conv1D, whose matrix was packed as [out, in].
    transposed: bool = False

    @property
    def key(self) -> str:
        """The name by which Transformers knows the result."""
        return self.parameter if self.module is None else f"{self.module}.W_q"

    @property
    def layers(self) -> list[Stored]:
        """All layers."""
        return [stored for part in self.parts for stored in part]

    def add(self, stored: Stored, part: int) -> None:
        """Another layer."""
        while len(self.parts) <= part:
            self.parts.append([])
        self.parts[part].append(stored)


def find_targets(stored: Iterable[Stored], key_map: KeyMap) -> dict[str, Target]:
    """Parameter -> target, of the layers that the model has; Transformers reports the others."""
    targets: dict[str, Target] = {}
    for layer in stored:
        place = key_map.place(layer.tensor)
        if place is not None:
            target = targets.setdefault(place.parameter, Target(place.parameter, place.converter))
            target.add(layer, place.part)
    return targets


def _add_dense(targets: dict[str, Target], keys: Iterable[str], key_map: KeyMap) -> set[str]:
    """Adds what the checkpoint has dense to targets that are made of several layers; returns the
    other parameters that it has dense."""
    dense = set()
    for key in keys:
        place = key_map.place(key)
        if place is None:
            continue
        target = targets.get(place.parameter)
        if target is None or place.converter is None:
            dense.add(place.parameter)
            continue
        name, _, last = key.rpartition(".")
        reason = "the layers that Transformers merges into it are not all quantized"
        target.add(Stored(name, key, [last], reason=reason, is_dense=True), place.part)
        target.parts[place.part].sort(key=lambda layer: dot_natural_key(layer.name))
    return dense


def put_modules(
    model: nn.Module, targets: dict[str, Target], others: Iterable[str], key_map: KeyMap
) -> list[tuple[Target, nn.Module]]:
    """Puts empty quantized modules where they can hold what is stored, with one warning that
    names the other weights.

    Args:
        model: The model, on device meta.
        targets: By parameter; their module and transposed are set.
        others: Names of all other tensors of the checkpoint.
        key_map: Where they go.

    Raises:
        FormatError: If a part of a target is missing.
    """
    layers = {layer.parameter: layer for layer in nn_layers.find_layers(model)}
    merged = any(target.converter is not None for target in targets.values())
    tied = any(layers[name].tied for name in targets if name in layers)
    dense = _add_dense(targets, others, key_map) if merged or tied else set()
    stored = dense | targets.keys()
    as_stored = _has_conv1d_as_stored(targets, layers)
    put, reasons = [], {}
    for target in targets.values():
        layer = layers.get(target.parameter)
        _check_parameter(target, model)
        if layer is not None and layer.kind == "conv1d" and as_stored:
            module, reason = None, "it was packed as a Conv1D keeps it, [in, out]"
        else:
            module, reason = _module_for(target, layer, model, stored)
        if module is None or layer is None:
            target.transposed = not as_stored and _is_conv1d(model, target.parameter)
            if reason:
                reasons[target.parameter] = reason
            continue
        put_module(model, layer, module)
        target.module = layer.name
        put.append((target, module))
    tie_packed(model)
    _warn_of_dense(reasons, len(targets))
    return put


def _module_for(
    target: Target, layer: nn_layers.Layer | None, model: nn.Module, stored: set[str]
) -> tuple[nn.Module | None, str]:
    """(the quantized module for a target, ""), or None with the reason why there is none.

    Args:
        target: The target.
        layer: Its layer; None if it is none that can be quantized.
        model: The model.
        stored: Names of all parameters that the checkpoint has.
    """
    settings, reason = _settings_of(target, layer, model)
    if layer is None or settings is None:
        return None, reason
    if any(f"{tied}.weight" in stored for tied in layer.tied):
        return None, f"{layer.tied[0]}, which is tied to it, is stored as well"
    try:
        return _empty(layer, settings, target), ""
    except ValueError as error:  # an embedding that does more than look up
        return None, str(error)


def _empty(layer: nn_layers.Layer, settings: LayerConfig, target: Target) -> nn.Module:
    """The quantized module for a target."""
    first = target.layers[0]
    parts = len(target.parts) if target.converter is not None else first.parts
    module = empty_module(layer, settings, parts)
    if isinstance(module, HqqLinear):
        if first.has_bias and module.bias is None:
            # hqq adds some where the architecture has none, when it calibrates.
            bias = layer.module.weight.new_empty(module.out_features, device="meta")
            module.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
        leave_bias_to_model(module)
    return module


def _warn_of_dense(reasons: dict[str, str], targets: int) -> None:
    if not reasons:
        return
    named = [f"{name} ({reason})" for name, reason in list(reasons.items())[:_NAMES_IN_WARNINGS]]
    rest = len(reasons) - len(named)
    logger.warning(
        f"[from_pretrained] {len(reasons)} of {targets} quantized weights become dense ones, which "
        f"take more memory: {', '.join(named)}" + (f" and {rest} more" if rest else "")
    )


def _check_parameter(target: Target, model: nn.Module) -> None:
    """Refuses a parameter that is no matrix, and a merged one of which a layer is missing."""
    parameter, converter = model.get_parameter_or_buffer(target.parameter), target.converter
    if parameter.ndim < 2:
        raise FormatError(
            f"[from_pretrained] {target.parameter} is quantized in the checkpoint, as "
            f"{list(target.layers[0].shape)}, but in {type(model).__name__} it is "
            f"{list(parameter.shape)}"
        )
    if converter is None or not _stacks_experts(converter):
        return
    patterns = converter.source_patterns
    parts = target.parts + [[]] * (len(patterns) - len(target.parts))
    wanted = max(parameter.shape[0], *map(len, parts))
    if any(len(part) < wanted for part in parts):
        counts = ", ".join(f"{p}: {len(part)} of {wanted}" for p, part in zip(patterns, parts))
        raise FormatError(
            f"[from_pretrained] {target.parameter} is made of several layers, some of which the "
            f"checkpoint does not have quantized or dense ({counts}): a shard is missing, or the "
            "folder is not complete"
        )


def _settings_of(
    target: Target, layer: nn_layers.Layer | None, model: nn.Module
) -> tuple[LayerConfig | None, str]:
    """(settings of the quantized module, ""), or None with the reason why there is none; without
    one where Transformers reports that the shape is another."""
    everyone = target.layers
    first, settings = everyone[0], everyone[0].settings
    reasons = [stored.reason for stored in everyone if stored.settings is None]
    if settings is None or reasons:
        return None, reasons[0]
    if layer is None:
        owner, _ = nn_layers.parent_of(model, target.parameter)
        return None, f"{type(owner).__name__} computes with a dense weight"
    if any(stored.settings != settings for stored in everyone):
        return None, "the layers that Transformers merges into it have different settings"
    if target.converter is None:
        shape = first.shape
    elif not _merges_rows(target.converter, layer.kind):
        return None, "Transformers changes it while it reads"
    elif layer.kind == "linear" and not _has_own_groups(settings):
        return None, "its rows do not have all factors to themselves and cannot be merged"
    else:
        rows = sum(part[0].shape[0] for part in target.parts)
        shape = (len(target.parts[0]), rows, first.shape[1])[-len(layer.shape) :]
    same = all(stored.shape == part[0].shape for part in target.parts for stored in part)
    return (settings, "") if tuple(shape) == layer.shape and same else (None, "")


def _has_own_groups(settings: LayerConfig) -> bool:
    """Whether rows below each other, quantized by themselves, are one quantized matrix."""
    shared = settings.quant_scale or settings.quant_zero or settings.balance != "none"
    return settings.axis == 1 and not shared


def _stacks_experts(converter: WeightConverter) -> bool:
    operations = converter.operations
    return bool(operations) and type(operations[0]) is MergeModulelist and operations[0].dim == 0


def _merges_rows(converter: WeightConverter, kind: str) -> bool:
    """Whether a conversion stacks experts, and puts rows below each other."""
    operations = list(converter.operations)
    if kind == "experts":
        if not _stacks_experts(converter):
            return False
        operations = operations[1:]
    rows = 1 if kind == "experts" else 0
    return all(type(op) is Concatenate and op.dim == rows for op in operations)


def _is_conv1d(model: nn.Module, parameter: str) -> bool:
    owner, _ = nn_layers.parent_of(model, parameter)
    return isinstance(owner, Conv1D)


def _has_conv1d_as_stored(targets: dict[str, Target], layers: dict[str, nn_layers.Layer]) -> bool:
    """Whether the matrices of Conv1D were packed [in, out]: one writer did so with all, and those
    that are not square tell."""
    for target in targets.values():
        layer = layers.get(target.parameter)
        if layer is not None and layer.kind == "conv1d":
            shape = target.layers[0].shape
            if shape != layer.shape and shape == layer.shape[::-1]:
                return True
    return False
