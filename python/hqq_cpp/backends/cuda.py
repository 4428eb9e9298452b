"""The kernels of libhqq_cuda for weights in GPU memory: torch tensors by address, on torch's current
stream.

Nothing here waits for the GPU but quantize(), and nothing asks torch.cuda for anything before a tensor
is on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import _core
from ..format import FORMAT_1, TENSOR_NAMES, Layout, PackedWeight, Packing, Tensors, tensor_specs
from . import common, fused
from .cuda_calls import addresses, device_of, dtype_code, layer_of, place
from .packing import format_1

# Of the devices that libhqq_cuda drives.
DEVICE_TYPE = "cuda"

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


def use_fused(wanted: bool) -> None:
    """Whether products may use fused kernels, which keep copies of the codes."""
    fused.use(wanted)


def refresh(weight: PackedWeight) -> None:
    """Fills the copies of a weight whose memory was written to again."""
    fused.refresh(weight.tensors)


def packing_for(layout: Layout) -> Packing:
    """The order of codes that the kernels read fastest; fused kernels keep copies of their own."""
    return FORMAT_1


def quantize(
    W: torch.Tensor, config: Any, name: str, importance: Any, threads: int
) -> common.Solved:
    """Quantizes W [out, in] on its GPU, where the result stays; the bits are those of the CPU."""
    W = W.detach()
    W = W if W.stride(-1) == 1 and W.stride(0) >= W.shape[1] else W.contiguous()
    if isinstance(importance, torch.Tensor):
        importance = importance.detach().float().cpu()
    solver = _core.CudaSolver(config, name, dtype_code(W.dtype), *W.shape, importance)
    settings = solver.config
    tensors = {
        key: torch.empty(shape, dtype=dtype, device=W.device)
        for key, (shape, dtype) in tensor_specs(settings, *W.shape).items()
    }
    out = addresses(Tensors(*map(tensors.get, TENSOR_NAMES)))
    size = solver.workspace_bytes(device_of(W))
    workspace = torch.empty(size + 256, dtype=torch.uint8, device=W.device)
    start = -(-workspace.data_ptr() // 256) * 256
    stats = solver.solve(W.data_ptr(), W.stride(0), out, start, size, place(W))
    return common.Solved(tensors, settings, stats)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """W_r [out_features, in_features]."""
    weight, layout = common.contiguous(format_1(weight)), weight.layout
    tensors = weight.tensors
    out = tensors.W_q.new_empty(layout.out_features, layout.in_features, dtype=dtype)
    layer_of(layout).dequantize(
        addresses(tensors), out.data_ptr(), dtype_code(dtype), place(tensors.W_q)
    )
    return out


def rows(weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows `ids` [...] of W_r, [..., in_features]."""
    weight, layout = common.contiguous(format_1(weight)), weight.layout
    tensors, ids = weight.tensors, ids.to(torch.int64).contiguous()
    # The kernel trusts them. As in nn.Embedding, a wrong one is noticed later, and ends the process's
    # use of the GPU.
    there = ((ids >= 0) & (ids < layout.out_features)).all()
    torch._assert_async(there, f"[embedding] an id is not in 0 to {layout.out_features - 1}")
    out = tensors.W_q.new_empty(*ids.shape, layout.in_features, dtype=dtype)
    layer_of(layout).dequantize_rows(
        addresses(tensors), ids.data_ptr(), ids.numel(), out.data_ptr(), dtype_code(dtype),
        place(tensors.W_q),
    )  # fmt: skip
    return out


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, mode: common.Mode
) -> torch.Tensor:
    """x [..., in_features] W_r^T + bias by a fused kernel, or by a dense product where that is faster.

    Every product is exact: `mode` changes nothing.
    """
    weight = format_1(weight)
    y = fused.linear(x, weight, bias)
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
    where there are fused kernels."""
    if not transposed and weight.packing == FORMAT_1:
        y = fused.experts_linear(x, counts, weight, bias)
        if y is not None:
            return y

    # A fused kernel for a single expert would keep a copy of its own.
    def multiply(x: torch.Tensor, matrix: PackedWeight) -> torch.Tensor:
        return common.dense_linear(x, dequantize(matrix, x.dtype), None)

    return common.experts_one_by_one(x, counts, weight, bias, transposed, multiply, dequantize)
