"""Which code runs a quantized layer: the one place where torch meets the kernels.

Two backends: "native", the C++ kernels for tensors in CPU memory and those of libhqq_cuda (cuda.py,
fused.py) for tensors on a GPU, and "torch", plain torch operations, on any device. "auto" takes native
where it can.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from .. import _core
from . import cuda
from . import fused as fused_kernels
from .dequantize import Layout, Weight, config_of, stored_of, weight_of
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
        _mode_code(mode)
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


def is_tiled(weight: Weight) -> bool:
    """Whether the tensors of a matrix are those of a TiledTensor: its codes have three dimensions."""
    return weight.W_q.dim() == 3


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


def tile(weight: Weight, layout: Layout) -> Weight:
    """The matrix in the order of the C++ kernels."""
    return weight_of(_matrix(_core.QuantizedTensor, weight, layout).tile(_threads()))


def untile(weight: Weight, layout: Layout) -> Weight:
    """Format 1 again, bit for bit, on the device of the weight."""
    device = weight.W_q.device
    weight = Weight(*(t if t is None else t.detach().cpu() for t in weight))
    plain = weight_of(_matrix(_core.TiledTensor, weight, layout).untile(_threads()))
    return Weight(*(t if t is None else t.to(device) for t in plain))


def _untiled_on_gpu(weight: Weight, layout: Layout) -> Weight:
    """The matrix in the order that the CUDA kernels read. Tiled tensors come to a GPU where something
    moves the parameters of a module, and not the module."""
    return untile(weight, layout) if is_tiled(weight) else weight


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
        weight = untile(weight, layout) if is_tiled(weight) else weight
        return torch_dequantize(weight, layout, dtype)
    weight = _contiguous(weight)
    out = torch.empty(layout.out_features, layout.in_features, dtype=dtype, device="cpu")
    native_layer(weight, layout).dequantize(
        _addresses(weight), out.data_ptr(), _dtype_code(dtype), _threads()
    )
    return out


def embedding(
    ids: torch.Tensor, weight: Weight, layout: Layout, dtype: torch.dtype
) -> torch.Tensor:
    """The rows `ids` [...] of W_r, [..., in_features] of dtype."""
    native = embeds_native(ids, weight, dtype)
    if native and cuda.is_native(weight.W_q):
        return cuda.embedding(ids, _untiled_on_gpu(weight, layout), layout, dtype)
    if native:
        _check_ids(ids, layout)
        weight, rows = _contiguous(weight), ids.to(torch.int64).contiguous()
        out = torch.empty(*ids.shape, layout.in_features, dtype=dtype, device="cpu")
        native_layer(weight, layout).dequantize_rows(
            _addresses(weight), rows.data_ptr(), rows.numel(), out.data_ptr(), _dtype_code(dtype)
        )
        return out
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_ids(ids, layout)
    weight = untile(weight, layout) if is_tiled(weight) else weight
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
        weight = _contiguous(weight)
        return native_linear(native_layer(weight, layout), x, weight, layout, bias, exact)
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
            _native_experts(x, counts.tolist(), weight, layout, parts, y, exact)
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


def native_layer(weight: Weight, layout: Layout) -> _core.NativeLayer:
    """What the kernels need to know of a matrix beside the addresses of its tensors."""
    return _make_native_layer(layout, *stored_of(weight), is_tiled(weight))


def native_linear(
    native: _core.NativeLayer,
    x: torch.Tensor,
    weight: Weight,
    layout: Layout,
    bias: torch.Tensor | None,
    exact: bool = False,
) -> torch.Tensor:
    """linear() by the C++ kernels, for contiguous tensors in CPU memory. `native`: native_layer()."""
    in_features = layout.in_features
    rows = x if x.dim() == 2 else x.reshape(-1, in_features)
    count, stride = rows.shape[0], rows.stride(0)
    if rows.stride(1) != 1 or stride < in_features:
        rows = rows.contiguous()
        stride = in_features
    y = x.new_empty(x.shape[:-1] + (layout.out_features,))
    bias_address = 0
    if bias is not None:
        bias = bias.float().contiguous()
        bias_address = bias.data_ptr()
    native.linear(
        _addresses(weight), rows.data_ptr(), count, stride, _dtype_code(x.dtype), bias_address,
        y.data_ptr(), _mode_code_for(x, exact), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _native_experts(
    x: torch.Tensor,
    counts: list[int],
    weight: Weight,
    layout: Layout,
    parts: int,
    y: torch.Tensor,
    exact: bool,
) -> None:
    """experts_linear() into y by the C++ kernels, all experts at once, for tiled weights."""
    if min(counts, default=0) < 0 or sum(counts) > x.shape[0]:
        raise ValueError(
            f"[experts] the counts {counts} add up to {sum(counts)} rows; they must be >= 0 and add "
            f"up to at most the {x.shape[0]} rows of x"
        )
    weight = _contiguous(weight)
    x = x if x.stride(1) == 1 and x.stride(0) >= layout.in_features else x.contiguous()
    matrices = weight.W_q.shape[0] * parts
    steps = [0 if t is None else t.nbytes // matrices for t in weight]
    piece = layout._replace(out_features=layout.out_features // parts)
    native = _make_native_layer(piece, *stored_of(weight), True)
    native.experts_linear(
        _addresses(weight), steps, parts, counts, x.data_ptr(), x.stride(0), _dtype_code(x.dtype),
        y.data_ptr(), _mode_code_for(x, exact), _threads(),
    )  # fmt: skip


def _threads() -> int:
    # torch's setting, so that torch.set_num_threads() and data loaders' workers are respected.
    return torch.get_num_threads()


def _contiguous(weight: Weight) -> Weight:
    if all(t is None or t.is_contiguous() for t in weight):
        return weight
    return Weight(*(t if t is None else t.contiguous() for t in weight))


def _addresses(weight: Weight) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in weight]


def _matrix(kind: type, weight: Weight, layout: Layout) -> Any:
    """The tensors as a QuantizedTensor or TiledTensor that shares their memory."""
    tensors = {k: v.detach() for k, v in weight._asdict().items() if v is not None}
    shape = (layout.out_features, layout.in_features)
    return kind.from_tensors(tensors, config_of(layout, *stored_of(weight)), shape)


@functools.lru_cache(maxsize=1024)
def _make_native_layer(
    layout: Layout,
    meta: torch.dtype,
    quant_scale: bool,
    quant_zero: bool,
    balanced: bool,
    tiled: bool,
) -> _core.NativeLayer:
    config = config_of(layout, meta, quant_scale, quant_zero, balanced)
    return _core.NativeLayer(config, layout.out_features, layout.in_features, tiled)


@functools.cache
def _dtype_code(dtype: torch.dtype) -> int:
    return _core.dtype_code(dtype)


@functools.cache
def _mode_code(mode: str) -> int:
    return _core.linear_mode_code(mode)


def _mode_code_for(x: torch.Tensor, exact: bool) -> int:
    # The gradient that autograd records is that of the exact product.
    return _mode_code("exact" if _mode == "auto" and (exact or x.requires_grad) else _mode)
