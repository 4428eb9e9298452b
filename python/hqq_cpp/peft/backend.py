"""Merging into quantized layers, for the tuners of peft that leave it to a backend."""

from __future__ import annotations

import torch
from peft.utils.quantization_utils import QuantizationBackend

from ..format import TENSOR_NAMES, Tensors
from ..nn.linear import HqqLinear


def packed_copy(layer: HqqLinear) -> Tensors:
    """The packed tensors as they are now. quantize_() makes new ones, so nothing is copied."""
    return Tensors(*(None if tensor is None else tensor.data for tensor in layer.packed()))


def restore(layer: HqqLinear, packed: Tensors) -> None:
    """Gives a layer the packed tensors back that it had, to the bit."""
    for name in TENSOR_NAMES:
        tensor = getattr(packed, name)
        if tensor is not None:
            layer.get_parameter(name).data = tensor.to(layer.device)


class HqqBackend(QuantizationBackend):
    """How OFT, BOFT, VeRA, MiSS and SHiRA read and write the weight of an HqqLinear.

    They unmerge by arithmetic, which a requantized weight does not survive. So each merge keeps the
    packed tensors from before it, and unmerging puts them back.
    """

    supports_merge = True
    backend_name = "hqq_cpp"
    layer_type = "linear"

    def __init__(self) -> None:
        # The i-th is from before the i-th merged adapter.
        self._before: list[Tensors] = []

    def get_base_weight(self, base_layer: HqqLinear) -> torch.Tensor:
        """The dequantized weight [out_features, in_features] in float32."""
        return base_layer.dequantize()

    def set_base_weight(self, peft_layer, weight_data: torch.Tensor) -> None:
        """Quantizes a merged weight with the settings of the layer; for an unmerged one, restores
        the bits.

        Raises:
            ValueError: If the weight has another shape, or NaN or Inf.
        """
        layer = peft_layer.get_base_layer()
        # merge() calls this before it lists the adapter as merged, unmerge() after it has removed
        # it.
        merged = len(peft_layer.merged_adapters)
        if len(self._before) > merged:
            restore(layer, self._before[merged])
            self.forget(merged)
            return
        before = packed_copy(layer)
        layer.quantize_(weight_data)
        self._before.append(before)

    def forget(self, merged: int) -> None:
        """Drops what was kept for more than `merged` merged adapters."""
        del self._before[merged:]
