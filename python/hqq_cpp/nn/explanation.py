"""explain(): which kernel would run a layer, and why no faster one does."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import backends
from ..backends.common import Kernel
from ..format import PackedWeight, dtype_name
from . import ops
from .base import QuantizedModule
from .embedding import HqqEmbedding
from .experts import HqqExperts
from .watched import wants_gradient


@dataclass(frozen=True)
class Explanation:
    """What a layer does with an input, as explain() tells it; str() is a few lines of text.

    Attributes:
        backend: 'cpu' (the C++ kernels), 'cuda' (libhqq_cuda) or 'torch' (torch operations).
        kernel: The kernel in words, as 'decode, fast, AVX2' or 'dequantize + torch.mm'.
        packing: The order of the codes: 'format 1', 'cpu tiles' or 'cuda tiles'.
        mode: 'fast' or 'exact', see hqq_cpp.linear().
        device: Where the weight is.
        dtype: Of the result; autocast is taken into account.
        reasons: Why nothing faster runs; empty: there is nothing faster.

    Example:
        >>> import torch
        >>> layer = hqq_cpp.HqqLinear(hqq_cpp.quantize(torch.randn(8, 64), {"nbits": 4}))
        >>> hqq_cpp.explain(layer, torch.ones(1, 64)).backend
        'cpu'
    """

    backend: str
    kernel: str
    packing: str
    mode: str
    device: torch.device
    dtype: torch.dtype
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        what = f"{self.packing}, {dtype_name(self.dtype)}, {self.device}"
        return "\n  ".join([f"{self.backend}: {self.kernel} ({what})", *self.reasons])


def explain(layer: QuantizedModule, x: torch.Tensor) -> Explanation:
    """Tells which kernel ``layer(x)`` would run now, and why no faster one; nothing is computed.

    Args:
        layer: An HqqLinear, HqqExperts or HqqEmbedding.
        x: An input: its shape, type and device count, and whether a gradient is wanted. Of
            HqqExperts the rows, which are taken to be spread evenly.

    Returns:
        An Explanation.

    Raises:
        TypeError: If it is no quantized layer.
        ValueError: As the layer, among others after ``set_backend("native")`` if no kernel can do
            it.

    Example:
        >>> import torch
        >>> layer = hqq_cpp.HqqLinear(hqq_cpp.quantize(torch.randn(8, 64), {"nbits": 4}))
        >>> why = hqq_cpp.explain(layer, torch.ones(1, 64))
        >>> why.backend, why.packing, why.reasons
        ('cpu', 'cpu tiles', ())
        >>> print(hqq_cpp.explain(layer, torch.ones(1, 64, dtype=torch.float64)))
        cpu: dequantize + torch.mm (cpu tiles, float64, cpu)
          the kernels sum in float32, which is less than x of float64 asks for
    """
    if not isinstance(layer, QuantizedModule):
        raise TypeError(
            f"[explain] layer is a {type(layer).__name__}; it must be an HqqLinear, HqqExperts or "
            f"HqqEmbedding"
        )
    weight, reason = _weight_to_be(layer)
    if isinstance(layer, HqqEmbedding):
        choice = backends.choose(weight, layer.compute_dtype, x.device)
        kernel = Kernel("rows", "exact", "")
        return _explanation(choice, kernel, weight, layer.compute_dtype, reason)
    dtype, count = ops.compute_dtype(x), x.numel() // layer.in_features
    if isinstance(layer, HqqExperts):
        count = -(-count // layer.num_experts)
    choice = backends.choose(weight, dtype, x.device)
    mode = backends.mode_of(x, wants_gradient(x, layer._parameters.get("bias")))
    kernel = choice.backend.kernel(weight, count, dtype, mode)
    if choice.backend is backends.cpu and mode != backends.mode_of(x.detach()):
        reason = reason or "mode 'auto' is exact where x or the bias requires a gradient"
    return _explanation(choice, kernel, weight, dtype, reason)


def _weight_to_be(layer: QuantizedModule) -> tuple[PackedWeight, str]:
    """The weight in the packing that a call would read, and why that is not the fastest one."""
    weight = layer.checked()
    wanted = backends.packing_for(weight)
    # A lookup reads the rows where they are.
    if weight.packing == wanted or isinstance(layer, HqqEmbedding):
        return weight, ""
    if layer.may_repack(weight):
        return weight._replace(packing=wanted), ""
    return weight, (
        "the tensors are not the layer's own (sharded, offloaded, shared by processes or recorded in "
        "a CUDA graph), so they stay in format 1"
    )


def _explanation(
    choice: backends.Choice, kernel: Kernel, weight: PackedWeight, dtype: torch.dtype, reason: str
) -> Explanation:
    reasons = (choice.reason, reason, kernel.reason)
    return Explanation(
        backend=choice.name,
        kernel=kernel.name,
        packing=weight.packing,
        mode=kernel.mode,
        device=weight.device,
        dtype=dtype,
        reasons=tuple(filter(None, reasons)),
    )
