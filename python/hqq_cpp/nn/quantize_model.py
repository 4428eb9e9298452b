"""quantize_model_: quantization of any torch model in place, and its steps, which loaders share."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import _core, api, backends
from .._core import HqqConfig, LayerConfig
from ..format import TENSOR_NAMES
from .base import Replaced
from .carry import carry_over
from .conv import HqqPointwiseConv2d
from .dense_layers import ON_META, check_importance, listed, nothing_to_quantize, stays_dense
from .dequantize_model import tell_peft
from .embedding import HqqEmbedding
from .experts import HqqExperts
from .kinds import kind_of
from .layers import Layer, dense_matrix, find_layers, parent_of, survey
from .linear import HqqLinear
from .names import unmatched_names
from .subclasses import class_for

# Projections of a single expert that have the input of a fused one.
_SINGLE_NAMES = {
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"),
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "w3"),
    "down_proj": ("down_proj", "w2"),
}


def settings_of(layer: Layer, config: HqqConfig) -> LayerConfig | None:
    """The settings of a layer, or None if it stays dense.

    An embedding does unless a rule names it. A layer with several names stays dense if one of them
    does, and gets the settings of the first that a rule names.
    """
    names = layer.names or (layer.name,)
    if len(names) == 1:
        return _core.settings_of(config, layer.name, layer.role)
    every, ruled = config.__copy__(), config.__copy__()
    every.dynamic_only, ruled.dynamic_only = False, True
    role = "linear" if layer.role == "embedding" else layer.role
    if any(_core.settings_of(every, name, role) is None for name in names):
        return None
    for name in names:
        chosen = _core.settings_of(ruled, name, role)
        if chosen is not None:
            return chosen
    return _core.settings_of(config, layer.name, layer.role)


class Quantized(NamedTuple):
    """The packed tensors of a layer, their errors (a dict, or one per expert) and the settings."""

    tensors: dict[str, torch.Tensor]
    stats: Any
    settings: LayerConfig


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
            source = api.load_safetensors(source)
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
        single = set()
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


def quantize_layer(
    layer: Layer, weight: torch.Tensor, settings: LayerConfig, importance: torch.Tensor | None
) -> Quantized:
    """Solves for the packed tensors of a layer, which are where the solver leaves them.

    Args:
        layer: The layer; its name stands in messages.
        weight: Its parameter.
        settings: As HqqConfig.layer() gives them.
        importance: [in], or [experts, in] for experts, or None.
    """
    matrix = dense_matrix(layer.kind, weight.detach())
    if layer.kind != "experts":
        solved = backends.quantize(matrix, settings, layer.name, importance)
        return Quantized(solved.tensors, solved.stats.to_dict(), settings)
    if backends.kernels_for(matrix) is None:
        matrix = matrix.cpu()
    stacks: dict[str, torch.Tensor] = {}
    all_stats = []
    for e in range(matrix.shape[0]):
        vector = importance if importance is None or importance.ndim == 1 else importance[e]
        solved = backends.quantize(matrix[e], settings, f"{layer.name}.{e}", vector)
        all_stats.append(solved.stats.to_dict())
        for name, tensor in solved.tensors.items():
            if name not in stacks:
                stacks[name] = tensor.new_empty(matrix.shape[0], *tensor.shape)
            stacks[name][e] = tensor
    return Quantized(stacks, all_stats, settings)


def empty_module(layer: Layer, settings: LayerConfig) -> HqqLinear | HqqEmbedding | HqqExperts:
    """The quantized module for a layer, on device meta, with the layer's bias."""
    module = _empty_module(layer, settings)
    weight = layer.module._parameters[layer.parameter.rpartition(".")[2]]
    module.replaced = Replaced(layer.kind, type(layer.module), weight.requires_grad)
    return module


