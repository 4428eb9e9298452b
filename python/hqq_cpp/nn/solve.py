"""Quantizes a torch matrix where it lies, if there is a solver there."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import api
from .._core import LayerConfig, QuantizeStats
from ..config import importance_of
from . import cuda


class Solved(NamedTuple):
    """Tensors of format 1, the settings with balance decided, and the errors."""

    tensors: dict[str, torch.Tensor]
    settings: LayerConfig
    stats: QuantizeStats


def quantize_tensor(
    W: torch.Tensor, config: Any, name: str, importance: Any, threads: int = 0
) -> Solved:
    """hqq_cpp.quantize() for torch: on a GPU that libhqq_cuda can use the tensors stay there, else they
    are in CPU memory. The bits are the same.

    Args:
        W: [out_features, in_features], on any device.
        config: An HqqConfig, a dict, or None.
        name: Name of the layer; empty: the settings that hold without rules.
        importance: See hqq_cpp.quantize().
        threads: CPU threads.

    Raises:
        ValueError: As hqq_cpp.quantize().
    """
    if importance is None:
        importance = importance_of(config, name)
    W = W.detach()
    if W.dim() == 2 and W.dtype in cuda.SOLVED_DTYPES and cuda.is_native(W):
        return Solved(*cuda.quantize(W, config, name, importance))
    W = W.cpu()
    q, stats = api.quantize(
        W if W.dim() != 2 or W.stride(-1) == 1 else W.contiguous(),
        config,
        name=name,
        importance=importance,
        threads=threads,
        stats=True,
    )
    return Solved({k: torch.from_dlpack(v) for k, v in q.tensors().items()}, q.config, stats)
