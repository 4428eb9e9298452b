"""LoRA on HqqLinear."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge

from ..format import Tensors
from .backend import HqqBackend, packed_copy, restore

# Initializations that subtract the adapter from the base weight.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


class HqqLoraLinear(Linear):
    """LoRA, rsLoRA, DoRA and the other variants of peft's lora.Linear on an HqqLinear.

    The forward pass is peft's: the quantized layer plus the adapters, in their own type. Merging
    dequantizes, adds, and quantizes again with the settings of the layer; unmerging gives back the
    very bits from before.

    Raises:
        ValueError: For an initialization of the adapter that changes the base weight.
    """

    def __init__(self, base_layer: Any, adapter_name: str, config: Any, **kwargs: Any):
        if config.fan_in_fan_out:
            # peft does the same for nn.Linear. A quantized Conv1D has the layout of nn.Linear too.
            warnings.warn(
                "fan_in_fan_out is True, but HqqLinear is [out, in]: setting it to False",
                stacklevel=2,
            )
            config.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self._before: tuple[Tensors, torch.Tensor | None] | None = None
        self.quantization_backend = HqqBackend()

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any
    ) -> None:
        """Adds an adapter."""
        init = config.init_lora_weights
        if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
            raise ValueError(
                f"[peft] init_lora_weights='{init}' subtracts the adapter from the base weight, "
                "which a quantized layer cannot store exactly; use True, 'gaussian', 'orthogonal' "
                "or 'eva', or start from the dense model"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the quantized weight: dequantize, add all, quantize once.

        The packed tensors from before stay in memory (they are small) until unmerge().

        Args:
            safe_merge: Name the adapter that has NaN or Inf. The layer stays as it was either way.
            adapter_names: Adapters to merge; None: the active ones.

        Raises:
            ValueError: If the merged weight has NaN or Inf, or if an adapter has a bias and the
                layer none.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) or () if n in self.lora_A]
        if not names:
            return
        layer = self.get_base_layer()
        W = layer.dequantize()
        bias = layer.bias
        for name in names:
            if name in self.lora_variant:
                W = self.lora_variant[name].merge_safe(self, name, W)
            else:
                W = W + self.get_delta_weight(name).to(W.device)
            if self.lora_bias[name]:
                if bias is None:
                    raise ValueError(
                        f"[peft] adapter '{name}' has lora_bias=True, but the layer has no bias to "
                        "merge it into"
                    )
                bias = bias + self.lora_B[name].bias * self.scaling[name]
            if safe_merge and not (
                torch.isfinite(W).all() and (bias is None or torch.isfinite(bias).all())
            ):
                raise ValueError(
                    f"[peft] merging adapter '{name}' would give weights with NaN or Inf; the "
                    "adapter seems broken"
                )
        before = packed_copy(layer), None if bias is None else layer.bias.data
        layer.quantize_(W)
        if bias is not None:
            layer.bias.data = bias.data.to(layer.bias.dtype)
        self._before = self._before or before
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Gives the layer back the bits it had before the first merge."""
        if self._before is None:
            warnings.warn("[peft] no adapter is merged; there is nothing to unmerge", stacklevel=2)
            return
        layer = self.get_base_layer()
        packed, bias = self._before
        restore(layer, packed)
        if bias is not None:
            layer.bias.data = bias.to(layer.device)
        self._before = None
        self.merged_adapters.clear()