def _empty_module(layer: Layer, settings: LayerConfig) -> HqqLinear | HqqEmbedding | HqqExperts:
    if layer.kind == "experts":
        return HqqExperts.empty(settings, layer.shape, dtype=layer.dtype, device="meta")
    if layer.kind == "embedding":
        return HqqEmbedding.empty_like(layer.module, settings)
    bias = layer.module._parameters.get("bias")
    if layer.kind == "linear":
        cls = class_for(HqqLinear, type(layer.module))
    else:
        cls = HqqPointwiseConv2d if layer.kind == "conv2d" else HqqLinear
    return cls.empty(
        settings, *layer.shape, False if bias is None else bias, dtype=layer.dtype, device="meta"
    )


def put_module(model: nn.Module, layer: Layer, module: nn.Module) -> None:
    """Puts the quantized module wherever the layer was, and layers that share its parameters
    wherever those tied to it were. They get the hooks and attributes of the old ones."""
    owner, last = parent_of(model, layer.name)
    if layer.kind == "experts":
        del owner._parameters[last]
        module.train(layer.module.training)
        setattr(owner, last, module)
        return
    taken = {id(layer.module): _take_place(owner, last, layer.module, module)}
    for name in layer.tied:
        owner, last = parent_of(model, name)
        old = owner._modules[last]
        kind, shape, _ = kind_of(old)
        tied = Layer(name, f"{name}.weight", old, kind, shape, old.weight.dtype)
        taken[id(old)] = _take_place(owner, last, old, empty_module(tied, module.layer_config))
    for name in layer.aliases:
        owner, last = parent_of(model, name)
        owner._modules[last] = taken.get(id(owner._modules[last]), owner._modules[last])
    share_parameters(model, layer, module)


def _take_place(owner: nn.Module, name: str, old: nn.Module, module: nn.Module) -> nn.Module:
    carry_over(old, module)
    setattr(owner, name, module)
    return module


def share_parameters(model: nn.Module, layer: Layer, module: nn.Module) -> None:
    """Gives the layers tied to another its packed tensors."""
    for name in layer.tied:
        tied = model.get_submodule(name)
        for key in TENSOR_NAMES:
            tied.register_parameter(key, module._parameters[key])
        tied.place_marker()


def store_quantized(
    model: nn.Module, layer: Layer, quantized: Quantized, device: torch.device
) -> nn.Module:
    """Replaces a layer by its quantized form."""
    module = empty_module(layer, quantized.settings)
    module.set_packed(quantized.tensors, device)
    module.quantize_stats = quantized.stats
    put_module(model, layer, module)
    return module


