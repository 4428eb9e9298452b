"""dequantize_model_: the modules that there were before quantization, in place."""

from __future__ import annotations

import torch
from torch import nn

from ..find.layers import dense_weight, parent_of, places_of, quantized_layers
from ..nn.base import QuantizedModule, Replaced, parse_dtype
from ..nn.carry import carry_over
from ..nn.embedding import HqqEmbedding
from ..nn.experts import HqqExperts
from ..nn.linear import HqqLinear
from . import listeners
from .messages import listed

_PLAIN = Replaced("linear", nn.Linear, True)


def dequantize_model_(model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
    """Makes the quantized layers of a model dense again, in place.

    Every layer becomes the kind of module that it was: nn.Linear and subclasses of it, Conv1D of
    Transformers, 1x1 convolutions, embeddings, experts. Hooks, attributes, the training flag and
    requires_grad of weight and bias are kept; layers that shared a weight share it again. A model
    of Transformers can be saved and loaded without this package afterwards.

    Args:
        model: Any module with quantized layers below it.
        dtype: Type of the weights and biases that are made; None: the type each layer computes in.

    Returns:
        The same model.

    Raises:
        ValueError: If there is no quantized layer, or one is on device meta (offloaded weights
            are); nothing is changed then.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(64, 32, 1), torch.nn.Flatten())
        >>> hqq_cpp.dequantize_model_(hqq_cpp.quantize_model_(net))
        Sequential(
          (0): Conv2d(64, 32, kernel_size=(1, 1), stride=(1, 1))
          (1): Flatten(start_dim=1, end_dim=-1)
        )
    """
    dtype = None if dtype is None else parse_dtype(dtype, torch.float32)
    _check(model)
    make_dense(model, dtype)
    listeners.dequantized(model)
    return model


def _check(model: nn.Module) -> None:
    name = type(model).__name__
    if isinstance(model, QuantizedModule):
        raise ValueError(
            f"[dequantize] {name} is a single layer; layer.dequantize() gives its weight"
        )
    modules = dict(quantized_layers(model))
    if not modules:
        raise ValueError(f"[dequantize] there is no quantized layer below {name}")
    on_meta = [path for path, module in modules.items() if module.W_q.is_meta]
    if on_meta:
        raise ValueError(
            f"[dequantize] {listed(on_meta)} of {len(modules)} layers are on device meta: load "
            "their weights first, without offloading"
        )


def make_dense(model: nn.Module, dtype: torch.dtype | None) -> None:
    """The layers of dequantize_model_(), and nothing else of the model."""
    weights: dict[tuple[int, str], nn.Parameter] = {}
    for place in list(places_of(model).values()):
        module = place.module
        if not isinstance(module, QuantizedModule):
            continue
        replaced = module.replaced or _PLAIN
        key = (id(module.W_q), "conv1d" if replaced.kind == "conv1d" else "")
        if key not in weights:
            matrix = module.dequantize(dtype=dtype or module.compute_dtype)
            matrix = dense_weight(replaced.kind, matrix)
            weights[key] = nn.Parameter(matrix, requires_grad=replaced.requires_grad)
        if isinstance(module, HqqExperts):
            _put_experts(model, place.paths[0], weights[key])
            continue
        dense = dense_module(module, weights[key])
        for path in place.paths:
            owner, last = parent_of(model, path)
            if owner._modules[last] is module:
                setattr(owner, last, dense)


def _put_experts(model: nn.Module, name: str, weight: nn.Parameter) -> None:
    owner, last = parent_of(model, name)
    delattr(owner, last)
    owner.register_parameter(last, weight)


def dense_module(module: HqqLinear | HqqEmbedding, weight: nn.Parameter) -> nn.Module:
    """The layer that a quantized one took the place of, with another weight."""
    if isinstance(module, HqqEmbedding):
        return module.to_dense(weight)
    cls = (module.replaced or _PLAIN).cls
    dense: nn.Module = object.__new__(cls)
    nn.Module.__init__(dense)
    if issubclass(cls, nn.Linear):
        dense.in_features, dense.out_features = module.in_features, module.out_features
    dense.register_parameter("weight", weight)
    bias = module._parameters["bias"]
    if bias is not None and bias.dtype != weight.dtype:
        bias.data = bias.data.to(weight.dtype)
    dense.register_parameter("bias", bias)
    carry_over(module, dense)
    return dense
