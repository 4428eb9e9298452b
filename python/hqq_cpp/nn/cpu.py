"""Quantized matrices in CPU memory: torch tensors to the C++ kernels, by address.

Tensors are contiguous and hold their values (checks.py, watched.py): nothing here asks again.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .. import _core
from .dequantize import Layout, Weight, config_of, stored_of, weight_of


def is_tiled(weight: Weight) -> bool:
    """Whether the tensors of a matrix are those of a TiledTensor: its codes have three dimensions."""
    return weight.W_q.dim() == 3


def tile(weight: Weight, layout: Layout) -> Weight:
    """The matrix in the order of the C++ kernels."""
    return weight_of(_matrix(_core.QuantizedTensor, weight, layout).tile(_threads()))


def untile(weight: Weight, layout: Layout) -> Weight:
    """Format 1 again, bit for bit, on the device of the weight."""
    device = weight.W_q.device
    weight = Weight(*(t if t is None else t.detach().cpu() for t in weight))
    plain = weight_of(_matrix(_core.TiledTensor, weight, layout).untile(_threads()))
    return Weight(*(t if t is None else t.to(device) for t in plain))


def layer_of(weight: Weight, layout: Layout) -> _core.NativeLayer:
    """What the kernels need to know of a matrix beside the addresses of its tensors."""
    return _make_layer(layout, *stored_of(weight), is_tiled(weight))


def dequantize(weight: Weight, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """W_r [out_features, in_features]."""
    weight = contiguous(weight)
    out = weight.W_q.new_empty(layout.out_features, layout.in_features, dtype=dtype)
    layer_of(weight, layout).dequantize(
        _addresses(weight), out.data_ptr(), _dtype_code(dtype), _threads()
    )
    return out


def embedding(
    ids: torch.Tensor, weight: Weight, layout: Layout, dtype: torch.dtype
) -> torch.Tensor:
    """The rows `ids` [...] of W_r; all of them exist."""
    weight, rows = contiguous(weight), ids.to(torch.int64).contiguous()
    out = ids.new_empty(*ids.shape, layout.in_features, dtype=dtype)
    layer_of(weight, layout).dequantize_rows(
        _addresses(weight), rows.data_ptr(), rows.numel(), out.data_ptr(), _dtype_code(dtype)
    )
    return out


def linear(
    layer: _core.NativeLayer,
    x: torch.Tensor,
    weight: Weight,
    layout: Layout,
    bias: torch.Tensor | None,
    mode: int,
) -> torch.Tensor:
    """x [..., in_features] W_r^T + bias, in the dtype of x.

    Args:
        layer: layer_of() the matrix.
        weight: Contiguous tensors.
        mode: mode_code().
    """
    in_features = layout.in_features
    rows = x if x.dim() == 2 else x.reshape(-1, in_features)
    count, stride = rows.shape[0], rows.stride(0)
    if rows.stride(1) != 1 or stride < in_features:
        rows = rows.contiguous()
        stride = in_features
    y = x.new_empty((*x.shape[:-1], layout.out_features))
    bias_address = 0
    if bias is not None:
        bias = bias.float().contiguous()
        bias_address = bias.data_ptr()
    layer.linear(
        _addresses(weight), rows.data_ptr(), count, stride, _dtype_code(x.dtype), bias_address,
        y.data_ptr(), mode, torch.get_num_threads(),
    )  # fmt: skip
    return y


def experts_linear(
    x: torch.Tensor,
    counts: list[int],
    weight: Weight,
    layout: Layout,
    parts: int,
    y: torch.Tensor,
    mode: int,
) -> None:
    """Every row of x times the matrix of its expert into y, all experts at once; weights are tiled.

    Raises:
        ValueError: If there are not so many rows.
    """
    if min(counts, default=0) < 0 or sum(counts) > x.shape[0]:
        raise ValueError(
            f"[experts] the counts {counts} add up to {sum(counts)} rows; they must be >= 0 and add "
            f"up to at most the {x.shape[0]} rows of x"
        )
    weight = contiguous(weight)
    x = x if x.stride(1) == 1 and x.stride(0) >= layout.in_features else x.contiguous()
    matrices = weight.W_q.shape[0] * parts
    steps = [0 if t is None else t.nbytes // matrices for t in weight]
    piece = layout._replace(out_features=layout.out_features // parts)
    layer = _make_layer(piece, *stored_of(weight), True)
    layer.experts_linear(
        _addresses(weight), steps, parts, counts, x.data_ptr(), x.stride(0), _dtype_code(x.dtype),
        y.data_ptr(), mode, _threads(),
    )  # fmt: skip


@functools.cache
def mode_code(mode: str) -> int:
    """What the kernels take for 'auto', 'fast' and 'exact'."""
    return _core.linear_mode_code(mode)


def _threads() -> int:
    # torch's setting, so that torch.set_num_threads() and data loaders' workers are respected.
    return torch.get_num_threads()


def contiguous(weight: Weight) -> Weight:
    if all(t is None or t.is_contiguous() for t in weight):
        return weight
    return Weight(*(t if t is None else t.contiguous() for t in weight))


def _addresses(weight: Weight) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in weight]


def _matrix(kind: type, weight: Weight, layout: Layout) -> Any:
    """The tensors as a QuantizedTensor or TiledTensor that shares their memory."""
    tensors = {k: v.detach() for k, v in weight._asdict().items() if v is not None}
    shape = (layout.out_features, layout.in_features)
    return kind.from_tensors(tensors, config_of(layout, *stored_of(weight)), shape)


@functools.lru_cache(maxsize=1024)
def _make_layer(
    layout: Layout,
    meta: torch.dtype,
    quant_scale: bool,
    quant_zero: bool,
    balanced: bool,
    tiled: bool,
) -> _core.NativeLayer:
    config = config_of(layout, meta, quant_scale, quant_zero, balanced)
    return _core.NativeLayer(config, layout.out_features, layout.in_features, tiled)


@functools.cache
def _dtype_code(dtype: torch.dtype) -> int:
    return _core.dtype_code(dtype)
