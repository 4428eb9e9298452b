"""HqqExperts: the quantized weight of fused experts, [experts, out, in]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .._core import LayerConfig, QuantizedTensor
from ..backends.common import dequantize_expert
from ..format import TENSOR_NAMES, tensors_of
from . import ops
from .base import QuantizedModule, parse_dtype


class HqqExperts(QuantizedModule):
    """Quantized matrices of experts: takes the place of a parameter [experts, out, in].

    Every tensor of format 1 has a leading dimension. The rows of a matrix may come in `parts` equal
    parts that were quantized one by one, as gate and up projections; their tensors follow each
    other, and ``col_scale`` is [experts, parts, in]. Indexing with an expert's number dequantizes
    its matrix, so code that reads a parameter keeps working; calling it multiplies without that.

    Args:
        weights: One quantized matrix per expert, of equal shapes and settings.
        dtype: Type of the dense weights.

    Raises:
        ValueError: If there is none, or shapes or settings differ.

    Example:
        >>> import torch
        >>> q = hqq_cpp.quantize(torch.randn(8, 64), {"nbits": 4})
        >>> experts = hqq_cpp.HqqExperts([q, q])
        >>> experts(torch.ones(3, 64), torch.tensor([1, 2])).shape, experts[0].shape
        (torch.Size([3, 8]), torch.Size([8, 64]))
    """

    W_q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def __init__(self, weights: Sequence[QuantizedTensor], dtype: torch.dtype | None = None):
        super().__init__()
        if not weights:
            raise ValueError("[experts] there are 0 matrices; give one per expert")
        first = weights[0]
        for e, q in enumerate(weights):
            if q.shape != first.shape or q.config != first.config:
                raise ValueError(
                    f"[experts] expert {e} is {q!r}, expert 0 is {first!r}; all must have one "
                    f"shape and the same settings"
                )
        self._setup(first.config, (len(weights), *first.shape), parse_dtype(dtype, torch.float32))
        tensors = [tensors_of(q) for q in weights]
        self._register_tensors(
            {
                name: torch.stack([getattr(w, name) for w in tensors])
                for name in TENSOR_NAMES
                if getattr(tensors[0], name) is not None
            }
        )

    @classmethod
    def empty(
        cls,
        config: LayerConfig,
        shape: tuple[int, ...],
        *,
        parts: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> HqqExperts:
        """Experts whose tensors are allocated, not set.

        Args:
            config: Settings of the layer, with balance 'none' or 'sinkhorn'.
            shape: (experts, out_features, in_features).
            parts: Parts of the rows with col_scale of their own.
            dtype: Type of the dense weights.
            device: Where the tensors are; 'meta' allocates nothing.
        """
        experts = cls.__new__(cls)
        nn.Module.__init__(experts)
        experts._setup(config, shape, dtype, parts)
        device = torch.get_default_device() if device is None else torch.device(device)
        experts._register_tensors(experts._empty_tensors(device))
        return experts

    @property
    def parts(self) -> int:
        """Equal parts of the rows of a matrix that were quantized one by one."""
        return self._layout.parts

    @property
    def num_experts(self) -> int:
        """Matrices there are."""
        return self.dense_shape[0]

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense parameter: [experts, out_features, in_features]."""
        return torch.Size(self.dense_shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the dense parameter."""
        return self.compute_dtype

    def __len__(self) -> int:
        return self.num_experts

    def dequantize(
        self, expert: int | None = None, dtype: torch.dtype | str = torch.float32
    ) -> torch.Tensor:
        """W_r of one expert [out_features, in_features], or of all."""
        if expert is None:
            return torch.stack([self.dequantize(e, dtype) for e in range(self.num_experts)])
        dtype = parse_dtype(dtype, torch.float32)
        return dequantize_expert(self.checked(), expert, dtype, ops.dequantize)

    def __getitem__(self, expert: int | torch.Tensor) -> torch.Tensor:
        """The dense weight of an expert, or of several: what a parameter gives."""
        if isinstance(expert, torch.Tensor) and expert.ndim > 0:
            return torch.stack([self[int(e)] for e in expert.flatten()]).unflatten(0, expert.shape)
        index = int(expert)
        if not -self.num_experts <= index < self.num_experts:
            raise IndexError(f"[experts] there is no expert {index}; there are {self.num_experts}")
        return self.dequantize(index % self.num_experts, self.compute_dtype)

    def forward(
        self,
        x: torch.Tensor,
        counts: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        transposed: bool = False,
    ) -> torch.Tensor:
        """Multiplies every row with the matrix of its expert; the other experts are not read.

        Args:
            x: [rows, in_features], sorted by expert.
            counts: int64 [experts]: rows each expert has. Rows that are left over get zeros.
            bias: [experts, out_features], or None.
            transposed: The matrices are stored [in, out]: x is [rows, out_features], and so on.

        Returns:
            [rows, out_features] in the dtype of x, with gradients for x and bias.
        """
        # Transposed matrices are dequantized in any packing.
        weight = self.checked() if transposed else self.prepared()
        return ops.experts_linear(x, counts, weight, bias, transposed)

    def extra_repr(self) -> str:
        """For repr(): sizes and the settings that matter for reading."""
        parts = "" if self.parts == 1 else f", parts={self.parts}"
        return f"shape={list(self.dense_shape)}, {self._repr_settings()}{parts}"
