"""The common part of loaders of quantized checkpoints. The files say which layers are quantized,
and empty modules are put in their places before a weight is read."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from transformers import PreTrainedModel

from ...errors import FormatError
from ...find.layers import quantized_layers
from ...format import TENSOR_NAMES
from ..config import HqqQuantizationConfig
from .gather import Gather
from .loader import Loader
from .marks import unread


class StoredLoader(Loader):
    """Reads packed tensors."""

    reads_packed = True

    def __init__(self, quantization_config: HqqQuantizationConfig):
        super().__init__(quantization_config)
        # From prepare() to conversions().
        self._to_read: tuple[PreTrainedModel, list[str] | None] | None = None
        # Names of the packed tensors in the model, and what those of merged experts begin as.
        self._packed_names: set[str] = set()
        self._packed_patterns: set[str] = set()

    def prepare(self, model: PreTrainedModel, files: list[str] | None) -> None:
        """Continued by conversions(), which knows the caller's key_mapping."""
        self._to_read = model, files

    def conversions(self, conversions: list[Any]) -> list[Any]:
        """Puts the modules in place. Asked again, it changes nothing."""
        if self._to_read is None:
            return conversions
        (model, files), self._to_read = self._to_read, None
        if files is None and not self._has_tensors():
            raise ValueError(
                "[from_pretrained] a quantized checkpoint is read from its files, which say how "
                "its layers are stored; state_dict alone does not: pass the folder, or build the "
                "model, quantize_model_() it and use load_state_dict()"
            )
        conversions = self.replace_layers(model, files or [], conversions)
        self._packed_names = {
            f"{name}.{tensor}" for name, _ in quantized_layers(model) for tensor in TENSOR_NAMES
        }
        return conversions

    def _has_tensors(self) -> bool:
        """Whether the tensors came without files."""
        return False

    @abstractmethod
    def replace_layers(
        self, model: PreTrainedModel, files: list[str], conversions: list[Any]
    ) -> list[Any]:
        """Puts empty quantized modules where the checkpoint has quantized layers.

        Args:
            model: The model, on device meta.
            files: Of the checkpoint.
            conversions: How Transformers reads the dense model.

        Returns:
            How it has to read this one.

        Raises:
            FormatError: If there is no such layer, or one is broken or incomplete.
        """

    def keeps_types(self, converter: Any, dtype: torch.dtype | None) -> bool:
        """Rounding scale and zero to the type of the model would change the weights."""
        if isinstance(converter, Gather):
            converter.set_dtype(dtype)
            return True
        if any(source in self._packed_patterns for source in converter.source_patterns):
            return True
        return converter.target_patterns[0] in self._packed_names

    def finish(self, model: PreTrainedModel) -> None:
        """Refuses a model of which packed tensors were not read."""
        if lost := unread(model):
            raise FormatError(
                f"[from_pretrained] {len(lost)} packed tensors were not read, such as {lost[0]}: "
                "key_mapping gives them other names, or a conversion of the model makes others of "
                "them"
            )
