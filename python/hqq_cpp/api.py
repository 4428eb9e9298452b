"""Functions for single matrices. The work is done in C++, without the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from . import _core
from ._core import (
    HqqConfig,
    LayerConfig,
    Progress,
    QuantizedTensor,
    QuantizeStats,
    Tensor,
    TiledTensor,
)
from .config import importance_of

if TYPE_CHECKING:
    import numpy as np

    PathLike = str | os.PathLike[str]
    # A dict in any form that HqqConfig.from_dict reads, or an object whose to_dict() gives one.
    ConfigLike = HqqConfig | LayerConfig | Mapping[str, Any] | Any | None
    ProgressCallback = Callable[[Progress], bool | None]


@overload
def quantize(
    W: Any,
    config: ConfigLike = None,
    *,
    name: str = "",
    importance: Any = None,
    threads: int = 0,
    device: str = "cpu",
    stats: Literal[False] = False,
) -> QuantizedTensor: ...
@overload
def quantize(
    W: Any,
    config: ConfigLike = None,
    *,
    name: str = "",
    importance: Any = None,
    threads: int = 0,
    device: str = "cpu",
    stats: Literal[True],
) -> tuple[QuantizedTensor, QuantizeStats]: ...
def quantize(W, config=None, *, name="", importance=None, threads=0, device="cpu", stats=False):
    """Quantizes a matrix.

    The result depends on neither the number of threads nor the CPU.

    Args:
        W: [out_features, in_features], float32, float16, bfloat16 or float64, in CPU memory: a
            NumPy array, a torch tensor, a Tensor or anything with ``__dlpack__``. Read in place if
            the elements of a row are contiguous, else copied.
        config: An HqqConfig, a dict that HqqConfig.from_dict reads, or None for the defaults.
        name: Name of the layer, which selects the rules of config and stands in messages. Empty:
            the settings that hold without rules.
        importance: [in_features]: a weight >= 0 for the squared error of each input column, best
            the mean square of that input. None: what config.importance has for the layer `name`.
        threads: CPU threads; 0: see default_threads().
        device: Where to solve: 'cpu', or 'cuda' or 'cuda:<number>' (docs/cuda.md), which copies W to
            that GPU and the result back. The bits are the same.
        stats: Also return the errors.

    Returns:
        A QuantizedTensor, or (QuantizedTensor, QuantizeStats) with stats=True.

    Raises:
        ValueError: If W is no matrix of floats in CPU memory, is empty or holds NaN or Inf; if
            config is invalid or leaves the layer unquantized; if importance does not fit.
        CudaError: If there is no such device, no libhqq_cuda or no driver for it, or not enough memory.

    Example:
        >>> import numpy as np
        >>> W = np.random.default_rng(0).standard_normal((64, 128), dtype=np.float32)
        >>> q, stats = hqq_cpp.quantize(W, {"nbits": 4, "group_size": 32}, stats=True)
        >>> q.shape, round(stats.relative_error, 2)
        ((64, 128), 0.07)
    """
    if importance is None:
        importance = importance_of(config, name)
    q, errors = _core.quantize(W, config, name, importance, threads, device, stats)
    return (q, errors) if stats else q


@overload
def dequantize(
    q: QuantizedTensor,
    dtype: Literal["float32", "float16", "float64"] = "float32",
    *,
    threads: int = 0,
) -> np.ndarray: ...
@overload
def dequantize(q: QuantizedTensor, dtype: Literal["bfloat16"], *, threads: int = 0) -> Tensor: ...
@overload
def dequantize(q: QuantizedTensor, dtype: Any, *, threads: int = 0) -> np.ndarray | Tensor: ...
def dequantize(q, dtype="float32", *, threads=0):
    """Computes W_r = (W_q - zero) * scale * col_scale.

    Args:
        q: A quantized matrix.
        dtype: 'float32', 'float16', 'bfloat16' or 'float64', or the NumPy or torch dtype. Values
            are computed in float32 and rounded half to even.
        threads: CPU threads; 0: see default_threads().

    Returns:
        A new NumPy array [out_features, in_features]; a Tensor for bfloat16, which NumPy lacks
        (``torch.from_dlpack`` takes it).

    Raises:
        ValueError: For another dtype.

    Example:
        >>> import numpy as np
        >>> W = np.array([[-1.0, 0.0, 1.0, 2.0, -1.0, 0.0, 1.0, 2.0]])
        >>> q = hqq_cpp.quantize(W, {"nbits": 2, "group_size": 8, "balance": "none"})
        >>> hqq_cpp.dequantize(q, "float16")[0, :4].tolist()
        [-1.0, 0.0, 1.0, 2.0]
    """
    return _core.dequantize(q, dtype, threads)


def linear(
    x: Any,
    q: QuantizedTensor | TiledTensor,
    bias: Any = None,
    *,
    mode: str = "auto",
    threads: int = 0,
) -> np.ndarray:
    """y = x W_r^T + bias.

    Args:
        x: [..., in_features], float32, float16, bfloat16 or float64.
        q: A quantized matrix [out_features, in_features]. One that is used again is faster as
            ``q.tile()``.
        bias: [out_features], or None.
        mode: 'exact': x as it is, sums in float32. 'fast': x rounded to int8 in blocks of up to 64
            with a scale each, which adds an error of about 0.6 % of y. 'auto': the environment
            variable HQQ_CPU_MODE, and 'fast' without it.
        threads: CPU threads; 0: see default_threads(). They do not change the result.

    Returns:
        NumPy array [..., out_features] of the type of x (float32 for bfloat16, which NumPy lacks).

    Raises:
        ValueError: If a size, a type or the mode does not fit.

    Example:
        >>> import numpy as np
        >>> q = hqq_cpp.quantize(np.eye(8), {"nbits": 8, "group_size": 8, "balance": "none"})
        >>> hqq_cpp.linear(np.ones((2, 8), np.float32), q, np.full(8, 0.5)).shape
        (2, 8)
    """
    x = x if hasattr(x, "reshape") else Tensor(x).numpy()
    if x.ndim == 0:
        raise ValueError("[linear] x is a single number; it must be [..., in_features]")
    if x.ndim == 2:
        return _core.linear(x, q, bias, mode, threads)
    rows = x.reshape(-1, x.shape[-1])
    return _core.linear(rows, q, bias, mode, threads).reshape(*x.shape[:-1], q.out_features)
