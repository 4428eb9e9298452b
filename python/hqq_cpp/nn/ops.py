"""Custom operators of torch: hqq_cpp::linear and its gradient.

torch.compile and torch.export see each as one node with known shapes; autograd keeps only the
packed weight and dequantizes it again on the way back.
"""

from __future__ import annotations

import torch

from . import backend
from .dequantize import Layout, Weight

_LIBRARY = torch.library.Library("hqq_cpp", "DEF")
_WEIGHT = (
    "Tensor W_q, Tensor scale, Tensor zero, Tensor? scale_step, Tensor? scale_offset, "
    "Tensor? zero_step, Tensor? zero_offset, Tensor? col_scale"
)
_LAYOUT = "float nbits, int group_size, int axis, SymInt out_features, SymInt in_features"
_LIBRARY.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias, {_LAYOUT}) -> Tensor")
_LIBRARY.define(f"linear_backward(Tensor grad_y, {_WEIGHT}, {_LAYOUT}) -> Tensor")
_LIBRARY.define(
    f"experts_linear(Tensor x, Tensor counts, {_WEIGHT}, Tensor? bias, {_LAYOUT}, int parts, "
    "bool transposed) -> Tensor"
)
_LIBRARY.define(
    f"experts_linear_backward(Tensor grad_y, Tensor counts, {_WEIGHT}, {_LAYOUT}, int parts, "
    "bool transposed) -> Tensor"
)
_LIBRARY.define(f"embedding(Tensor ids, {_WEIGHT}, {_LAYOUT}, ScalarType dtype) -> Tensor")
_FIELDS = len(Weight._fields)
_WEIGHT_END = 1 + _FIELDS


def _linear(x, *arguments):
    weight = Weight(*arguments[:_FIELDS])
    bias = arguments[_FIELDS]
    return backend.linear(x, weight, Layout(*arguments[_WEIGHT_END:]), bias)


def _linear_backward(grad_y, *arguments):
    weight = Weight(*arguments[:_FIELDS])
    return backend.linear_backward(grad_y, weight, Layout(*arguments[_FIELDS:]))


_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_backward", _linear_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("hqq_cpp::linear")
def _linear_fake(x, *arguments):
    return x.new_empty(*x.shape[:-1], arguments[-2])


@torch.library.register_fake("hqq_cpp::linear_backward")
def _linear_backward_fake(grad_y, *arguments):
    return grad_y.new_empty(*grad_y.shape[:-1], arguments[-1])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:_WEIGHT_END])
    ctx.layout = inputs[_WEIGHT_END + 1 :]
    bias = inputs[_WEIGHT_END]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad_y):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.hqq_cpp.linear_backward(grad_y, *ctx.saved_tensors, *ctx.layout)
    if ctx.needs_input_grad[_WEIGHT_END]:
        grad_bias = grad_y.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, *(None,) * _FIELDS, grad_bias, *(None,) * len(ctx.layout)


torch.library.register_autograd("hqq_cpp::linear", _backward, setup_context=_setup_context)


def _autocast(x: torch.Tensor) -> torch.Tensor:
    device = x.device.type
    if device != "meta" and x.is_floating_point() and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def linear(
    x: torch.Tensor, weight: Weight, layout: Layout, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [..., in_features] W_r^T + bias in the dtype of x, with gradients for x and bias."""
    x = _autocast(x)
    if x.shape[-1] != layout.in_features:
        raise ValueError(
            f"[linear] x has the shape {list(x.shape)}; its last dimension must be "
            f"{layout.in_features}"
        )
    wants_grad = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    if wants_grad or torch.compiler.is_compiling():
        # Compiled code without native kernels and gradients is left to the compiler, which fuses
        # it.
        if wants_grad or backend.uses_native(weight, x):
            return torch.ops.hqq_cpp.linear(x, *weight, bias, *layout)
    return backend.linear(x, weight, layout, bias)


def _experts_linear(x, counts, *arguments):
    weight, bias = Weight(*arguments[:_FIELDS]), arguments[_FIELDS]
    *layout, parts, transposed = arguments[_FIELDS + 1 :]
    return backend.experts_linear(x, counts, weight, Layout(*layout), parts, transposed, bias)


def _experts_linear_backward(grad_y, counts, *arguments):
    weight = Weight(*arguments[:_FIELDS])
    *layout, parts, transposed = arguments[_FIELDS:]
    return backend.experts_linear_backward(
        grad_y, counts, weight, Layout(*layout), parts, transposed
    )


_LIBRARY.impl("experts_linear", _experts_linear, "CompositeExplicitAutograd")
_LIBRARY.impl("experts_linear_backward", _experts_linear_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("hqq_cpp::experts_linear")
def _experts_linear_fake(x, counts, *arguments):
    out_features, in_features, _, transposed = arguments[-4:]
    return x.new_empty(x.shape[0], in_features if transposed else out_features)


@torch.library.register_fake("hqq_cpp::experts_linear_backward")
def _experts_linear_backward_fake(grad_y, counts, *arguments):
    out_features, in_features, _, transposed = arguments[-4:]
    return grad_y.new_empty(grad_y.shape[0], out_features if transposed else in_features)


def _experts_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1 : 2 + _FIELDS])
    ctx.layout = inputs[3 + _FIELDS :]
    bias = inputs[2 + _FIELDS]
    ctx.bias = None if bias is None else (bias.shape, bias.dtype)


def _experts_backward(ctx, grad_y):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.hqq_cpp.experts_linear_backward(grad_y, *ctx.saved_tensors, *ctx.layout)
    if ctx.needs_input_grad[2 + _FIELDS]:
        counts = ctx.saved_tensors[0]
        shape, dtype = ctx.bias
        experts = torch.arange(shape[0], device=counts.device).repeat_interleave(counts)
        used = grad_y[: experts.shape[0]].to(dtype)
        grad_bias = used.new_zeros(shape).index_add_(0, experts, used)
    return grad_x, None, *(None,) * _FIELDS, grad_bias, *(None,) * len(ctx.layout)


torch.library.register_autograd(
    "hqq_cpp::experts_linear", _experts_backward, setup_context=_experts_setup_context
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
    features = layout.out_features if transposed else layout.in_features
    if x.ndim != 2 or x.shape[1] != features:
        raise ValueError(
            f"[experts] x has the shape {list(x.shape)}; it must be [rows, {features}]"
        )
    x = _autocast(x)
    return torch.ops.hqq_cpp.experts_linear(x, counts, *weight, bias, *layout, parts, transposed)


def _embedding(ids, *arguments):
    *layout, dtype = arguments[_FIELDS:]
    return backend.embedding(ids, Weight(*arguments[:_FIELDS]), Layout(*layout), dtype)


_LIBRARY.impl("embedding", _embedding, "CompositeExplicitAutograd")


@torch.library.register_fake("hqq_cpp::embedding")
def _embedding_fake(ids, *arguments):
    *_, in_features, dtype = arguments
    return ids.new_empty(*ids.shape, in_features, dtype=dtype)


def embedding(
    ids: torch.Tensor, weight: Weight, layout: Layout, dtype: torch.dtype
) -> torch.Tensor:
    """The rows `ids` of W_r, [..., in_features] of dtype; no gradients."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"[embedding] ids are {ids.dtype}; they must be torch.int32 or int64")
    if torch.compiler.is_compiling() and backend.embeds_native(ids, weight, dtype):
        return torch.ops.hqq_cpp.embedding(ids, *weight, *layout, dtype)
    return backend.embedding(ids, weight, layout, dtype)
