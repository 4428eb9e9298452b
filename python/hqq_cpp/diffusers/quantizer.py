"""The DiffusersQuantizer: what from_pretrained and save_pretrained call for quantized models."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from .._core import LayerConfig
from ..checkpoints import load_safetensors
from ..errors import FormatError
from ..find.layers import Layer, find_layers, parent_of, quantized_layers
from ..format import TENSOR_NAMES
from ..importance.source import ImportanceSource
from ..models import described
from ..models.dequantize import dequantize_model_
from ..models.loading import plan_loading
from ..models.messages import listed
from ..models.replace import put_module, store_quantized
from ..models.solve import quantize_layer, settings_of
from ..nn.base import QuantizedModule
from .config import HqqQuantizationConfig


class _Plan(NamedTuple):
    """The layer, settings and importance of a weight that is to be quantized."""

    layer: Layer
    settings: LayerConfig
    importance: ImportanceSource


class HqqQuantizer(DiffusersQuantizer):
    """Quantizes on load, and loads what was quantized.

    Args:
        quantization_config: An hqq_cpp.HqqConfig, or ours for diffusers.
        pre_quantized: Whether the checkpoint is quantized already.
    """

    # Modules that a dense model keeps in float32 stay in float32.
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: Any, **kwargs: Any):
        if not isinstance(quantization_config, HqqQuantizationConfig):
            quantization_config = HqqQuantizationConfig(quantization_config)
        super().__init__(quantization_config, **kwargs)
        # Parameter -> plan, of the weights that are to be quantized.
        self._plans: dict[str, _Plan] = {}
        # Other names of such weights.
        self._tied: set[str] = set()
        self._files: list[Path] | None = None
        # Set once the layers are in place: what save_pretrained describes.
        self.model: nn.Module | None = None

    # Before the weights are read.

    def validate_environment(self, *args, device_map=None, **kwargs):
        """Refuses offloading to disk, where diffusers would cast packed tensors."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "[diffusers] device_map puts quantized layers on 'disk', for which diffusers casts "
                "their tensors to another type; use 'cpu' or a GPU, or fewer bits"
            )

    def maybe_update_loaded_keys(self, loaded_keys, checkpoint_files):
        """Sees which files are read."""
        self._files = [Path(file) for file in checkpoint_files]
        return loaded_keys

    @property
    def supports_parallel_loading(self) -> bool:
        """False while solving: the solver uses all cores, and modules are replaced."""
        return self.pre_quantized

    def preprocess_model(self, model, **kwargs):
        """Does what other quantizers do, but the model may still be cast: packed tensors keep their
        types."""
        model.quantization_method = self.quantization_config.quant_method
        return self._process_model_before_weight_loading(model, **kwargs)

    def _process_model_before_weight_loading(self, model, keep_in_fp32_modules=(), **kwargs):
        def is_kept(name: str) -> bool:
            return any(part in keep_in_fp32_modules for part in name.split("."))

        # A single file is passed as if it were quantized, without its name.
        if self.pre_quantized and self._files is not None:
            self._put_empty(model, self._files, is_kept)
            return
        settings = self.quantization_config.config
        importance = ImportanceSource(settings)
        for layer in find_layers(model):
            chosen = settings_of(layer, settings)
            if chosen is not None and not is_kept(layer.name):
                resolved = importance.resolve(layer, chosen)
                self._plans[layer.parameter] = _Plan(layer, resolved, importance)
                self._tied.update(f"{name}.weight" for name in (*layer.tied, *layer.aliases))
        if not self._plans:
            names = [layer.name for layer in find_layers(model)]
            raise ValueError(
                f"[diffusers] the settings leave every layer of {type(model).__name__} unquantized: "
                f"check skip_modules and the keys of dynamic_config against its layers, such as "
                f"{listed(names) or '(it has none)'}"
            )

    def _put_empty(
        self, model: nn.Module, files: list[Path], is_kept: Callable[[str], bool]
    ) -> None:
        """Puts empty modules where the files have quantized layers."""
        wrong = [file.name for file in files if file.suffix != ".safetensors"]
        if wrong:
            raise FormatError(
                f"[diffusers] {listed(wrong)}: quantized layers are stored in safetensors files"
            )
        layers, transposed = described.read_descriptions(files)
        where = files[0].parent
        if not layers:
            raise FormatError(
                f"[diffusers] config.json says that {where} is quantized, but its files describe no "
                "quantized layer: remove quantization_config from config.json, or quantize again"
            )
        tensors = {name: t for file in files for name, t in load_safetensors(file).items()}
        plan = plan_loading(model, layers, transposed, tensors)
        ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
        plan.unexpected = [n for n in plan.unexpected if not any(p.search(n) for p in ignored)]
        plan.wrong += [
            f"{names[0]} is quantized, but its module in the model cannot hold that"
            for names, _ in plan.unpacked.values()
        ]
        plan.check("from_pretrained", where, model)
        for layer, module in plan.modules.values():
            module.compute_dtype = torch.float32 if is_kept(layer.name) else layer.dtype
            put_module(model, layer, module)

    # While the weights are read.

    def check_if_quantized_param(
        self, model, param_value, param_name, state_dict, **kwargs
    ) -> bool:
        """Whether a tensor is packed, or to be."""
        if param_name in self._plans or param_name in self._tied:
            return True
        owner, last = parent_of(model, param_name)
        return last in TENSOR_NAMES and isinstance(owner, QuantizedModule)

    def create_quantized_param(
        self,
        model,
        param_value,
        param_name,
        target_device,
        state_dict,
        unexpected_keys=None,
        **kwargs,
    ) -> None:
        """Sets a packed tensor, in the type it has in the file; or packs a weight."""
        if param_name in self._tied:
            return
        plan = self._plans.get(param_name)
        if plan is None:
            owner, last = parent_of(model, param_name)
            stored = state_dict[param_name].to(target_device)
            owner._parameters[last] = nn.Parameter(stored, requires_grad=False)
            return
        layer, settings, importance = plan
        weight = param_value.to(target_device)
        quantized = quantize_layer(layer, weight, settings, importance.get(layer))
        module = store_quantized(model, layer, quantized, weight.device)
        module.compute_dtype = weight.dtype

    # Afterwards.

    def _process_model_after_weight_loading(self, model, **kwargs):
        self._plans, self._tied = {}, set()
        attach(model, self)
        return model

    def get_state_dict_and_metadata(self, state_dict, safe_serialization=False):
        """The tensors and metadata that save_pretrained writes."""
        if not safe_serialization:
            raise ValueError(
                "[save_pretrained] quantized layers are stored in safetensors files: leave "
                "safe_serialization=True"
            )
        layers = dict(quantized_layers(self.model))
        adapted = [name for name in layers if name.endswith(".base_layer")]
        if adapted:
            raise ValueError(
                f"[save_pretrained] {listed(adapted)} have adapters, with which diffusers does not load "
                "a model: save those with save_lora_adapter, and the model after unload_lora or before "
                "add_adapter"
            )
        return state_dict, described.metadata_of(*described.describe_all(layers))

    def dequantize(self, model):
        """The dense model, which save_pretrained saves as one."""
        return dequantize_model_(model)

    @property
    def is_serializable(self) -> bool:
        """True in every case."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True in every case."""
        return True


def attach(model: nn.Module, quantizer: HqqQuantizer | None = None) -> None:
    """Makes a model with quantized layers one that save_pretrained saves as such.

    The settings are read off its layers: diffusers sorts the keys of config.json, and the order of
    rules counts.
    """
    config = HqqQuantizationConfig(
        described.config_of(model), not_quantized=described.not_quantized(model)
    )
    if quantizer is None:
        quantizer = HqqQuantizer(config, pre_quantized=True)
    quantizer.quantization_config, quantizer.model = config, model
    for _, module in quantized_layers(model):
        module.place_marker()
    model.hf_quantizer = quantizer
    model.quantization_method = config.quant_method
    model.register_to_config(quantization_config=config)
