"""Marks by which Transformers sees what a checkpoint set and what it has to initialize itself."""

from __future__ import annotations

import torch

from ...find.layers import quantized_layers
from ...nn.base import QuantizedModule


def leave_bias_to_model(module: QuantizedModule) -> None:
    """Has Transformers initialize a bias that the checkpoint lacks, as that of a dense layer; it
    leaves out weights that stand for packed ones."""
    if module._parameters.get("bias") is not None:
        module._is_hf_initialized = False


def mark_read(module: QuantizedModule) -> None:
    """Tells Transformers that the packed tensors are not to be initialized."""
    for parameter in module.packed():
        if parameter is not None:
            parameter._is_hf_initialized = True


def unread(model: torch.nn.Module) -> list[str]:
    """Names of packed tensors that nothing set. Those on device meta are read when they are
    used."""
    return [
        f"{name}.{key}"
        for name, module in quantized_layers(model)
        for key, tensor in module.packed()._asdict().items()
        if tensor is not None
        and not tensor.is_meta
        and not getattr(tensor, "_is_hf_initialized", False)
    ]
