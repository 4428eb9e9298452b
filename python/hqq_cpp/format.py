"""One packed weight: settings, shape, packing and tensors. What computes with it is in backends/."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from . import _torch_version  # noqa: F401  before all others: refuses a torch that is too old
from ._core import BIT_WIDTHS, TENSOR_NAMES, LayerConfig, QuantizedTensor, TiledTensor, tile_specs
from ._core import tensor_specs as specs_of

# The order of the codes in memory: that of the files, that of the C++ kernels (docs/kernels.md) and that
# of the CUDA kernels (docs/cuda-kernels.md).
Packing = Literal["format 1", "cpu tiles", "cuda tiles"]
FORMAT_1: Packing = "format 1"
CPU_TILES: Packing = "cpu tiles"
CUDA_TILES: Packing = "cuda tiles"
# A tile of the CUDA kernels.
CUDA_TILE_ROWS, CUDA_TILE_COLS = 32, 64


class RowFormat(NamedTuple):
    """How a row of codes is packed: planes of the codes' bits, block after block."""

    low_bits: int  # 0: ternary, five codes a byte
    high_bits: int  # 0: a single plane
    block: int  # codes


# Name of a tensor -> its shape and dtype.
Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]

# nbits -> how a row of codes is packed. Plain numbers: torch.compile reads them.
ROW_FORMATS = {
    width.nbits: RowFormat(width.low_bits, width.high_bits, width.block) for width in BIT_WIDTHS
}


def plane_bits(nbits: float) -> tuple[int, ...]:
    """Bits of each plane of codes, the low one first, where every code has bits of its own: in tiles and
    in caches. A ternary code has two."""
    planes = ROW_FORMATS[nbits]
    return tuple(bits for bits in (planes.low_bits or 2, planes.high_bits) if bits)


def _cuda_tile_bytes(nbits: float) -> int:
    return CUDA_TILE_ROWS * CUDA_TILE_COLS * sum(plane_bits(nbits)) // 8


def nbytes_of(specs: Specs) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())


def dtype_name(dtype: torch.dtype) -> str:
    """'float16' for torch.float16: the spelling of settings, files and messages."""
    return str(dtype).removeprefix("torch.")


