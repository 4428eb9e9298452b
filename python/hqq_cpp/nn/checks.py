"""Whether the tensors in a module are those that its settings call for."""

from __future__ import annotations

import torch
from torch import nn

from ..format import CPU_TILES, FORMAT_1, PackedWeight, dtype_name
from .watched import sees_operators


def check_tensors(weight: PackedWeight) -> None:
    """Refuses tensors that kernels would read as something else.

    Raises:
        ValueError: With the first that is wrong.
    """
    specs = weight.layout.specs(weight.packing)
    is_tiled = weight.packing != FORMAT_1
    for name, tensor in weight.tensors._asdict().items():
        if (tensor is None) != (name not in specs):
            state = "missing" if tensor is None else "present, but the settings exclude it"
            raise ValueError(f"[module] {name} is {state}")
        if tensor is None:
            continue
        shape, dtype = specs[name]
        _check_kind(name, tensor)
        if tensor.device != weight.tensors.W_q.device:
            raise ValueError(
                f"[module] {name} is on {tensor.device}, but W_q on {weight.tensors.W_q.device}: the "
                f"tensors of a layer must be on one device"
            )
        if tensor.dtype != dtype:
            raise ValueError(
                f"[module] {name} is {dtype_name(tensor.dtype)}; it must be {dtype_name(dtype)}: a "
                f"packed weight is not cast (with fully_shard, leave MixedPrecisionPolicy's "
                f"param_dtype None or give the frozen parameters to ignored_params)"
            )
        if weight.packing == CPU_TILES and not tensor.is_contiguous():
            raise ValueError(f"[module] {name} is tiled, but not contiguous: call untile_() before")
        if tuple(tensor.shape) != tuple(shape):
            where = f" in {weight.packing}" if is_tiled else ""
            raise ValueError(
                f"[module] {name} has the shape {list(tensor.shape)}; it must be {list(shape)}{where}"
                + (": call untile_() before tensors are replaced" if is_tiled else "")
            )


def _check_kind(name: str, tensor: torch.Tensor) -> None:
    if hasattr(tensor, "device_mesh"):
        raise ValueError(
            f"[module] {name} is a DTensor of {tensor.device_mesh.size()} processes, and a quantized "
            f"layer computes with whole tensors: call the module that fully_shard() was given (docs/"
            f"training.md), unshard() it, or leave the layer out of the tensor-parallel plan"
        )
    real = type(tensor) in (torch.Tensor, nn.Parameter) and not sees_operators()
    if real and tensor.is_cpu and tensor.numel() > 0 and tensor.data_ptr() == 0:
        raise ValueError(
            f"[module] {name} has no memory: it was freed, as FSDP and offloading do between calls"
        )
