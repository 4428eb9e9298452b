"""Layers that upstream's package hqq holds in memory, taken over with their codes."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from .. import _core
from .._core import LayerConfig
from ..errors import FormatError
from ..find.kinds import UPSTREAM_LAYER
from ..find.layers import parent_of
from ..nn.linear import HqqLinear
from . import listeners, upstream
from .described import config_of_layers

# Classes that prepare_for_inference() of hqq makes: their codes are in the order of another library.
_PREPARED = (
    "hqq.backends.torchao.HQQLinearTorchWeightOnlynt4",
    "hqq.backends.bitblas.HQQLinearBitBlas",
    "hqq.backends.marlin.MarlinLinear",
)
# Methods that hqq puts on a model so that it does not move.
_REPLACED_METHODS = ("to", "cuda", "float", "half", "quantize_model", "save_quantized")


def is_upstream_layer(module: Any) -> bool:
    """Whether an object is an HQQLinear of upstream's package."""
    return UPSTREAM_LAYER in _class_names(module)


def from_upstream(layer: nn.Module) -> HqqLinear:
    """An HqqLinear with the codes, scales and zeros of upstream's HQQLinear, bit for bit.

    Args:
        layer: A quantized ``hqq.core.quantize.HQQLinear``, on any device.

    Returns:
        The layer, on the same device, with the compute_dtype of upstream's as its dtype.

    Raises:
        TypeError: If it is no HQQLinear.
        ValueError: If format 1 cannot hold it, such as groups that run over the ends of rows;
            ``layer.dequantize()`` then gives the dense weight.

    Example:
        >>> import torch
        >>> from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
        >>> linear, config = torch.nn.Linear(64, 8), BaseQuantizeConfig(nbits=4, axis=1)
        >>> hqq_cpp.from_upstream(HQQLinear(linear, config, device="cpu"))
        HqqLinear(in_features=64, out_features=8, bias=True, nbits=4, group_size=64, axis=1)
    """
    if not is_upstream_layer(layer):
        raise TypeError(
            f"[from_upstream] {type(layer).__module__}.{type(layer).__qualname__} is no HQQLinear "
            "of upstream's hqq"
        )
    if layer.W_q is None or layer.meta is None:
        raise ValueError("[from_upstream] the HQQLinear is not quantized yet: call initialize()")
    entry = {"W_q": layer.W_q} | layer.meta | layer.quant_config["weight_quant_params"]
    entry |= {"offload_meta": bool(layer.offload_meta), "stores_quant_config": True}
    # None for a whole row in the config; the metadata has its length.
    entry["group_size"] = layer.meta["group_size"]
    encoded = upstream.encode(entry, "from_upstream")
    tensors = {key: tensor.cpu().contiguous() for key, tensor in encoded.items()}
    taken = HqqLinear(_core.from_upstream(tensors, "from_upstream"), dtype=layer.compute_dtype)
    taken.to(layer.W_q.device)
    if layer.bias is not None:
        trains = isinstance(layer.bias, nn.Parameter) and layer.bias.requires_grad
        taken._register_bias(nn.Parameter(layer.bias.detach().clone(), requires_grad=trains))
    return taken.train(layer.training)


def take_over_(model: nn.Module) -> nn.Module:
    """Replaces every HQQLinear of upstream's hqq in a model by an HqqLinear, in place.

    Codes, scales and zeros stay what they are, so outputs differ by rounding only. Layers that
    format 1 cannot hold become dense, with one warning. A model of Transformers can be saved
    afterwards, and moves between devices and types again.

    Args:
        model: Any module with such layers below it.

    Returns:
        The same model.

    Raises:
        ValueError: If it has no HQQLinear, or layers that were prepared for the kernels of another
            library; nothing is changed then.

    Example:
        >>> import torch
        >>> from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
        >>> linear, config = torch.nn.Linear(64, 8), BaseQuantizeConfig(nbits=4, axis=1)
        >>> net = torch.nn.Sequential(HQQLinear(linear, config, device="cpu"), torch.nn.ReLU())
        >>> hqq_cpp.take_over_(net)[0].nbits
        4
    """
    found = [name for name, module in model.named_modules() if is_upstream_layer(module)]
    prepared = [
        name for name, module in model.named_modules() if _class_names(module) & {*_PREPARED}
    ]
    if prepared:
        raise ValueError(
            f"[take_over] {prepared[0]} was prepared for the kernels of another library "
            f"({type(model.get_submodule(prepared[0])).__name__}), and {len(prepared) - 1} more "
            "layers: take the model over before hqq's prepare_for_inference()"
        )
    if not found or found == [""]:
        raise ValueError(
            f"[take_over] {type(model).__name__} has no HQQLinear of upstream's hqq below it"
            + (" (from_upstream() takes a single layer)" if found else "")
        )
    dense: dict[str, str] = {}
    settings: dict[str, LayerConfig] = {}
    for name in found:
        owner, last = parent_of(model, name)
        layer = owner.get_submodule(last)
        try:
            taken: nn.Module = from_upstream(layer)
            settings[name] = taken.layer_config
        except FormatError:
            raise
        except ValueError as error:
            dense[name] = str(error)
            taken = _dense_linear(layer)
        setattr(owner, last, taken)
    if dense:
        name, reason = next(iter(dense.items()))
        warnings.warn(
            f"[take_over] {len(dense)} of {len(found)} layers become dense, which takes more memory: "
            f"{name} ({reason})" + (", ..." if len(dense) > 1 else ""),
            stacklevel=2,
        )
    for method in (*_REPLACED_METHODS, "base_class", "hqq_quantized"):
        vars(model).pop(method, None)
    listeners.quantized(model, config_of_layers(settings))
    return model


def _dense_linear(layer: nn.Module) -> nn.Linear:
    weight = layer.dequantize().detach().to(layer.compute_dtype)
    linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().clone())
    return linear.train(layer.training)


def _class_names(module: Any) -> set[str]:
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}
