"""HqqLinear: a quantized linear layer for torch, in plain torch operations on any device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ._core import HqqConfig, QuantizedTensor, Tensor

# Codes that share one scale_step and scale_offset.
_METADATA_BLOCK = 128
# nbits -> (bits of the low plane, bits of the high plane); docs/format.md.
_PLANES = {8: (8, 0), 6: (4, 2), 5: (4, 1), 4: (4, 0), 3: (2, 1), 2: (2, 0), 1: (1, 0)}
_PLANE_BLOCK = 32
_TERNARY_BLOCK = 64
_TERNARY_DIGITS = 5
_TENSOR_NAMES = (
    "W_q",
    "scale",
    "zero",
    "scale_step",
    "scale_offset",
    "zero_step",
    "zero_offset",
    "col_scale",
)


def _unpack_plane(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """uint8 [..., bytes] -> uint8 [..., count]: 8 / bits codes a byte, the lowest bits first."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :count]


def _unpack_ternary(packed: torch.Tensor, count: int) -> torch.Tensor:
    """uint8 [..., bytes] -> uint8 [..., count]: five base-3 digits a byte, the lowest first."""
    powers = torch.tensor([3**i for i in range(_TERNARY_DIGITS)], device=packed.device)
    codes = (packed.unsqueeze(-1).int() // powers) % 3
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def _unpack_blocks(packed: torch.Tensor, nbits: float, count: int) -> torch.Tensor:
    """uint8 [..., bytes of a block] -> uint8 [..., count] for a block of `count` codes."""
    if nbits == 1.58:
        return _unpack_ternary(packed, count)
    low, high = _PLANES[int(nbits)]
    low_bytes = math.ceil(count * low / 8)
    codes = _unpack_plane(packed[..., :low_bytes], low, count)
    if high:
        codes = codes | (_unpack_plane(packed[..., low_bytes:], high, count) << low)
    return codes


def _block_bytes(nbits: float, count: int) -> int:
    if nbits == 1.58:
        return math.ceil(count / _TERNARY_DIGITS)
    return sum(math.ceil(count * bits / 8) for bits in _PLANES[int(nbits)])


def unpack(W_q: torch.Tensor, nbits: float, in_features: int) -> torch.Tensor:
    """Unpacks rows of format 1.

    Args:
        W_q: uint8 [out_features, bytes a row].
        nbits: 8, 6, 5, 4, 3, 2, 1.58 or 1.
        in_features: Codes a row has.

    Returns:
        uint8 [out_features, in_features].
    """
    block = _TERNARY_BLOCK if nbits == 1.58 else _PLANE_BLOCK
    full, rest = divmod(in_features, block)
    split = full * _block_bytes(nbits, block)
    parts = []
    if full:
        blocks = W_q[:, :split].reshape(W_q.shape[0], full, -1)
        parts.append(_unpack_blocks(blocks, nbits, block).flatten(1))
    if rest:
        parts.append(_unpack_blocks(W_q[:, split:], nbits, rest))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class HqqLinear(nn.Module):
    """A quantized linear layer: y = x W_r^T + bias.

    The tensors of format 1 (``W_q``, ``scale``, ``zero`` and those the settings call for) are
    parameters without gradient, so state_dict has the keys of a checkpoint. They move between
    devices with the module; ``half()``, ``to(torch.bfloat16)`` and the like leave their types
    alone, since rounding scale and zero again would change the weights. Gradients flow to x and to
    bias.

    Args:
        weight: Quantized matrix [out_features, in_features]; its memory is shared.
        bias: [out_features], or None.

    Raises:
        ValueError: If bias has another shape.

    Example:
        >>> import torch
        >>> layer = hqq_cpp.quantize_linear(torch.nn.Linear(64, 8), {"nbits": 4})
        >>> layer(torch.ones(2, 64)).shape
        torch.Size([2, 8])
    """

    W_q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    scale_step: torch.Tensor | None
    scale_offset: torch.Tensor | None
    zero_step: torch.Tensor | None
    zero_offset: torch.Tensor | None
    col_scale: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, weight: QuantizedTensor, bias: Any = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.config = weight.config
        tensors = weight.tensors()
        for name in _TENSOR_NAMES:
            parameter = None
            if name in tensors:
                parameter = nn.Parameter(torch.from_dlpack(tensors[name]), requires_grad=False)
            self.register_parameter(name, parameter)
        if bias is not None and not isinstance(bias, torch.Tensor):
            bias = torch.from_dlpack(Tensor(bias)).clone()
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(
                f"[linear] bias has the shape {list(bias.shape)}; it must be [{self.out_features}]"
            )
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def nbits(self) -> float:
        """8, 6, 5, 4, 3, 2, 1.58 or 1."""
        return self.config["nbits"]

    def quantized_tensor(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor; shares memory if the layer is on the CPU."""
        tensors = {name: getattr(self, name) for name in _TENSOR_NAMES}
        tensors = {k: v.detach().cpu() for k, v in tensors.items() if v is not None}
        return QuantizedTensor.from_tensors(
            tensors, HqqConfig.from_dict(self.config), (self.out_features, self.in_features)
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W_r [out_features, in_features], computed in float32 and rounded to dtype."""
        W = unpack(self.W_q, self.nbits, self.in_features).float()
        scale = self._metadata("scale")
        zero = self._metadata("zero")
        W = self._per_group(W, zero, scale)
        if self.col_scale is not None:
            W = W * self.col_scale.float()
        return W.to(dtype)

    def _metadata(self, name: str) -> torch.Tensor:
        """scale or zero in float32, [groups] in row-major order."""
        values = getattr(self, name).float().reshape(-1)
        step = getattr(self, name + "_step")
        if step is None:
            return values
        block = torch.arange(values.numel(), device=values.device) // _METADATA_BLOCK
        return values * step[block] + getattr(self, name + "_offset")[block]

    def _per_group(
        self, codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """(codes - zero) * scale, with the zero and scale of every weight's group."""
        if self.config["axis"] == 0:
            # Group j holds the flat positions j, j + groups, j + 2 groups, ...
            repeats = math.ceil(codes.numel() / zero.numel())
            zero, scale = (
                v.repeat(repeats)[: codes.numel()].reshape(codes.shape) for v in (zero, scale)
            )
            return (codes - zero) * scale
        group = self.config["group_size"] or self.in_features
        zero, scale = (
            v.reshape(self.out_features, -1).repeat_interleave(group, dim=1)[:, : self.in_features]
            for v in (zero, scale)
        )
        return (codes - zero) * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] in the dtype of x."""
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.dequantize(x.dtype), bias)

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name) for name in _TENSOR_NAMES}
        kept = {name: value.data for name, value in kept.items() if value is not None}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != value.dtype:
                parameter.data = value.to(parameter.device)
        return self

    def extra_repr(self) -> str:
        """For repr(): sizes and the settings that matter for reading."""
        config = self.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nbits={config['nbits']}, "
            f"group_size={config['group_size']}, axis={config['axis']}"
        )
