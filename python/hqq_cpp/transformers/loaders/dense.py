"""Dense checkpoints: the settings say which layers are quantized, while the weights are read."""

from __future__ import annotations

import re
from collections.abc import Callable

from transformers import PreTrainedModel
from transformers.utils import logging

from ...find.layers import Layer, find_layers, survey
from ...find.names import unmatched_names
from ...importance.source import ImportanceSource
from ...models.messages import SHARED, stays_dense
from ...models.replace import store_quantized
from ...models.solve import settings_of
from ...source_check import check_dense_source
from ..config import HqqQuantizationConfig
from .loader import Loader
from .solving import Plan, QuantizeOnLoad, SolverThread

logger = logging.get_logger("transformers.hqq_cpp")


class DenseLoader(Loader):
    """Plans what becomes of every weight; a thread quantizes them as they come."""

    reads_packed = False

    def __init__(self, quantization_config: HqqQuantizationConfig):
        super().__init__(quantization_config)
        self._plans: dict[str, Plan] = {}
        self._solver = SolverThread()

    def prepare(self, model: PreTrainedModel, files: list[str] | None) -> None:
        """Makes the plans.

        Raises:
            ValueError: If the files are no dense model, or no layer is to be quantized.
        """
        check_dense_source(files or [], "from_pretrained")
        settings = self.quantization_config.config
        importance = ImportanceSource(settings)
        names = importance.names(find_layers(model))
        if unmatched := unmatched_names(model, settings, names):
            logger.warning(f"[quantize] {unmatched}")
        dense = self._plan(model, importance)
        if dense:
            logger.warning(stays_dense(dense))
        if not self._plans:
            raise ValueError(
                f"[quantize] the settings leave every layer of {type(model).__name__} unquantized: "
                "check skip_modules and the keys of dynamic_config against the names of its "
                f"layers, such as {_some_layer(model)}"
            )

    def _plan(self, model: PreTrainedModel, importance: ImportanceSource) -> list[Layer]:
        """Makes the plans; returns the layers that cannot be quantized as the settings ask."""
        kept = _keep_in_fp32(model)
        dense = []
        for layer in survey(model):
            chosen = settings_of(layer, self.quantization_config.config)
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
        return dense

    def takes(self, parameter: str) -> bool:
        """Whether there is a plan for it."""
        if parameter not in self._plans:
            return False
        self._solver.expected.add(parameter)
        return True

    def bits_per_weight(self, parameter: str) -> float | None:
        """The size that its plan foresees."""
        plan = self._plans.get(parameter)
        return None if plan is None else plan.bits_per_weight

    def operation(self, is_offloaded: Callable[[str], bool]) -> QuantizeOnLoad:
        """Hands weights to the thread."""
        return QuantizeOnLoad(self._plans, self._solver, is_offloaded)

    def finish(self, model: PreTrainedModel) -> None:
        """Waits for the thread."""
        self._solver.join()
        plans, self._plans = self._plans, {}
        _quantize_leftovers(model, plans)
        if plans and not any(plan.done for plan in plans.values()):
            raise ValueError(
                f"[quantize] the checkpoint has none of the {len(plans)} weights that the settings "
                f"quantize, such as {next(iter(plans))}"
            )


def _quantize_leftovers(model: PreTrainedModel, plans: dict[str, Plan]) -> None:
    """Weights that came by a way that does not ask for quantization, such as one of several
    results of a conversion. What did not come was initialized, and is to be trained dense."""
    for plan in plans.values():
        weight = plan.layer.module._parameters.get(plan.layer.parameter.rpartition(".")[2])
        if weight is None or plan.done or weight.device.type == "meta":
            continue
        if not getattr(weight, "_is_hf_initialized", False):
            continue
        store_quantized(model, plan.layer, plan.quantize(weight), weight.device)


def _keep_in_fp32(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a part of a name is one whose weights stay in float32."""
    patterns = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    compiled = [re.compile(pattern.replace("*", ".*") + "$") for pattern in patterns]
    return lambda part: any(pattern.match(part) for pattern in compiled)


def _some_layer(model: PreTrainedModel) -> str:
    names = [layer.name for layer in find_layers(model) if layer.kind != "embedding"]
    return names[0] if names else "(it has no linear layer)"
