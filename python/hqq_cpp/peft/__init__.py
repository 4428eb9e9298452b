"""LoRA and its relatives from the package peft on top of HqqLinear. Importing it does not import
peft.

    >>> import hqq_cpp.peft
    >>> hqq_cpp.peft.register()  # `import hqq_cpp.transformers` does it

After that ``peft.get_peft_model`` takes models with quantized layers; docs/training.md shows how.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys

__all__ = ["register"]


def register() -> None:
    """Makes peft know HqqLinear: at once if peft is imported, otherwise as soon as it is.

    Doing it again changes nothing. Neither peft nor upstream's package hqq has to be installed.

    Example:
        >>> hqq_cpp.peft.register()
    """
    if "peft" in sys.modules:
        from .patches import apply

        apply()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets others find peft, and adds our part to the end of its import."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
            if spec is None or spec.loader is None:
                return spec
        finally:
            # find_spec only looks, as is_available() functions do; the import may come later.
            sys.meta_path.insert(0, self)
        loader = spec.loader
        exec_module = loader.exec_module

        def exec_and_register(module):
            exec_module(module)
            if module.__name__ != "peft":  # a loader of an archive serves many modules
                return
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            register()

        # On this instance alone: everything else about the loader stays as it is.
        loader.exec_module = exec_and_register
        return spec
