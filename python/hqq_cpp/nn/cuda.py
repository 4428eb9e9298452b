"""Quantized matrices on a GPU: torch tensors to the kernels of libhqq_cuda, by address and on torch's
current stream.

Nothing here waits for the GPU but quantize(), and nothing asks torch.cuda for anything before a tensor
is on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .. import _core
from .dequantize import Layout, Weight, config_of, stored_of, tensor_specs

# What the solver takes.
SOLVED_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

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


def is_native(tensor: torch.Tensor) -> bool:
    """Whether the tensor lies where the kernels of libhqq_cuda work."""
    return tensor.device.type == "cuda" and is_available()


def device_of(tensor: torch.Tensor) -> int:
    return max(tensor.get_device(), 0)


def stream_of(tensor: torch.Tensor) -> int:
    # What torch.cuda.current_stream() wraps, in a fifth of its time; Triton's launcher calls it too.
    return torch._C._cuda_getCurrentRawStream(tensor.get_device()) if tensor.is_cuda else 0


def place(tensor: torch.Tensor) -> _core.CudaPlace:
    return _core.CudaPlace(device_of(tensor), stream_of(tensor))


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being recorded: nothing may wait for the GPU."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def addresses(weight: Weight) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in weight]


def contiguous(weight: Weight) -> Weight:
    return Weight(*(t if t is None else t.contiguous() for t in weight))


@functools.lru_cache(maxsize=1024)
def _make_layer(layout: Layout, *stored: Any) -> _core.CudaLayer:
    config = config_of(layout, *stored)
    return _core.CudaLayer(config, layout.out_features, layout.in_features)


def layer_of(weight: Weight, layout: Layout) -> _core.CudaLayer:
    return _make_layer(layout, *stored_of(weight))


@functools.cache
def dtype_code(dtype: torch.dtype) -> int:
    return _core.dtype_code(dtype)


def dequantize(weight: Weight, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """W_r [out_features, in_features]."""
    weight = contiguous(weight)
    out = weight.W_q.new_empty(layout.out_features, layout.in_features, dtype=dtype)
    layer = layer_of(weight, layout)
    layer.dequantize(addresses(weight), out.data_ptr(), dtype_code(dtype), place(weight.W_q))
    return out


def embedding(
    ids: torch.Tensor, weight: Weight, layout: Layout, dtype: torch.dtype
) -> torch.Tensor:
    """The rows `ids` [...] of W_r."""
    weight, rows = contiguous(weight), ids.to(torch.int64).contiguous()
    # The kernel trusts them. As in nn.Embedding, a wrong one is noticed later, and ends the process's
    # use of the GPU.
    there = ((rows >= 0) & (rows < layout.out_features)).all()
    torch._assert_async(there, f"[embedding] an id is not in 0 to {layout.out_features - 1}")
    out = weight.W_q.new_empty(*ids.shape, layout.in_features, dtype=dtype)
    layer = layer_of(weight, layout)
    layer.dequantize_rows(
        addresses(weight), rows.data_ptr(), rows.numel(), out.data_ptr(), dtype_code(dtype),
        place(weight.W_q),
    )  # fmt: skip
    return out


# ---- Quantization ------------------------------------------------------------------------------


def quantize(
    W: torch.Tensor, config: Any, name: str, importance: Any
) -> tuple[dict[str, torch.Tensor], _core.LayerConfig, Any]:
    """Quantizes W [out, in] where it lies.

    Returns:
        The tensors of format 1 on the device of W, the settings with balance decided, and
        QuantizeStats.

    Raises:
        ValueError: As hqq_cpp.quantize().
    """
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
    out = addresses(Weight(*map(tensors.get, Weight._fields)))
    size = solver.workspace_bytes(device_of(W))
    workspace = torch.empty(size + 256, dtype=torch.uint8, device=W.device)
    start = -(-workspace.data_ptr() // 256) * 256
    stats = solver.solve(W.data_ptr(), W.stride(0), out, start, size, place(W))
    return tensors, settings, stats
