"""Custom operators of torch: hqq_cpp::linear, its gradient, and what else reads packed weights.

torch.compile, torch.export, tracers and modes see each as one node with known shapes; autograd keeps
only the packed weight and dequantizes it again on the way back.
"""

from __future__ import annotations

import torch

from . import backend, cpu
from .dequantize import Layout, Weight
from .transforms import Linearity, register_batching, register_derivatives, register_flops
from .watched import is_ordinary, is_watched, sees_operators

_LIBRARY = torch.library.Library("hqq_cpp", "DEF")
_WEIGHT = (
    "Tensor W_q, Tensor scale, Tensor zero, Tensor? scale_step, Tensor? scale_offset, "
    "Tensor? zero_step, Tensor? zero_offset, Tensor? col_scale"
)
_LAYOUT = "float nbits, int group_size, int axis, SymInt out_features, SymInt in_features"
# exact: as set_backend(mode="exact"), unless another mode than "auto" is set.
_LIBRARY.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias, {_LAYOUT}, bool exact=False) -> Tensor")
_LIBRARY.define(f"linear_backward(Tensor grad_y, {_WEIGHT}, {_LAYOUT}) -> Tensor")
_LIBRARY.define(
    f"experts_linear(Tensor x, Tensor counts, {_WEIGHT}, Tensor? bias, {_LAYOUT}, int parts, "
    "bool transposed, bool exact=False) -> Tensor"
)
_LIBRARY.define(
    f"experts_linear_backward(Tensor grad_y, Tensor counts, {_WEIGHT}, {_LAYOUT}, int parts, "
    "bool transposed) -> Tensor"
)
_LIBRARY.define(f"embedding(Tensor ids, {_WEIGHT}, {_LAYOUT}, ScalarType dtype) -> Tensor")
_LIBRARY.define(f"dequantize({_WEIGHT}, {_LAYOUT}, ScalarType dtype) -> Tensor")
_OPS = torch.ops.hqq_cpp
_FIELDS = len(Weight._fields)
_LAYOUT_FIELDS = len(Layout._fields)


def _split(arguments) -> tuple[Weight, Layout, tuple]:
    """The weight, the layout and what follows it; nothing is between them."""
    end = _FIELDS + _LAYOUT_FIELDS
    return Weight(*arguments[:_FIELDS]), Layout(*arguments[_FIELDS:end]), arguments[end:]


def _split_bias(arguments) -> tuple[Weight, Layout, tuple, torch.Tensor | None]:
    """The same, with a bias between weight and layout."""
    bias = arguments[_FIELDS]
    return *_split((*arguments[:_FIELDS], *arguments[_FIELDS + 1 :])), bias


# Linear layers.


def _check_x(x: torch.Tensor, layout: Layout) -> None:
    if x.dim() == 0 or x.shape[-1] != layout.in_features:
        raise ValueError(
            f"[linear] x has the shape {list(x.shape)}; its last dimension must be "
            f"{layout.in_features}"
        )


def _linear(x, *arguments):
    weight, layout, (*exact,), bias = _split_bias(arguments)
    _check_x(x, layout)
    return backend.linear(x, weight, layout, bias, *exact)


def _linear_backward(grad_y, *arguments):
    weight, layout, _ = _split(arguments)
    return backend.linear_backward(grad_y, weight, layout)


_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_backward", _linear_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("hqq_cpp::linear")
def _linear_fake(x, *arguments):
    _, layout, *_ = _split_bias(arguments)
    _check_x(x, layout)
    return x.new_empty(*x.shape[:-1], layout.out_features)


@torch.library.register_fake("hqq_cpp::linear_backward")
def _linear_backward_fake(grad_y, *arguments):
    return grad_y.new_empty(*grad_y.shape[:-1], arguments[-1])


def _linear_exact(v, inputs):
    weight, layout, *_ = _split_bias(inputs[1:])
    return _OPS.linear(v, *weight, None, *layout, True)


