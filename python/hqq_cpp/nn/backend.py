"""Which code runs a quantized layer: the one place where torch meets the kernels.

Two backends: "native", the C++ kernels for tensors in CPU memory and those of libhqq_cuda (cuda.py,
fused.py) for tensors on a GPU, and "torch", plain torch operations, on any device. "auto" takes native
where it can.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch.nn import functional

from . import cpu, cuda
from . import fused as fused_kernels
from .dequantize import Layout, Weight
from .dequantize import dequantize as torch_dequantize
from .dequantize import dequantize_rows as torch_dequantize_rows
from .watched import is_ordinary

_BACKENDS = ("auto", "torch", "native")
_backend = "auto"
_mode = "auto"

_FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def set_backend(name: str, *, mode: str | None = None, fused: bool | None = None) -> None:
    """Selects the code that runs quantized layers of torch, for the whole process.

    Args:
        name: 'torch': plain torch operations on any device. 'native': the C++ kernels in CPU memory
            and the CUDA kernels on a GPU; a layer that is elsewhere, or on a GPU without
            libhqq_cuda, is an error. 'auto' (the default): native where it can be, else torch.
        mode: How the C++ kernels multiply, see hqq_cpp.linear(): 'fast', 'exact' or 'auto'. With
            'auto' (the default) a forward pass that autograd records is exact. None: as it is.
        fused: Whether products on a GPU use fused kernels (the default), which keep a second copy of
            the codes in GPU memory; False drops those copies, but what recorded CUDA graphs read, and
            a product dequantizes the weight first. None: as it is.

    Raises:
        ValueError: For another name.

    Example:
        >>> hqq_cpp.set_backend("torch")
        >>> hqq_cpp.get_backend()
        'torch'
        >>> hqq_cpp.set_backend("auto", mode="auto")
    """
    global _backend, _mode
    if name not in _BACKENDS:
        raise ValueError(f"[backend] '{name}' is no backend; there are {', '.join(_BACKENDS)}")
    if mode is not None:
        cpu.mode_code(mode)
        _mode = mode
    if fused is not None:
        fused_kernels.use(fused)
    _backend = name


def get_backend() -> str:
    """The backend that set_backend() selected.

    Args: none.

    Raises: nothing.

    Example:
        >>> hqq_cpp.get_backend()
        'auto'
    """
    return _backend


def uses_native(weight: Weight, x: torch.Tensor) -> bool:
    """Whether the C++ kernels run this layer.

    Raises:
        ValueError: If they were asked for and cannot.
    """
    if _backend == "torch":
        return False
    possible = (
        x.dtype in _NATIVE_DTYPES
        and x.device == weight.W_q.device
        and (_on_cpu(weight.W_q) or cuda.is_native(weight.W_q))
    )
    if _backend == "native" and not possible:
        raise ValueError(
            "[backend] the native kernels take float32, bfloat16, float16 or float64 in CPU memory, "
            "or on a GPU that libhqq_cuda can use ('hqq-cpp doctor' says more); the layer is on "
            f"{weight.W_q.device}, x is {x.dtype} on {x.device}: use set_backend('auto')"
        )
    return possible


def _on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and not cuda.is_native(tensor)


def tiles() -> bool:
    """Whether a layer that runs now should be tiled: not while a compiler looks at it."""
    return _backend != "torch" and not torch.compiler.is_compiling()


def is_plain(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether nothing but the product itself is asked of a layer in CPU memory: no gradient, no
    autocast, no other backend. What torch has to see is asked before (watched.is_watched)."""
    return (
        _backend != "torch"
        and is_ordinary(x)
        and x.is_cpu
        and x.dtype in _FAST_DTYPES
        and not (
            torch.is_grad_enabled()
            and (x.requires_grad or (bias is not None and bias.requires_grad))
        )
        and not torch.is_autocast_enabled("cpu")
    )


