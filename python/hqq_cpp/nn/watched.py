"""Whether torch has to see a call, or its kernels may be called with the addresses of its tensors.

Addresses are right for tensors that are what they seem, while nothing records, replaces or
transforms operators. All else goes through the custom operators, which torch dispatches.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_Key = torch._C.DispatchKey
_dispatch_keys = torch._C._dispatch_keys
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_any_autocast = torch._C._is_any_autocast_enabled
_transforms_active = torch._C._are_functorch_transforms_active


def _keys(*names: str) -> int:
    keys = torch._C.DispatchKeySet(_Key.__members__[names[0]])
    for name in names[1:]:
        keys = keys.add(_Key.__members__[name])
    return keys.raw_repr()


# Keys of a tensor, and of one made in inference mode. Others say that its memory does not hold its
# values (negated and conjugated views, zero tensors, functional tensors), or not in rows (nested and
# sparse tensors).
_ORDINARY_KEYS = {
    keys
    for device in ("CPU", "CUDA")
    for keys in (
        _keys(device, f"Autocast{device}"),
        _keys(device, f"Autocast{device}", f"Autograd{device}", "ADInplaceOrView"),
    )
}


def sees_operators() -> bool:
    """Whether a tracer, a dispatch mode (fake tensors, make_fx, counters), a transform of torch.func
    or forward-mode AD takes part in what runs now."""
    return bool(
        _tracing_state()
        or _dispatch_modes()
        or _transforms_active()
        or forward_ad._current_level >= 0
    )


def is_watched() -> bool:
    """Whether these, or a mode for functions such as a default device, take part."""
    # Every call of a layer asks, so nothing is called twice or looked up.
    return bool(
        _function_modes()
        or _tracing_state()
        or _dispatch_modes()
        or _transforms_active()
        or forward_ad._current_level >= 0
    )


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor on a CPU or GPU holds its values, and nothing else does."""
    return type(tensor) is torch.Tensor and _dispatch_keys(tensor).raw_repr() in _ORDINARY_KEYS


def wants_gradient(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether autograd records a product."""
    return torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )


def is_direct(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether nothing but the values of a product is asked for, so that torch need not see the call: no
    gradient, no autocast of any device, nothing that watches."""
    return (
        is_ordinary(x) and not is_watched() and not wants_gradient(x, bias) and not _any_autocast()
    )
