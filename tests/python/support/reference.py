"""What hqq.cpp must compute, written a second time in NumPy from the formulas in docs/format.md and
docs/solver.md. Clear rather than fast; it shares no code with the library it checks.

Arithmetic is float32 wherever the library promises bits, float64 where it measures errors.
"""

from __future__ import annotations

import numpy as np

NBITS = (8, 6, 5, 4, 3, 2, 1.58, 1)
META_DTYPES = ("float16", "bfloat16", "float32")
METADATA_BLOCK = 128

# nbits -> bits of the low and of the high plane.
_PLANES = {8: (8, 0), 6: (4, 2), 5: (4, 1), 4: (4, 0), 3: (2, 1), 2: (2, 0), 1: (1, 0)}
_PLANE_BLOCK = 32
_TERNARY_BLOCK = 64
_TERNARY_DIGITS = 5

_F32 = np.float32
_MIN_NORMAL = _F32(2.0**-126)


def max_code(nbits) -> int:
    return 2 if nbits == 1.58 else 2 ** int(nbits) - 1


# ---- packed rows -------------------------------------------------------------------------------


def _pack_plane(codes, bits):
    """Codes below 2**bits -> bytes: 8 / bits codes a byte, the first in the lowest bits."""
    per_byte = 8 // bits
    padded = np.zeros(-(-len(codes) // per_byte) * per_byte, np.uint32)
    padded[: len(codes)] = codes
    weights = 2 ** (bits * np.arange(per_byte, dtype=np.uint32))
    return (padded.reshape(-1, per_byte) * weights).sum(axis=1).astype(np.uint8)


def _unpack_plane(data, bits, count):
    per_byte = 8 // bits
    shifts = bits * np.arange(per_byte)
    codes = (data[:, None].astype(np.uint32) >> shifts) % 2**bits
    return codes.reshape(-1)[:count].astype(np.uint8)


def _pack_ternary(codes):
    padded = np.zeros(-(-len(codes) // _TERNARY_DIGITS) * _TERNARY_DIGITS, np.uint32)
    padded[: len(codes)] = codes
    weights = 3 ** np.arange(_TERNARY_DIGITS, dtype=np.uint32)
    return (padded.reshape(-1, _TERNARY_DIGITS) * weights).sum(axis=1).astype(np.uint8)


def _unpack_ternary(data, count):
    weights = 3 ** np.arange(_TERNARY_DIGITS, dtype=np.uint32)
    return ((data[:, None] // weights) % 3).reshape(-1)[:count].astype(np.uint8)


def _block_length(nbits) -> int:
    return _TERNARY_BLOCK if nbits == 1.58 else _PLANE_BLOCK


def _block_bytes(nbits, count) -> int:
    if nbits == 1.58:
        return -(-count // _TERNARY_DIGITS)
    low, high = _PLANES[nbits]
    return -(-count * low // 8) + -(-count * high // 8)


def packed_row_bytes(nbits, cols) -> int:
    block = _block_length(nbits)
    full, rest = divmod(cols, block)
    return full * _block_bytes(nbits, block) + _block_bytes(nbits, rest)


def pack_row(codes, nbits):
    codes = np.asarray(codes, np.uint8)
    parts = [np.zeros(0, np.uint8)]
    for begin in range(0, len(codes), _block_length(nbits)):
        block = codes[begin : begin + _block_length(nbits)]
        if nbits == 1.58:
            parts.append(_pack_ternary(block))
            continue
        low, high = _PLANES[nbits]
        parts.append(_pack_plane(block % 2**low if low < 8 else block, low))
        if high:
            parts.append(_pack_plane(block >> low, high))
    return np.concatenate(parts)


def unpack_row(packed, nbits, cols):
    packed = np.asarray(packed, np.uint8)
    assert len(packed) == packed_row_bytes(nbits, cols)
    parts = [np.zeros(0, np.uint8)]
    at = 0
    for begin in range(0, cols, _block_length(nbits)):
        count = min(_block_length(nbits), cols - begin)
        block = packed[at : at + _block_bytes(nbits, count)]
        at += len(block)
        if nbits == 1.58:
            parts.append(_unpack_ternary(block, count))
            continue
        low, high = _PLANES[nbits]
        low_bytes = -(-count * low // 8)
        codes = _unpack_plane(block[:low_bytes], low, count)
        if high:
            codes = codes + (_unpack_plane(block[low_bytes:], high, count) << low)
        parts.append(codes.astype(np.uint8))
    return np.concatenate(parts)


def pack_rows(codes, nbits):
    return np.stack([pack_row(row, nbits) for row in codes])


def unpack_rows(packed, nbits, cols):
    return np.stack([unpack_row(row, nbits, cols) for row in packed])


# ---- groups ------------------------------------------------------------------------------------


class Groups:
    """Which weight of a matrix [out, in] belongs to which group.

    `index [out, in]` holds the number of every weight's group; numbers follow the row-major order
    of scale and zero, whose shape is `shape`.
    """

    def __init__(self, out_features, in_features, group_size, axis):
        if group_size is None:
            group_size = in_features if axis == 1 else out_features
        flat = np.arange(out_features * in_features).reshape(out_features, in_features)
        if axis == 1:
            per_row = -(-in_features // group_size)
            rows, cols = np.divmod(flat, in_features)
            self.index = rows * per_row + cols // group_size
            self.shape = (out_features, per_row)
            self.count = out_features * per_row
        else:
            self.count = -(-flat.size // group_size)
            self.index = flat % self.count
            whole_rows = self.count % in_features == 0
            self.shape = (self.count // in_features, in_features) if whole_rows else (1, self.count)
        self.group_size, self.axis = group_size, axis

    def reduce(self, ufunc, values, start):
        """ufunc over every group, [count]."""
        out = np.full(self.count, start, np.asarray(values).dtype)
        ufunc.at(out, self.index.reshape(-1), np.asarray(values).reshape(-1))
        return out

    def sizes(self):
        return np.bincount(self.index.reshape(-1), minlength=self.count)

    def spread(self, metadata):
        """scale or zero (any shape of `count` values) -> [out, in]."""
        return np.asarray(metadata).reshape(-1)[self.index]


# ---- 16-bit floats and 8-bit metadata ------------------------------------------------------------


def round_bf16(x):
    """float32 -> the nearest bfloat16, ties to even, as float32."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(x), x, rounded).reshape(x.shape)


def round_to(x, dtype):
    """The float32 value that storing x as `dtype` leaves; overflow gives infinity."""
    x = np.asarray(x, np.float32)
    if dtype == "float32":
        return x
    if dtype == "bfloat16":
        return round_bf16(x)
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def expand_metadata(codes, step, offset):
    """8-bit scale or zero: code * step + offset, one pair per 128 codes in row-major order."""
    codes = np.asarray(codes)
    block = np.arange(codes.size) // METADATA_BLOCK
    flat = codes.reshape(-1).astype(np.float32)
    values = flat * np.asarray(step, np.float32)[block] + np.asarray(offset, np.float32)[block]
    return values.reshape(codes.shape)


# ---- quantization with given scale and zero ------------------------------------------------------


def encode(W, scale, zero, groups, nbits):
    """Codes [out, in] of W for scale and zero as stored."""
    inv_scale = _F32(1) / np.asarray(scale, np.float32)
    with np.errstate(over="ignore"):
        q = np.asarray(W, np.float32) * groups.spread(inv_scale) + groups.spread(
            np.asarray(zero, np.float32)
        )
    return np.clip(np.rint(q), 0, max_code(nbits)).astype(np.uint8)


def dequantize(codes, scale, zero, groups, col_scale=None):
    """W_r [out, in] in float32."""
    W_r = codes.astype(np.float32) - groups.spread(np.asarray(zero, np.float32))
    W_r = W_r * groups.spread(np.asarray(scale, np.float32))
    if col_scale is not None:
        W_r = W_r * np.asarray(col_scale, np.float32)
    return W_r


# ---- solvers -------------------------------------------------------------------------------------


def smallest_scale(meta_dtype):
    return _F32(2.0**-24) if meta_dtype == "float16" else _MIN_NORMAL


def small_scale(nbits, meta_dtype):
    """Up to it a stored scale is too coarse: float16 counts in steps of 2**-24 there, and the ends of
    the range move by max_code / 2 times half of one, more than four steps of the scale."""
    return max(1, max_code(nbits) / 16) * 2.0**-24 if meta_dtype == "float16" else 0.0


def underflows(W, W_r, scale, groups, nbits, meta_dtype):
    """Whether groups with small scales spoil the matrix: their errors are above a millionth of it."""
    W = np.asarray(W, np.float64)
    small = groups.spread(scale) <= small_scale(nbits, meta_dtype)
    return np.square(W - W_r)[small].sum() > 1e-6 * np.square(W).sum()


def largest_zero(meta_dtype):
    """Beyond it a stored zero overflows (float16) or does not resolve single codes."""
    return _F32(65504) if meta_dtype == "float16" else _F32(2**24)


def minmax(W, groups, nbits, meta_dtype):
    """Scale and zero [count] of the groups' ranges, as stored.

    A group whose range is below half the smallest scale, or whose zero cannot be stored, becomes the
    constant in the middle of its range; the code of a constant is 1 with zero 0 if it is positive, else
    0 with zero 1 (0 with zero 0 for 0).
    """
    W = np.asarray(W, np.float32)
    low = groups.reduce(np.minimum, W, np.inf)
    high = groups.reduce(np.maximum, W, -np.inf)
    raw = (high - low) / _F32(max_code(nbits))
    tiny = smallest_scale(meta_dtype)
    scale = np.maximum(round_to(raw, meta_dtype), tiny)
    with np.errstate(over="ignore"):
        zero = round_to((_F32(0) - low) / scale, meta_dtype)
    middle = low * _F32(0.5) + high * _F32(0.5)
    magnitude = np.abs(middle)
    constant = np.where(magnitude == 0, _F32(1), np.maximum(round_to(magnitude, meta_dtype), tiny))
    usable = (high - low > tiny * _F32(0.5)) & (np.abs(zero) < largest_zero(meta_dtype))
    scale = np.where(usable, scale, constant)
    zero = np.where(usable, zero, np.where(middle < 0, _F32(1), _F32(0)))
    return scale, zero


def shrink(x, beta, lp_norm):
    """sign(x) * relu(|x| - |x|^(p-1) / beta)."""
    magnitude = np.abs(x)
    with np.errstate(divide="ignore"):
        power = magnitude ** _F32(lp_norm - 1)
    return np.sign(x) * np.maximum(magnitude - power * _F32(1 / beta), _F32(0))


def solve_hqq(W, groups, nbits, round_zero=None, lp_norm=0.7, beta=10.0, iterations=20, kappa=1.0):
    """Upstream's solver in float32: the zero only, stopped for the whole matrix together.

    Returns (codes [out, in], scale [count], zero [count]). A step uses the zero of the step before;
    when the mean error stops falling, the zero of that last step is kept. beta grows by `kappa` a
    step in upstream's master branch; its releases never apply it.
    """
    if round_zero is None:
        round_zero = nbits == 4
    W = np.asarray(W, np.float32)
    top = _F32(max_code(nbits))
    low = groups.reduce(np.minimum, W, np.inf)
    width = groups.reduce(np.maximum, W, -np.inf) - low
    with np.errstate(divide="ignore", over="ignore"):
        # A torch number / tensor multiplies by the reciprocal.
        inv_scale = np.where(width <= _F32(1e-4), _F32(1), _F32(1) / width * top)
    inv_scale = np.minimum(inv_scale, _F32(2e4))
    zero = -low * inv_scale
    if round_zero:
        zero = np.rint(zero)

    sizes = groups.sizes()
    inv = groups.spread(inv_scale)
    best = np.inf
    for _ in range(iterations):
        z = groups.spread(zero)
        q = np.clip(np.rint(W * inv + z), 0, top)
        r = W - (q - z) / inv
        target = W - shrink(r, beta, lp_norm)
        total = groups.reduce(np.add, (q - target * inv).astype(np.float64), 0.0)
        zero = (total / sizes).astype(np.float32)
        beta *= kappa
        error = np.abs(r).mean(dtype=np.float64)
        if not error < best:
            break
        best = error
    codes = np.clip(np.rint(W * inv + groups.spread(zero)), 0, top).astype(np.uint8)
    return codes, _F32(1) / inv_scale, zero


# ---- errors --------------------------------------------------------------------------------------


def error_stats(W, W_r):
    """mean_abs_error, rms_error, max_abs_error and relative_error of W_r in float64."""
    W = np.asarray(W, np.float64)
    r = W - np.asarray(W_r, np.float64)
    norm = np.sqrt((W * W).sum())
    return {
        "mean_abs_error": np.abs(r).mean(),
        "rms_error": np.sqrt((r * r).mean()),
        "max_abs_error": np.abs(r).max(),
        "relative_error": np.sqrt((r * r).sum()) / norm if norm > 0 else 0.0,
    }


def group_errors(W, W_r, groups, lp_norm=2.0, importance=None):
    """Sum of importance * |W - W_r|^lp_norm of every group, [count], in float64."""
    r = np.abs(np.asarray(W, np.float64) - np.asarray(W_r, np.float64)) ** lp_norm
    if importance is not None:
        r = r * np.asarray(importance, np.float64)
    return groups.reduce(np.add, r, 0.0)
