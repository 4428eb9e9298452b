"""How the custom operators are differentiated, batched and counted.

Products are linear in their first argument, so that an operator and its adjoint are all that is
needed: the one is the derivative of the other, forward and backward, as often as one likes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

Product = Callable[..., torch.Tensor]


class Linearity(NamedTuple):
    """What makes an operator linear in its first argument, and in its bias.

    `inputs` are all arguments of the operator, but for the first and the bias, which are None.
    """

    product: Product  # (v, inputs) -> the exact operator without bias
    adjoint: Product  # (grad, inputs) -> the gradient of the first argument
    bias: int | None = None  # which argument is the bias
    bias_product: Product | None = None  # (bias, inputs, shape) -> what it adds to a result
    bias_adjoint: Product | None = None  # (grad, inputs, shape) -> the gradient of the bias


def register_derivatives(
    library: torch.library.Library, operator: torch._ops.OpOverload, linearity: Linearity
) -> None:
    """Derivatives of an operator, forward and backward. If its last argument is `exact`, then what
    is differentiated is exact."""
    count = len(operator._schema.arguments)
    rounds = operator._schema.arguments[-1].name == "exact"
    function = _function(operator, linearity, rounds)

    def differentiable(keyset, *inputs):
        if not _is_differentiated(inputs):
            return _below_autograd(operator, keyset, inputs)
        # The dispatcher leaves defaults out.
        inputs = (*inputs, False) if len(inputs) < count else inputs
        # It is inside of one transform of torch.func already.
        with enable_single_level_autograd_function():
            return function.apply(keyset, *inputs)

    library.impl(operator, differentiable, "Autograd", with_keyset=True)


def _function(
    operator: torch._ops.OpOverload, linearity: Linearity, rounds: bool
) -> type[_SingleLevelFunction]:
    bias = linearity.bias

    class Derivatives(_SingleLevelFunction):
        @staticmethod
        def forward(keyset, *inputs):
            # A gradient is that of the exact product.
            inputs = (*inputs[:-1], True) if rounds else inputs
            # The outer transforms of torch.func want their derivatives of this one, too.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return _below_autograd(operator, keyset, inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            # Zeros would be multiplied, and look like a derivative that is wanted.
            ctx.set_materialize_grads(False)
            inputs = list(inputs[1:])
            if bias is not None and inputs[bias] is not None:
                ctx.bias_dtype, ctx.bias_shape = inputs[bias].dtype, inputs[bias].shape
            for index in {0, bias} - {None}:
                inputs[index] = None
            tensors = [v if isinstance(v, torch.Tensor) else None for v in inputs]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.others = [None if isinstance(v, torch.Tensor) else v for v in inputs]
            ctx.shape = output.shape

        @staticmethod
        def backward(ctx, grad):
            inputs = _saved(ctx)
            needed = ctx.needs_input_grad[1:]
            if torch._C._are_functorch_transforms_active():
                _refuse_weights(operator, [i for i, n in enumerate(needed) if n], bias)
            grads = [None] * len(inputs)
            if grad is None:
                return None, *grads
            if needed[0]:
                grads[0] = linearity.adjoint(grad, inputs)
            if bias is not None and needed[bias]:
                gradient = linearity.bias_adjoint(grad, inputs, ctx.bias_shape)
                grads[bias] = gradient.to(ctx.bias_dtype)
            return None, *grads

        @staticmethod
        def jvp(ctx, _, *tangents):
            inputs = _saved(ctx)
            moved = [i for i, t in enumerate(tangents) if t is not None]
            _refuse_weights(operator, moved, bias)
            terms = []
            if 0 in moved:
                terms.append(linearity.product(tangents[0], inputs))
            if bias in moved:
                terms.append(linearity.bias_product(tangents[bias], inputs, ctx.shape))
            return sum(terms[1:], terms[0])

    return Derivatives


def _refuse_weights(operator: torch._ops.OpOverload, wanted: list[int], bias: int | None) -> None:
    """torch.func takes no derivative for one that is zero."""
    names = [operator._schema.arguments[i].name for i in wanted if i not in (0, bias)]
    if names:
        raise RuntimeError(
            f"[autograd] {operator} has no derivative with respect to {', '.join(names)}: a "
            f"quantized weight is frozen; differentiate with respect to inputs, biases and adapters"
        )


def _saved(ctx) -> list[Any]:
    return [v if t is None else t for t, v in zip(ctx.saved_tensors, ctx.others)]


def _below_autograd(operator, keyset, inputs) -> torch.Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


def _is_differentiated(inputs) -> bool:
    return (
        (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs))
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def register_batching(operator: torch._ops.OpOverload, leading: bool) -> None:
    """A rule for torch.vmap.

    Args:
        operator: One whose result has the batch in front.
        leading: Whether the first argument may have any number of leading dimensions: one more is
            the batch. Everything else is a loop.
    """

    def rule(info, in_dims, *inputs):
        if leading and in_dims[0] is not None and not any(d is not None for d in in_dims[1:]):
            return operator(inputs[0].movedim(in_dims[0], 0), *inputs[1:]), 0
        results = [
            operator(*(v if d is None else v.select(d, i) for v, d in zip(inputs, in_dims)))
            for i in range(info.batch_size)
        ]
        return torch.stack(results), 0

    torch.library.register_vmap(operator, rule)


def register_flops(operator: torch._ops.OpOverloadPacket) -> None:
    """A product counts what it counts with a dense weight."""

    def flops(x_shape, *_, out_shape=None, **__) -> int:
        return 2 * torch.Size(x_shape).numel() * out_shape[-1]

    register_flop_formula(operator)(flops)
