"""Dequantization of format 1 in plain torch operations: the backend that runs on every device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .._core import LayerConfig, QuantizedTensor

# Codes that share one scale_step and scale_offset.
METADATA_BLOCK = 128
# nbits -> (bits of the low plane, bits of the high plane); docs/format.md.
_PLANES = {8: (8, 0), 6: (4, 2), 5: (4, 1), 4: (4, 0), 3: (2, 1), 2: (2, 0), 1: (1, 0)}
_PLANE_BLOCK = 32
_TERNARY_BLOCK = 64
_TERNARY_DIGITS = 5
_META_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


def dtype_name(dtype: torch.dtype) -> str:
    """'float16' for torch.float16: the spelling of settings, files and messages."""
    return str(dtype).removeprefix("torch.")


class Weight(NamedTuple):
    """The tensors of one quantized matrix, in the order of the file; absent ones are None."""

    W_q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    scale_step: torch.Tensor | None
    scale_offset: torch.Tensor | None
    zero_step: torch.Tensor | None
    zero_offset: torch.Tensor | None
    col_scale: torch.Tensor | None


TENSOR_NAMES = Weight._fields


class Layout(NamedTuple):
    """How to read the tensors of a matrix [out_features, in_features]."""

    nbits: float
    group_size: int  # 0: one group per row (axis 1) or column (axis 0)
    axis: int
    out_features: int
    in_features: int


def layout_of(config: LayerConfig, out_features: int, in_features: int) -> Layout:
    """The layout that a layer's settings (HqqConfig.layer()) mean for a shape."""
    return Layout(
        float(config.nbits),
        config.group_size or 0,
        config.axis,
        out_features,
        in_features,
    )


def stored_of(weight: Weight) -> tuple[torch.dtype, bool, bool, bool]:
    """What the tensors say of the settings: metadata type, 8-bit scale, 8-bit zero, balanced."""
    floats = (weight.scale, weight.zero, weight.col_scale)
    meta = next((t.dtype for t in floats if t is not None and t.dtype != torch.uint8), None)
    return (
        meta or torch.float16,
        weight.scale_step is not None,
        weight.zero_step is not None,
        weight.col_scale is not None,
    )


def config_of(
    layout: Layout, meta: torch.dtype, quant_scale: bool, quant_zero: bool, balanced: bool
) -> LayerConfig:
    """Settings that mean a layout and what stored_of() says."""
    return LayerConfig(
        nbits=layout.nbits,
        group_size=layout.group_size or None,
        axis=layout.axis,
        meta_dtype=dtype_name(meta),
        quant_scale=quant_scale,
        quant_zero=quant_zero,
        balance="sinkhorn" if balanced else "none",
    )


def tensor_specs(
    config: LayerConfig, out_features: int, in_features: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that a layer with these settings has.

    Args:
        config: Settings of the layer; balance 'auto' is not allowed here.
    """
    whole = in_features if config.axis == 1 else out_features
    group = config.group_size or whole
    if config.axis == 1:
        groups = (out_features, math.ceil(in_features / group))
    else:
        group = min(group, out_features * in_features)
        rows, rest = divmod(out_features, group)
        count = math.ceil(out_features * in_features / group)
        groups = (1, count) if rest else (rows, in_features)
    blocks = (math.ceil(math.prod(groups) / METADATA_BLOCK),)
    meta = _META_DTYPES[config.meta_dtype]
    specs = {"W_q": ((out_features, row_bytes(config.nbits, in_features)), torch.uint8)}
    for name in ("scale", "zero"):
        specs[name] = (groups, torch.uint8 if getattr(config, "quant_" + name) else meta)
    for name in ("scale", "zero"):
        if getattr(config, "quant_" + name):
            specs[name + "_step"] = specs[name + "_offset"] = (blocks, torch.float32)
    if config.balance == "sinkhorn":
        specs["col_scale"] = ((in_features,), meta)
    elif config.balance != "none":
        raise ValueError(
            f"[format] balance is '{config.balance}'; a stored layer has 'none' or 'sinkhorn'"
        )
    return specs


def weight_of(q: QuantizedTensor) -> Weight:
    """The tensors of a QuantizedTensor as torch tensors that share its memory."""
    tensors = q.tensors()
    return Weight(*(torch.from_dlpack(tensors[n]) if n in tensors else None for n in TENSOR_NAMES))


def row_bytes(nbits: float, in_features: int) -> int:
    """Bytes that a row of codes takes."""
    block = _TERNARY_BLOCK if nbits == 1.58 else _PLANE_BLOCK
    full, rest = divmod(in_features, block)
    return full * _block_bytes(nbits, block) + (_block_bytes(nbits, rest) if rest else 0)


def _block_bytes(nbits: float, count: int) -> int:
    if nbits == 1.58:
        return math.ceil(count / _TERNARY_DIGITS)
    return sum(math.ceil(count * bits / 8) for bits in _PLANES[int(nbits)])


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
    for _ in range(_TERNARY_DIGITS):
        digits.append(rest % 3)
        rest = rest // 3
    return torch.stack(digits, -1).to(torch.uint8).flatten(-2)[..., :count]


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
        blocks = W_q[:, :split].unflatten(1, (full, -1))
        parts.append(_unpack_blocks(blocks, nbits, block).flatten(1))
    if rest:
        parts.append(_unpack_blocks(W_q[:, split:], nbits, rest))
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


def dequantize(weight: Weight, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """W_r = (W_q - zero) * scale * col_scale, computed in float32 and rounded to dtype.

    Returns:
        [out_features, in_features], with the bits of hqq_cpp.dequantize.
    """
    codes = unpack(weight.W_q, layout.nbits, layout.in_features).float()
    scale = _metadata(weight.scale, weight.scale_step, weight.scale_offset)
    zero = _metadata(weight.zero, weight.zero_step, weight.zero_offset)
    if layout.axis == 0:
        # Group j holds the flat positions j, j + groups, j + 2 groups, ...
        repeats = math.ceil(codes.numel() / zero.numel())
        zero, scale = (
            v.repeat(repeats)[: codes.numel()].reshape(codes.shape) for v in (zero, scale)
        )
    else:
        group = layout.group_size or layout.in_features
        shape = (layout.out_features, math.ceil(layout.in_features / group))
        zero, scale = (
            v.reshape(shape).repeat_interleave(group, dim=1)[:, : layout.in_features]
            for v in (zero, scale)
        )
    W_r = (codes - zero) * scale
    if weight.col_scale is not None:
        W_r = W_r * weight.col_scale.float()
    return W_r.to(dtype)


def dequantize_rows(
    weight: Weight, layout: Layout, rows: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of W_r, [rows, in_features]; with axis 1 nothing else is unpacked.

    Args:
        rows: int64 [rows].
    """
    if layout.axis == 0:
        return dequantize(weight, layout, dtype).index_select(0, rows)

    def metadata(values, step, offset):
        taken = values.index_select(0, rows).float()
        if step is None or offset is None:
            return taken
        groups = torch.arange(values.shape[1], device=rows.device)
        block = (rows.unsqueeze(1) * values.shape[1] + groups) // METADATA_BLOCK
        return taken * step[block] + offset[block]

    taken = Weight(
        W_q=weight.W_q.index_select(0, rows),
        scale=metadata(weight.scale, weight.scale_step, weight.scale_offset),
        zero=metadata(weight.zero, weight.zero_step, weight.zero_offset),
        scale_step=None,
        scale_offset=None,
        zero_step=None,
        zero_offset=None,
        col_scale=weight.col_scale,
    )
    return dequantize(taken, layout._replace(out_features=rows.shape[0]), dtype)
