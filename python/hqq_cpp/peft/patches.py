"""Puts our classes where peft looks for them."""

from __future__ import annotations

import copy
import sys
from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.lora import model as lora_model
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import quantization_utils
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..format import TENSOR_NAMES
from ..models.dequantize import make_dense
from ..nn.base import QuantizedModule
from ..nn.linear import HqqLinear
from .backend import HqqBackend
from .lora import HqqLoraLinear

_MARK = "_hqq_cpp"


def apply() -> None:
    """Replaces functions of peft by ones that know HqqLinear and call the original for the rest."""
    _replace(lora_model, "dispatch_hqq", _dispatch)
    _replace(quantization_utils, "resolve_quantization_backend", _resolve_backend)
    _replace(tuners_utils, "check_adapters_to_merge", _check_merge)
    for tuner in (BaseTuner, MixedModel):
        _replace(tuner, "_replace_module", _replace_module)
    _replace(BaseTuner, "_inject_parameters", _inject_parameters)
    _replace(ModulesToSaveWrapper, "update", _update_dense)


def _replace(home: Any, name: str, make: Any) -> None:
    original = getattr(home, name)
    if hasattr(original, _MARK):
        return
    ours = make(original)
    setattr(ours, _MARK, True)
    setattr(home, name, ours)
    # Every tuner has imported these functions by name.
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "peft" and vars(module).get(name) is original:
            setattr(module, name, ours)


def _base(target: Any) -> Any:
    return target.get_base_layer() if isinstance(target, BaseTunerLayer) else target


def _dispatch(original):
    def dispatch_hqq(target, adapter_name, config, **kwargs):
        if isinstance(_base(target), HqqLinear):
            return HqqLoraLinear(target, adapter_name, config=config, **kwargs)
        return original(target, adapter_name, config=config, **kwargs)

    return dispatch_hqq


def _resolve_backend(original):
    def resolve_quantization_backend(base_layer, **kwargs):
        if isinstance(base_layer, HqqLinear):
            return HqqBackend()
        return original(base_layer, **kwargs)

    return resolve_quantization_backend


def _check_merge(original):
    def check_adapters_to_merge(module, adapter_names=None):
        if isinstance(_base(module), HqqLinear) and not isinstance(module, HqqLoraLinear):
            backend = module.quantization_backend
            if not isinstance(backend, HqqBackend):
                # It would write into the dense stand-in of the weight, and nothing would happen.
                kind = type(module)
                raise ValueError(
                    f"[peft] {kind.__module__}.{kind.__name__} cannot be merged into a quantized "
                    "layer; use the adapter unmerged, or merge it into the dense model and "
                    "quantize that"
                )
            backend.forget(len(module.merged_adapters))
        return original(module, adapter_names)

    return check_adapters_to_merge


def _replace_module(original):
    def _replace_module(self, parent, child_name, new_module, child):
        if isinstance(new_module, HqqLinear):
            # Unloading: the original would assign a dense weight to the layer.
            setattr(parent, child_name, new_module)
        else:
            original(self, parent, child_name, new_module, child)

    return _replace_module


def _inject_parameters(original):
    def _inject_parameters(self, peft_config, model, *args, **kwargs):
        # The parameter has another name now, and peft would pass over it.
        for name, module in model.named_modules():
            if not isinstance(module, QuantizedModule):
                continue
            names = [name, *(f"{name}.{tensor}" for tensor in ("weight", *TENSOR_NAMES))]
            for target in peft_config.target_parameters or ():
                if any(n == target or n.endswith("." + target) for n in names):
                    raise ValueError(
                        f"[peft] target_parameters has '{target}', but {name} is quantized; "
                        "adapters on parameters need dense ones: leave it out of "
                        "target_parameters, or out of the quantization"
                    )
        return original(self, peft_config, model, *args, **kwargs)

    return _inject_parameters


def _update_dense(original):
    def update(self, adapter_name, tied_module=None, **kwargs):
        # modules_to_save are trained whole, as a classifier's head: their copy is dense.
        is_new = tied_module is None and adapter_name not in self.modules_to_save
        if is_new and any(isinstance(m, QuantizedModule) for m in self.original_module.modules()):
            self.modules_to_save[adapter_name] = _dense_copy(self.original_module)
        return original(self, adapter_name, tied_module=tied_module, **kwargs)

    return update


def _dense_copy(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(nn.ModuleDict({"module": module}))
    make_dense(copied, None)
    return copied["module"]
