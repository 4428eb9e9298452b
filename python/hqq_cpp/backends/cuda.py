"""The kernels of libhqq_cuda for weights in GPU memory: torch tensors by address, on torch's current
stream.

Nothing here waits for the GPU but quantize(), nor does anything ask torch.cuda before a tensor is on a
GPU. What brings codes into another order (cuda_calls.py) waits, since every stream may read them next.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .. import _core
from ..format import (
    CPU_TILES,
    CUDA_TILES,
    FORMAT_1,
    TENSOR_NAMES,
    Layout,
    PackedWeight,
    Packing,
    Tensors,
    dtype_name,
    tensor_specs,
)
from . import common
from .cuda_calls import addresses, device_of, dtype_code, is_capturing, layer_of, place, tiles_shape
from .packing import format_1

# Whether the library can be used; None: nobody has asked yet. Asking starts the driver, which a process
# that forks later must not have done at import.
_available: bool | None = None


def is_available() -> bool:
    """Whether libhqq_cuda was found and can drive a GPU."""
    global _available
    if _available is None:
        _available = _core.cuda_is_available()
    return _available


# A compiler that traces a forward pass calls it and takes the answer as a constant.
is_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def packing_for(weight: PackedWeight) -> Packing:
    """The order of codes that the kernels read fastest; format 1 where none of them multiplies."""
    shape = tiles_shape(weight.layout, device_of(weight.tensors.W_q))
    return FORMAT_1 if shape is None else CUDA_TILES


def quantize(
    W: torch.Tensor, config: Any, name: str, importance: Any, threads: int
) -> common.Solved:
    """Quantizes W [out, in] on its GPU, where the result stays; the bits are those of the CPU."""
    W = W.detach()
    W = W if W.stride(-1) == 1 and W.stride(0) >= W.shape[1] else W.contiguous()
    if isinstance(importance, torch.Tensor):
        importance = importance.detach().float().cpu()
    rows, columns = W.shape
    solver = _core.CudaSolver(config, name, dtype_code(W.dtype), rows, columns, importance)
    settings = solver.config
    tensors = {
        key: torch.empty(shape, dtype=dtype, device=W.device)
        for key, (shape, dtype) in tensor_specs(settings, rows, columns).items()
    }
    out = addresses(Tensors(*map(tensors.get, TENSOR_NAMES)))
    size = solver.workspace_bytes(device_of(W))
    workspace = torch.empty(size + 256, dtype=torch.uint8, device=W.device)
    start = -(-workspace.data_ptr() // 256) * 256
    stats = solver.solve(W.data_ptr(), W.stride(0), out, start, size, place(W))
    return common.Solved(tensors, settings, stats)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """W_r [out_features, in_features]."""
    weight, layout = _readable(weight), weight.layout
    tensors = weight.tensors
    out = tensors.W_q.new_empty(layout.out_features, layout.in_features, dtype=dtype)
    layer_of(layout, weight.packing).dequantize(
        addresses(tensors), out.data_ptr(), dtype_code(dtype), place(tensors.W_q)
    )
    return out


def rows(weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows `ids` [...] of W_r, [..., in_features]."""
    weight, layout = _readable(weight), weight.layout
    tensors, ids = weight.tensors, ids.to(torch.int64).contiguous()
    # The kernel trusts them. As in nn.Embedding, a wrong one is noticed later, and ends the process's
    # use of the GPU.
    there = ((ids >= 0) & (ids < layout.out_features)).all()
    torch._assert_async(there, f"[embedding] an id is not in 0 to {layout.out_features - 1}")
    out = tensors.W_q.new_empty(*ids.shape, layout.in_features, dtype=dtype)
    layer_of(layout, weight.packing).dequantize_rows(
        addresses(tensors), ids.data_ptr(), ids.numel(), out.data_ptr(), dtype_code(dtype),
        place(tensors.W_q),
    )  # fmt: skip
    return out


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, mode: common.Mode
) -> torch.Tensor:
    """x [..., in_features] W_r^T + bias from tiles, or by a dense product where that is faster.

    Every product is exact: `mode` changes nothing.
    """
    y = _tiles_linear(x, weight, bias)
    return common.dense_linear(x, dequantize(weight, x.dtype), bias) if y is None else y


