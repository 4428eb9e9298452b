"""What calls of libhqq_cuda take: addresses, streams and layers; and the order of the codes that its
kernels read."""

from __future__ import annotations

import functools

import torch

from .. import _core
from ..format import CUDA_TILES, FORMAT_1, Layout, PackedWeight, Packing, Tensors

# Type of the devices that libhqq_cuda drives.
DEVICE_TYPE = "cuda"


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
def layer_of(layout: Layout, packing: Packing) -> _core.CudaLayer:
    """What the kernels need to know of a matrix beside the addresses of its tensors."""
    return _core.CudaLayer(
        layout.config, layout.out_features, layout.in_features, packing == CUDA_TILES
    )


@functools.cache
def dtype_code(dtype: torch.dtype) -> int:
    return _core.dtype_code(dtype)


# ---- Tiles -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def tiles_shape(layout: Layout, device: int) -> tuple[int, ...] | None:
    """Shape of W_q as tiles, [strips, tiles, bytes]; None: no kernel of the device multiplies this.

    In a stack it is [experts, parts * strips, tiles, bytes].
    """
    if layer_of(layout.matrix, FORMAT_1).tiles_bytes(device) is None:
        return None
    shape, _ = layout.specs(CUDA_TILES)["W_q"]
    return None if layout.out_features % layout.parts else shape


def pack(layout: Layout, W_q: torch.Tensor) -> torch.Tensor:
    """The codes of format 1 as tiles, on the same GPU; there must be tiles of this layout."""
    shape = tiles_shape(layout, device_of(W_q))
    assert shape is not None
    return _move_codes(layout, FORMAT_1, W_q, W_q.new_empty(shape))


def unpack(weight: PackedWeight) -> torch.Tensor:
    """The inverse, bit for bit, of tiles on any device: they are moved to a GPU where they are not."""
    W_q = weight.tensors.W_q.detach()
    there = W_q
    if W_q.device.type != DEVICE_TYPE:
        _core.cuda_require_device(0)
        there = W_q.to(DEVICE_TYPE)
    shape, dtype = weight.layout.specs()["W_q"]
    plain = _move_codes(weight.layout, CUDA_TILES, there, there.new_empty(shape, dtype=dtype))
    return plain.to(W_q.device)


def _move_codes(
    layout: Layout, packing: Packing, source: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Every matrix of a weight, one after the other."""
    source = source.detach().contiguous()
    layer = layer_of(layout.matrix, packing)
    move = layer.pack if packing == FORMAT_1 else layer.unpack
    matrices = max(layout.experts, 1) * layout.parts
    step, out_step = source.nbytes // matrices, out.nbytes // matrices
    where, others = place(source), [0] * (len(Tensors._fields) - 1)
    for m in range(matrices):
        move([source.data_ptr() + m * step, *others], out.data_ptr() + m * out_step, where)
    return out
