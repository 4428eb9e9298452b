"""Sizes: bytes of layers, copies that overflow a cache, the Llama whose speed is measured. Plain arithmetic."""

from __future__ import annotations

import math
from typing import NamedTuple

GROUP = 64
WIDTHS = (8, 6, 5, 4, 3, 2, 1.58, 1)
METADATA_BITS = 32  # of a group: scale and zero in 16 bits each
TERNARY_CODES, TERNARY_BYTES = 64, 13

# Weights that take turns fill the cache this many times over, so that none is read from it.
CACHE_FACTOR = 4
MOST_COPIES = 256


def code_bits(nbits: float) -> float:
    """Bits of a code in format 1, for rows of whole blocks."""
    return 8 * TERNARY_BYTES / TERNARY_CODES if nbits == 1.58 else nbits


def bits_per_weight(nbits: float) -> float:
    """With scale and zero in groups of 64."""
    return code_bits(nbits) + METADATA_BITS / GROUP


def layer_bytes(n: int, k: int, nbits: float) -> int:
    """Bytes of a layer [n, k] in format 1, axis 1; k is a multiple of 64."""
    return round(n * k * bits_per_weight(nbits) / 8)


def copies(nbytes: int, cache_bytes: int, memory_bytes: int) -> int:
    """Copies of a weight that overflow the cache and fit into a share of memory; at least 2."""
    wanted = math.ceil(CACHE_FACTOR * cache_bytes / nbytes)
    return max(2, min(wanted, memory_bytes // nbytes, MOST_COPIES))


def bus_bytes_per_second(clock_khz: int, bus_bits: int) -> float:
    """Peak of a memory that moves data at both edges of its clock."""
    return 2 * clock_khz * 1e3 * bus_bits / 8


class Llama(NamedTuple):
    """Sizes of a Llama; the default is Llama-3-8B."""

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 128256

    def linear_shapes(self) -> list[tuple[int, int]]:
        """[out, in] of every matrix that a token is multiplied with."""
        kv = self.hidden // self.heads * self.kv_heads
        layer = [(self.hidden, self.hidden), (kv, self.hidden), (kv, self.hidden)]
        layer += [(self.hidden, self.hidden)]
        layer += [(self.intermediate, self.hidden)] * 2 + [(self.hidden, self.intermediate)]
        return layer * self.layers + [(self.vocab, self.hidden)]

    def linear_weights(self) -> int:
        return sum(n * k for n, k in self.linear_shapes())

    def token_bytes(self, nbits: float) -> int:
        """Bytes of weights that a token reads, all matrices quantized."""
        return sum(layer_bytes(n, k, nbits) for n, k in self.linear_shapes())


LLAMA_3_8B = Llama()
SMALL_LLAMA = Llama(hidden=256, intermediate=512, layers=2, heads=4, kv_heads=2, vocab=512)
