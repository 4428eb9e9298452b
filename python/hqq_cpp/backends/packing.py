"""Packed weights in another order: format 1 for files and torch operations, tiles for the kernels of a
device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import _core
from ..format import (
    CPU_TILES,
    CUDA_TILES,
    FORMAT_1,
    Layout,
    PackedWeight,
    Packing,
    Tensors,
    tensors_of,
)
from . import cuda_calls


def repack(weight: PackedWeight, wanted: Packing) -> PackedWeight:
    """The weight in another order, in new memory where it differs; its layout must have that order."""
    if weight.packing == wanted:
        return weight
    plain = format_1(weight)
    if wanted == CPU_TILES:
        return PackedWeight(plain.layout, CPU_TILES, _reordered(plain, _tile))
    if wanted == CUDA_TILES:
        codes = cuda_calls.pack(plain.layout, plain.tensors.W_q)
        return PackedWeight(plain.layout, CUDA_TILES, plain.tensors._replace(W_q=codes))
    return plain


def format_1(weight: PackedWeight) -> PackedWeight:
    """The weight in format 1, bit for bit, on its device. One that is in format 1 is given back as is."""
    if weight.packing == FORMAT_1:
        return weight
    if weight.packing == CUDA_TILES:
        tensors = weight.tensors._replace(W_q=cuda_calls.unpack(weight))
    else:
        tensors = _reordered(weight, _untile)
    return PackedWeight(weight.layout, FORMAT_1, tensors)


def _tile(tensors: Tensors, layout: Layout) -> Tensors:
    shape = (layout.out_features, layout.in_features)
    matrix = _core.QuantizedTensor.from_tensors(_detached(tensors), layout.config, shape)
    return tensors_of(matrix.tile(torch.get_num_threads()))


def _untile(tensors: Tensors, layout: Layout) -> Tensors:
    shape, device = (layout.out_features, layout.in_features), tensors.W_q.device
    # The kernels work in CPU memory. Tiles come to a GPU where something moves parameters one by one.
    there = {name: tensor.cpu() for name, tensor in _detached(tensors).items()}
    matrix = _core.TiledTensor.from_tensors(there, layout.config, shape)
    plain = tensors_of(matrix.untile(torch.get_num_threads()))
    return Tensors(*(t if t is None else t.to(device) for t in plain))


def _detached(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.present().items()}


def _reordered(weight: PackedWeight, reorder: Callable[[Tensors, Layout], Tensors]) -> Tensors:
    """Every matrix of the weight in another order."""
    if not weight.layout.experts:
        return reorder(weight.tensors, weight.layout)
    experts = []
    for expert in range(weight.layout.experts):
        parts = [reorder(m.tensors, m.layout) for m in weight.matrices(expert)]
        # col_scale has one order and is shaped differently.
        rows = zip(*(part._replace(col_scale=None) for part in parts))
        experts.append([None if row[0] is None else torch.cat(row) for row in rows])
    stacked = (None if t[0] is None else torch.stack(t) for t in zip(*experts))
    return Tensors(*stacked)._replace(col_scale=weight.tensors.col_scale)
