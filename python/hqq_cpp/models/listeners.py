"""Libraries that want to know when the layers of a model were quantized, or became dense again.

A listener is imported when it is first called, and called only while its library is imported:
without the library, no model is one of its own. Importing this module imports no torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from torch import nn

    from .._core import HqqConfig

__all__ = ["Listener", "dequantized", "join", "quantized"]


class Listener(Protocol):
    """The functions of a module that listens."""

    def on_quantized(self, model: nn.Module, config: HqqConfig) -> Any:
        """Layers of the model, or of models inside of it, were quantized by this config."""

    def on_dequantized(self, model: nn.Module) -> Any:
        """All quantized layers of the model became dense."""


# Module of a library -> module of the listener, in the order in which they are called.
_listeners: dict[str, str] = {}


def join(library: str, listener: str) -> None:
    """Adds a listener. Doing it again changes nothing.

    Args:
        library: Full name of a module that a model of the library cannot do without.
        listener: Full name of the module with the functions of Listener.
    """
    _listeners.setdefault(library, listener)


def quantized(model: nn.Module, config: HqqConfig) -> None:
    """Tells everyone that layers of a model were quantized."""
    for listener in _present():
        listener.on_quantized(model, config)


def dequantized(model: nn.Module) -> None:
    """Tells everyone that the layers of a model became dense."""
    for listener in _present():
        listener.on_dequantized(model)


def _present() -> Iterator[Listener]:
    for library, listener in _listeners.items():
        if library in sys.modules:
            yield cast(Listener, importlib.import_module(listener))
