"""Custom operators of torch: hqq_cpp::linear, its gradient, and what else reads packed weights.

torch.compile, torch.export, tracers and modes see each as one node with known shapes; autograd keeps
only the packed weight and dequantizes it again on the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import backends
from ..format import FORMAT_1, Numbers, PackedWeight, Tensors, weight_of_numbers
from .transforms import Linearity, register_batching, register_derivatives, register_flops
from .watched import is_direct, is_ordinary, is_watched, sees_operators, wants_gradient

_LIBRARY = torch.library.Library("hqq_cpp", "DEF")
_WEIGHT = (
    "Tensor W_q, Tensor scale, Tensor zero, Tensor? scale_step, Tensor? scale_offset, "
    "Tensor? zero_step, Tensor? zero_offset, Tensor? col_scale"
)
_NUMBERS = "float nbits, int group_size, int axis, SymInt out_features, SymInt in_features"
# exact: as set_backend(mode="exact"), unless another mode than "auto" is set.
_LIBRARY.define(
    f"linear(Tensor x, {_WEIGHT}, Tensor? bias, {_NUMBERS}, bool exact=False) -> Tensor"
)
_LIBRARY.define(f"linear_backward(Tensor grad_y, {_WEIGHT}, {_NUMBERS}) -> Tensor")
_LIBRARY.define(
    f"experts_linear(Tensor x, Tensor counts, {_WEIGHT}, Tensor? bias, {_NUMBERS}, int parts, "
    "bool transposed, bool exact=False) -> Tensor"
)
_LIBRARY.define(
    f"experts_linear_backward(Tensor grad_y, Tensor counts, {_WEIGHT}, {_NUMBERS}, int parts, "
    "bool transposed) -> Tensor"
)
_LIBRARY.define(f"embedding(Tensor ids, {_WEIGHT}, {_NUMBERS}, ScalarType dtype) -> Tensor")
_LIBRARY.define(f"dequantize({_WEIGHT}, {_NUMBERS}, ScalarType dtype) -> Tensor")
_OPS = torch.ops.hqq_cpp
_FIELDS = len(Tensors._fields)


def _split(arguments: Sequence[Any]) -> tuple[Tensors, Numbers, Sequence[Any]]:
    """The tensors, the numbers and what follows them; nothing is between the two."""
    end = _FIELDS + len(Numbers._fields)
    return Tensors(*arguments[:_FIELDS]), Numbers(*arguments[_FIELDS:end]), arguments[end:]


def _split_bias(
    arguments: Sequence[Any],
) -> tuple[Tensors, Numbers, Sequence[Any], torch.Tensor | None]:
    """Splits arguments that have a bias between tensors and numbers."""
    bias = arguments[_FIELDS]
    return *_split((*arguments[:_FIELDS], *arguments[_FIELDS + 1 :])), bias


# Linear layers.


def _check_x(x: torch.Tensor, in_features: int) -> None:
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"[linear] x has the shape {list(x.shape)}; its last dimension must be {in_features}"
        )


def _linear(x, *arguments):
    tensors, numbers, (*exact,), bias = _split_bias(arguments)
    _check_x(x, numbers.in_features)
    return backends.linear(x, weight_of_numbers(tensors, numbers), bias, *exact)


def _linear_backward(grad_y, *arguments):
    tensors, numbers, _ = _split(arguments)
    return backends.linear_backward(grad_y, weight_of_numbers(tensors, numbers))


_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_backward", _linear_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("hqq_cpp::linear")
def _linear_fake(x, *arguments):
    _, numbers, *_ = _split_bias(arguments)
    _check_x(x, numbers.in_features)
    return x.new_empty(*x.shape[:-1], numbers.out_features)


@torch.library.register_fake("hqq_cpp::linear_backward")
def _linear_backward_fake(grad_y, *arguments):
    return grad_y.new_empty(*grad_y.shape[:-1], arguments[-1])


def _linear_exact(v, inputs):
    tensors, numbers, *_ = _split_bias(inputs[1:])
    return _OPS.linear(v, *tensors, None, *numbers, True)


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


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type in which a product of x is computed: its own, or that of autocast."""
    device = x.device.type
    if device != "meta" and x.is_floating_point() and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _check_kind(x: torch.Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"[linear] x is {x.dtype}; it must be a floating dtype")
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else str(x.layout)
        raise ValueError(f"[linear] x is {kind}; a quantized layer takes dense tensors")


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., in_features] W_r^T + bias in the dtype of x, with gradients for x and bias.

    Raises:
        ValueError: If x is not dense, of another type than a floating one, or of another width.
    """
    numbers = weight.layout.numbers
    compiling = torch.compiler.is_compiling()
    # The layers of a small model take less time than the way through torch's dispatcher.
    if not compiling and is_direct(x, bias) and x.is_floating_point():
        _check_x(x, numbers.in_features)
        return backends.linear(x, weight, bias)
    if isinstance(x, torch.Tensor):  # and not what torch.fx traces with
        _check_kind(x)
        x = x.to(compute_dtype(x))
        # Asked before the operator, which computes nothing for tensors on device meta.
        backend = backends.choose(weight, x.dtype, x.device).backend
        if compiling and _is_left_to_compiler(backend, weight) and not wants_gradient(x, bias):
            _check_x(x, numbers.in_features)
            return backends.linear(x, weight, bias)
    return _OPS.linear(x, *weight.tensors, bias, *numbers)


def _is_left_to_compiler(backend: backends.Backend, weight: PackedWeight) -> bool:
    """Whether a call consists of torch operations, which a compiler can fuse with others."""
    return backend is backends.torch and weight.packing == FORMAT_1


# Fused experts.


def _check_rows(x: torch.Tensor, numbers: Numbers, transposed: bool) -> None:
    features = numbers.out_features if transposed else numbers.in_features
    if x.dim() != 2 or x.shape[1] != features:
        raise ValueError(
            f"[experts] x has the shape {list(x.shape)}; it must be [rows, {features}]"
        )


def _stack(tensors: Tensors, numbers: Numbers, parts: int) -> PackedWeight:
    return weight_of_numbers(tensors, numbers, tensors.W_q.shape[0], parts)


def _experts_linear(x, counts, *arguments):
    tensors, numbers, (parts, transposed, *exact), bias = _split_bias(arguments)
    _check_rows(x, numbers, transposed)
    weight = _stack(tensors, numbers, parts)
    return backends.experts_linear(x, counts, weight, bias, transposed, *exact)


def _experts_linear_backward(grad_y, counts, *arguments):
    tensors, numbers, (parts, transposed) = _split(arguments)
    weight = _stack(tensors, numbers, parts)
    return backends.experts_linear_backward(grad_y, counts, weight, transposed)


_LIBRARY.impl("experts_linear", _experts_linear, "CompositeExplicitAutograd")
_LIBRARY.impl("experts_linear_backward", _experts_linear_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("hqq_cpp::experts_linear")
def _experts_linear_fake(x, counts, *arguments):
    _, numbers, (_, transposed, *_), _ = _split_bias(arguments)
    _check_rows(x, numbers, transposed)
    return x.new_empty(x.shape[0], numbers.in_features if transposed else numbers.out_features)


@torch.library.register_fake("hqq_cpp::experts_linear_backward")
def _experts_linear_backward_fake(grad_y, counts, *arguments):
    _, numbers, (_, transposed) = _split(arguments)
    features = numbers.out_features if transposed else numbers.in_features
    return grad_y.new_empty(grad_y.shape[0], features)


def _experts_exact(v, inputs):
    tensors, numbers, (parts, transposed, _), _ = _split_bias(inputs[2:])
    return _OPS.experts_linear(v, inputs[1], *tensors, None, *numbers, parts, transposed, True)


def _experts_adjoint(grad, inputs):
    tensors, numbers, (parts, transposed, _), _ = _split_bias(inputs[2:])
    return _OPS.experts_linear_backward(grad, inputs[1], *tensors, *numbers, parts, transposed)


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
    weight: PackedWeight,
    bias: torch.Tensor | None,
    transposed: bool,
) -> torch.Tensor:
    """See HqqExperts.forward()."""
    _check_kind(x)
    x, layout = x.to(compute_dtype(x)), weight.layout
    backends.choose(weight, x.dtype, x.device)
    return _OPS.experts_linear(
        x, counts, *weight.tensors, bias, *layout.numbers, layout.parts, transposed
    )


# Rows of a table, and whole weights.


def _embedding(ids, *arguments):
    tensors, numbers, (dtype,) = _split(arguments)
    return backends.rows(weight_of_numbers(tensors, numbers), ids, dtype)


def _dequantize(*arguments):
    tensors, numbers, (dtype,) = _split(arguments)
    return backends.dequantize(weight_of_numbers(tensors, numbers), dtype)


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


def embedding(ids: torch.Tensor, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The rows `ids` of W_r, [..., in_features] of dtype; no gradients.

    Raises:
        ValueError: For ids of another type than int32 and int64.
    """
    if isinstance(ids, torch.Tensor) and ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"[embedding] ids are {ids.dtype}; they must be torch.int32 or int64")
    if isinstance(ids, torch.Tensor):
        backend = backends.choose(weight, dtype, ids.device).backend
        if torch.compiler.is_compiling():
            direct = _is_left_to_compiler(backend, weight)
        else:
            direct = is_ordinary(ids) and not is_watched()
        if direct:
            return backend.rows(weight, ids, dtype)
    return _OPS.embedding(ids, *weight.tensors, *weight.layout.numbers, dtype)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """W_r [out_features, in_features] of dtype."""
    backend = backends.choose(weight, dtype).backend
    compiling = torch.compiler.is_compiling()
    if _is_left_to_compiler(backend, weight) if compiling else not sees_operators():
        return backend.dequantize(weight, dtype)
    return _OPS.dequantize(*weight.tensors, *weight.layout.numbers, dtype)


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
