"""quantize_linear and the linear layer that needs no torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from . import _core, api
from ._core import QuantizedTensor, Tensor, TiledTensor, can_tile

if TYPE_CHECKING:
    import numpy as np

    from .nn.linear import HqqLinear


class QuantizedLinear:
    """A quantized linear layer for NumPy: y = x W_r^T + bias.

    The first call puts the codes into the order that the kernels read (QuantizedTensor.tile()), and
    the layer keeps only that. So the codes are in memory once, unless the caller keeps `weight`
    too.

    Args:
        weight: Quantized matrix [out_features, in_features].
        bias: [out_features], or None.

    Raises:
        ValueError: If bias is not 1-D or has another length.

    Example:
        >>> import numpy as np
        >>> layer = hqq_cpp.quantize_linear(np.eye(16, dtype=np.float32), {"group_size": 8})
        >>> layer(np.ones((2, 3, 16), np.float32)).shape
        (2, 3, 16)
    """

    def __init__(self, weight: QuantizedTensor, bias: Any = None):
        # Tiles after the first call, where the settings have them.
        self._weight: QuantizedTensor | TiledTensor = weight
        self.bias = None
        if bias is not None:
            import numpy as np

            self.bias = np.array(Tensor(bias), np.float32)
            if self.bias.shape != (weight.out_features,):
                raise ValueError(
                    f"[linear] bias has the shape {list(self.bias.shape)}; "
                    f"it must be [{weight.out_features}]"
                )

    @property
    def weight(self) -> QuantizedTensor:
        """The quantized matrix; made from the tiles after the first call, bit for bit."""
        weight = self._weight
        return weight.untile() if isinstance(weight, TiledTensor) else weight

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self._weight.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self._weight.out_features

    def dequantize(self) -> np.ndarray:
        """W_r as float32 [out_features, in_features]."""
        return _core.dequantize(self._weight, "float32", 0)

    def __call__(self, x: Any) -> np.ndarray:
        """float32 [..., in_features] -> float32 [..., out_features]."""
        weight = self._weight
        if isinstance(weight, QuantizedTensor) and can_tile(weight.config, *weight.shape):
            self._weight = weight = weight.tile()
        return api.linear(x, weight, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weight": self.weight}

    def __repr__(self) -> str:
        config = self._weight.config
        return (
            f"QuantizedLinear([{self.out_features}, {self.in_features}], nbits={config.nbits}, "
            f"group_size={config.group_size}, axis={config.axis}, bias={self.bias is not None})"
        )


def quantize_linear(
    linear_or_weight: Any,
    config: api.ConfigLike = None,
    name: str | None = None,
    bias: Any = None,
    *,
    importance: Any = None,
    threads: int = 0,
) -> HqqLinear | QuantizedLinear:
    """Quantizes a linear layer.

    Args:
        linear_or_weight: A ``torch.nn.Linear``, or a weight [out_features, in_features] as
            quantize() takes it; of torch, it may be on a GPU, which then solves (with libhqq_cuda)
            and holds the result.
        config: An HqqConfig, a dict that HqqConfig.from_dict reads, or None for the defaults.
        name: Name of the layer, which selects the rules of config.
        bias: [out_features], or None: that of the Linear, if it is one.
        importance: See quantize().
        threads: CPU threads; 0: see default_threads().

    Returns:
        An HqqLinear (a torch.nn.Module) for a Linear or a torch tensor, else a QuantizedLinear.

    Raises:
        ValueError: As quantize(); among others if config leaves the layer `name` unquantized (ask
            ``config.layer(name)`` first), or if bias does not fit.

    Example:
        >>> import numpy as np
        >>> W = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
        >>> layer = hqq_cpp.quantize_linear(W, {"nbits": 8}, bias=np.zeros(8))
        >>> x = np.ones((1, 64), np.float32)
        >>> bool(np.abs(layer(x) - x @ W.T).max() < 0.1)
        True
    """
    # Whoever holds a torch object has imported torch.
    torch = sys.modules.get("torch")
    weight = linear_or_weight
    is_torch = False
    if torch is not None:
        if isinstance(weight, torch.nn.Module):
            from .find.kinds import check_single

            check_single(weight)
            bias = weight.bias if bias is None else bias
            weight = weight.weight
        is_torch = isinstance(weight, torch.Tensor)
    if is_torch and weight.device.type == "cuda":
        from .nn.linear import quantized_on_device

        return quantized_on_device(weight, config, name or "", bias, importance, threads)
    q = api.quantize(weight, config, name=name or "", importance=importance, threads=threads)
    if not is_torch:
        return QuantizedLinear(q, bias)
    from .nn.linear import HqqLinear

    return HqqLinear(q, bias, weight.dtype)
