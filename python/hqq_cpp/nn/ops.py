"""Custom operators of torch: hqq_cpp::linear and its gradient.

torch.compile and torch.export see each as one node with known shapes; autograd keeps only the packed weight and
dequantizes it again on the way back.
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
_WEIGHT_END = 1 + len(Weight._fields)


def _linear(x, *arguments):
    weight = Weight(*arguments[: _WEIGHT_END - 1])
    bias = arguments[_WEIGHT_END - 1]
    return backend.linear(x, weight, Layout(*arguments[_WEIGHT_END:]), bias)


def _linear_backward(grad_y, *arguments):
    weight = Weight(*arguments[: _WEIGHT_END - 1])
    return backend.linear_backward(grad_y, weight, Layout(*arguments[_WEIGHT_END - 1 :]))


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
    return grad_x, *(None,) * (_WEIGHT_END - 1), grad_bias, *(None,) * len(ctx.layout)


torch.library.register_autograd("hqq_cpp::linear", _backward, setup_context=_setup_context)


def linear(
    x: torch.Tensor, weight: Weight, layout: Layout, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [..., in_features] W_r^T + bias in the dtype of x, with gradients for x and bias."""
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.shape[-1] != layout.in_features:
        raise ValueError(
            f"[linear] x has the shape {list(x.shape)}; its last dimension must be {layout.in_features}"
        )
    wants_grad = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    if wants_grad or torch.compiler.is_compiling():
        # Compiled code without native kernels and gradients is left to the compiler, which fuses it.
        if wants_grad or backend.uses_native(weight, x):
            return torch.ops.hqq_cpp.linear(x, *weight, bias, *layout)
    return backend.linear(x, weight, layout, bias)
