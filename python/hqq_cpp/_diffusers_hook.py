"""Lets diffusers load and quantize with nothing but ``import hqq_cpp``."""

from __future__ import annotations

import importlib
import os

from ._after_import import after_import


def install() -> None:
    """Registers with diffusers once it has its quantizers; ``HQQ_CPP_NO_HOOK=1`` prevents it."""
    if os.environ.get("HQQ_CPP_NO_HOOK", "") in ("", "0"):
        after_import("diffusers.quantizers.auto", _register)


def _register() -> None:
    importlib.import_module("hqq_cpp.diffusers")
