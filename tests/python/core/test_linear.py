"""hqq_cpp.linear and tiles, against NumPy and the bounds of docs/kernels.md."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hqq_cpp
import reference
from weight_metadata import metadata

EPS = float(np.finfo(np.float32).eps)
# Unit roundoff of the type of y.
ROUNDOFF = {np.float16: 2.0**-11, np.float32: 2.0**-24, np.float64: 2.0**-24}
BLOCK = 64


def bounds(q, x, y):
    """Largest errors of y in the exact and in the fast mode (docs/kernels.md, "Errors")."""
    scale, zero, col_scale = metadata(q)
    codes = q.codes().astype(np.float64)
    columns = q.in_features
    # exact: every term of sum q x - z sum x passes at most columns + 8 roundings
    terms = np.abs(x * col_scale) @ (np.abs(scale) * (codes + np.abs(zero))).T
    subnormal = 2.0**-24 if x.dtype == np.float16 else 2.0**-126
    exact = (columns + 8) * EPS * terms + 2 * ROUNDOFF[x.dtype.type] * np.abs(y) + subnormal
    # fast: x, or x * scale with axis 0, rounded to steps of the largest of its block / 127
    group = columns if q.axis == 0 else min(q.group_size or columns, columns)
    starts = [
        start
        for first in range(0, columns, group)
        for start in range(first, min(first + group, columns), 8)
    ]
    edges = sorted(set(starts) | {columns})
    fast = exact.copy()
    centered = np.abs(codes - zero)
    for n in range(q.out_features):
        factor = scale[n] if q.axis == 0 else np.ones(columns)
        weight = centered[n] if q.axis == 0 else centered[n] * np.abs(scale[n])
        values = np.abs(x.astype(np.float64) * col_scale * factor)
        # Blocks are at most 64 columns: the largest of 128 around covers any division.
        for a, b in itertools.pairwise(edges):
            near = values[:, max(0, a - BLOCK) : b + BLOCK].max(axis=1, initial=0)
            fast[:, n] += near / 127 * 0.5001 * weight[a:b].sum()
    return exact, fast


def check(q, x, bias=None, threads=0):
    W_r = np.asarray(hqq_cpp.dequantize(q), np.float64)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float64) @ W_r.T + (0 if bias is None else bias.astype(np.float64))
    exact, fast = bounds(q, x, expected)
    weights = [q]
    group = q.group_size or q.out_features
    if q.axis == 1 or (group % 16 == 0 and q.out_features % group == 0):
        weights.append(q.tile())
    for weight in weights:
        for mode, bound in (("exact", exact), ("fast", fast)):
            y = hqq_cpp.linear(x, weight, bias, mode=mode, threads=threads)
            assert y.dtype == x.dtype and y.shape == expected.shape
            error = np.abs(y.astype(np.float64) - expected)
            assert (error <= bound).all(), (mode, (error / bound).max(), q)
    return weights


CASES = [
    # out, in, rows, group_size, axis
    (1, 32, 1, 32, 1),
    (17, 100, 3, 8, 1),
    (33, 200, 2, 24, 1),
    (16, 96, 4, 96, 1),
    (3, 4160, 1, 64, 1),
    (20, 161, 9, None, 1),
    (40, 300, 5, 128, 1),
    (64, 96, 1, 16, 0),
    (64, 100, 6, 32, 0),
    (40, 96, 2, 8, 0),
    (30, 64, 3, 16, 0),
    (257, 64, 33, 40, 1),
]


@pytest.mark.parametrize("nbits", reference.NBITS)
@pytest.mark.parametrize("shape", CASES)
def test_against_numpy(rng, nbits, shape):
    out, columns, rows, group_size, axis = shape
    W = rng.standard_normal((out, columns), dtype=np.float32)
    settings = {"nbits": nbits, "group_size": group_size, "axis": axis, "solver": "minmax"}
    q = hqq_cpp.quantize(W, {**settings, "balance": "none"})
    x = rng.standard_normal((rows, columns), dtype=np.float32)
    check(q, x, rng.standard_normal(out, dtype=np.float32))


@given(
    nbits=st.sampled_from(reference.NBITS),
    shape=st.sampled_from(CASES),
    meta_dtype=st.sampled_from(reference.META_DTYPES),
    quant=st.booleans(),
    balance=st.sampled_from(["none", "sinkhorn"]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    kind=st.sampled_from(["normal", "outlier", "zeros", "tiny"]),
    seed=st.integers(0, 1000),
)
def test_any_settings(nbits, shape, meta_dtype, quant, balance, dtype, kind, seed):
    rng = np.random.default_rng(seed)
    out, columns, rows, group_size, axis = shape
    W = rng.standard_normal((out, columns)).astype(np.float32)
    q = hqq_cpp.quantize(
        W,
        {
            "nbits": nbits, "group_size": group_size, "axis": axis, "meta_dtype": meta_dtype,
            "quant_scale": quant, "quant_zero": quant, "balance": balance, "solver": "minmax",
        },
    )  # fmt: skip
    x = rng.standard_normal((rows, columns))
    if kind == "outlier":
        x[rng.integers(rows), rng.integers(columns)] = 500
    elif kind == "zeros":
        x[rng.integers(rows)] = 0
    elif kind == "tiny":
        x *= 1e-6
    check(q, x.astype(dtype), threads=1 + seed % 3)


@pytest.mark.parametrize("nbits", reference.NBITS)
def test_threads_change_nothing(rng, nbits):
    for axis in (1, 0):
        W = rng.standard_normal((320, 128), dtype=np.float32)
        q = hqq_cpp.quantize(W, {"nbits": nbits, "axis": axis, "group_size": 32}).tile()
        for rows in (1, 3, 20, 300):
            x = rng.standard_normal((rows, 128), dtype=np.float32)
            for mode in ("fast", "exact"):
                one = hqq_cpp.linear(x, q, mode=mode, threads=1)
                for threads in (2, 3, 8):
                    y = hqq_cpp.linear(x, q, mode=mode, threads=threads)
                    assert np.array_equal(one, y), (axis, rows, mode, threads)


def test_rows_apart(rng):
    q = hqq_cpp.quantize(rng.standard_normal((24, 64), dtype=np.float32), {"group_size": 32})
    x = rng.standard_normal((5, 100), dtype=np.float32)
    for part in (x[:, 10:74], x[::2, :64], np.asfortranarray(x)[:, :64], x[:0, :64]):
        y = hqq_cpp.linear(part, q.tile())
        assert np.array_equal(y, hqq_cpp.linear(np.ascontiguousarray(part), q.tile()))


def test_nan_and_inf_reach_y(rng):
    q = hqq_cpp.quantize(rng.standard_normal((16, 128), dtype=np.float32), {"group_size": 64})
    for bad in (np.nan, np.inf):
        for mode in ("fast", "exact"):
            x = np.ones((2, 128), np.float32)
            x[1, 100] = bad
            y = hqq_cpp.linear(x, q.tile(), mode=mode)
            assert np.isfinite(y[0]).all() and not np.isfinite(y[1]).any()


def test_the_mode_of_the_environment(rng, tmp_path):
    np.save(tmp_path / "W.npy", rng.standard_normal((16, 64), dtype=np.float32))
    code = (
        "import sys, numpy as np, hqq_cpp\n"
        "W = np.load(sys.argv[1])\n"
        "q = hqq_cpp.quantize(W, {'nbits': 4}).tile()\n"
        "sys.stdout.buffer.write(hqq_cpp.linear(W[:3], q, mode=sys.argv[2]).tobytes())\n"
    )

    def run(environment, mode):
        command = [sys.executable, "-c", code, str(tmp_path / "W.npy"), mode]
        env = {k: v for k, v in os.environ.items() if k != "HQQ_CPU_MODE"} | environment
        return subprocess.run(command, env=env, capture_output=True)

    fast, exact = run({}, "fast").stdout, run({}, "exact").stdout
    assert len(fast) == 3 * 16 * 4 and fast != exact
    assert run({}, "auto").stdout == run({"HQQ_CPU_MODE": "fast"}, "auto").stdout == fast
    assert run({"HQQ_CPU_MODE": "exact"}, "auto").stdout == exact
    assert run({"HQQ_CPU_MODE": "exact"}, "fast").stdout == fast
    wrong = run({"HQQ_CPU_MODE": "quick"}, "auto")
    assert wrong.returncode != 0
    assert b"[linear] HQQ_CPU_MODE is 'quick'; it must be fast or exact" in wrong.stderr


def test_linear_refuses(rng):
    q = hqq_cpp.quantize(rng.standard_normal((16, 64), dtype=np.float32), {"nbits": 4})
    x = np.zeros((2, 64), np.float32)
    for weight in (q, q.tile()):
        with pytest.raises(ValueError, match="x has 65 columns; the layer takes 64"):
            hqq_cpp.linear(np.zeros((2, 65), np.float32), weight)
        with pytest.raises(ValueError, match="bias has 15 values; the layer has 16"):
            hqq_cpp.linear(x, weight, np.zeros(15))
        with pytest.raises(ValueError, match="mode is 'quick'; it must be auto, fast or exact"):
            hqq_cpp.linear(x, weight, mode="quick")
        with pytest.raises(ValueError, match="threads is -1"):
            hqq_cpp.linear(x, weight, threads=-1)
        with pytest.raises(ValueError, match="int32"):
            hqq_cpp.linear(np.zeros((2, 64), np.int32), weight)


def tile_in_numpy(codes, nbits):
    """The codes of a tile [16, columns] as docs/kernels.md draws them: [units, 64 * bits]."""
    bits = 2 if nbits == 1.58 else nbits
    columns = -(-codes.shape[1] // 32) * 32
    padded = np.zeros((16, columns), np.uint8)
    padded[: codes.shape[0], : codes.shape[1]] = codes
    # [units, 8 fields, 16 rows, 4 columns]
    fields = padded.reshape(16, -1, 8, 4).transpose(1, 2, 0, 3).reshape(-1, 8, 64)
    vectors = np.zeros((len(fields), bits, 64), np.uint8)
    whole = {8: 1, 4: 2, 2: 4, 1: 8, 3: 2, 5: 1, 6: 1}[bits]
    for v in range(bits):
        for slot in range(whole):
            vectors[:, v] |= fields[:, v * whole + slot] << (slot * bits)
    # field: (vector, its bit, number of bits) from the field's lowest bit on
    spread = {
        3: {6: [(0, 6, 2), (2, 6, 1)], 7: [(1, 6, 2), (2, 7, 1)]},
        5: {
            5: [(0, 5, 3), (3, 5, 2)],
            6: [(1, 5, 3), (4, 5, 2)],
            7: [(2, 5, 3), (3, 7, 1), (4, 7, 1)],
        },
        6: {6: [(0, 6, 2), (1, 6, 2), (2, 6, 2)], 7: [(3, 6, 2), (4, 6, 2), (5, 6, 2)]},
    }
    for field, pieces in spread.get(bits, {}).items():
        done = 0
        for vector, bit, count in pieces:
            piece = fields[:, field] >> done & (2**count - 1)
            vectors[:, vector] |= piece << bit
            done += count
    return vectors.reshape(len(fields), -1)


@pytest.mark.parametrize("nbits", reference.NBITS)
def test_tiles_are_as_drawn(rng, nbits):
    W = rng.standard_normal((40, 100), dtype=np.float32)
    q = hqq_cpp.quantize(W, {"nbits": nbits, "group_size": 32, "balance": "none"})
    t = q.tile()
    codes, scale = q.codes(), q.scale.numpy()
    for tile in range(3):
        rows = slice(16 * tile, 16 * tile + 16)
        assert np.array_equal(t.W_q.numpy()[tile], tile_in_numpy(codes[rows], nbits))
        stored = t.scale.numpy()[tile].T
        assert np.array_equal(stored[: len(scale[rows])], scale[rows])
        assert not stored[len(scale[rows]) :].any()
    again = t.untile()
    for name, tensor in q.tensors().items():
        assert np.array_equal(again.tensors()[name].numpy(), tensor.numpy()), name


def test_tiled_tensor(rng):
    W = rng.standard_normal((64, 96), dtype=np.float32)
    q = hqq_cpp.quantize(W, {"nbits": 3, "group_size": 32, "quant_zero": True})
    t = q.tile()
    assert t.shape == q.shape and t.config == q.config and t.nbytes == q.nbytes
    rows = [5, 63, 5, 0]
    assert np.array_equal(t.dequantize_rows(rows), hqq_cpp.dequantize(q)[rows])
    for bad in (-1, 64):
        with pytest.raises(ValueError, match=f"row {bad} does not exist; W has 64 rows"):
            t.dequantize_rows([bad])
    made = hqq_cpp.TiledTensor.from_tensors(t.tensors(), t.config, t.shape)
    x = rng.standard_normal((2, 96), dtype=np.float32)
    assert np.array_equal(hqq_cpp.linear(x, made), hqq_cpp.linear(x, t))
    wrong = t.tensors() | {"W_q": q.W_q}
    with pytest.raises(hqq_cpp.FormatError, match=r"tiled W_q is uint8 \[64, 36\]; it must be"):
        hqq_cpp.TiledTensor.from_tensors(wrong, t.config, t.shape)
    columns = hqq_cpp.quantize(W, {"nbits": 3, "axis": 0, "group_size": 24, "balance": "none"})
    with pytest.raises(ValueError, match="multiple of 16 that divides out_features"):
        columns.tile()
