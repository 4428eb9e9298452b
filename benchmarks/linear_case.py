"""What a benchmark of y = x W^T gives to a peer (Case) and gets back (Job)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

GROUP = 64
# Up to here a product reads the weights once from memory, as decoding does; with more rows it computes.
DECODE_ROWS = 8
MOST_COPIES = 256


@dataclass(frozen=True)
class Case:
    """One layer [n, k] and m rows of x.

    The weights repeat after 256 rows: no kernel notices, and slow quantizers finish soon.
    """

    n: int
    k: int
    m: int
    threads: int
    cold_bytes: int
    single_copy: bool = False

    @cached_property
    def weight_rows(self) -> np.ndarray:
        rows = math.gcd(self.n, 256)
        return 0.02 * np.random.default_rng(0).standard_normal((rows, self.k), dtype=np.float32)

    @cached_property
    def weight(self) -> np.ndarray:
        return self.repeat(self.weight_rows)

    @cached_property
    def x(self) -> np.ndarray:
        return np.random.default_rng(1).standard_normal((self.m, self.k), dtype=np.float32)

    def repeat(self, rows: np.ndarray) -> np.ndarray:
        """What belongs to the rows of weight_rows, for all n rows."""
        times = self.n // len(self.weight_rows)
        return np.ascontiguousarray(np.tile(rows, (times,) + (1,) * (rows.ndim - 1)))

    def copies(self, nbytes: int) -> int:
        """Copies of weights of this size: few rows take turns through more memory than caches hold."""
        if self.m > DECODE_ROWS or self.single_copy:
            return 1
        return min(MOST_COPIES, max(2, math.ceil(self.cold_bytes / nbytes)))

    def error(self, y: Any, dense_rows: np.ndarray) -> float:
        """Relative error of y [m, n] against the product with the same quantized weights."""
        expected = np.tile(
            self.x.astype(np.float64) @ dense_rows.T, self.n // len(self.weight_rows)
        )
        got = np.asarray(y, np.float64).reshape(expected.shape)
        return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@dataclass
class Job:
    """A peer that is ready: run() computes one product with each of the copies."""

    run: Callable[[], Any]
    copies: int
    nbytes: int  # that one product reads
    error: float | None = None
    format_nbytes: int | None = None  # of the same weights in format 1
    keep: list = field(default_factory=list)  # memory that run() uses


def round_to_nearest(w: np.ndarray, bits: int, zero: str):
    """codes uint8 [rows, k], scale and zero float32 [rows, k / GROUP].

    zero is "float", "int" (a code), or "middle" (2^(bits - 1) everywhere: symmetric).
    """
    groups = w.reshape(len(w), -1, GROUP)
    most = 2**bits - 1
    if zero == "middle":
        scale = np.abs(groups).max(-1) / (most / 2)
        zeros = np.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = groups.min(-1), groups.max(-1)
        scale = (high - low) / most
        zeros = -low / scale
        if zero == "int":
            zeros = np.clip(np.round(zeros), 0, most)
    codes = np.clip(np.round(groups / scale[..., None] + zeros[..., None]), 0, most)
    return codes.astype(np.uint8).reshape(w.shape), scale, zeros


def dense_rows(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    groups = codes.reshape(*scale.shape, GROUP).astype(np.float32)
    return ((groups - zero[..., None]) * scale[..., None]).reshape(codes.shape)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of the last axis into bytes, the first in the lowest bits."""
    per_byte = 8 // bits
    groups = codes.astype(np.uint8).reshape(*codes.shape[:-1], -1, per_byte)
    return (groups << (bits * np.arange(per_byte, dtype=np.uint8))).sum(-1, dtype=np.uint8)