def experts_linear(
    x: torch.Tensor,
    counts: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    transposed: bool,
    mode: common.Mode,
) -> torch.Tensor:
    """Every row of x [rows, in] times the matrix of its expert, without asking the GPU for the counts
    where tiles are multiplied."""
    if not transposed:
        y = _tiles_experts_linear(x, counts, weight, bias)
        if y is not None:
            return y

    def multiply(x: torch.Tensor, matrix: PackedWeight) -> torch.Tensor:
        return common.dense_linear(x, dequantize(matrix, x.dtype), None)

    return common.experts_one_by_one(x, counts, weight, bias, transposed, multiply, dequantize)


def kernel(weight: PackedWeight, rows: int, dtype: torch.dtype, mode: common.Mode) -> common.Kernel:
    """What multiplies so many rows of x (of one expert, on average)."""
    if weight.packing != CUDA_TILES:
        return common.Kernel(
            common.DENSE, "exact", "the codes are not in tiles of the CUDA kernels"
        )
    limit = max_rows(weight.layout, dtype, device_of(weight.tensors.W_q))
    if limit is None:
        return common.Kernel(
            common.DENSE, "exact", f"no CUDA kernel multiplies x of {dtype_name(dtype)}"
        )
    if rows > limit:
        reason = f"a dense product is faster for more than {limit} rows of x"
        return common.Kernel(common.DENSE, "exact", reason)
    return common.Kernel("tiles", "exact", "")


# ---- Products of tiles -------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def max_rows(layout: Layout, dtype: torch.dtype, device: int) -> int | None:
    """Rows of x (of one expert, on average) up to which tiles are multiplied faster than a dense matrix.

    None: no kernel of the device multiplies x of this dtype.
    """
    return layer_of(layout.matrix, CUDA_TILES).max_rows(dtype_code(dtype), device)


def _readable(weight: PackedWeight) -> PackedWeight:
    """The weight as the kernels read it. Tiles of the CPU come to a GPU past the module."""
    return common.contiguous(format_1(weight) if weight.packing == CPU_TILES else weight)


def _limit(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> int | None:
    """max_rows() of a call; None: tiles cannot be multiplied."""
    if weight.packing != CUDA_TILES or (bias is not None and bias.device != x.device):
        return None
    return max_rows(weight.layout, x.dtype, device_of(x))


def _matrix(x: torch.Tensor, features: int) -> torch.Tensor:
    """x as [rows, features] with contiguous rows."""
    rows = x.reshape(-1, features)
    return rows if rows.stride(1) == 1 and rows.stride(0) >= features else rows.contiguous()


def _tiles_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """None: a dense product does better, or is the only way."""
    layout, limit = weight.layout, _limit(x, weight, bias)
    if limit is None or x.numel() > limit * layout.in_features:
        return None
    weight, rows = common.contiguous(weight), _matrix(x, layout.in_features)
    y = x.new_empty(*x.shape[:-1], layout.out_features)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    done = layer_of(layout, CUDA_TILES).linear(
        addresses(weight.tensors), rows.data_ptr(), rows.shape[0], rows.stride(0),
        dtype_code(x.dtype), 0 if bias is None else bias.data_ptr(), y.data_ptr(), place(x),
    )  # fmt: skip
    return y if done else None


def _tiles_experts_linear(
    x: torch.Tensor, counts: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """None: dense products do better, or are the only way."""
    layout, limit = weight.layout, _limit(x, weight, bias)
    average = -(-x.shape[0] // layout.experts)
    # Dense products ask for the counts, which cannot be done while a graph is recorded.
    if limit is None or (average > limit and not is_capturing(x)):
        return None
    weight, rows = common.contiguous(weight), _matrix(x, layout.in_features)
    parts, matrices = layout.parts, layout.experts * layout.parts
    steps = [0 if t is None else t.nbytes // matrices for t in weight.tensors]
    row_begin = torch.nn.functional.pad(counts.to(x.device, torch.int64).cumsum(0), (1, 0))
    y = x.new_zeros(x.shape[0], layout.out_features)
    for part in range(parts):
        part_bias = None
        if bias is not None:
            part_bias = bias.to(x.dtype).unflatten(1, (parts, -1))[:, part].contiguous()
        y_part = y.data_ptr() + part * layout.matrix.out_features * y.element_size()
        done = layer_of(layout.matrix, CUDA_TILES).experts_linear(
            addresses(weight.tensors), steps, layout.experts, parts, part, row_begin.data_ptr(),
            rows.data_ptr(), rows.shape[0], rows.stride(0), dtype_code(x.dtype),
            0 if part_bias is None else part_bias.data_ptr(), y_part, layout.out_features, place(x),
        )  # fmt: skip
        if not done:
            return None
    return y