def is_plain_on_gpu(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> bool:
    """The same of a layer whose tensors are on a GPU."""
    if _backend == "torch" or not is_ordinary(x) or x.device != weight.W_q.device:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return not torch.is_autocast_enabled(x.device.type)


def can_tile(weight: Weight, layout: Layout) -> bool:
    """Whether the C++ kernels have tiles for this matrix; it must not be tiled."""
    if not _on_cpu(weight.W_q):
        return False
    group = layout.group_size or layout.out_features
    return layout.axis == 1 or (group % 16 == 0 and layout.out_features % group == 0)


def _untiled_on_gpu(weight: Weight, layout: Layout) -> Weight:
    """The matrix in the order that the CUDA kernels read. Tiled tensors come to a GPU where something
    moves the parameters of a module, and not the module."""
    return cpu.untile(weight, layout) if cpu.is_tiled(weight) else weight


def dequantizes_native(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether dequantize() calls kernels, and not torch's operations."""
    there = weight.W_q.device.type == "cpu" or cuda.is_native(weight.W_q)
    return _backend != "torch" and dtype in _NATIVE_DTYPES and there


def dequantize(weight: Weight, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """W_r [out_features, in_features] of dtype, on the device of the weight."""
    native = dequantizes_native(weight, dtype)
    if native and cuda.is_native(weight.W_q):
        return cuda.dequantize(_untiled_on_gpu(weight, layout), layout, dtype)
    if not native:
        weight = cpu.untile(weight, layout) if cpu.is_tiled(weight) else weight
        return torch_dequantize(weight, layout, dtype)
    return cpu.dequantize(weight, layout, dtype)


def embedding(
    ids: torch.Tensor, weight: Weight, layout: Layout, dtype: torch.dtype
) -> torch.Tensor:
    """The rows `ids` [...] of W_r, [..., in_features] of dtype."""
    native = embeds_native(ids, weight, dtype)
    if native and cuda.is_native(weight.W_q):
        return cuda.embedding(ids, _untiled_on_gpu(weight, layout), layout, dtype)
    if native:
        _check_ids(ids, layout)
        return cpu.embedding(ids, weight, layout, dtype)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_ids(ids, layout)
    weight = cpu.untile(weight, layout) if cpu.is_tiled(weight) else weight
    rows = torch_dequantize_rows(weight, layout, ids.reshape(-1).to(torch.int64), dtype)
    return rows.reshape(*ids.shape, layout.in_features)


def embeds_native(ids: torch.Tensor, weight: Weight, dtype: torch.dtype) -> bool:
    """Whether the C++ kernels look up these rows.

    Raises:
        ValueError: If they were asked for and cannot.
    """
    together = weight.W_q.device == ids.device and (
        _on_cpu(weight.W_q) or cuda.is_native(weight.W_q)
    )
    possible = together and dtype in _NATIVE_DTYPES
    if _backend == "native" and not possible:
        raise ValueError(
            f"[backend] the native kernels look up rows in CPU memory, or on a GPU that libhqq_cuda "
            f"can use; the embedding is on {weight.W_q.device}, the ids on {ids.device}: use "
            f"set_backend('auto')"
        )
    return possible and _backend != "torch"


def _check_ids(ids: torch.Tensor, layout: Layout) -> None:
    if ids.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= layout.out_features:
        raise IndexError(
            f"[embedding] index {low if low < 0 else high} is out of range; there are "
            f"{layout.out_features} rows, 0 to {layout.out_features - 1}"
        )


def linear(
    x: torch.Tensor,
    weight: Weight,
    layout: Layout,
    bias: torch.Tensor | None,
    exact: bool = False,
) -> torch.Tensor:
    """x [..., in_features] W_r^T + bias, in the dtype of x. `exact`: a derivative is asked for, so
    that mode "auto" is exact."""
    native = uses_native(weight, x)
    if native and cuda.is_native(weight.W_q):
        weight = _untiled_on_gpu(weight, layout)
        y = fused_kernels.linear(x, weight, layout, bias)
        if y is not None:
            return y
    # The kernels sum in float32.
    elif native and x.dtype != torch.float64:
        weight, mode = cpu.contiguous(weight), mode_code(x, exact)
        return cpu.linear(cpu.layer_of(weight, layout), x, weight, layout, bias, mode)
    return _dense_linear(x, weight, layout, bias)


def _dense_linear(
    x: torch.Tensor, weight: Weight, layout: Layout, bias: torch.Tensor | None
) -> torch.Tensor:
    W_r = dequantize(weight, layout, x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if torch.compiler.is_compiling():
        return functional.linear(x, W_r, bias)
    # Not functional.linear, whose result for three dimensions is a view: autograd forbids changing
    # that in place when it comes out of a custom operator.
    y = x.new_empty(*x.shape[:-1], layout.out_features)
    rows, out = x.reshape(-1, layout.in_features), y.view(-1, layout.out_features)
    if bias is None:
        torch.mm(rows, W_r.t(), out=out)
    else:
        torch.addmm(bias, rows, W_r.t(), out=out)
    return y


def linear_backward(grad_y: torch.Tensor, weight: Weight, layout: Layout) -> torch.Tensor:
    """The gradient of x: grad_y [..., out_features] W_r."""
    return grad_y @ dequantize(weight, layout, grad_y.dtype)


def expert_pieces(
    weight: Weight, layout: Layout, parts: int, expert: int
) -> list[tuple[Weight, Layout]]:
    """One expert's matrix in the parts that were quantized one by one.

    Args:
        weight: Tensors with a leading dimension [experts].
        layout: Of the whole matrix of one expert.
        parts: Equal parts of its rows; their tensors follow each other, col_scale is stacked.
    """
    matrix = Weight(*(t if t is None else t[expert] for t in weight))
    if parts == 1:
        return [(matrix, layout)]
    layout = layout._replace(out_features=layout.out_features // parts)
    pieces = []
    for p in range(parts):
        piece = Weight(*(t if t is None else t.chunk(parts)[p] for t in matrix))
        if matrix.col_scale is not None:
            piece = piece._replace(col_scale=matrix.col_scale[p])
        pieces.append((piece, layout))
    return pieces


def experts_dequantize(
    weight: Weight, layout: Layout, parts: int, expert: int, dtype: torch.dtype
) -> torch.Tensor:
    """W_r of one expert as stored, [out_features, in_features]."""
    dense = [dequantize(*piece, dtype) for piece in expert_pieces(weight, layout, parts, expert)]
    return dense[0] if len(dense) == 1 else torch.cat(dense)


def expert_rows(counts: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of a matrix sorted by expert, for the experts that have any."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count > 0:
            yield expert, slice(start, start + count)
        start += count


def experts_linear(
    x: torch.Tensor,
    counts: torch.Tensor,
    weight: Weight,
    layout: Layout,
    parts: int,
    transposed: bool,
    bias: torch.Tensor | None,
    exact: bool = False,
) -> torch.Tensor:
    """Every row of x times the matrix of its expert.

    Args:
        x: [rows, in], sorted by expert.
        counts: int64 [experts]: rows each expert has; rows after them get zeros.
        transposed: The matrices are stored [in, out].
        bias: [experts, out], or None.
        exact: See linear().
    """
    features = layout.in_features if transposed else layout.out_features
    is_tiled_stack = weight.W_q.dim() == 4
    on_gpu = cuda.is_native(weight.W_q)
    # Tiled experts that are on a GPU all the same are untiled one by one.
    if on_gpu and not transposed and not is_tiled_stack and uses_native(weight, x):
        grouped = fused_kernels.experts_linear(x, counts, weight, layout, parts, bias)
        if grouped is not None:
            return grouped
    y = x.new_zeros(x.shape[0], features)
    if is_tiled_stack and not on_gpu and not transposed and x.dtype in _FAST_DTYPES:
        if uses_native(weight, x):
            mode = mode_code(x, exact)
            cpu.experts_linear(x, counts.tolist(), weight, layout, parts, y, mode)
            if bias is not None:
                experts = torch.arange(len(bias), device="cpu").repeat_interleave(counts)
                y[: experts.numel()] += bias[experts].to(y.dtype)
            return y
    # A fused kernel for a single expert would keep a copy of its own.
    multiply = _dense_linear if on_gpu else functools.partial(linear, exact=exact)
    for expert, rows in expert_rows(counts):
        if transposed:
            y[rows] = x[rows] @ experts_dequantize(weight, layout, parts, expert, x.dtype)
        else:
            pieces = expert_pieces(weight, layout, parts, expert)
            done = [multiply(x[rows], *piece, None) for piece in pieces]
            y[rows] = done[0] if len(done) == 1 else torch.cat(done, -1)
        if bias is not None:
            y[rows] += bias[expert].to(y.dtype)
    return y


def experts_linear_backward(
    grad_y: torch.Tensor,
    counts: torch.Tensor,
    weight: Weight,
    layout: Layout,
    parts: int,
    transposed: bool,
) -> torch.Tensor:
    """The gradient of x of experts_linear."""
    features = layout.out_features if transposed else layout.in_features
    grad_x = grad_y.new_zeros(grad_y.shape[0], features)
    for expert, rows in expert_rows(counts):
        W_r = experts_dequantize(weight, layout, parts, expert, grad_y.dtype)
        grad_x[rows] = grad_y[rows] @ (W_r.t() if transposed else W_r)
    return grad_x


def mode_code(x: torch.Tensor, exact: bool = False) -> int:
    """How the C++ kernels multiply x; `exact`: see linear()."""
    # The gradient that autograd records is that of the exact product.
    return cpu.mode_code("exact" if _mode == "auto" and (exact or x.requires_grad) else _mode)
