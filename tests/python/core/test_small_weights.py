"""Weights whose scales float16 cannot hold: refused where they spoil the matrix, as those that are too
large; never worse than large weights otherwise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hqq_cpp
import reference


@pytest.fixture
def W():
    return (np.random.default_rng(5).standard_t(4, (24, 150)) * 0.03).astype(np.float32)


layouts = st.fixed_dictionaries(
    {
        "nbits": st.sampled_from(reference.NBITS),
        "axis": st.sampled_from((0, 1)),
        "group_size": st.one_of(st.none(), st.integers(1, 40).map(lambda n: 8 * n)),
    }
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.integers(0, 1000),
    layouts,
    st.floats(-12, -3),
    st.sampled_from(("minmax", "joint")),
    st.sampled_from(("none", "sinkhorn")),
    st.sampled_from(reference.META_DTYPES),
)
def test_small_weights_are_as_good_as_large_ones_or_refused(
    seed, layout, exponent, solver, balance, meta_dtype
):
    W = np.random.default_rng(seed).standard_normal((16, 160)).astype(np.float32)
    config = {**layout, "solver": solver, "balance": balance, "meta_dtype": meta_dtype}
    expected = hqq_cpp.quantize(W, config, stats=True)[1].relative_error
    small = (W * np.float64(10.0) ** exponent).astype(np.float32)
    try:
        _, stats = hqq_cpp.quantize(small, config, stats=True)
    except ValueError as error:
        assert meta_dtype == "float16" and exponent < -4
        assert "too small for float16; use meta_dtype bfloat16 or float32" in str(error)
        return
    assert stats.relative_error < 2 * expected


@pytest.mark.parametrize("solver", ("minmax", "joint"))
@pytest.mark.parametrize("balance", ("none", "sinkhorn"))
def test_underflow_of_float16_is_refused(W, solver, balance):
    config = {"solver": solver, "balance": balance, "nbits": 4}
    refusal = r"^\[fc\] the scale of .* groups, of which row 0, group 0"
    with pytest.raises(ValueError, match=refusal):
        hqq_cpp.quantize(W * np.float32(1e-7), config, name="fc")
    for wide in ({"meta_dtype": "bfloat16"}, {"meta_dtype": "float32"}, {"quant_scale": True}):
        _, stats = hqq_cpp.quantize(W * np.float32(1e-7), {**config, **wide}, stats=True)
        expected = hqq_cpp.quantize(W, {**config, **wide}, stats=True)[1]
        assert stats.relative_error == pytest.approx(expected.relative_error, rel=0.02)


def test_dead_rows_beside_others_are_not_refused(W):
    dead = W.copy()
    dead[::2] *= np.float32(1e-9)
    dead[5] = 0
    expected = hqq_cpp.quantize(W, {}, stats=True)[1].relative_error
    assert hqq_cpp.quantize(dead, {}, stats=True)[1].relative_error < 1.2 * expected
