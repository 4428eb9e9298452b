"""Exceptions of hqq_cpp. User mistakes are ValueError, the operating system's failures OSError."""

from __future__ import annotations


class FormatError(ValueError):
    """A file or a set of tensors breaks its format."""


class CudaError(RuntimeError):
    """A CUDA call failed, or the library was built without CUDA."""


class Interrupted(RuntimeError):
    """A progress callback returned False: the work was stopped."""
