"""A quantized key-value cache for Transformers: ``QuantizedCache(backend="hqq")`` with our
solver."""

from __future__ import annotations

from typing import Any

import torch
from transformers import cache_utils

from . import states
from .states import PackedStates

# Transformers' class, even if register() has run before this file is read again.
_Original: Any = getattr(cache_utils.HQQQuantizedLayer, "replaces", cache_utils.HQQQuantizedLayer)


def register() -> None:
    """Makes ``QuantizedCache(backend="hqq")`` use HqqCacheLayer, with or without the package hqq.

    Doing it again changes nothing; ``import hqq_cpp.transformers`` does it.

    Example:
        >>> from hqq_cpp.transformers import cache
        >>> cache.register()
        >>> from transformers import AutoConfig, QuantizedCache
        >>> quantized = QuantizedCache("hqq", AutoConfig.from_pretrained(model), nbits=4)
        >>> type(quantized.layers[0]).__name__
        'HqqCacheLayer'
    """
    cache_utils.HQQQuantizedLayer = HqqCacheLayer


class HqqCacheLayer(_Original):
    """Keys and values of one decoder layer, quantized once and then only appended to.

        The newest tokens stay in their own type until there are `residual_length` of them; then they
        are quantized and joined to the packed ones. What is packed is never quantized again, so errors
        do not add up, and reordering beams moves packed rows without loss.

        Args:
            nbits: 8, 6, 5, 4, 3, 2, 1.58 or 1.
            axis_key: 0: a group is `q_group_size` tokens of one channel, which suits keys, whose
                channels differ in size. 1: a group is `q_group_size` channels of one token and head, or
                all if it has fewer.
            axis_value: The same for values.
            q_group_size: Values that share a scale, a multiple of 8.
            residual_length: Tokens that are kept unquantized. With axis 0 only whole groups of tokens
                are quantized, so that up to a group may remain beyond it.

        Raises:
            ValueError: For any other value.

        Example:
            >>> from typing import Any

    import torch
            >>> from hqq_cpp.transformers.cache import HqqCacheLayer
            >>> layer = HqqCacheLayer(nbits=4)
            >>> keys, values = layer.update(torch.randn(1, 2, 64, 32), torch.randn(1, 2, 64, 32))
            >>> layer.get_seq_length(), layer.packed_nbytes
            (64, 5120)
    """

    replaces = _Original
    is_initialized: bool
    # Packed tokens are not cut off again; older versions of Transformers would try.
    is_croppable = False

    def __init__(
        self,
        nbits: float = 4,
        axis_key: int = 0,
        axis_value: int = 0,
        q_group_size: int = 64,
        residual_length: int = 128,
    ):
        if nbits not in states.PLANES:
            raise ValueError(
                f"[kv_cache] nbits is {nbits}; it must be one of "
                f"{', '.join(map(str, states.PLANES))}"
            )
        for name, axis in (("axis_key", axis_key), ("axis_value", axis_value)):
            if axis not in (0, 1):
                raise ValueError(
                    f"[kv_cache] {name} is {axis}; it must be 0 (groups of tokens) or 1 (groups of "
                    "channels)"
                )
        if not isinstance(q_group_size, int) or q_group_size < 8 or q_group_size % 8:
            raise ValueError(
                f"[kv_cache] q_group_size is {q_group_size}; it must be a multiple of 8, at least 8"
            )
        if not isinstance(residual_length, int) or residual_length < 0:
            raise ValueError(
                f"[kv_cache] residual_length is {residual_length}; it must be an int, at least 0"
            )
        # Past the original's __init__, which asks for the package hqq.
        super(_Original, self).__init__(nbits, axis_key, axis_value, q_group_size, residual_length)
        self._quantized_keys: PackedStates | None = None
        self._quantized_values: PackedStates | None = None
        # Tokens are packed in multiples of this.
        self._unit = 1 if axis_key == axis_value == 1 else q_group_size

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the quantized keys and values."""
        packed = (self._quantized_keys, self._quantized_values)
        return sum(states.nbytes for states in packed if states is not None)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens.

        Args:
            key_states: [batch, heads, new tokens, head_dim].
            value_states: [batch, heads, new tokens, value head_dim].

        Returns:
            Keys and values of all tokens. The new ones are exact, and so are those not yet
            quantized.
        """
        first = not self.is_initialized
        if first:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.cumulative_length += key_states.shape[-2]
        keys = self._all(self._quantized_keys, self.keys, key_states)
        values = self._all(self._quantized_values, self.values, value_states)

        recent = self.keys.shape[-2] + key_states.shape[-2]
        # The prompt is packed at once.
        count = recent if first or recent >= self.residual_length else 0
        count -= count % self._unit
        start = keys.shape[-2] - recent
        end = start + count
        if count:
            self._quantized_keys = self._append(
                self._quantized_keys, keys[..., start:end, :], self.axis_key
            )
            self._quantized_values = self._append(
                self._quantized_values, values[..., start:end, :], self.axis_value
            )
        # Copies: views would keep all keys and values in memory.
        self.keys, self.values = keys[..., end:, :].clone(), values[..., end:, :].clone()
        return keys, values

    def reset(self) -> None:
        """Forgets all tokens."""
        # Older versions of Transformers would keep the packed ones.
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()
        self._quantized_keys = self._quantized_values = None

    def _all(self, packed, recent, new):
        if packed is None:
            return torch.cat([recent, new], dim=-2) if recent.shape[-2] else new
        tokens = packed.tokens
        length = tokens + recent.shape[-2] + new.shape[-2]
        out = new.new_empty(*new.shape[:-2], length, new.shape[-1])
        states.dequantize(packed, out[..., :tokens, :])
        torch.cat([recent, new], dim=-2, out=out[..., tokens:, :])
        return out

    def _append(self, packed, states, axis):
        new = self._quantize(states, axis)
        return new if packed is None else packed.append(new)

    def _quantize(self, tensor: torch.Tensor, axis: int) -> PackedStates:
        """[batch, heads, tokens, head_dim] -> PackedStates."""
        return states.quantize(tensor, self.nbits, self.q_group_size, axis)

    def _dequantize(self, qtensor: PackedStates) -> torch.Tensor:
        """PackedStates -> [batch, heads, tokens, head_dim] in the type of the states."""
        shape = (*qtensor.scale.shape[:-2], qtensor.tokens, qtensor.head_dim)
        return states.dequantize(qtensor, qtensor.scale.new_empty(shape))

    def _select(self, function) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = function(self.keys), function(self.values)
        if self._quantized_keys is not None and self._quantized_values is not None:
            self._quantized_keys = self._quantized_keys.map(function)
            self._quantized_values = self._quantized_values.map(function)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Gives every batch row the states of row beam_idx[row]."""
        self._select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch row `repeats` times."""
        self._select(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given batch rows."""
        self._select(lambda t: t[indices, ...])