def quantize_model_(
    model: nn.Module,
    config: Any = None,
    *,
    filter: Callable[[str, nn.Module], bool] | None = None,
    importance: Any = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> nn.Module:
    """Quantizes the linear layers of any torch model in place, one after the other.

    nn.Linear and subclasses that compute the same, Transformers' Conv1D, convolutions 1x1 and fused
    experts; embeddings that a rule of config names, together with the layers that are tied to them.
    A module at several places, and modules with one weight, are one layer. Hooks, attributes and
    the training flag of a layer go to the one that takes its place. Routers, adapters of peft and
    other embeddings stay as they are, and so do layers that cannot be quantized (a forward of their
    own, other convolutions, weights that are empty, not initialized, on device meta, computed, or
    of a type without a solver): one warning names them.

    Args:
        model: Any module with linear layers below it.
        config: An HqqConfig, a dict that HqqConfig.from_dict reads, or None for the defaults.
        filter: Called with name and module of every layer that the config would quantize; False
            leaves it as it is. For fused experts the name is that of the parameter.
        importance: Layer name -> [in_features] (experts: [experts, in_features]), a safetensors
            file of such,
            or 'random': run the model on random input first (collect_importance). None:
            config.importance.
        progress: Called with the name of a layer, its number from 1, and how many there are.

    Returns:
        The same model.

    Raises:
        ValueError: If nothing is left to quantize, or a layer cannot be quantized as asked: weights
            that are NaN or Inf or outside of what meta_dtype holds, importance that does not fit.
            All layers are checked before the first is changed; where a check cannot see it, the
            message says which layers are quantized already.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
        >>> hqq_cpp.quantize_model_(net, {"nbits": 4}, filter=lambda name, module: name != "1")
        Sequential(
          (0): HqqLinear(in_features=64, out_features=32, bias=True, nbits=4, ...)
          (1): Linear(in_features=32, out_features=8, bias=True)
        )
    """
    config = HqqConfig.from_dict(config)
    chosen, dense = choose_layers(model, config, filter)
    if not chosen:
        warnings.warn(nothing_to_quantize(model, dense, config), stacklevel=2)
        return model
    if dense:
        warnings.warn(stays_dense(dense), stacklevel=2)
    importance = config.importance if importance is None else importance
    if isinstance(importance, str) and importance == "random":
        from .importance import collect_importance

        importance = collect_importance(model)
    source = ImportanceSource(config, importance or {})
    if unmatched := unmatched_names(model, config, source.names(find_layers(model))):
        warnings.warn(f"[quantize] {unmatched}", stacklevel=2)
    chosen = [(layer, source.resolve(layer, settings)) for layer, settings in chosen]
    solved = _check_all(chosen, source)
    for number, (layer, settings) in enumerate(chosen, 1):
        device = model.get_parameter(layer.parameter).device
        quantized = solved.pop(layer.name, None)
        if quantized is None:
            before = [one.name for one, _ in chosen[: number - 1]]
            quantized = _solve_next(layer, settings, source, before)
        store_quantized(model, layer, quantized, device)
        if progress is not None:
            progress(layer.name, number, len(chosen))
    tell_peft(model)
    tell_libraries(model, config)
    return model


def choose_layers(
    model: nn.Module, config: HqqConfig, filter: Callable[[str, nn.Module], bool] | None = None
) -> tuple[list[tuple[Layer, dict[str, Any]]], list[Layer]]:
    """(layer, settings) of what is to be quantized, and the layers that would be, but cannot."""
    chosen, dense = [], []
    for layer in survey(model):
        settings = settings_of(layer, config) if layer.name else None
        if settings is None:
            continue
        # Filters look at in_features and the like.
        asked = filter is not None and layer.kind not in ("convolution", "upstream")
        if asked and not filter(layer.name, layer.module):
            continue
        weight = layer.module._parameters.get(layer.parameter.rpartition(".")[2])
        if not layer.obstacle and weight.is_meta:
            layer = layer._replace(obstacle=ON_META)
        if layer.obstacle:
            dense.append(layer)
        else:
            chosen.append((layer, settings))
    return chosen, dense


# Outside of these a scale may not fit float16, and the solver has the last word.
_PLAIN_WEIGHTS = (1e-3, 1e4)


def _check_all(
    chosen: list[tuple[Layer, dict[str, Any]]], source: ImportanceSource
) -> dict[str, Quantized]:
    """Refuses what the solver would refuse, before anything is changed. Layers whose weights are
    not finite, or very large or small, are solved here; this is the result."""
    solved = {}
    for layer, settings in chosen:
        importance = source.get(layer)
        check_importance(layer.name, importance)
        empty_module(layer, settings)
        weight = layer.module._parameters[layer.parameter.rpartition(".")[2]].detach()
        least, most = weight.aminmax()
        largest = max(-float(least), float(most))
        if not _PLAIN_WEIGHTS[0] <= largest <= _PLAIN_WEIGHTS[1] and largest != 0:
            solved[layer.name] = quantize_layer(layer, weight, settings, importance)
    return solved


def _solve_next(
    layer: Layer, settings: LayerConfig, source: ImportanceSource, before: list[str]
) -> Quantized:
    weight = layer.module._parameters[layer.parameter.rpartition(".")[2]]
    try:
        return quantize_layer(layer, weight, settings, source.get(layer))
    except ValueError as error:
        if not before:
            raise
        raise ValueError(
            f"{error} ({len(before)} layers are quantized already: {listed(before)})"
        ) from error


def tell_libraries(model: nn.Module, config: HqqConfig) -> None:
    """Models of Transformers and diffusers, at the top or inside of others, can be saved, and run
    their quantized experts."""
    if "transformers" in sys.modules:
        from ..transformers.quantizer import attach_all

        attach_all(model, config)
    if "diffusers.models.modeling_utils" in sys.modules:
        from ..diffusers.quantizer import attach_all

        attach_all(model)
