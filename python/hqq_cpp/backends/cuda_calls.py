"""What calls of libhqq_cuda take: addresses, streams and layers."""

from __future__ import annotations

import functools

import torch

from .. import _core
from ..format import Layout, Tensors


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


def addresses(tensors: Tensors) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


@functools.lru_cache(maxsize=4096)
def layer_of(layout: Layout) -> _core.CudaLayer:
    return _core.CudaLayer(layout.config, layout.out_features, layout.in_features)


@functools.cache
def dtype_code(dtype: torch.dtype) -> int:
    return _core.dtype_code(dtype)