class Tensors(NamedTuple):
    """The tensors of a quantized weight, in the order of the file; absent ones are None."""

    W_q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    scale_step: torch.Tensor | None
    scale_offset: torch.Tensor | None
    zero_step: torch.Tensor | None
    zero_offset: torch.Tensor | None
    col_scale: torch.Tensor | None

    def present(self) -> dict[str, torch.Tensor]:
        """Name -> tensor, without the absent ones."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}


class Numbers(NamedTuple):
    """What the custom operators of torch are told of a matrix [out_features, in_features]."""

    nbits: float
    group_size: int  # 0: one group per row (axis 1) or column (axis 0)
    axis: int
    out_features: int
    in_features: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Settings and shape of a quantized matrix [out, in], or of a stack [experts, out, in].

    layout_of() makes them, one for all weights that have the same: caches may go by identity.
    """

    config: LayerConfig
    numbers: Numbers  # of the whole matrix, in a stack of one expert's
    experts: int  # 0: a single matrix
    parts: int  # equal parts of an expert's rows that were quantized one by one

    @property
    def shape(self) -> tuple[int, ...]:
        """[experts,] out_features, in_features."""
        matrix = (self.numbers.out_features, self.numbers.in_features)
        return (self.experts, *matrix) if self.experts else matrix

    @property
    def out_features(self) -> int:
        """Rows of a matrix."""
        return self.numbers.out_features

    @property
    def in_features(self) -> int:
        """Columns of a matrix."""
        return self.numbers.in_features

    @functools.cached_property
    def cuda_tile_bytes(self) -> int:
        """Bytes of the codes of a tile of the CUDA kernels."""
        return _cuda_tile_bytes(self.numbers.nbits)

    @property
    def matrix(self) -> Layout:
        """The layout of one part of one expert. A single matrix is its own."""
        if not self.experts:
            return self
        return layout_of(self.config, (self.out_features // self.parts, self.in_features))

    def specs(self, packing: Packing = FORMAT_1) -> Specs:
        """Shape and dtype of every tensor in a packing, which the layout must have.

        Raises:
            ValueError: If balance is not decided.
        """
        rows = self.out_features // self.parts
        specs = tensor_specs(self.config, rows, self.in_features, packing)
        if not self.experts:
            return specs
        # Parts follow each other in every tensor but col_scale, where they are stacked.
        for name, (shape, dtype) in specs.items():
            if name == "col_scale":
                lead = (self.experts,) if self.parts == 1 else (self.experts, self.parts)
                specs[name] = ((*lead, *shape), dtype)
            else:
                specs[name] = ((self.experts, self.parts * shape[0], *shape[1:]), dtype)
        return specs

    def __reduce__(self) -> tuple[Any, ...]:
        return layout_of, (self.config, self.shape, self.parts)


@functools.lru_cache(maxsize=4096)
def layout_of(config: LayerConfig, shape: tuple[int, ...], parts: int = 1) -> Layout:
    """The layout that a layer's settings (HqqConfig.layer()) mean for a shape.

    Args:
        config: Settings of the layer.
        shape: [experts,] out_features, in_features.
        parts: See Layout.
    """
    *experts, out_features, in_features = shape
    group_size = config.group_size or 0
    numbers = Numbers(float(config.nbits), group_size, config.axis, out_features, in_features)
    return Layout(config, numbers, experts[0] if experts else 0, parts)


class PackedWeight(NamedTuple):
    """A quantized weight: what layers, loaders and backends hand to each other."""

    layout: Layout
    packing: Packing
    tensors: Tensors

    @property
    def config(self) -> LayerConfig:
        """The settings."""
        return self.layout.config

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors.W_q.device

    def matrices(self, expert: int) -> list[PackedWeight]:
        """One expert's matrix of a stack, in the parts that were quantized one by one."""
        layout, parts = self.layout.matrix, self.layout.parts
        whole = Tensors(*(t if t is None else t[expert] for t in self.tensors))
        if parts == 1:
            return [PackedWeight(layout, self.packing, whole)]
        matrices = []
        for part in range(parts):
            tensors = Tensors(*(t if t is None else t.chunk(parts)[part] for t in whole))
            if whole.col_scale is not None:
                tensors = tensors._replace(col_scale=whole.col_scale[part])
            matrices.append(PackedWeight(layout, self.packing, tensors))
        return matrices


def packed_weight(layout: Layout, tensors: Tensors) -> PackedWeight:
    """The weight that these tensors are; the shape of the codes tells their packing.

    Format 1 is [..., rows, bytes]. Tiles have one dimension more; the last is the bytes of a tile: 256
    for each bit of a code on a GPU, 64 on a CPU.
    """
    # Code that sets tensors of format 1 again need not say so.
    shape = tensors.W_q.shape
    if len(shape) == (3 if layout.experts else 2):
        return PackedWeight(layout, FORMAT_1, tensors)
    packing = CUDA_TILES if shape[-1] == layout.cuda_tile_bytes else CPU_TILES
    return PackedWeight(layout, packing, tensors)


def weight_of_numbers(
    tensors: Tensors, numbers: Numbers, experts: int = 0, parts: int = 1
) -> PackedWeight:
    """The weight that a custom operator was given."""
    return packed_weight(_layout_of_numbers(numbers, experts, parts, *_stored(tensors)), tensors)


def _stored(tensors: Tensors) -> tuple[str, bool, bool, bool]:
    """What tensors say of the settings: metadata type, 8-bit scale, 8-bit zero, balanced."""
    floats = (tensors.scale, tensors.zero, tensors.col_scale)
    meta = next((t.dtype for t in floats if t is not None and t.dtype != torch.uint8), None)
    return (
        dtype_name(meta or torch.float16),
        tensors.scale_step is not None,
        tensors.zero_step is not None,
        tensors.col_scale is not None,
    )


@functools.lru_cache(maxsize=4096)
def _layout_of_numbers(
    numbers: Numbers,
    experts: int,
    parts: int,
    meta_dtype: str,
    quant_scale: bool,
    quant_zero: bool,
    balanced: bool,
) -> Layout:
    config = LayerConfig(
        nbits=numbers.nbits,
        group_size=numbers.group_size or None,
        axis=numbers.axis,
        meta_dtype=meta_dtype,
        quant_scale=quant_scale,
        quant_zero=quant_zero,
        balance="sinkhorn" if balanced else "none",
    )
    shape = (numbers.out_features, numbers.in_features)
    return layout_of(config, (experts, *shape) if experts else shape, parts)


def tensors_of(q: QuantizedTensor | TiledTensor) -> Tensors:
    """The tensors of a quantized matrix as torch tensors that share its memory."""
    tensors = q.tensors()
    return Tensors(*(torch.from_dlpack(tensors[n]) if n in tensors else None for n in TENSOR_NAMES))


def tensor_specs(
    config: LayerConfig, out_features: int, in_features: int, packing: Packing = FORMAT_1
) -> Specs:
    """Shape and dtype of every tensor that a matrix with these settings has.

    Args:
        config: Settings of the layer; balance 'auto' is not allowed here.
        out_features: Rows of the matrix.
        in_features: Columns of the matrix.
        packing: The order of the codes, which the matrix must have.

    Raises:
        ValueError: If balance is not decided.
    """
    of_packing = tile_specs if packing == CPU_TILES else specs_of
    specs = {
        name: (shape, getattr(torch, dtype))
        for name, shape, dtype in of_packing(config, out_features, in_features)
    }
    if packing == CUDA_TILES:
        strips, tiles = -(-out_features // CUDA_TILE_ROWS), -(-in_features // CUDA_TILE_COLS)
        specs["W_q"] = ((strips, tiles, _cuda_tile_bytes(config.nbits)), torch.uint8)
    return specs
