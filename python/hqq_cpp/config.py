"""HqqConfig: the settings of the C++ library, and what only models need."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from . import _core


class HqqConfig(_core.HqqConfig):
    __doc__ = _core.HqqConfig.__doc__.replace(
        "    Raises:",
        "    importance: Weights of the squared errors of each layer's input columns: a mapping "
        "from layer\n        names to arrays [in_features], or a safetensors file of such "
        "(``hqq-cpp importance``);\n        'random': collect them (quantize_model_ and "
        "from_pretrained only). Not part of\n        ``to_dict()``.\n\n    Raises:",
        1,
    ) if _core.HqqConfig.__doc__ else None  # fmt: skip

    # No other attributes: a misspelled setting must not pass for one.
    __slots__ = ("_importance",)

    # What Transformers asks a quantization_config for.
    quant_method = "hqq_cpp"

    def __init__(self, *args: Any, importance: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.importance = importance

    @property
    def importance(self) -> Any:
        """Where importance comes from: None, 'random', a path or a mapping."""
        return self._importance

    @importance.setter
    def importance(self, value: Any) -> None:
        if value is not None and not isinstance(value, (str, os.PathLike, Mapping)):
            raise ValueError(
                f"[config] importance is a {type(value).__name__}; it must be a mapping from layer "
                f"names to arrays, a safetensors file, 'random' or None"
            )
        self._importance = value

    @classmethod
    def from_dict(cls, config: Any) -> HqqConfig:
        if isinstance(config, cls):
            return config.__copy__()
        refuse_class(config)
        importance = getattr(config, "importance", None)
        return cls(**_core.HqqConfig.from_dict(config).to_dict(), importance=importance)

    from_dict.__func__.__doc__ = _core.HqqConfig.from_dict.__doc__

    def __copy__(self) -> HqqConfig:
        return type(self)(**self.to_dict(), importance=self.importance)

    def __deepcopy__(self, memo: dict) -> HqqConfig:
        # The vectors, which nobody changes, are shared.
        return self.__copy__()

    def __reduce__(self):
        return _unpickle, (self.to_dict(), self.importance)


def _unpickle(settings: dict, importance: Any) -> HqqConfig:
    return HqqConfig(**settings, importance=importance)


def refuse_class(config: Any) -> None:
    """Raises ValueError for HqqConfig itself where an object is meant."""
    if isinstance(config, type):
        name = config.__name__
        raise ValueError(f"[config] the config is the class {name}; make an object of it: {name}()")


def importance_of(config: Any, name: str) -> Any:
    """The importance that a config brings for one layer, or None."""
    refuse_class(config)
    source = getattr(config, "importance", None)
    if source is None:
        return None
    if isinstance(source, str) and source == "random":
        raise ValueError(
            "[config] importance 'random' needs a model to run: use quantize_model_ or "
            "from_pretrained, or the file that 'hqq-cpp importance' writes"
        )
    tensors = source if isinstance(source, Mapping) else _core.load_safetensors(source)
    return tensors.get(name)
