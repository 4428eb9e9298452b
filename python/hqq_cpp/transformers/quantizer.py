"""The HfQuantizer: what from_pretrained and save_pretrained call for quantized models."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from ..find.layers import parent_of, quantized_layers
from ..models import described
from ..models.dequantize import dequantize_model_
from ..nn.experts import HqqExperts
from . import saving, ties
from ._versions import get_device
from .config import HqqQuantizationConfig
from .experts import EXPERTS_FUNCTION, warn_of_dense_experts
from .loaders import choose_loader
from .merged import MergedExperts


class HqqQuantizer(HfQuantizer):
    """Quantizes on load, and loads what was quantized: hands the steps of Transformers to a loader.

    Args:
        quantization_config: An hqq_cpp.HqqConfig, ours or Transformers' HqqConfig.
        pre_quantized: Whether the checkpoint is quantized already.
    """

    requires_calibration = False

    def __init__(self, quantization_config: Any, pre_quantized: bool = True, **kwargs: Any):
        self._loader = choose_loader(quantization_config, pre_quantized)
        self._device_map: Any = None
        super().__init__(
            self._loader.quantization_config, pre_quantized=self._loader.reads_packed, **kwargs
        )

    @property
    def merged(self) -> MergedExperts:
        """Experts that save_pretrained has to cut into layers again."""
        return self._loader.merged

    # Before the weights are read.

    def validate_environment(self, *args, device_map=None, **kwargs):
        # Called a second time with what "auto" became.
        self._device_map = device_map

    def _is_offloaded(self, name: str) -> bool:
        device_map = self._device_map
        return isinstance(device_map, dict) and get_device(device_map, name) == "disk"

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        self._loader.prepare(model, checkpoint_files)

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        _refuse_tensor_parallel(model)
        return self._loader.takes(param_name)

    def param_element_size(self, model, param_name: str, param: torch.Tensor) -> float:
        bits = self._loader.bits_per_weight(param_name)
        return param.element_size() if bits is None else bits / 8

    # While the weights are read.

    def get_quantize_ops(self):
        return self._loader.operation(self._is_offloaded)

    def get_new_dtype(self, converter, param, dtype):
        if self._loader.keeps_types(converter, dtype):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def get_weight_conversions(self):
        return []

    def update_weight_conversions(self, weight_conversions, model=None):
        conversions = self._loader.conversions(weight_conversions)
        self.quantization_config = self._loader.quantization_config
        return conversions

    # Afterwards.

    def _process_model_after_weight_loading(self, model, **kwargs):
        _refuse_tensor_parallel(model)
        self._loader.finish(model)
        finish(model, self.quantization_config)
        return model

    # Saving and the rest.

    def get_state_dict_and_metadata(self, model):
        ties.untile_tied(model)
        return None, saving.metadata(model)

    def _dequantize(self, model, dtype=None):
        return dequantize_model_(model, dtype)

    def is_serializable(self):
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _refuse_tensor_parallel(model) -> None:
    size = getattr(model, "_tp_size", None) or 1
    if size > 1:
        raise ValueError(
            f"[from_pretrained] tp_plan cuts the weights over {size} processes, and a packed weight is "
            f"not cut: leave tp_plan out, and use device_map, DDP or fully_shard() (docs/training.md)"
        )


def finish(model, quantization_config: HqqQuantizationConfig) -> None:
    """Completes a model whose layers are quantized."""
    for name, module in quantized_layers(model):
        module.place_marker()
        # Transformers makes parameters of what it loads, with gradients where they are floats.
        for parameter in module.packed():
            if parameter is not None:
                parameter.requires_grad_(False)
        if isinstance(module, HqqExperts):
            owner, _ = parent_of(model, name)
            owner.config._experts_implementation = EXPERTS_FUNCTION
    warn_of_dense_experts(model)
    ties.tie_packed(model)
    saving.drop_conversions(model)
    quantization_config.not_quantized = described.not_quantized(model)
    _attach_inner(model)
    # prepare_model_for_kbit_training of peft asks for this.
    model.hqq_quantized = True


def _attach_inner(model: torch.nn.Module) -> None:
    """Models inside of a model of Transformers can be saved alone, as dense ones can."""
    for part in model.modules():
        if part is not model and isinstance(part, PreTrainedModel):
            if any(quantized_layers(part)):
                part.hf_quantizer = _InnerQuantizer(HqqQuantizationConfig(), pre_quantized=True)


class _InnerQuantizer(HqqQuantizer):
    """The quantizer of a model inside of another. The config of the whole has the settings of all
    parts; the config of the part gets its own when it is saved alone."""

    def get_state_dict_and_metadata(self, model):
        if getattr(model.config, "quantization_config", None) is None:
            settings = HqqQuantizationConfig(described.config_of(model))
            settings.not_quantized = described.not_quantized(model)
            model.config.quantization_config = settings
        return super().get_state_dict_and_metadata(model)
