"""load_model: a folder in format 1 into a torch model that was built anew."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .. import _core
from ..errors import FormatError
from ..find.layers import Layer, find_layers, parent_of, quantized_layers
from ..format import dtype_name
from ..nn.base import QuantizedModule, parse_dtype
from ..nn.experts import HqqExperts
from ..nn.linear import HqqLinear
from . import listeners
from .described import Description, config_of, read_descriptions
from .messages import listed
from .replace import empty_module, put_module

INDEX = "model.safetensors.index.json"


def load_model(
    model: nn.Module, folder: str | os.PathLike[str], *, device: torch.device | str | None = None
) -> nn.Module:
    """Loads what save_model(), or the command ``hqq-cpp quantize``, wrote into a dense model.

    Layers that the files describe as quantized are replaced; everything else gets the tensors of
    the files, in the types that they have there. All names, shapes and kinds are compared before
    anything is changed.

    Args:
        model: Built as for the first time, real or on device meta.
        folder: The folder.
        device: Where everything goes; None: where it is in the model, and the CPU for meta.

    Returns:
        The same model.

    Raises:
        ValueError: If files and model do not fit: the message names what is missing, left over, or
            of another shape or kind. Or if the model has quantized layers already, or a buffer on
            device meta that no file stores.
        FormatError: If a file breaks its format, or describes no quantized layer.
        OSError: If a file cannot be read.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
        >>> hqq_cpp.save_model(hqq_cpp.quantize_model_(net, {"nbits": 4}), folder / "net")
        >>> with torch.device("meta"):
        ...     empty = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
        >>> hqq_cpp.load_model(empty, folder / "net")
        Sequential(
          (0): HqqLinear(in_features=64, out_features=32, bias=True, nbits=4, ...)
          (1): ReLU()
        )
    """
    _check_model(model)
    device = None if device is None else torch.device(device)
    folder = Path(folder)
    files = _files(folder)
    described, transposed = read_descriptions(files)
    if not described:
        raise FormatError(
            f"[load_model] {folder} describes no quantized layer of format 1: load_state_dict reads "
            "a dense model, and 'hqq-cpp convert --to hqq_cpp' what the package hqq wrote"
        )
    tensors = {
        name: tensor for file in files for name, tensor in _core.load_safetensors(file).items()
    }
    plan = plan_loading(model, described, transposed, tensors)
    plan.check("load_model", folder, model)
    _put_quantized(model, plan, tensors, device)
    for stored, names in plan.dense.items():
        _put(model, names, _torch(tensors[stored]).clone(), device)
    if plan.modules:
        listeners.quantized(model, config_of(model))
    return model


def _check_model(model: nn.Module) -> None:
    quantized = [name or "(the module itself)" for name, _ in quantized_layers(model)]
    if quantized:
        raise ValueError(
            f"[load_model] {listed(quantized)} {'is' if len(quantized) == 1 else 'are'} quantized "
            "already; build the model anew, or use its load_state_dict"
        )
    stored = model.state_dict().keys()
    unset = [n for n, b in model.named_buffers() if b.is_meta and n not in stored]
    if unset:
        raise ValueError(
            f"[load_model] {listed(unset)}: no file has non-persistent buffers, and "
            f"{'this is' if len(unset) == 1 else 'these are'} on device meta; build the model on a "
            "real device, or at least them"
        )


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(_core.read_json_file(index)["weight_map"].values()))
        if any(os.path.basename(name) != name for name in names):
            raise ValueError("a file outside of the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"[load_model] {index} has no weight_map ({error})") from None
    return [folder / name for name in names]


@dataclass
class Plan:
    """The use of every stored tensor, and a list of what does not fit."""

    # Stored name of a quantized layer -> the layer and the module for it.
    modules: dict[str, tuple[Layer, QuantizedModule]] = field(default_factory=dict)
    # Stored name -> names of the dense weight in the model, and a module that reads the tensors.
    unpacked: dict[str, tuple[list[str], QuantizedModule]] = field(default_factory=dict)
    # Tensor of the files -> its names in the model.
    dense: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def check(self, where: str, folder: Path, model: nn.Module) -> None:
        """Refuses what does not fit, in one sentence."""
        problems = [
            (self.missing, "missing in the files"),
            (self.unexpected, "not in the model"),
            (self.wrong, "different"),
        ]
        parts = [f"{len(names)} {what} ({listed(names)})" for names, what in problems if names]
        if parts:
            name = type(model).__name__
            raise ValueError(f"[{where}] {folder} does not fit {name}: {'; '.join(parts)}")


def plan_loading(
    model: nn.Module,
    described: dict[str, Description],
    transposed: set[str],
    tensors: dict[str, _core.Tensor],
) -> Plan:
    plan = Plan()
    layers = {name: layer for layer in find_layers(model) for name in _parameters_of(layer)}
    as_stored = _conv1d_as_stored(described, transposed, layers)
    state = dict(model.state_dict(keep_vars=True))
    names = _names(model, state)
    left = set(tensors)
    replaced: set[str] = set()
    for name, description in described.items():
        layer, tensor = layers.get(description.tensor), description.tensor
        module = _stored_module(description, name)
        if layer is not None and layer.kind == "conv1d" and name not in transposed and as_stored:
            layer = None
        if layer is not None and tuple(layer.shape) != description.shape:
            layer = None
        _compare_packed(plan, name, module, tensors)
        left -= {f"{name}.{key}" for key in module._specs()}
        if tensor not in state:
            plan.unexpected.append(name)
        elif tensor in replaced:
            plan.wrong.append(f"{name} is tied to another layer in the model, not in the files")
        elif layer is not None:
            plan.modules[name] = layer, _module_for(layer, description)
            replaced.update(_parameters_of(layer))
        else:
            plan.unpacked[name] = names[tensor], module
            _compare(plan, tensor, state, description.shape, True)
            replaced.update(names[tensor])
    _plan_dense(plan, state, names, replaced, tensors, left)
    plan.unexpected += sorted(left)
    return plan


def _names(model: nn.Module, state: dict[str, object]) -> dict[str, list[str]]:
    """Name in a state_dict -> all names of the same tensor."""
    named = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    identity = {name: id(tensor) for name, tensor in named}
    groups: dict[object, list[str]] = {}
    for name in state:
        groups.setdefault(identity.get(name, name), []).append(name)
    return {name: names for names in groups.values() for name in names}


def _parameters_of(layer: Layer) -> list[str]:
    """All names of the dense weight of a layer."""
    if layer.kind == "experts":
        return [layer.parameter]
    return [f"{name}.weight" for name in (layer.name, *layer.tied, *layer.aliases)]


def _conv1d_as_stored(
    described: dict[str, Description], transposed: set[str], layers: dict[str, Layer]
) -> bool:
    """Whether weights of Conv1D were packed as they are stored, [in, out], as ``hqq-cpp`` does with
    a file whose config.json does not tell: one writer did so with all, and those that are not square
    tell.

    Raises:
        ValueError: If nothing tells.
    """
    found = {
        name: (description.shape, tuple(layers[description.tensor].shape))
        for name, description in described.items()
        if description.tensor in layers and layers[description.tensor].kind == "conv1d"
    }
    unclear = [name for name in found if name not in transposed]
    telling = [(shape, of) for shape, of in found.values() if of[0] != of[1]]
    if unclear and not telling:
        raise ValueError(
            f"[load] {listed(unclear)}: weights of Conv1D are stored transposed, and nothing "
            "says whether these square ones were before they were quantized; quantize the model with "
            "quantize_model_ and save it with save_model"
        )
    return any(shape != of and shape == of[::-1] for shape, of in telling)


def _stored_module(description: Description, name: str) -> QuantizedModule:
    """A module, on device meta, that could hold the stored tensors."""
    dtype = parse_dtype(description.dtype, torch.float32)
    try:
        if len(description.shape) == 3:
            return HqqExperts.empty(
                description.settings, description.shape, dtype=dtype, device="meta"
            )
        out_features, in_features = description.shape
        return HqqLinear.empty(
            description.settings, out_features, in_features, dtype=dtype, device="meta"
        )
    except ValueError as error:
        raise FormatError(f"[load] the description of {name} is wrong: {error}") from None


def _module_for(layer: Layer, description: Description) -> QuantizedModule:
    module = empty_module(layer, description.settings)
    module.compute_dtype = parse_dtype(description.dtype, torch.float32)
    return module


def _compare_packed(
    plan: Plan, name: str, module: QuantizedModule, tensors: dict[str, _core.Tensor]
) -> None:
    for key, (shape, dtype) in module._specs().items():
        stored = tensors.get(f"{name}.{key}")
        if stored is None:
            plan.missing.append(f"{name}.{key}")
        elif stored.shape != tuple(shape) or stored.dtype != dtype_name(dtype):
            plan.wrong.append(
                f"{name}.{key} is {stored.dtype} {list(stored.shape)} and must be "
                f"{dtype_name(dtype)} {list(shape)}"
            )


def _compare(
    plan: Plan, name: str, state: dict[str, object], shape: Iterable[int], is_float: bool
) -> None:
    """Notes in the plan where a dense tensor does not fit the model."""
    target, shape = state[name], list(shape)
    if not isinstance(target, torch.Tensor):
        plan.wrong.append(f"{name} is a {type(target).__name__} in the model")
    elif list(target.shape) != shape:
        plan.wrong.append(f"{name} is {shape}, in the model {list(target.shape)}")
    elif target.is_floating_point() != is_float:
        kinds = ("whole numbers", "floating")
        plan.wrong.append(f"{name} is {kinds[is_float]}, in the model {kinds[not is_float]}")


def _plan_dense(
    plan: Plan,
    state: dict[str, object],
    names: dict[str, list[str]],
    replaced: set[str],
    tensors: dict[str, _core.Tensor],
    left: set[str],
) -> None:
    """Finds the tensors of everything that stays dense; takes them from `left`."""
    for first, same in names.items():
        if first != same[0] or not replaced.isdisjoint(same):
            continue
        stored = [name for name in same if name in left]
        left.difference_update(stored)
        if not stored:
            plan.missing.append(first)
            continue
        for name in stored:
            tensor = tensors[name]
            _compare(plan, name, state, tensor.shape, "float" in tensor.dtype)
        plan.dense[stored[0]] = same
        if not _all_equal([tensors[name] for name in stored]):
            plan.wrong.append(f"{stored[1]} is tied to {stored[0]} in the model, not in the files")


def _all_equal(tensors: list[_core.Tensor]) -> bool:
    first, *others = map(_torch, tensors)
    return all(torch.equal(first, other) for other in others)


def _torch(tensor: _core.Tensor) -> torch.Tensor:
    return torch.from_dlpack(tensor)


def _put_quantized(
    model: nn.Module, plan: Plan, tensors: dict[str, _core.Tensor], device: torch.device | None
) -> None:
    def read(name: str, module: QuantizedModule, target: torch.device) -> None:
        stored = {key: _torch(tensors[f"{name}.{key}"]).clone() for key in module._specs()}
        module.set_packed(stored, target)

    for name, (layer, module) in plan.modules.items():
        read(name, module, _device(model.get_parameter(layer.parameter), device))
        put_module(model, layer, module)
    for name, (names, module) in plan.unpacked.items():
        read(name, module, torch.device("cpu"))
        _put(model, names, module.dequantize(dtype=module.compute_dtype), device)
    if plan.unpacked:
        dense = [names[0] for names, _ in plan.unpacked.values()]
        warnings.warn(
            f"[load_model] {len(dense)} of {len(plan.modules) + len(dense)} quantized weights become "
            f"dense ones, since their modules cannot hold quantized ones: {listed(dense)}",
            stacklevel=3,
        )


def _put(
    model: nn.Module, names: list[str], value: torch.Tensor, device: torch.device | None
) -> None:
    """Sets a parameter or buffer, which has several names if it is tied."""
    owner, last = parent_of(model, names[0])
    is_parameter = last in owner._parameters
    old = owner._parameters[last] if is_parameter else owner._buffers[last]
    value = value.to(_device(old, device))
    if is_parameter:
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    for name in names:
        owner, last = parent_of(model, name)
        (owner._parameters if is_parameter else owner._buffers)[last] = value


def _device(old: torch.Tensor, device: torch.device | None) -> torch.device:
    if device is not None:
        return device
    return torch.device("cpu") if old.is_meta else old.device
