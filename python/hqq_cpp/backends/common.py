"""What the backends share: products with a dense weight, and loops over experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch.nn import functional

from .._core import LayerConfig, QuantizeStats
from ..format import Layout, PackedWeight

# How kernels multiply, see hqq_cpp.linear().
Mode = Literal["auto", "fast", "exact"]


class Kernel(NamedTuple):
    """What multiplies, for explain()."""

    name: str
    mode: Mode  # never "auto"
    reason: str  # why nothing faster does; empty: there is nothing faster


# A product with the dense weight.
DENSE = "dequantize + torch.mm"


class Solved(NamedTuple):
    """What quantize() gives: tensors of format 1, the settings with balance decided, and errors."""

    tensors: dict[str, torch.Tensor]
    settings: LayerConfig
    stats: QuantizeStats


def contiguous(weight: PackedWeight) -> PackedWeight:
    """The weight with contiguous tensors, as kernels read them."""
    tensors = weight.tensors
    if all(t is None or t.is_contiguous() for t in tensors):
        return weight
    copies = (t if t is None else t.contiguous() for t in tensors)
    return weight._replace(tensors=type(tensors)(*copies))


def check_ids(ids: torch.Tensor, layout: Layout) -> None:
    """Refuses ids that are no rows.

    Raises:
        IndexError: With the first bound that is exceeded.
    """
    if ids.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= layout.out_features:
        raise IndexError(
            f"[embedding] index {low if low < 0 else high} is out of range; there are "
            f"{layout.out_features} rows, 0 to {layout.out_features - 1}"
        )


def dense_linear(x: torch.Tensor, W_r: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., in_features] W_r^T + bias, in the dtype of x, by torch."""
    out_features, in_features = W_r.shape
    bias = None if bias is None else bias.to(x.dtype)
    if torch.compiler.is_compiling():
        return functional.linear(x, W_r, bias)
    # Not functional.linear, whose result for three dimensions is a view: autograd forbids changing
    # that in place when it comes out of a custom operator.
    y = x.new_empty(*x.shape[:-1], out_features)
    rows, out = x.reshape(-1, in_features), y.view(-1, out_features)
    if bias is None:
        torch.mm(rows, W_r.t(), out=out)
    else:
        torch.addmm(bias, rows, W_r.t(), out=out)
    return y


def expert_rows(counts: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of a matrix sorted by expert, for the experts that have any."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count > 0:
            yield expert, slice(start, start + count)
        start += count


def dequantize_expert(
    weight: PackedWeight,
    expert: int,
    dtype: torch.dtype,
    dequantize: Callable[[PackedWeight, torch.dtype], torch.Tensor],
) -> torch.Tensor:
    """W_r of one expert as it is stored, [out_features, in_features]."""
    dense = [dequantize(matrix, dtype) for matrix in weight.matrices(expert)]
    return dense[0] if len(dense) == 1 else torch.cat(dense)


def experts_one_by_one(
    x: torch.Tensor,
    counts: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    transposed: bool,
    multiply: Callable[[torch.Tensor, PackedWeight], torch.Tensor],
    dequantize: Callable[[PackedWeight, torch.dtype], torch.Tensor],
) -> torch.Tensor:
    """experts_linear() by one product an expert, for the experts that have rows.

    Args:
        x: [rows, in], sorted by expert.
        counts: int64 [experts]: rows each expert has; rows after them get zeros.
        weight: A stack.
        bias: [experts, out], or None.
        transposed: The matrices are stored [in, out].
        multiply: (x, matrix) -> x W_r^T.
        dequantize: (matrix, dtype) -> W_r.
    """
    layout = weight.layout
    y = x.new_zeros(x.shape[0], layout.in_features if transposed else layout.out_features)
    for expert, rows in expert_rows(counts):
        if transposed:
            y[rows] = x[rows] @ dequantize_expert(weight, expert, x.dtype, dequantize)
        else:
            done = [multiply(x[rows], matrix) for matrix in weight.matrices(expert)]
            y[rows] = done[0] if len(done) == 1 else torch.cat(done, -1)
        if bias is not None:
            y[rows] += bias[expert].to(y.dtype)
    return y
