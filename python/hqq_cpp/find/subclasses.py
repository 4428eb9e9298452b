"""Subclasses of nn.Linear and of convolutions: which of them a quantized layer can stand for."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from .._cached import cached
from ..nn.base import QuantizedModule
from ..nn.carry import ACCELERATE, attributes_of

# A subclass may replace these: they take no part in a forward pass.
_HARMLESS = {"reset_parameters", "extra_repr"}
# Python's own names that do take part.
_TELLING = {"__call__", "__new__", "__getattr__", "__getattribute__", "__setattr__", "__delattr__"}
_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device)


def class_obstacle(module: nn.Module, base: type[nn.Module]) -> str:
    """Why the class of `module`, a subclass of `base`, cannot be replaced; empty if it can."""
    cls = type(module)
    if module._modules or module._parameters.keys() - {"weight", "bias"}:
        return f"{cls.__name__} has parts of its own"
    for name in _overridden(cls, base):
        if name != "forward":
            return f"{cls.__name__} has a {name} of its own"
        if not _computes_like(module, base):
            return f"{cls.__name__} has a forward of its own"
    return ""


@cached
def _overridden(cls: type[nn.Module], base: type[nn.Module]) -> tuple[str, ...]:
    """Attributes of `base` that `cls` has of its own, "forward" last."""
    known = set(dir(base)) | {"weight", "bias"}
    found = set()
    for part in cls.__mro__[: cls.__mro__.index(base)]:
        for name in vars(part):
            dunder = name.startswith("__") and name.endswith("__")
            if name in known and (name in _TELLING if dunder else name not in _HARMLESS):
                if getattr(cls, name) is not getattr(base, name, None):
                    found.add(name)
    return tuple(sorted(found, key=lambda name: (name == "forward", name)))


def _computes_like(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a forward of the class's own gives what that of nn.Linear gives, and changes nothing.

    It is tried on a small layer with random weights: Falcon's writes the same product otherwise.
    """
    attributes = {k: v for k, v in attributes_of(module).items() if k not in ACCELERATE}
    if base is not nn.Linear or module._buffers:
        return False
    if not all(isinstance(value, _SIMPLE) for value in attributes.values()):
        return False
    try:
        # Loaders have meta as the default device; a dropout must not move the caller's generator.
        with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            return all(
                _agrees(type(module), attributes, module._parameters["bias"] is not None, *case)
                for case in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, False))
            )
    except Exception:  # whatever the code of others raises for a layer of another size
        return False


def _agrees(
    cls: type[nn.Module], attributes: dict[str, Any], bias: bool, dtype: torch.dtype, training: bool
) -> bool:
    given = attributes | {"in_features": 7, "out_features": 5}
    small: nn.Module = object.__new__(cls)
    nn.Module.__init__(small)
    vars(small).update(given)
    small.train(training)
    weight, offset = torch.randn(5, 7).to(dtype), torch.randn(5).to(dtype)
    small.register_parameter("weight", nn.Parameter(weight.clone()))
    small.register_parameter("bias", nn.Parameter(offset.clone()) if bias else None)
    for shape in ((3, 7), (2, 3, 7)):
        x = torch.randn(shape).to(dtype)
        expected = nn.functional.linear(x, weight, offset if bias else None)
        y = small.forward(x.clone())
        tolerance = 1e-4 if dtype == torch.float32 else 0.02
        if y.shape != expected.shape or y.dtype != dtype:
            return False
        if not torch.allclose(y, expected, tolerance, tolerance):
            return False
    return attributes_of(small) == given and torch.equal(small._parameters["weight"], weight)


@cached
def class_for(quantized: type[QuantizedModule], dense: type[nn.Module]) -> type[QuantizedModule]:
    """`quantized` with the methods that a subclass of nn.Linear adds: models call them, and ask
    isinstance."""
    if dense is nn.Linear:
        return quantized
    namespace = {"_made_from": (quantized, dense), "__reduce_ex__": _reduce}
    return types.new_class(
        f"Hqq{dense.__name__}", (quantized, dense), exec_body=lambda body: body.update(namespace)
    )


def _reduce(self, protocol):
    # pickle finds no class that was made while the program ran.
    return _allocate, self._made_from, self.__getstate__()


def _allocate(quantized: type[QuantizedModule], dense: type[nn.Module]) -> QuantizedModule:
    cls = class_for(quantized, dense)
    return cls.__new__(cls)
