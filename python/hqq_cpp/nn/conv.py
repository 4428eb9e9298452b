"""A quantized 1x1 convolution."""

from __future__ import annotations

import torch

from .linear import HqqLinear


class HqqPointwiseConv2d(HqqLinear):
    """A convolution with a 1x1 kernel: the linear layer of HqqLinear over the channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., channels, height, width] -> [..., out_features, height, width]."""
        return super().forward(x.movedim(-3, -1)).movedim(-1, -3)
