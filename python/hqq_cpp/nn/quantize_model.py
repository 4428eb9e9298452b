"""quantize_model_: quantization of any torch model in place, and its steps, which loaders share."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import _core, api
from ..config import HqqConfig
from . import cuda
from .dequantize import TENSOR_NAMES
from .embedding import HqqEmbedding
from .experts import HqqExperts
from .layers import Layer, dense_matrix, find_layers, kind_of, parent_of
from .linear import HqqLinear
from .names import unmatched_names
from .pointwise import HqqPointwiseConv2d
from .solve import quantize_tensor


# Projections of a single expert that have the input of a fused one.
_SINGLE_NAMES = {
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"),
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "w3"),
    "down_proj": ("down_proj", "w2"),
}


def settings_of(layer: Layer, config: HqqConfig) -> dict[str, Any] | None:
    """The settings of a layer, or None if it stays dense. An embedding does unless a rule names
    it."""
    return _core.settings_of(config, layer.name, layer.role)


class Quantized(NamedTuple):
    """The packed tensors of a layer, their errors (a dict, or one per expert) and the settings."""

    tensors: dict[str, torch.Tensor]
    stats: Any
    settings: dict[str, Any]


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
        vector = self._vectors.get(layer.name)
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

    def resolve(self, layer: Layer, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings with balance 'auto' decided, as the library decides it."""
        if settings["balance"] != "auto":
            return settings
        has_importance = self.get(layer) is not None
        return settings | {"balance": _core.resolve_balance("auto", has_importance)}


def quantize_layer(
    layer: Layer, weight: torch.Tensor, settings: dict[str, Any], importance: torch.Tensor | None
) -> Quantized:
    """Solves for the packed tensors of a layer, which are where quantize_tensor() leaves them.

    Args:
        layer: The layer; its name stands in messages.
        weight: Its parameter.
        settings: As HqqConfig.layer() gives them.
        importance: [in], or [experts, in] for experts, or None.
    """
    config = _config_of(tuple(settings.items()))
    matrix = dense_matrix(layer.kind, weight.detach())
    if layer.kind != "experts":
        solved = quantize_tensor(matrix, config, layer.name, importance)
        return Quantized(solved.tensors, solved.stats.to_dict(), settings)
    if not cuda.is_native(matrix):
        matrix = matrix.cpu()
    stacks: dict[str, torch.Tensor] = {}
    all_stats = []
    for e in range(matrix.shape[0]):
        vector = importance if importance is None or importance.ndim == 1 else importance[e]
        solved = quantize_tensor(matrix[e], config, f"{layer.name}.{e}", vector)
        all_stats.append(solved.stats.to_dict())
        for name, tensor in solved.tensors.items():
            if name not in stacks:
                stacks[name] = tensor.new_empty(matrix.shape[0], *tensor.shape)
            stacks[name][e] = tensor
    return Quantized(stacks, all_stats, settings)


@functools.lru_cache(maxsize=64)
def _config_of(settings: tuple[tuple[str, Any], ...]) -> HqqConfig:
    return HqqConfig(**dict(settings), skip_modules=())


def empty_module(layer: Layer, settings: dict[str, Any]) -> HqqLinear | HqqEmbedding | HqqExperts:
    """The quantized module for a layer, on device meta, with the layer's bias."""
    if layer.kind == "experts":
        return HqqExperts.empty(settings, layer.shape, dtype=layer.dtype, device="meta")
    if layer.kind == "embedding":
        return HqqEmbedding.empty_like(layer.module, settings)
    bias = layer.module._parameters.get("bias")
    cls = HqqPointwiseConv2d if layer.kind == "conv2d" else HqqLinear
    return cls.empty(
        settings, *layer.shape, False if bias is None else bias, dtype=layer.dtype, device="meta"
    )


def put_module(model: nn.Module, layer: Layer, module: nn.Module) -> None:
    """Puts the quantized module where the layer was, and layers that share its parameters where
    those tied to it were."""
    owner, last = parent_of(model, layer.name)
    if layer.kind == "experts":
        del owner._parameters[last]
    module.train(layer.module.training)
    setattr(owner, last, module)
    for name in layer.tied:
        old = model.get_submodule(name)
        kind, shape = kind_of(old)
        tied = Layer(name, f"{name}.weight", old, kind, shape, old.weight.dtype)
        put_module(model, tied, empty_module(tied, module.layer_config))
    share_parameters(model, layer, module)


def share_parameters(model: nn.Module, layer: Layer, module: nn.Module) -> None:
    """Gives the layers tied to an embedding its packed tensors."""
    for name in layer.tied:
        tied = model.get_submodule(name)
        tied._parameters.update({key: module._parameters[key] for key in TENSOR_NAMES})


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

    nn.Linear, Transformers' Conv1D, convolutions 1x1 and fused experts; embeddings that a rule of
    config names, together with the layers that are tied to them. Other layers that share their
    weight, other embeddings and routers stay as they are.

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
        ValueError: If nothing is left to quantize, or a layer cannot be quantized as asked. Layers
            before it are quantized already.

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
    chosen = [
        (layer, settings)
        for layer in find_layers(model)
        if layer.name
        and (settings := settings_of(layer, config)) is not None
        and (filter is None or filter(layer.name, layer.module))
    ]
    if not chosen:
        raise ValueError(
            f"[quantize] there is nothing to quantize below {type(model).__name__}: its layers are "
            f"{', '.join(layer.name or '(the module itself)' for layer in find_layers(model)) or 'none'}, "
            f"and the config or the filter leaves them out (quantize_linear takes a single layer). "
            f"{unmatched_names(model, config)}".rstrip(". ")
        )
    importance = config.importance if importance is None else importance
    if isinstance(importance, str) and importance == "random":
        from .importance import collect_importance

        importance = collect_importance(model)
    source = ImportanceSource(config, importance or {})
    if unmatched := unmatched_names(model, config, source.names(find_layers(model))):
        warnings.warn(f"[quantize] {unmatched}", stacklevel=2)
    for number, (layer, settings) in enumerate(chosen, 1):
        parameter = model.get_parameter(layer.parameter)
        settings = source.resolve(layer, settings)
        quantized = quantize_layer(layer, parameter, settings, source.get(layer))
        store_quantized(model, layer, quantized, parameter.device)
        if progress is not None:
            progress(layer.name, number, len(chosen))
    _tell_transformers(model, config)
    return model


def _tell_transformers(model: nn.Module, config: HqqConfig) -> None:
    """A model of Transformers can be saved, and runs its quantized experts."""
    import sys

    if "transformers" in sys.modules:
        from transformers import PreTrainedModel

        if isinstance(model, PreTrainedModel):
            from ..transformers.quantizer import attach

            attach(model, config)
