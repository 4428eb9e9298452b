"""The C++ kernels for weights in CPU memory: torch tensors by address."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .. import _core, api
from ..format import CPU_TILES, CUDA_TILES, FORMAT_1, Layout, PackedWeight, Packing, dtype_name
from . import common
from .packing import format_1

# What the kernels multiply; they sum in float32.
_MULTIPLIED = (torch.float32, torch.bfloat16, torch.float16)


def packing_for(weight: PackedWeight) -> Packing:
    """The order of codes that the kernels read fastest."""
    return _packing_of(weight.layout)


@functools.lru_cache(maxsize=4096)
def _packing_of(layout: Layout) -> Packing:
    rows, rest = divmod(layout.out_features, layout.parts)
    has_tiles = rest == 0 and _core.can_tile(layout.config, rows, layout.in_features)
    return CPU_TILES if has_tiles else FORMAT_1


def is_available() -> bool:
    """The C++ kernels are part of hqq_cpp."""
    return True


def quantize(
    W: torch.Tensor, config: Any, name: str, importance: Any, threads: int
) -> common.Solved:
    """Quantizes W [out, in]; the result is in CPU memory."""
    q, stats = api.quantize(
        W if W.dim() != 2 or W.stride(-1) == 1 else W.contiguous(),
        config,
        name=name,
        importance=importance,
        threads=threads,
        stats=True,
    )
    tensors = {key: torch.from_dlpack(tensor) for key, tensor in q.tensors().items()}
    return common.Solved(tensors, q.config, stats)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """W_r [out_features, in_features]."""
    weight, layout = _readable(weight), weight.layout
    out = weight.tensors.W_q.new_empty(layout.out_features, layout.in_features, dtype=dtype)
    _layer(layout, weight.packing).dequantize(
        _addresses(weight), out.data_ptr(), _dtype_code(dtype), torch.get_num_threads()
    )
    return out


def rows(weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows `ids` [...] of W_r, [..., in_features]."""
    weight, layout = _readable(weight), weight.layout
    common.check_ids(ids, layout)
    ids = ids.to(torch.int64).contiguous()
    out = ids.new_empty(*ids.shape, layout.in_features, dtype=dtype)
    _layer(layout, weight.packing).dequantize_rows(
        _addresses(weight), ids.data_ptr(), ids.numel(), out.data_ptr(), _dtype_code(dtype)
    )
    return out


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, mode: common.Mode
) -> torch.Tensor:
    """x [..., in_features] W_r^T + bias; float64 by a dense product."""
    if x.dtype not in _MULTIPLIED:
        return common.dense_linear(x, dequantize(weight, x.dtype), bias)
    layout = weight.layout
    if weight.packing != CPU_TILES:  # tiles are contiguous
        weight = _readable(weight)
    _, _, _, out_features, in_features = layout.numbers
    if x.dim() == 2:
        rows, count = x, x.shape[0]
        y = x.new_empty(count, out_features)
    else:
        rows, count = x.reshape(-1, in_features), x.numel() // in_features
        y = x.new_empty(*x.shape[:-1], out_features)
    stride, step = rows.stride()
    if step != 1 or stride < in_features:
        rows, stride = rows.contiguous(), in_features
    bias_address = 0
    if bias is not None:
        bias = bias.float().contiguous()
        bias_address = bias.data_ptr()
    _layer(layout, weight.packing).linear(
        _addresses(weight), rows.data_ptr(), count, stride, _dtype_code(x.dtype), bias_address,
        y.data_ptr(), _mode_code(mode), torch.get_num_threads(),
    )  # fmt: skip
    return y


def experts_linear(
    x: torch.Tensor,
    counts: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    transposed: bool,
    mode: common.Mode,
) -> torch.Tensor:
    """Every row of x [rows, in] times the matrix of its expert; tiled ones all at once."""
    if weight.packing == CPU_TILES and not transposed and x.dtype in _MULTIPLIED:
        y = _grouped(x, counts.tolist(), weight, mode)
        if bias is not None:
            experts = torch.arange(len(bias), device="cpu").repeat_interleave(counts)
            y[: experts.numel()] += bias[experts].to(y.dtype)
        return y

    def multiply(x: torch.Tensor, matrix: PackedWeight) -> torch.Tensor:
        return linear(x, matrix, None, mode)

    return common.experts_one_by_one(x, counts, weight, bias, transposed, multiply, dequantize)


def kernel(weight: PackedWeight, rows: int, dtype: torch.dtype, mode: common.Mode) -> common.Kernel:
    """What multiplies so many rows of x."""
    if dtype not in _MULTIPLIED:
        return common.Kernel(
            common.DENSE,
            "exact",
            f"the kernels sum in float32, which is less than x of {dtype_name(dtype)} asks for",
        )
    layer = _layer(weight.layout.matrix, weight.packing)
    name, resolved, target = layer.kernel(rows, _mode_code(mode))
    reason = ""
    if name == "row by row":
        reason = (
            "there are no tiles: axis 0 needs a group_size that is a multiple of 16 and divides "
            "out_features"
        )
    is_fast = resolved == "fast"
    return common.Kernel(f"{name}, {resolved}, {target}", "fast" if is_fast else "exact", reason)


def _grouped(
    x: torch.Tensor, counts: list[int], weight: PackedWeight, mode: common.Mode
) -> torch.Tensor:
    if min(counts, default=0) < 0 or sum(counts) > x.shape[0]:
        raise ValueError(
            f"[experts] the counts {counts} add up to {sum(counts)} rows; they must be >= 0 and add "
            f"up to at most the {x.shape[0]} rows of x"
        )
    weight, layout = common.contiguous(weight), weight.layout
    x = x if x.stride(1) == 1 and x.stride(0) >= layout.in_features else x.contiguous()
    y = x.new_zeros(x.shape[0], layout.out_features)
    matrices = layout.experts * layout.parts
    steps = [0 if t is None else t.nbytes // matrices for t in weight.tensors]
    _layer(layout.matrix, CPU_TILES).experts_linear(
        _addresses(weight), steps, layout.parts, counts, x.data_ptr(), x.stride(0),
        _dtype_code(x.dtype), y.data_ptr(), _mode_code(mode), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _readable(weight: PackedWeight) -> PackedWeight:
    """The weight as the kernels read it. Tiles of a GPU come to the CPU past the module."""
    return common.contiguous(format_1(weight) if weight.packing == CUDA_TILES else weight)


def _addresses(weight: PackedWeight) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in weight.tensors]


@functools.lru_cache(maxsize=4096)
def _layer(layout: Layout, packing: Packing) -> _core.NativeLayer:
    """What the kernels need to know of a matrix beside the addresses of its tensors."""
    return _core.NativeLayer(
        layout.config, layout.out_features, layout.in_features, packing == CPU_TILES
    )


def check_mode(mode: str) -> None:
    """Refuses other modes.

    Raises:
        ValueError: Unless it is 'auto', 'fast' or 'exact'.
    """
    _core.linear_mode_code(mode)


@functools.cache
def _mode_code(mode: common.Mode) -> int:
    return _core.linear_mode_code(mode)


@functools.cache
def _dtype_code(dtype: torch.dtype) -> int:
    return _core.dtype_code(dtype)
