"""LoRA and its relatives from the package peft on top of HqqLinear. Importing it does not import
peft.

    >>> import hqq_cpp.peft
    >>> hqq_cpp.peft.register()  # `import hqq_cpp.transformers` does it

After that ``peft.get_peft_model`` takes models with quantized layers; docs/training.md shows how.
"""

from __future__ import annotations

from .._after_import import after_import

__all__ = ["register"]


def register() -> None:
    """Makes peft know HqqLinear: at once if peft is imported, otherwise as soon as it is.

    Doing it again changes nothing. Neither peft nor upstream's package hqq has to be installed.

    Example:
        >>> hqq_cpp.peft.register()
    """
    after_import("peft", _apply)


def _apply() -> None:
    from .patches import apply

    apply()
