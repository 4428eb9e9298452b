"""The interface of a loader, which reads one kind of checkpoint for from_pretrained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from .._versions import ConversionOps
from ..config import HqqQuantizationConfig
from ..merged import MergedExperts


class Loader(ABC):
    """One load of one model, in the order in which the methods are called.

    Attributes:
        reads_packed: Whether the checkpoint is quantized already.
        quantization_config: That of the model; it may become another one while loading.
        merged: The experts that Transformers merged from layers of the checkpoint.
    """

    reads_packed: bool

    def __init__(self, quantization_config: HqqQuantizationConfig):
        self.quantization_config = quantization_config
        self.merged = MergedExperts()

    @abstractmethod
    def prepare(self, model: PreTrainedModel, files: list[str] | None) -> None:
        """Before the weights are read.

        Args:
            model: The dense model, on device meta.
            files: Those of the checkpoint; None if there is only a state dict.
        """

    def conversions(self, conversions: list[Any]) -> list[Any]:
        """How Transformers reads this checkpoint, from the conversions that read the dense
        model."""
        return conversions

    def takes(self, parameter: str) -> bool:
        """Whether a dense weight is passed to operation() instead of being put into the model."""
        return False

    def bits_per_weight(self, parameter: str) -> float | None:
        """The size of a weight once it is quantized; None if it stays as it is."""
        return None

    def operation(self, is_offloaded: Callable[[str], bool]) -> ConversionOps:
        """The conversion that quantizes dense weights.

        Args:
            is_offloaded: Whether the layer of this name goes to disk.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no dense weights")

    def keeps_types(self, converter: Any, dtype: torch.dtype | None) -> bool:
        """Whether the tensors of a conversion keep the types that they have in the files.

        Args:
            converter: The conversion.
            dtype: The type to which Transformers would cast them.
        """
        return False

    @abstractmethod
    def finish(self, model: PreTrainedModel) -> None:
        """After the weights are read: completes the layers, and refuses a checkpoint that did not
        have them."""
