"""Format 1 in plain torch operations: the backend that runs on every device, and under compilers."""

from __future__ import annotations

import math
from typing import Any

import torch

from .._core import METADATA_BLOCK, TERNARY_DIGITS
from ..format import (
    FORMAT_1,
    ROW_FORMATS,
    Numbers,
    PackedWeight,
    Packing,
    RowFormat,
    Tensors,
)
from . import common, cpu
from .packing import format_1


def packing_for(weight: PackedWeight) -> Packing:
    """The order of codes that is read fastest."""
    return FORMAT_1


def is_available() -> bool:
    """torch is imported."""
    return True


def quantize(
    W: torch.Tensor, config: Any, name: str, importance: Any, threads: int
) -> common.Solved:
    """Quantizes W [out, in] in CPU memory, where the result stays: torch operations have no solver."""
    return cpu.quantize(W.cpu(), config, name, importance, threads)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """W_r = (W_q - zero) * scale * col_scale, computed in float32 and rounded to dtype.

    Returns:
        [out_features, in_features], with the bits of hqq_cpp.dequantize.
    """
    weight = format_1(weight)
    return _dequantize(weight.tensors, weight.layout.numbers, dtype)


def rows(weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows `ids` [...] of W_r, [..., in_features]; with axis 1 no others are unpacked."""
    layout, tensors = weight.layout, format_1(weight).tensors
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        common.check_ids(ids, layout)
    flat = ids.reshape(-1).to(torch.int64)
    if layout.numbers.axis == 0:
        taken = _dequantize(tensors, layout.numbers, dtype).index_select(0, flat)
    else:
        some = Tensors(
            W_q=tensors.W_q.index_select(0, flat),
            scale=_row_metadata(tensors.scale, tensors.scale_step, tensors.scale_offset, flat),
            zero=_row_metadata(tensors.zero, tensors.zero_step, tensors.zero_offset, flat),
            scale_step=None,
            scale_offset=None,
            zero_step=None,
            zero_offset=None,
            col_scale=tensors.col_scale,
        )
        taken = _dequantize(some, layout.numbers._replace(out_features=flat.shape[0]), dtype)
    return taken.reshape(*ids.shape, layout.in_features)


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, mode: common.Mode
) -> torch.Tensor:
    """x [..., in_features] W_r^T + bias. Every product is exact: `mode` changes nothing."""
    return common.dense_linear(x, dequantize(weight, x.dtype), bias)


def experts_linear(
    x: torch.Tensor,
    counts: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    transposed: bool,
    mode: common.Mode,
) -> torch.Tensor:
    """Every row of x [rows, in] times the matrix of its expert."""

    def multiply(x: torch.Tensor, matrix: PackedWeight) -> torch.Tensor:
        return linear(x, matrix, None, mode)

    return common.experts_one_by_one(x, counts, weight, bias, transposed, multiply, dequantize)


def kernel(weight: PackedWeight, rows: int, dtype: torch.dtype, mode: common.Mode) -> common.Kernel:
    """What multiplies so many rows of x."""
    return common.Kernel(common.DENSE, "exact", "")


def _unpack_plane(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """uint8 [..., bytes] -> uint8 [..., count]: 8 / bits codes a byte, the lowest bits first."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :count]


def _unpack_ternary(packed: torch.Tensor, count: int) -> torch.Tensor:
    """uint8 [..., bytes] -> uint8 [..., count]: five base-3 digits a byte, the lowest first."""
    digits = []
    rest = packed.int()
    for _ in range(TERNARY_DIGITS):
        digits.append(rest % 3)
        rest = rest // 3
    return torch.stack(digits, -1).to(torch.uint8).flatten(-2)[..., :count]


def _block_bytes(planes: RowFormat, count: int) -> int:
    """Bytes that a block of `count` codes takes."""
    if planes.low_bits == 0:
        return math.ceil(count / TERNARY_DIGITS)
    return math.ceil(count * planes.low_bits / 8) + math.ceil(count * planes.high_bits / 8)


def _unpack_blocks(packed: torch.Tensor, planes: RowFormat, count: int) -> torch.Tensor:
    """uint8 [..., bytes of a block] -> uint8 [..., count] for a block of `count` codes."""
    low, high = planes.low_bits, planes.high_bits
    if low == 0:
        return _unpack_ternary(packed, count)
    low_bytes = math.ceil(count * low / 8)
    codes = _unpack_plane(packed[..., :low_bytes], low, count)
    if high:
        codes = codes | (_unpack_plane(packed[..., low_bytes:], high, count) << low)
    return codes


def unpack(W_q: torch.Tensor, nbits: float, in_features: int) -> torch.Tensor:
    """Unpacks rows of format 1.

    Args:
        W_q: uint8 [out_features, bytes a row].
        nbits: 8, 6, 5, 4, 3, 2, 1.58 or 1.
        in_features: Codes a row has.

    Returns:
        uint8 [out_features, in_features].
    """
    planes = ROW_FORMATS[nbits]
    block = planes.block
    full, rest = divmod(in_features, block)
    split = full * _block_bytes(planes, block)
    parts = []
    if full:
        blocks = W_q[:, :split].unflatten(1, (full, -1))
        parts.append(_unpack_blocks(blocks, planes, block).flatten(1))
    if rest:
        parts.append(_unpack_blocks(W_q[:, split:], planes, rest))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _metadata(
    values: torch.Tensor, step: torch.Tensor | None, offset: torch.Tensor | None
) -> torch.Tensor:
    """scale or zero in float32, [groups] in row-major order."""
    values = values.float().reshape(-1)
    if step is None or offset is None:
        return values
    block = torch.arange(values.numel(), device=values.device) // METADATA_BLOCK
    return values * step[block] + offset[block]


def _dequantize(tensors: Tensors, numbers: Numbers, dtype: torch.dtype) -> torch.Tensor:
    nbits, group_size, axis, out_features, in_features = numbers
    codes = unpack(tensors.W_q, nbits, in_features).float()
    scale = _metadata(tensors.scale, tensors.scale_step, tensors.scale_offset)
    zero = _metadata(tensors.zero, tensors.zero_step, tensors.zero_offset)
    if axis == 0:
        # Group j holds the flat positions j, j + groups, j + 2 groups, ...
        repeats = math.ceil(codes.numel() / zero.numel())
        zero, scale = (
            v.repeat(repeats)[: codes.numel()].reshape(codes.shape) for v in (zero, scale)
        )
    else:
        group = group_size or in_features
        shape = (out_features, math.ceil(in_features / group))
        zero, scale = (
            v.reshape(shape).repeat_interleave(group, dim=1)[:, :in_features] for v in (zero, scale)
        )
    W_r = (codes - zero) * scale
    if tensors.col_scale is not None:
        W_r = W_r * tensors.col_scale.float()
    return W_r.to(dtype)


def _row_metadata(
    values: torch.Tensor,
    step: torch.Tensor | None,
    offset: torch.Tensor | None,
    rows: torch.Tensor,
) -> torch.Tensor:
    """scale or zero of some rows in float32, [rows, groups a row]."""
    taken = values.index_select(0, rows).float()
    if step is None or offset is None:
        return taken
    groups = torch.arange(values.shape[1], device=rows.device)
    block = (rows.unsqueeze(1) * values.shape[1] + groups) // METADATA_BLOCK
    return taken * step[block] + offset[block]
