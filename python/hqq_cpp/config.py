"""The importance of input columns that an HqqConfig brings along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import _core


def importance_of(config: Any, name: str) -> Any:
    """The importance that a config brings for one layer, or None.

    Raises:
        ValueError: For 'random', which needs a model to run.
    """
    source = getattr(config, "importance", None)
    if source is None or isinstance(config, type):
        return None
    if isinstance(source, str) and source == "random":
        raise ValueError(
            "[config] importance 'random' needs a model to run: use quantize_model_ or "
            "from_pretrained, or the file that 'hqq-cpp importance' writes"
        )
    tensors = source if isinstance(source, Mapping) else _core.load_safetensors(source)
    return tensors.get(name)
