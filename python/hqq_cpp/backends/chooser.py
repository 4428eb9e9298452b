"""Which backend runs a call: every question is asked here, once."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from ..config import importance_of
from ..format import PackedWeight, Packing
from . import common, cpu, cuda
from . import torch as torch_backend
from .common import Kernel, Mode, Solved

_SETTINGS = ("auto", "torch", "native")
_setting = "auto"
_mode: Mode = "auto"

# What the kernels read and write.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Backend(Protocol):
    """What a backend does with a PackedWeight in any packing, on a device that it works on."""

    def is_available(self) -> bool:
        """Whether it can run on this machine."""

    def packing_for(self, weight: PackedWeight) -> Packing:
        """The order of codes that is read fastest."""

    def quantize(
        self, W: torch.Tensor, config: Any, name: str, importance: Any, threads: int
    ) -> Solved:
        """Quantizes W [out, in]; arguments as quantize() of this module, all given."""

    def dequantize(self, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
        """W_r [out_features, in_features] of dtype."""

    def rows(self, weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows `ids` [...] of W_r, [..., in_features] of dtype."""

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, mode: Mode
    ) -> torch.Tensor:
        """x [..., in_features] W_r^T + bias, [..., out_features] in the dtype of x."""

    def experts_linear(
        self,
        x: torch.Tensor,
        counts: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        transposed: bool,
        mode: Mode,
    ) -> torch.Tensor:
        """Every row of x [rows, in] times the matrix of its expert; see experts_linear()."""

    def kernel(self, weight: PackedWeight, rows: int, dtype: torch.dtype, mode: Mode) -> Kernel:
        """What linear() and experts_linear() do with so many rows of x (of one expert, on average)."""


class Choice(NamedTuple):
    """Who computes, and why nobody faster does."""

    name: str
    backend: Backend
    reason: str  # empty: this is the fastest there is


# ---- Settings ----------------------------------------------------------------------------------


def set_backend(name: str, *, mode: str | None = None) -> None:
    """Selects the code that runs quantized layers of torch, for the whole process.

    Args:
        name: 'torch': plain torch operations on any device. 'native': the C++ kernels in CPU memory
            and the CUDA kernels on a GPU; a layer that is elsewhere, or on a GPU without
            libhqq_cuda, is an error. 'auto' (the default): native where it can be, else torch.
        mode: How the C++ kernels multiply, see hqq_cpp.linear(): 'fast', 'exact' or 'auto'. With
            'auto' (the default) a forward pass that autograd records is exact. None: as it is.

    Raises:
        ValueError: For another name.

    Example:
        >>> hqq_cpp.set_backend("torch")
        >>> hqq_cpp.get_backend()
        'torch'
        >>> hqq_cpp.set_backend("auto", mode="auto")
    """
    global _setting, _mode
    if name not in _SETTINGS:
        raise ValueError(f"[backend] '{name}' is no backend; there are {', '.join(_SETTINGS)}")
    if mode is not None:
        cpu.check_mode(mode)
        _mode = mode  # type: ignore[assignment]  # checked
    _setting = name


def get_backend() -> str:
    """The backend that set_backend() selected.

    Args: none.

    Raises: nothing.

    Example:
        >>> hqq_cpp.get_backend()
        'auto'
    """
    return _setting


# ---- The choice --------------------------------------------------------------------------------


# Type of a device -> the backend that has kernels for it. Every call of a layer chooses: nothing is made.
_KERNELS: dict[str, Choice] = {
    "cpu": Choice("cpu", cpu, ""),
    "cuda": Choice("cuda", cuda, ""),
}
_TORCH = Choice("torch", torch_backend, "set_backend('torch') was called")


def _kernels_for(tensor: torch.Tensor) -> Choice | None:
    # Asking a device for its type takes longer than all other questions.
    found = _KERNELS.get("cpu" if tensor.is_cpu else tensor.device.type)
    return found if found is not None and found.backend.is_available() else None


def kernels_for(tensor: torch.Tensor) -> Backend | None:
    """The backend with kernels for the device of a tensor; None: there is none."""
    found = _kernels_for(tensor)
    return None if found is None else found.backend


