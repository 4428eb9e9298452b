"""HqqLinear: a quantized linear layer for torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import backends
from .._core import LayerConfig, QuantizedTensor, Tensor
from ..backends.packing import format_1
from ..format import tensors_of
from . import ops
from .base import QuantizedModule, parse_dtype
from .watched import sees_operators


class HqqLinear(QuantizedModule, nn.Linear):
    """A quantized linear layer: y = x W_r^T + bias, in the dtype of x.

    The tensors of format 1 (``W_q``, ``scale``, ``zero`` and those the settings call for) are
    parameters without gradient, so state_dict has the keys of a checkpoint. They move between
    devices with the module; ``half()``, ``to(torch.bfloat16)`` and the like leave their types
    alone, since rounding scale and zero again would change the weights. Gradients flow to x and to
    bias. ``weight`` stands for the dense weight: it knows shape, dtype and device, and dequantizes
    when it is computed with.

    Args:
        weight: Quantized matrix [out_features, in_features]; its memory is shared.
        bias: [out_features], or None.
        dtype: Type of ``weight``; None: that of bias, else float32.

    Raises:
        TypeError: If weight is no QuantizedTensor.
        ValueError: If bias has another shape.

    Example:
        >>> import torch
        >>> layer = hqq_cpp.quantize_linear(torch.nn.Linear(64, 8), {"nbits": 4})
        >>> layer(torch.ones(2, 64)).shape
        torch.Size([2, 8])
    """

    W_q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    scale_step: torch.Tensor | None
    scale_offset: torch.Tensor | None
    zero_step: torch.Tensor | None
    zero_offset: torch.Tensor | None
    col_scale: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, weight: QuantizedTensor, bias: Any = None, dtype: torch.dtype | None = None):
        # Not nn.Linear's, which allocates a dense weight.
        nn.Module.__init__(self)
        if not isinstance(weight, QuantizedTensor):
            raise TypeError(
                f"[linear] weight is a {type(weight).__name__}; it must be a QuantizedTensor: "
                "hqq_cpp.quantize(W) makes one, quantize_linear() a layer, from_upstream() takes a "
                "layer of upstream's hqq"
            )
        if bias is not None and not isinstance(bias, torch.Tensor):
            bias = torch.from_dlpack(Tensor(bias)).clone()
        default = torch.float32 if bias is None else bias.dtype
        self._setup(weight.config, weight.shape, parse_dtype(dtype, default))
        self._register_tensors(tensors_of(weight)._asdict())
        self._register_bias(bias)

    def _register_bias(self, bias: torch.Tensor | None) -> None:
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(
                f"[linear] bias has the shape {list(bias.shape)}; it must be [{self.out_features}]"
            )
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def empty(
        cls,
        config: LayerConfig,
        out_features: int,
        in_features: int,
        bias: bool | nn.Parameter = False,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> HqqLinear:
        """A layer whose tensors are allocated, not set: for load_state_dict().

        Args:
            config: Settings of the layer (``HqqConfig.layer()``), with balance 'none' or
                'sinkhorn'.
            out_features: Rows of the weight.
            in_features: Columns of the weight.
            bias: True: with a bias of `dtype`. Or the bias.
            dtype: Type of ``weight``.
            device: Where the tensors are; 'meta' allocates nothing.

        Raises:
            ValueError: If balance is 'auto'.

        Example:
            >>> config = hqq_cpp.HqqConfig(nbits=4, balance="none").layer("x")
            >>> hqq_cpp.HqqLinear.empty(config, 8, 64, device="meta").W_q.shape
            torch.Size([8, 32])
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        device = torch.get_default_device() if device is None else torch.device(device)
        layer._setup(config, (out_features, in_features), dtype)
        layer._register_tensors(layer._empty_tensors(device))
        if isinstance(bias, bool):
            bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        layer._register_bias(bias)
        return layer

    @property
    def weight(self) -> torch.Tensor:
        """Stands for W_r: shape, dtype and device cost nothing, computing with it dequantizes."""
        if torch.compiler.is_compiling() or sees_operators():
            # A compiler drops a product that only its dtype is asked of; a tracer would keep the
            # stand-in as a constant.
            return self.dequantize(self.compute_dtype)
        return _DenseWeight(self)

    def quantized_tensor(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor; shares memory if the layer is on the CPU."""
        plain = format_1(self.checked()).tensors
        tensors = {name: tensor.detach().cpu() for name, tensor in plain.present().items()}
        return QuantizedTensor.from_tensors(
            tensors, self.layer_config, (self.out_features, self.in_features)
        )

    def quantize_(self, W: torch.Tensor, importance: Any = None) -> HqqLinear:
        """Quantizes another dense weight into this layer, with its settings.

        Args:
            W: [out_features, in_features], any floating dtype and device.
            importance: See hqq_cpp.quantize().

        Raises:
            ValueError: If W has another shape or cannot be quantized.
        """
        if tuple(W.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"[quantize] W has the shape {list(W.shape)}; the layer takes "
                f"[{self.out_features}, {self.in_features}]"
            )
        device = self.device
        tensors = backends.quantize(W, self.layer_config, "", importance).tensors
        for name, tensor in tensors.items():
            self._parameters[name].data = tensor.to(device)
        self._own()
        return self

    def dequantize(self, dtype: torch.dtype | str = torch.float32) -> torch.Tensor:
        """W_r [out_features, in_features], computed in float32 and rounded to dtype."""
        return ops.dequantize(self.checked(), parse_dtype(dtype, torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] in the dtype of x."""
        return ops.linear(x, self.prepared(), self._parameters["bias"])

    def reset_parameters(self) -> None:
        """Does nothing: a quantized weight is not initialized."""

    def extra_repr(self) -> str:
        """For repr(): sizes and the settings that matter for reading."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self._parameters['bias'] is not None}, {self._repr_settings()}"
        )


def quantized_on_device(
    W: torch.Tensor, config: Any, name: str, bias: Any, importance: Any, threads: int
) -> HqqLinear:
    """hqq_cpp.quantize_linear() of a weight on any device, where the layer stays."""
    solved = backends.quantize(W, config, name, importance, threads)
    layer = HqqLinear.empty(solved.settings, *W.shape, dtype=W.dtype, device="meta")
    layer.set_packed(solved.tensors, W.device)
    if bias is not None and not isinstance(bias, torch.Tensor):
        bias = torch.from_dlpack(Tensor(bias)).clone()
    if bias is not None and bias.device != W.device:
        moved, needs_grad = bias.detach().to(W.device), bias.requires_grad
        bias = nn.Parameter(moved, requires_grad=needs_grad)
    layer._register_bias(bias)
    return layer


class _DenseWeight(torch.Tensor):
    """The dense weight of a layer, made when an operation asks for its values."""

    # Transformers' functions that initialize weights leave out what has this mark.
    _is_hf_initialized = True

    @staticmethod
    def __new__(cls, layer: HqqLinear):
        return torch.Tensor._make_wrapper_subclass(
            cls, layer.dense_shape, dtype=layer.compute_dtype, device=layer.device
        )

    def __init__(self, layer: HqqLinear):
        self._layer = layer

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def dense(value):
            if isinstance(value, cls):
                return value._layer.dequantize(value.dtype)
            return value

        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, cls):
                raise cls._read_only()
        args, kwargs = torch.utils._pytree.tree_map(dense, (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _read_only() -> RuntimeError:
        return RuntimeError(
            "[weight] the weight of a quantized layer cannot be changed in place; "
            "layer.quantize_(W) quantizes another one"
        )

    def __setitem__(self, index: Any, value: Any) -> None:
        raise self._read_only()

    @property
    def data(self) -> torch.Tensor:
        """The dense values."""
        return self._layer.dequantize(self.dtype)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise self._read_only()

    def __repr__(self, **kwargs) -> str:
        return f"<dense weight {list(self.shape)} of {self._layer!r}>"