register_derivatives(
    _LIBRARY,
    _OPS.linear.default,
    Linearity(
        product=_linear_exact,
        adjoint=lambda grad, inputs: _OPS.linear_backward(
            grad, *inputs[1 : 1 + _FIELDS], *inputs[2 + _FIELDS : -1]
        ),
        bias=1 + _FIELDS,
        bias_product=lambda bias, inputs, shape: bias.expand(shape).clone(),
        bias_adjoint=lambda grad, inputs, shape: grad.reshape(-1, grad.shape[-1]).sum(0),
    ),
)
register_derivatives(
    _LIBRARY,
    _OPS.linear_backward.default,
    Linearity(
        product=lambda v, inputs: _OPS.linear_backward(v, *inputs[1:]),
        adjoint=lambda grad, inputs: _OPS.linear(
            grad, *inputs[1 : 1 + _FIELDS], None, *inputs[1 + _FIELDS :], True
        ),
    ),
)


def _autocast(x: torch.Tensor) -> torch.Tensor:
    device = x.device.type
    if device != "meta" and x.is_floating_point() and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _check_kind(x: torch.Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"[linear] x is {x.dtype}; it must be a floating dtype")
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else str(x.layout)
        raise ValueError(f"[linear] x is {kind}; a quantized layer takes dense tensors")


