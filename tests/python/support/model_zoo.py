"""Models of Transformers on device meta, from the default of their config class: what their tensors
are called in files, and what they are in the model."""

import re
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from hqq_cpp import _core

# Modules that choose experts, as Transformers calls their classes.
_ROUTER_CLASS = re.compile(r"(?<!Density)Router|TopKGating|MoEGate")
_EXPERTS = ("_apply_gate", "is_transposed", "has_gate")  # of Transformers' experts interface


class Saved(NamedTuple):
    """A tensor as save_pretrained would write it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: str  # where from_pretrained puts it
    merged: bool  # with others into one parameter


class Difference(NamedTuple):
    """A tensor of which the rule says something else than the model."""

    kind: str
    role: str
    tensor: str
    owner: str  # class of the module that has it


def model_classes():
    """All public model classes: name -> class."""
    found = {}
    for name in dir(transformers):
        try:
            cls = getattr(transformers, name)
        except Exception:  # a class that needs a package that is not there
            continue
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            has_config = getattr(cls, "config_class", None) is not None
            if has_config and cls.__name__ == name and not name.endswith("PreTrainedModel"):
                found[name] = cls
    return found


def build(cls):
    """A model without memory; of layers that repeat, the first of each sort."""
    config = cls.config_class()
    with torch.device("meta"):
        model = cls(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] != "experts":
            _drop_repeated(module)
    return model


def _drop_repeated(layers):
    seen = set()
    for key, layer in list(layers._modules.items()):
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        if not any("." in name for name, _ in shapes):
            continue  # a list of plain layers
        sort = type(layer), shapes
        if sort in seen:
            del layers._modules[key]
        seen.add(sort)


def saved_tensors(model):
    """What save_pretrained would write."""
    state = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    written = {name: tensor for name, tensor in state.items() if name not in tied}
    conversions = get_model_conversion_mapping(model, None, None)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    for name, tensor in revert_weight_conversion(model, written).items():
        parameter, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        yield Saved(name, tuple(tensor.shape), tensor.dtype, parameter, pattern is not None)


def kind_of(model, parameter):
    """What a parameter is in a model, by the class of its module; (kind, name of the class)."""
    path, _, last = parameter.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return "missing", ""
    if last not in module._parameters and last not in module._buffers:
        return "missing", ""
    name = type(module).__name__
    parts = path.split(".")
    above = (model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts) + 1))
    if any(_ROUTER_CLASS.search(type(part).__name__) for part in above):
        return "router", name
    if all(hasattr(module, attribute) for attribute in _EXPERTS):
        return ("experts" if module._parameters[last].ndim == 3 else "other"), name
    return (_kind_of_weight(module) if last == "weight" else "other"), name


def _kind_of_weight(module):
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "other"  # of nn.MultiheadAttention
    if isinstance(module, nn.Linear):
        return "linear" if type(module).forward is nn.Linear.forward else "linear of its own"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, transformers.pytorch_utils.Conv1D):
        return "conv1d"
    is_pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    return "conv2d" if is_pointwise else "other"


# What the rule may say of a tensor. A tensor that the command copies is dense in the folder too, so
# "none" is right for all that neither side quantizes.
_COPIED = {"none", "router", "conv1d", "conv2d"}
_RIGHT = {
    "linear": {"linear", "head"},
    "experts": {"experts"},
    "embedding": {"embedding", "head", "none"},
    "conv2d": {"conv2d"},
    "conv1d": {"conv1d", "none"},
}


def _is_right(kind, role, tensor):
    if 0 in tensor.shape:
        return role == "none"
    if kind == "experts" and tensor.merged and len(tensor.shape) == 2:
        return role == "linear"
    return role in _RIGHT.get(kind, _COPIED)


def differences(model):
    """Where the rule for files says something else than the model, and where that for live models
    does."""
    tensors = list(saved_tensors(model))
    config = model.config.to_json_string(use_diff=False)
    roles = _core.Roles([(t.name, t.shape, t.dtype) for t in tensors], config)
    for tensor in tensors:
        kind, owner = kind_of(model, tensor.parameter)
        role = roles.role(tensor.name)
        if len(tensor.shape) >= 2 and not _is_right(kind, role, tensor):
            yield Difference(kind, role, tensor.name, owner)
    state = model.state_dict()
    live = _core.Roles([(name, tuple(t.shape), t.dtype) for name, t in state.items()])
    for name, tensor in state.items():
        kind, owner = kind_of(model, name)
        is_weight = tensor.ndim == 2 and tensor.is_floating_point()
        if is_weight and (kind == "router") != (live.role(name) == "router"):
            yield Difference(kind, live.role(name), name, owner)
