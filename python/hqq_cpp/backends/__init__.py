"""Backends of quantized layers, and the choice between them.

A backend is a module with the functions of `Backend`: torch.py (plain torch operations, on any device),
cpu.py (the C++ kernels) and cuda.py (the kernels of libhqq_cuda). The functions of the same names here
choose a backend and call it.
"""

from . import cpu, cuda, torch
from .chooser import (
    Backend,
    Choice,
    choose,
    dequantize,
    experts_linear,
    experts_linear_backward,
    get_backend,
    kernels_for,
    linear,
    linear_backward,
    mode_of,
    packing_for,
    quantize,
    rows,
    set_backend,
)

__all__ = [
    "Backend",
    "Choice",
    "choose",
    "cpu",
    "cuda",
    "dequantize",
    "experts_linear",
    "experts_linear_backward",
    "get_backend",
    "kernels_for",
    "linear",
    "linear_backward",
    "mode_of",
    "packing_for",
    "quantize",
    "rows",
    "set_backend",
    "torch",
]
