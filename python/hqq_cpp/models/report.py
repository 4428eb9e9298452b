"""hqq_report: what quantization did to a model, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .._core import layer_tag
from ..find.layers import quantized_layers
from ..nn.experts import HqqExperts


@dataclass(frozen=True)
class ReportRow:
    """One layer, or all layers of a tag.

    Attributes:
        name: Layer or tag.
        layers: How many layers.
        nbits: Bits a code has, or None where they differ.
        bits_per_weight: Stored bits a weight, scales and zeros included.
        relative_error: ||W - W_r|| / ||W||, the mean over layers and experts; None for what came
            from a file.
        weights: Number of weights.
        nbytes: Stored bytes.
    """

    name: str
    layers: int
    nbits: float | None
    bits_per_weight: float
    relative_error: float | None
    weights: int
    nbytes: int


@dataclass(frozen=True)
class HqqReport:
    """Rows and totals; ``str()`` and ``print()`` give a table.

    Attributes:
        rows: One ReportRow per layer (or tag), in the order of the model.
        weights: Quantized weights.
        nbytes: Bytes of their tensors.
        dense_nbytes: Bytes of everything that stayed dense.
    """

    rows: list[ReportRow]
    weights: int
    nbytes: int
    dense_nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight."""
        return 8 * self.nbytes / self.weights

    def __str__(self) -> str:
        head = ("layer", "layers", "bits", "bits/weight", "error", "bytes")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(
                [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]
            )
            for line in lines
        ]
        total = self.nbytes + self.dense_nbytes
        text.append(
            f"{self.weights:,} weights quantized at {self.bits_per_weight:.3f} bits; "
            f"{total / 1e6:.1f} MB in all, {self.dense_nbytes / 1e6:.1f} MB of it dense"
        )
        return "\n".join(text)

    __repr__ = __str__


def _cells(row: ReportRow) -> tuple[str, ...]:
    return (
        row.name,
        str(row.layers),
        "mixed" if row.nbits is None else f"{row.nbits:g}",
        f"{row.bits_per_weight:.3f}",
        "-" if row.relative_error is None else f"{row.relative_error:.4f}",
        f"{row.nbytes:,}",
    )


def hqq_report(model: nn.Module, by: str = "layer") -> HqqReport:
    """Bits, errors and bytes of the quantized layers of a model.

    Args:
        model: A model with quantized layers.
        by: 'layer': a row each. 'tag': one for all layers of the same tag (``layer_tag``).

    Raises:
        ValueError: If the model has no quantized layer, or for another `by`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> print(hqq_cpp.hqq_report(hqq_cpp.quantize_model_(model, {"balance": "none"})))
        layer  layers  bits  bits/weight   error  bytes
        0           1     4        4.500  0...  1,152
        2,048 weights quantized at 4.500 bits; 0.0 MB in all, 0.0 MB of it dense
    """
    if by not in ("layer", "tag"):
        raise ValueError(f"[report] by is '{by}'; it must be 'layer' or 'tag'")
    groups: dict[str, list[nn.Module]] = {}
    packed: set[int] = set()
    for name, module in quantized_layers(model):
        if id(module.W_q) in packed:
            continue  # tied to an embedding
        groups.setdefault(name if by == "layer" else layer_tag(name), []).append(module)
        packed |= {id(t) for t in module.packed() if t is not None}
    if not groups:
        raise ValueError(f"[report] {type(model).__name__} has no quantized layer")
    rows = [_row(name, modules) for name, modules in groups.items()]
    return HqqReport(
        rows=rows,
        weights=sum(row.weights for row in rows),
        nbytes=sum(row.nbytes for row in rows),
        dense_nbytes=sum(p.nbytes for p in model.parameters() if id(p) not in packed),
    )


def _row(name: str, modules: list[nn.Module]) -> ReportRow:
    errors: list[float] = []
    for module in modules:
        stats = module.quantize_stats
        if stats is not None:
            several = stats if isinstance(module, HqqExperts) else [stats]
            errors += [one["relative_error"] for one in several]
    weights = sum(_numel(module) for module in modules)
    nbytes = sum(module.packed_nbytes for module in modules)
    widths = {module.nbits for module in modules}
    return ReportRow(
        name=name,
        layers=len(modules),
        nbits=widths.pop() if len(widths) == 1 else None,
        bits_per_weight=8 * nbytes / weights,
        relative_error=sum(errors) / len(errors) if errors else None,
        weights=weights,
        nbytes=nbytes,
    )


def _numel(module: nn.Module) -> int:
    count = 1
    for size in module.dense_shape:
        count *= size
    return count