def linear(
    x: torch.Tensor, weight: Weight, layout: Layout, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [..., in_features] W_r^T + bias in the dtype of x, with gradients for x and bias."""
    if not isinstance(x, torch.Tensor):
        # What torch.fx traces with.
        return _OPS.linear(x, *weight, bias, *layout)
    _check_kind(x)
    x = _autocast(x)
    native = backend.uses_native(weight, x)
    if torch.compiler.is_compiling() and not native:
        wants_grad = torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad)
        )
        # Compiled code without native kernels and gradients is left to the compiler, which fuses
        # it.
        if not wants_grad and not cpu.is_tiled(weight):
            _check_x(x, layout)
            return backend.linear(x, weight, layout, bias)
    return _OPS.linear(x, *weight, bias, *layout)


# Fused experts.


def _check_rows(x: torch.Tensor, layout: Layout, transposed: bool) -> None:
    features = layout.out_features if transposed else layout.in_features
    if x.dim() != 2 or x.shape[1] != features:
        raise ValueError(
            f"[experts] x has the shape {list(x.shape)}; it must be [rows, {features}]"
        )


def _experts_linear(x, counts, *arguments):
    weight, layout, (parts, transposed, *exact), bias = _split_bias(arguments)
    _check_rows(x, layout, transposed)
    return backend.experts_linear(x, counts, weight, layout, parts, transposed, bias, *exact)


def _experts_linear_backward(grad_y, counts, *arguments):
    weight, layout, (parts, transposed) = _split(arguments)
    return backend.experts_linear_backward(grad_y, counts, weight, layout, parts, transposed)


_LIBRARY.impl("experts_linear", _experts_linear, "CompositeExplicitAutograd")
_LIBRARY.impl("experts_linear_backward", _experts_linear_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("hqq_cpp::experts_linear")
def _experts_linear_fake(x, counts, *arguments):
    _, layout, (_, transposed, *_), _ = _split_bias(arguments)
    _check_rows(x, layout, transposed)
    return x.new_empty(x.shape[0], layout.in_features if transposed else layout.out_features)


@torch.library.register_fake("hqq_cpp::experts_linear_backward")
def _experts_linear_backward_fake(grad_y, counts, *arguments):
    _, layout, (_, transposed) = _split(arguments)
    return grad_y.new_empty(
        grad_y.shape[0], layout.out_features if transposed else layout.in_features
    )


def _experts_exact(v, inputs):
    weight, layout, (parts, transposed, _), _ = _split_bias(inputs[2:])
    return _OPS.experts_linear(v, inputs[1], *weight, None, *layout, parts, transposed, True)


def _experts_adjoint(grad, inputs):
    weight, layout, (parts, transposed, _), _ = _split_bias(inputs[2:])
    return _OPS.experts_linear_backward(grad, inputs[1], *weight, *layout, parts, transposed)


def _owners(counts: torch.Tensor) -> torch.Tensor:
    """The expert of every row."""
    return torch.arange(counts.shape[0], device=counts.device).repeat_interleave(counts)


def _experts_bias_product(bias, inputs, shape):
    rows = bias[_owners(inputs[1])]
    return torch.cat([rows, rows.new_zeros(shape[0] - rows.shape[0], shape[1])])


def _experts_bias_adjoint(grad, inputs, shape):
    experts = _owners(inputs[1])
    return grad.new_zeros(shape).index_add(0, experts, grad[: experts.shape[0]])


register_derivatives(
    _LIBRARY,
    _OPS.experts_linear.default,
    Linearity(
        product=_experts_exact,
        adjoint=_experts_adjoint,
        bias=2 + _FIELDS,
        bias_product=_experts_bias_product,
        bias_adjoint=_experts_bias_adjoint,
    ),
)
register_derivatives(
    _LIBRARY,
    _OPS.experts_linear_backward.default,
    Linearity(
        product=lambda v, inputs: _OPS.experts_linear_backward(v, *inputs[1:]),
        adjoint=lambda grad, inputs: _OPS.experts_linear(
            grad, *inputs[1 : 2 + _FIELDS], None, *inputs[2 + _FIELDS :], True
        ),
    ),
)


def experts_linear(
    x: torch.Tensor,
    counts: torch.Tensor,
    weight: Weight,
    layout: Layout,
    parts: int,
    transposed: bool,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """See HqqExperts.forward()."""
    _check_kind(x)
    x = _autocast(x)
    return _OPS.experts_linear(x, counts, *weight, bias, *layout, parts, transposed)


# Rows of a table, and whole weights.


def _embedding(ids, *arguments):
    weight, layout, (dtype,) = _split(arguments)
    return backend.embedding(ids, weight, layout, dtype)


def _dequantize(*arguments):
    weight, layout, (dtype,) = _split(arguments)
    return backend.dequantize(weight, layout, dtype)


_LIBRARY.impl("embedding", _embedding, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")


@torch.library.register_fake("hqq_cpp::embedding")
def _embedding_fake(ids, *arguments):
    *_, in_features, dtype = arguments
    return ids.new_empty(*ids.shape, in_features, dtype=dtype)


@torch.library.register_fake("hqq_cpp::dequantize")
def _dequantize_fake(W_q, *arguments):
    *_, out_features, in_features, dtype = arguments
    return W_q.new_empty(out_features, in_features, dtype=dtype)


def embedding(
    ids: torch.Tensor, weight: Weight, layout: Layout, dtype: torch.dtype
) -> torch.Tensor:
    """The rows `ids` of W_r, [..., in_features] of dtype; no gradients."""
    if isinstance(ids, torch.Tensor) and ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"[embedding] ids are {ids.dtype}; they must be torch.int32 or int64")
    if torch.compiler.is_compiling():
        if backend.embeds_native(ids, weight, dtype):
            return _OPS.embedding(ids, *weight, *layout, dtype)
    elif is_watched() or not is_ordinary(ids):
        return _OPS.embedding(ids, *weight, *layout, dtype)
    return backend.embedding(ids, weight, layout, dtype)


def dequantize(weight: Weight, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """W_r [out_features, in_features] of dtype."""
    if torch.compiler.is_compiling():
        seen = cpu.is_tiled(weight) or backend.dequantizes_native(weight, dtype)
    else:
        seen = sees_operators()
    if seen:
        return _OPS.dequantize(*weight, *layout, dtype)
    return backend.dequantize(weight, layout, dtype)


for _name, _leading in {
    "linear": True,
    "linear_backward": True,
    "experts_linear": False,
    "experts_linear_backward": False,
    "embedding": True,
    "dequantize": False,
}.items():
    register_batching(getattr(_OPS, _name).default, _leading)

    if "linear" in _name:
        register_flops(getattr(_OPS, _name))
