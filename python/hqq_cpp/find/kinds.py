"""The kinds of layers that can be quantized, and what keeps a layer dense."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..format import dtype_name
from ..nn.base import WEIGHT_DTYPES, QuantizedModule
from ..nn.carry import attribute_obstacle
from ..nn.embedding import HqqEmbedding
from ..nn.linear import HqqLinear
from .subclasses import class_obstacle


class Kind(NamedTuple):
    """The kind of a layer, also of one that an obstacle keeps dense."""

    # "linear", "conv1d", "conv2d" (1x1), "embedding", or "convolution": of another sort.
    name: str
    # [out, in]; () where there is an obstacle.
    shape: tuple[int, ...]
    # Why it has to stay dense; empty if it can be quantized.
    obstacle: str = ""


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module, or None if it is no layer or is quantized.

    Linear layers and 1x1 convolutions have an obstacle where a subclass or an object does
    something else than torch's class; embeddings keep what subclasses do around the lookup.
    """
    if isinstance(module, QuantizedModule) or module._parameters.get("weight", module) is None:
        return None
    name, base = _sort_of(module)
    if name is None:
        return None
    if base is None:
        return Kind(name, (), _NEVER[name])
    obstacle = weight_obstacle(module._parameters.get("weight"), 4 if name == "conv2d" else 2)
    if not obstacle:
        quantized = HqqEmbedding if name == "embedding" else HqqLinear
        obstacle = attribute_obstacle(module, base, quantized)
    if not obstacle and name != "embedding":
        obstacle = class_obstacle(module, base)
    if obstacle:
        return Kind(name, (), obstacle)
    shape = tuple(module._parameters["weight"].shape[:2])
    shape = shape[::-1] if name == "conv1d" else shape
    bias = module._parameters.get("bias")
    if bias is not None and tuple(bias.shape) != shape[:1]:
        return Kind(name, (), f"the bias has the shape {list(bias.shape)}")
    return Kind(name, shape)


def check_single(module: nn.Module) -> None:
    """Refuses what quantize_linear() cannot take the place of.

    Raises:
        ValueError: If `module` is no linear layer, is quantized, or has an obstacle.
    """
    name = type(module).__name__
    if isinstance(module, QuantizedModule):
        raise ValueError(
            f"[quantize_linear] the layer is quantized already ({module!r}): "
            "quantize_linear(layer.dequantize(), config) would add the errors of both"
        )
    kind = kind_of(module)
    if kind is not None and kind.name == "upstream":
        raise ValueError(
            "[quantize_linear] the layer is quantized already, by upstream's hqq: "
            "hqq_cpp.from_upstream(layer) takes it over with its codes"
        )
    if kind is None or (kind.name != "linear" and not kind.obstacle):
        raise ValueError(f"[quantize] {name} is no torch.nn.Linear; quantize_model_ takes models")
    obstacle = kind.obstacle or (module.weight.is_meta and "the weight is on device meta")
    if obstacle:
        raise ValueError(f"[quantize] this {name} cannot be replaced: {obstacle}")


# The layer of the package hqq.
UPSTREAM_LAYER = "hqq.core.quantize.HQQLinear"

# Kinds of which no module is quantized.
_NEVER = {
    "convolution": "convolution other than 1x1",
    "attention": "nn.MultiheadAttention multiplies with the weight itself",
    "upstream": "quantized by the package hqq: take_over_ takes it over",
}


def _sort_of(module: nn.Module) -> tuple[str | None, type[nn.Module] | None]:
    """The name of a kind, and torch's class for it; no class: never quantized."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "attention", None
    if isinstance(module, nn.Linear):
        return "linear", nn.Linear
    if isinstance(module, nn.Embedding):
        return "embedding", nn.Embedding
    if isinstance(module, nn.modules.conv._ConvNd):
        return ("conv2d", nn.Conv2d) if _is_pointwise(module) else ("convolution", None)
    # Classes are compared by name, so that no package is imported.
    for cls in type(module).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name == "transformers.pytorch_utils.Conv1D":
            return "conv1d", cls
        if name == UPSTREAM_LAYER:
            return "upstream", None
    return None, None


def _is_pointwise(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        return False
    plain = module.kernel_size == module.stride == module.dilation == (1, 1)
    return plain and module.padding in ((0, 0), "valid", "same")


def weight_obstacle(weight: torch.Tensor | None, dims: int) -> str:
    """Why a weight of `dims` dimensions cannot be quantized; empty if it can."""
    if weight is None:
        return "the weight is computed: weight_norm, parametrization, pruning"
    if nn.parameter.is_lazy(weight):
        return "the weight is not initialized"
    if type(weight) not in (nn.Parameter, torch.Tensor):
        return f"the weight is a {type(weight).__name__}"
    if weight.dtype not in WEIGHT_DTYPES:
        return f"the weight is {dtype_name(weight.dtype)}"
    if weight.ndim != dims or weight.numel() == 0:
        return f"the weight has the shape {list(weight.shape)}"
    return ""