def choose(weight: PackedWeight, dtype: torch.dtype, device: torch.device | None = None) -> Choice:
    """The backend for one call.

    Args:
        weight: The weight.
        dtype: Of the result.
        device: Of x or of the ids; None: there are none.

    Raises:
        ValueError: If kernels were asked for (set_backend("native")) and none can do it.
    """
    if _setting == "torch":
        return _TORCH
    found, home = _kernels_for(weight.tensors.W_q), weight.tensors.W_q.device
    if found is None:
        reason = "there are no kernels for the device of the weight"
    elif device is not None and device != home:
        reason = "x and the weight are on different devices"
    elif dtype not in DTYPES:
        reason = "no kernel takes this dtype"
    else:
        return found
    if _setting == "native":
        raise ValueError(
            "[backend] the native kernels take float32, bfloat16, float16 or float64 in CPU memory, "
            "or on a GPU that libhqq_cuda can use ('hqq-cpp doctor' says more); the layer is on "
            f"{home}, x is {dtype} on {home if device is None else device}: use set_backend('auto')"
        )
    return Choice("torch", torch_backend, reason)


def mode_of(x: torch.Tensor, exact: bool = False) -> Mode:
    """How the C++ kernels multiply x; `exact`: a derivative is asked for."""
    # The gradient that autograd records is that of the exact product.
    return "exact" if _mode == "auto" and (exact or x.requires_grad) else _mode


def packing_for(weight: PackedWeight) -> Packing:
    """The order of codes in which a weight is read fastest where it is."""
    found = _TORCH if _setting == "torch" else _kernels_for(weight.tensors.W_q)
    return weight.packing if found is None else found.backend.packing_for(weight)


# ---- The five functions ------------------------------------------------------------------------


def quantize(
    W: torch.Tensor, config: Any, name: str = "", importance: Any = None, threads: int = 0
) -> Solved:
    """hqq_cpp.quantize() for torch: on a GPU that libhqq_cuda can use the tensors stay there, else they
    are in CPU memory. The bits are the same.

    Args:
        W: [out_features, in_features], on any device.
        config: A LayerConfig, an HqqConfig, a dict, or None.
        name: Name of the layer; empty: the settings that hold without rules.
        importance: See hqq_cpp.quantize().
        threads: CPU threads.

    Raises:
        ValueError: As hqq_cpp.quantize().
    """
    if importance is None:
        importance = importance_of(config, name)
    W = W.detach()
    # The CPU's solver says what is wrong with other tensors.
    is_matrix = W.dim() == 2 and W.dtype in DTYPES
    backend = (kernels_for(W) if is_matrix else None) or torch_backend
    return backend.quantize(W, config, name, importance, threads)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """W_r [out_features, in_features] of dtype, on the device of the weight."""
    return choose(weight, dtype).backend.dequantize(weight, dtype)


def rows(weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows `ids` [...] of W_r, [..., in_features] of dtype.

    Raises:
        IndexError: If there is no such row; of ids on a GPU, torch says so later.
    """
    return choose(weight, dtype, ids.device).backend.rows(weight, ids, dtype)


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, exact: bool = False
) -> torch.Tensor:
    """x [..., in_features] W_r^T + bias, in the dtype of x.

    Args:
        x: [..., in_features].
        weight: A matrix.
        bias: [out_features], or None.
        exact: A derivative is asked for, so that mode "auto" is exact.
    """
    backend = choose(weight, x.dtype, x.device).backend
    return backend.linear(x, weight, bias, mode_of(x, exact))


def experts_linear(
    x: torch.Tensor,
    counts: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    transposed: bool,
    exact: bool = False,
) -> torch.Tensor:
    """Every row of x times the matrix of its expert.

    Args:
        x: [rows, in], sorted by expert.
        counts: int64 [experts]: rows each expert has; rows after them get zeros.
        weight: A stack.
        bias: [experts, out], or None.
        transposed: The matrices are stored [in, out].
        exact: See linear().
    """
    backend = choose(weight, x.dtype, x.device).backend
    return backend.experts_linear(x, counts, weight, bias, transposed, mode_of(x, exact))


# ---- Gradients ---------------------------------------------------------------------------------


def linear_backward(grad_y: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """The gradient of x: grad_y [..., out_features] W_r."""
    return grad_y @ dequantize(weight, grad_y.dtype)


def experts_linear_backward(
    grad_y: torch.Tensor, counts: torch.Tensor, weight: PackedWeight, transposed: bool
) -> torch.Tensor:
    """The gradient of x of experts_linear()."""
    layout = weight.layout
    features = layout.out_features if transposed else layout.in_features
    grad_x = grad_y.new_zeros(grad_y.shape[0], features)
    for expert, some in common.expert_rows(counts):
        W_r = common.dequantize_expert(weight, expert, grad_y.dtype, dequantize)
        grad_x[some] = grad_y[some] @ (W_r.t() if transposed else W_r)
    return grad_x
