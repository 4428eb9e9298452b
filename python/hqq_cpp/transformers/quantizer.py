"""The HfQuantizer: what from_pretrained and save_pretrained call for quantized models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from ..errors import FormatError
from ..nn import described
from ..nn import layers as nn_layers
from ..nn.dense_layers import SHARED, stays_dense
from ..nn.dequantize import TENSOR_NAMES
from ..nn.dequantize_model import dequantize_model_
from ..nn.experts import HqqExperts
from ..nn.names import unmatched_names
from ..nn.quantize_model import ImportanceSource, settings_of, store_quantized
from ..source_check import check_dense_source
from . import config as _config
from . import legacy, saved, ties
from ._versions import get_device
from .experts import EXPERTS_FUNCTION
from .gather import Gather
from .load_ops import Plan, QuantizeOnLoad, SolverThread, unread

logger = logging.get_logger("transformers.hqq_cpp")


class HqqQuantizer(HfQuantizer):
    """Quantizes on load, and loads what was quantized.

    Args:
        quantization_config: An hqq_cpp.HqqConfig, ours or Transformers' HqqConfig.
        pre_quantized: Whether the checkpoint is quantized already.
    """

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any):
        if isinstance(quantization_config, legacy.UpstreamSource):
            kwargs["pre_quantized"] = True
        self.from_upstream = kwargs.get("pre_quantized", True) and _config.is_hqq(
            quantization_config
        )
        # What the config.json of an old checkpoint says, if it cannot be read; the files say the
        # same.
        self.unread_config: dict[str, Any] | None = None
        if not isinstance(quantization_config, _config.HqqQuantizationConfig):
            try:
                quantization_config = _config.HqqQuantizationConfig(quantization_config)
            except ValueError:
                if not self.from_upstream:
                    raise
                self.unread_config = quantization_config.to_dict()
                quantization_config = _config.HqqQuantizationConfig()
        super().__init__(quantization_config, **kwargs)
        self._plans: dict[str, Plan] = {}
        self._packed_names: set[str] = set()
        self.packed_patterns: set[str] = set()
        # Of a checkpoint with one matrix per expert: the conversions that merge them, and what
        # they make.
        self.merged: dict[int, Any] = {}
        self.merged_parameters: set[str] = set()
        # Of a quantized checkpoint, until its layers are in place.
        self._to_read: tuple[Any, list[str]] | None = None
        self._solver: SolverThread | None = None
        self._device_map: Any = None

    # Before the weights are read.

    def validate_environment(self, *args, device_map=None, **kwargs):
        # Called a second time with what "auto" became.
        self._device_map = device_map

    def _is_offloaded(self, name: str) -> bool:
        device_map = self._device_map
        return isinstance(device_map, dict) and get_device(device_map, name) == "disk"

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if self.pre_quantized:
            # Continued by update_weight_conversions(), which knows the caller's key_mapping.
            self._to_read = model, checkpoint_files
            return
        check_dense_source(checkpoint_files or [], "from_pretrained")
        settings = self.quantization_config.config
        importance = ImportanceSource(settings)
        names = importance.names(nn_layers.find_layers(model))
        if unmatched := unmatched_names(model, settings, names):
            logger.warning(f"[quantize] {unmatched}")
        kept = _keep_in_fp32(model)
        dense = []
        for layer in nn_layers.survey(model):
            chosen = settings_of(layer, settings)
            if chosen is None or any(kept(part) for part in layer.name.split(".")):
                continue
            if layer.others and layer.kind != "embedding":
                layer = layer._replace(obstacle=SHARED)
            if layer.obstacle:
                dense.append(layer)
                continue
            plan = Plan(layer, chosen, importance)
            self._plans[layer.parameter] = plan
            # A checkpoint with tensors for these is refused.
            self._plans |= {f"{other}.weight": plan for other in layer.others}
        if dense:
            logger.warning(stays_dense(dense))
        if not self._plans:
            raise ValueError(
                f"[quantize] the settings leave every layer of {type(model).__name__} unquantized: "
                "check skip_modules and the keys of dynamic_config against the names of its "
                f"layers, such as {_some_layer(model)}"
            )
        self._solver = SolverThread()

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        _refuse_tensor_parallel(model)
        if param_name not in self._plans:
            return False
        self._solver.expected.add(param_name)
        return True

    def param_element_size(self, model, param_name: str, param: torch.Tensor) -> float:
        plan = self._plans.get(param_name)
        if plan is None:
            return param.element_size()
        return plan.bits_per_weight / 8

    # While the weights are read.

    def get_quantize_ops(self):
        return QuantizeOnLoad(self._plans, self._solver, self._is_offloaded)

    def get_new_dtype(self, converter, param, dtype):
        # Rounding scale and zero to the type of the model would change the weights.
        if isinstance(converter, Gather):
            converter.set_dtype(dtype)
            return None
        if self._reads_packed(converter):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _reads_packed(self, converter) -> bool:
        if any(source in self.packed_patterns for source in converter.source_patterns):
            return True
        return converter.target_patterns[0] in self._packed_names

    def get_weight_conversions(self):
        return []

    def update_weight_conversions(self, weight_conversions, model=None):
        if self._to_read is None:
            return weight_conversions
        (model, files), self._to_read = self._to_read, None
        if files is None and not isinstance(self.quantization_config, legacy.UpstreamSource):
            raise ValueError(
                "[from_pretrained] a quantized checkpoint is read from its files, which say how "
                "its layers are stored; state_dict alone does not: pass the folder, or build the "
                "model, quantize_model_() it and use load_state_dict()"
            )
        loader = legacy if self.from_upstream else saved
        conversions = loader.replace_layers(model, self, files or [], weight_conversions)
        self._packed_names = {
            f"{name}.{tensor}"
            for name, _ in nn_layers.quantized_layers(model)
            for tensor in TENSOR_NAMES
        }
        return conversions

    def add_merged(self, target) -> None:
        """Experts that save_pretrained has to cut into layers again."""
        self.merged[id(target.converter)] = target.converter
        self.merged_parameters.add(target.module)

    # Afterwards.

    def _process_model_after_weight_loading(self, model, **kwargs):
        _refuse_tensor_parallel(model)
        if self._solver is not None:
            self._solver.join()
            self._quantize_leftovers(model)
            self._solver = None
            if self._plans and not any(plan.done for plan in self._plans.values()):
                raise ValueError(
                    f"[quantize] the checkpoint has none of the {len(self._plans)} weights that "
                    f"the settings quantize, such as {next(iter(self._plans))}"
                )
        elif lost := unread(model):
            raise FormatError(
                f"[from_pretrained] {len(lost)} packed tensors were not read, such as {lost[0]}: "
                "key_mapping gives them other names, or a conversion of the model makes others of "
                "them"
            )
        if self.from_upstream:
            legacy.finish(model, self)
        finish(model, self.quantization_config)
        return model

    def _quantize_leftovers(self, model) -> None:
        """Weights that came by a way that does not ask for quantization, such as one of several
        results of a conversion. What did not come was initialized, and is to be trained dense."""
        for plan in self._plans.values():
            weight = plan.layer.module._parameters.get(plan.layer.parameter.rpartition(".")[2])
            if weight is None or plan.done or weight.device.type == "meta":
                continue
            if not getattr(weight, "_is_hf_initialized", False):
                continue
            store_quantized(model, plan.layer, plan.quantize(weight), weight.device)

    # Saving and the rest.

    def get_state_dict_and_metadata(self, model):
        ties.untile_tied(model)
        return None, saved.metadata(model)

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


def finish(model, quantization_config: _config.HqqQuantizationConfig) -> None:
    """What a model needs once its layers are quantized."""
    for name, module in nn_layers.quantized_layers(model):
        module.place_marker()
        # Transformers makes parameters of what it loads, with gradients where they are floats.
        for parameter in module.packed():
            if parameter is not None:
                parameter.requires_grad_(False)
        if isinstance(module, HqqExperts):
            owner, _ = nn_layers.parent_of(model, name)
            owner.config._experts_implementation = EXPERTS_FUNCTION
    _warn_of_dense_experts(model)
    ties.tie_packed(model)
    saved.drop_conversions(model)
    quantization_config.not_quantized = described.not_quantized(model)
    _attach_inner(model)
    # What peft's prepare_model_for_kbit_training asks for.
    model.hqq_quantized = True


def _warn_of_dense_experts(model) -> None:
    """Experts that no rule left out, in modules whose code cannot take a quantized weight."""
    stayed = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and ".experts." in f".{name}" and parameter.is_floating_point()
    ]

    def is_ours(name: str) -> bool:
        owner = model.get_submodule(name.rpartition(".")[0])
        return isinstance(owner, HqqExperts) or nn_layers.is_experts(owner)

    stayed = [(name, parameter) for name, parameter in stayed if not is_ours(name)]
    if stayed:
        share = sum(p.numel() for _, p in stayed) / sum(p.numel() for p in model.parameters())
        owner = type(model.get_submodule(stayed[0][0].rpartition(".")[0])).__name__
        logger.warning(
            f"[quantize] {len(stayed)} tensors of experts ({100 * share:.0f} % of the parameters) "
            f"stay dense: {owner} does not run through Transformers' experts interface"
        )


def attach(model, config: Any) -> None:
    """Makes a model whose layers were quantized in place one that save_pretrained can save."""
    quantization_config = _config.HqqQuantizationConfig(config)
    model.hf_quantizer = HqqQuantizer(quantization_config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = quantization_config.quant_method
    model.config.quantization_config = quantization_config
    finish(model, quantization_config)


def attach_all(model: torch.nn.Module, config: Any) -> None:
    """attach() for the model, or else for every model of Transformers inside of it, whose settings
    are then read off its layers: rules for the whole name them differently."""
    for part in _outermost(model):
        if part is model:
            attach(part, config)
        elif any(nn_layers.quantized_layers(part)):
            attach(part, described.config_of(part))


def _outermost(module: torch.nn.Module) -> Iterator[PreTrainedModel]:
    """Models of Transformers that are in no other, each once."""
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, PreTrainedModel):
            yield module
        else:
            waiting += module.children()


def _attach_inner(model: torch.nn.Module) -> None:
    """Models inside of a model of Transformers can be saved alone, as dense ones can."""
    for part in model.modules():
        if part is not model and isinstance(part, PreTrainedModel):
            if any(nn_layers.quantized_layers(part)):
                part.hf_quantizer = _InnerQuantizer(
                    _config.HqqQuantizationConfig(), pre_quantized=True
                )


class _InnerQuantizer(HqqQuantizer):
    """For a model inside of another. Its config gets the settings when it is saved alone: that of
    the whole has them for all its parts."""

    def get_state_dict_and_metadata(self, model):
        if getattr(model.config, "quantization_config", None) is None:
            settings = _config.HqqQuantizationConfig(described.config_of(model))
            settings.not_quantized = described.not_quantized(model)
            model.config.quantization_config = settings
        return super().get_state_dict_and_metadata(model)


def _keep_in_fp32(model):
    patterns = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    compiled = [re.compile(pattern.replace("*", ".*") + "$") for pattern in patterns]
    return lambda part: any(pattern.match(part) for pattern in compiled)


def _some_layer(model) -> str:
    layers = nn_layers.find_layers(model)
    names = [layer.name for layer in layers if layer.kind != "embedding"]
    return names[0] if names else "(it has no linear layer)"
