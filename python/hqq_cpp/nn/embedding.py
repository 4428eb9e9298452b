"""HqqEmbedding: a quantized table of vectors for torch."""

from __future__ import annotations

import torch
from torch import nn

from .._cached import cached
from .._core import LayerConfig, QuantizedTensor
from ..format import tensors_of
from . import ops
from .base import QuantizedModule, parse_dtype
from .carry import carry_over
from .linear import HqqLinear


class HqqEmbedding(QuantizedModule, nn.Embedding):
    """A quantized nn.Embedding: a lookup dequantizes the rows it is asked for.

    Tensors, dtypes, ``weight``, ``dequantize()``, ``quantized_tensor()`` and ``quantize_()`` are
    those of HqqLinear, with rows for out_features; rows come in the dtype of ``weight``. There are
    no gradients: ``max_norm``, ``norm_type``, ``scale_grad_by_freq`` and ``sparse`` have their
    defaults. A linear layer may share the parameters (tied weights).

    Args:
        weight: Quantized matrix [num_embeddings, embedding_dim]; its memory is shared.
        padding_idx: As in nn.Embedding; without gradients it is information only.
        dtype: Type of ``weight``; None: float32.

    Raises:
        ValueError: If padding_idx is no row.

    Example:
        >>> import torch
        >>> q = hqq_cpp.quantize(torch.randn(100, 64), {"nbits": 8})
        >>> table = hqq_cpp.HqqEmbedding(q)
        >>> table(torch.tensor([[3, 99]])).shape
        torch.Size([1, 2, 64])
    """

    W_q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    # The class of the dense layer: nn.Embedding, or one that class_for() was asked for.
    _dense_class: type[nn.Embedding] = nn.Embedding

    # A lookup in nn.Embedding could change the weight, or scale its gradient.
    max_norm = None
    norm_type = 2.0
    scale_grad_by_freq = False
    sparse = False

    def __init__(
        self,
        weight: QuantizedTensor,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        # Not nn.Embedding's, which allocates a dense weight.
        nn.Module.__init__(self)
        self._setup_table(
            weight.config, weight.shape, padding_idx, parse_dtype(dtype, torch.float32)
        )
        self._register_tensors(tensors_of(weight)._asdict())

    def _setup_table(
        self,
        config: LayerConfig,
        shape: tuple[int, ...],
        padding_idx: int | None,
        dtype: torch.dtype,
    ) -> None:
        self._setup(config, shape, dtype)
        self.num_embeddings, self.embedding_dim = shape
        if padding_idx is not None:
            if not -shape[0] <= padding_idx < shape[0]:
                raise ValueError(
                    f"[embedding] padding_idx is {padding_idx}; it must be a row, {-shape[0]} to "
                    f"{shape[0] - 1}"
                )
            padding_idx %= shape[0]
        self.padding_idx = padding_idx

    @classmethod
    def empty(
        cls,
        config: LayerConfig,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> HqqEmbedding:
        """A table whose tensors are allocated, not set; see HqqLinear.empty().

        Example:
            >>> config = hqq_cpp.HqqConfig(nbits=8, balance="none").layer("x")
            >>> hqq_cpp.HqqEmbedding.empty(config, 100, 64, device="meta").W_q.shape
            torch.Size([100, 64])
        """
        table = cls.__new__(cls)
        nn.Module.__init__(table)
        device = torch.get_default_device() if device is None else torch.device(device)
        table._setup_table(config, (num_embeddings, embedding_dim), padding_idx, dtype)
        table._register_tensors(table._empty_tensors(device))
        return table

    @classmethod
    def empty_like(cls, module: nn.Embedding, config: LayerConfig) -> HqqEmbedding:
        """An empty table on device meta for the place of `module`, without what carry_over() gives.

        Raises:
            ValueError: If a lookup in `module` does more than look up.
        """
        for name in ("max_norm", "scale_grad_by_freq", "sparse"):
            value = getattr(module, name)
            if value:
                raise ValueError(
                    f"[embedding] {name} is {value}, but the weight of a quantized embedding does "
                    f"not change; leave this layer dense or set {name} to {getattr(cls, name)}"
                )
        rows, columns = module.weight.shape
        return class_for(type(module)).empty(
            config,
            rows,
            columns,
            module.padding_idx,
            dtype=module.weight.dtype,
            device="meta",
        )

    weight = HqqLinear.weight
    dequantize = HqqLinear.dequantize
    quantized_tensor = HqqLinear.quantized_tensor
    quantize_ = HqqLinear.quantize_

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """int32 or int64 [...] -> [..., embedding_dim].

        Raises:
            IndexError: If there is no such row.
            ValueError: For ids of another type.
        """
        return ops.embedding(input, self.checked(), self.compute_dtype)

    def to_dense(self, weight: nn.Parameter) -> nn.Embedding:
        """The layer that this one took the place of, with another weight."""
        dense: nn.Embedding = object.__new__(self._dense_class)
        nn.Embedding.__init__(dense, *self.dense_shape, self.padding_idx, device="meta")
        dense.weight = weight
        carry_over(self, dense)
        return dense

    def reset_parameters(self) -> None:
        """Does nothing: a quantized weight is not initialized."""

    def extra_repr(self) -> str:
        """For repr(): sizes and the settings that matter for reading."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._repr_settings()}"

    def __reduce_ex__(self, protocol):
        # pickle finds no class that was made while the program ran.
        return _allocate, (self._dense_class,), self.__getstate__()


@cached
def class_for(dense_class: type[nn.Embedding]) -> type[HqqEmbedding]:
    """HqqEmbedding with what a subclass of nn.Embedding does around a lookup: models multiply the
    rows, or add an offset to the ids."""
    if dense_class is nn.Embedding:
        return HqqEmbedding
    # Buffers of the subclass are still to be initialized by Transformers.
    namespace = {"_dense_class": dense_class, "_is_hf_initialized": False}
    return type(f"Hqq{dense_class.__name__}", (dense_class, HqqEmbedding), namespace)


def _allocate(dense_class: type[nn.Embedding]) -> HqqEmbedding:
    cls = class_for(dense_class)
    return cls.__new__(cls)
