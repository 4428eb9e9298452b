"""hqq_cpp.quantize and dequantize against the NumPy reference, and properties of any matrix."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hqq_cpp
import reference
from reference import Groups

GROUP_SIZES = (8, 64, 72, None)
# Neither side is a multiple of any group size: tails for both axes.
SHAPE = (37, 150)


def settings_of(nbits, group_size, axis, **more):
    base = {"nbits": nbits, "group_size": group_size, "axis": axis, "balance": "none"}
    return {**base, **more}


def floats(tensor):
    """scale or zero as float32, [count]."""
    return np.asarray(tensor).astype(np.float32).reshape(-1)


def metadata(q):
    """(scale, zero) as they are read back, [count]."""
    values = []
    for name in ("scale", "zero"):
        stored = getattr(q, name)
        if getattr(q, name + "_step") is None:
            values.append(floats(stored))
        else:
            step, offset = (np.asarray(getattr(q, name + part)) for part in ("_step", "_offset"))
            values.append(reference.expand_metadata(np.asarray(stored), step, offset).reshape(-1))
    return values


def assert_same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape
    differ = np.argwhere(a != b)
    assert a.tobytes() == b.tobytes(), f"{len(differ)} of {a.size} differ, first at {differ[:1]}"


def check_codes(W, q, groups, col_scale=None):
    """Codes, packing and W_r that follow from the stored scale and zero, to the bit."""
    scale, zero = metadata(q)
    balanced = np.asarray(W, np.float32)
    if col_scale is not None:
        balanced = balanced * (np.float32(1) / col_scale)
    codes = reference.encode(balanced, scale, zero, groups, q.nbits)
    assert_same_bits(q.codes(), codes)
    assert_same_bits(q.W_q, reference.pack_rows(codes, q.nbits))
    W_r = reference.dequantize(codes, scale, zero, groups, col_scale)
    assert_same_bits(hqq_cpp.dequantize(q), W_r)
    return W_r


def check_minmax(W, q, groups, meta_dtype):
    scale, zero = reference.minmax(W, groups, q.nbits, meta_dtype)
    assert_same_bits(floats(q.scale), scale)
    assert_same_bits(floats(q.zero), zero)
    assert np.asarray(q.scale).shape == groups.shape
    check_codes(W, q, groups)


# ---- examples ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def W():
    rng = np.random.default_rng(5)
    return (rng.standard_t(4, SHAPE) * 0.03).astype(np.float32)


@pytest.mark.parametrize("nbits", reference.NBITS)
@pytest.mark.parametrize("cols", (1, 7, 31, 32, 33, 63, 64, 65, 130, 257))
def test_packed_rows(nbits, cols):
    codes = np.random.default_rng(cols).integers(0, reference.max_code(nbits) + 1, (3, cols))
    packed = reference.pack_rows(codes.astype(np.uint8), nbits)
    assert packed.shape[1] == reference.packed_row_bytes(nbits, cols)
    ones = np.ones((3, 1), np.float32)
    config = settings_of(nbits, None, 1, meta_dtype="float32")
    tensors = {"W_q": packed, "scale": ones, "zero": ones}
    q = hqq_cpp.QuantizedTensor.from_tensors(tensors, config, (3, cols))
    assert_same_bits(q.codes(), codes.astype(np.uint8))
    assert_same_bits(reference.unpack_rows(packed, nbits, cols), codes.astype(np.uint8))


@pytest.mark.parametrize("nbits", reference.NBITS)
def test_packed_rows_of_another_length_are_refused(nbits):
    ones = np.ones((3, 1), np.float32)
    tensors = {"W_q": np.zeros((3, 130), np.uint8), "scale": ones, "zero": ones}
    config = settings_of(nbits, None, 1, meta_dtype="float32")
    with pytest.raises(hqq_cpp.FormatError, match=r"W_q is uint8 \[3, 130\]; it must"):
        hqq_cpp.QuantizedTensor.from_tensors(tensors, config, (3, 129 if nbits == 8 else 130))


@pytest.mark.parametrize("meta_dtype", reference.META_DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("axis", (0, 1))
@pytest.mark.parametrize("nbits", reference.NBITS)
def test_minmax_is_exact(W, nbits, axis, group_size, meta_dtype):
    config = settings_of(nbits, group_size, axis, solver="minmax", meta_dtype=meta_dtype)
    q, stats = hqq_cpp.quantize(W, config, stats=True)
    groups = Groups(*SHAPE, group_size, axis)
    check_minmax(W, q, groups, meta_dtype)
    for name, value in reference.error_stats(W, hqq_cpp.dequantize(q)).items():
        # Residuals are float32 differences: a relative 2^-24 of each.
        assert getattr(stats, name) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float64"))
@pytest.mark.parametrize("axis", (0, 1))
def test_input_types_are_read_exactly(W, axis, dtype):
    if dtype == "bfloat16":
        torch = pytest.importorskip("torch")
        given = torch.from_numpy(W).to(torch.bfloat16)
        W = reference.round_bf16(W)
        assert_same_bits(given.float().numpy(), W)
    else:
        # float64 weights are rounded to float32 first.
        given = W.astype(dtype) * (1 if dtype == "float16" else np.float64(1 + 1e-9))
        W = given.astype(np.float32)
    q = hqq_cpp.quantize(given, settings_of(4, 64, axis, solver="minmax"))
    check_minmax(W, q, Groups(*SHAPE, 64, axis), "float16")


@pytest.mark.parametrize("group_size", (152, 10**6, 2**40))
@pytest.mark.parametrize("axis", (0, 1))
def test_groups_longer_than_the_matrix(W, axis, group_size):
    q = hqq_cpp.quantize(W, settings_of(4, group_size, axis, solver="minmax"))
    check_minmax(W, q, Groups(*SHAPE, group_size, axis), "float16")


@pytest.mark.parametrize("solver", ("hqq", "joint"))
@pytest.mark.parametrize("axis", (0, 1))
@pytest.mark.parametrize("nbits", reference.NBITS)
def test_codes_follow_from_stored_metadata(W, nbits, axis, solver):
    q = hqq_cpp.quantize(W, settings_of(nbits, 64, axis, solver=solver))
    check_codes(W, q, Groups(*SHAPE, 64, axis))


@pytest.mark.parametrize("quantized", (("scale",), ("zero",), ("scale", "zero")))
@pytest.mark.parametrize("solver", ("minmax", "hqq", "joint"))
@pytest.mark.parametrize("axis", (0, 1))
def test_eight_bit_metadata(W, axis, solver, quantized):
    flags = {"quant_" + name: True for name in quantized}
    config = settings_of(4, 8, axis, solver=solver, meta_dtype="float32")
    q = hqq_cpp.quantize(W, {**config, **flags})
    groups = Groups(*SHAPE, 8, axis)
    check_codes(W, q, groups)
    plain = hqq_cpp.quantize(W, config)
    blocks = -(-groups.count // reference.METADATA_BLOCK)
    for name in quantized:
        step = np.asarray(getattr(q, name + "_step"))
        assert step.shape == np.asarray(getattr(q, name + "_offset")).shape == (blocks,)
        if name == "zero" and "scale" in quantized:
            continue  # refitted to the scales that rounding left
        # Half a step, and a rounding of the sum.
        exact = floats(getattr(plain, name))
        read = dict(zip(("scale", "zero"), metadata(q), strict=True))[name]
        bound = 0.5 * np.repeat(step, reference.METADATA_BLOCK)[: groups.count]
        assert (np.abs(read - exact) <= bound * (1 + 1e-5) + np.abs(exact) * 1e-6).all()


@pytest.mark.parametrize("meta_dtype", reference.META_DTYPES)
@pytest.mark.parametrize("axis", (0, 1))
def test_column_scales(W, axis, meta_dtype):
    config = settings_of(3, 64, axis, balance="sinkhorn", meta_dtype=meta_dtype)
    q = hqq_cpp.quantize(W, config)
    col_scale = floats(q.col_scale)
    assert col_scale.shape == (SHAPE[1],) and (col_scale > 0).all()
    check_codes(W, q, Groups(*SHAPE, 64, axis), col_scale)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float64"))
def test_dequantized_types_are_rounded_once(W, dtype):
    q = hqq_cpp.quantize(W, settings_of(4, 64, 1))
    exact = hqq_cpp.dequantize(q)
    # bfloat16 arrives as a Tensor, which NumPy sees as float32.
    rounded = np.asarray(hqq_cpp.dequantize(q, dtype))
    expected = exact if dtype == "float64" else reference.round_to(exact, dtype)
    assert_same_bits(rounded.astype(np.float32), expected)


@pytest.mark.parametrize("nbits", reference.NBITS)
@pytest.mark.parametrize("axis", (0, 1))
def test_hqq_solver_agrees(W, axis, nbits):
    config = settings_of(nbits, 64, axis, solver="hqq", meta_dtype="float32")
    q = hqq_cpp.quantize(W, config)
    groups = Groups(*SHAPE, 64, axis)
    codes, scale, zero = reference.solve_hqq(W, groups, nbits)
    assert np.mean(q.codes() == codes) >= 0.999
    W_r = reference.dequantize(codes, scale, zero, groups)
    expected = reference.error_stats(W, W_r)["mean_abs_error"]
    found = reference.error_stats(W, hqq_cpp.dequantize(q))["mean_abs_error"]
    assert found == pytest.approx(expected, rel=1e-3)


# ---- any matrix ----------------------------------------------------------------------------------

KINDS = (
    "gauss",
    "constant",
    "zeros",
    "subnormal",
    "outlier",
    "alternating",
    "offset",
    "large",
    "sparse",
)


def make_matrix(kind, rows, cols, seed):
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((rows, cols)).astype(np.float32)
    if kind == "constant":
        W[:] = W[0, 0]
    elif kind == "zeros":
        W[:] = rng.choice([0.0, -0.0], W.shape)
    elif kind == "subnormal":
        W *= np.float32(1e-41)
    elif kind == "outlier":
        W *= np.float32(1e-3)
        W[rng.integers(rows), rng.integers(cols)] = 1e4
    elif kind == "alternating":
        W = np.where(np.arange(cols) % 2 == 0, np.abs(W), -np.abs(W)).astype(np.float32)
    elif kind == "offset":
        W = (W * np.float32(1e-3) + np.float32(300)).astype(np.float32)
    elif kind == "large":
        W *= np.float32(1e30)
    elif kind == "sparse":
        W *= rng.random(W.shape) < 0.05
    return W


@st.composite
def matrices(draw, kinds=KINDS):
    rows, cols = draw(st.integers(1, 70)), draw(st.integers(1, 300))
    return make_matrix(draw(st.sampled_from(kinds)), rows, cols, draw(st.integers(0, 2**32 - 1)))


layouts = st.fixed_dictionaries(
    {
        "nbits": st.sampled_from(reference.NBITS),
        "axis": st.sampled_from((0, 1)),
        "group_size": st.one_of(st.none(), st.integers(1, 40).map(lambda n: 8 * n)),
    }
)
float_metadata = st.sampled_from(("bfloat16", "float32"))
properties = settings(max_examples=120, deadline=None, derandomize=True)


@properties
@given(matrices(), layouts, st.sampled_from(reference.META_DTYPES))
@example(np.float32([[0.0]]), {"nbits": 1, "axis": 1, "group_size": 8}, "float16")
@example(np.float32([[1e-41, 2e-41]]), {"nbits": 4, "axis": 0, "group_size": 8}, "float16")
@example(np.float32([[1e-9] * 8 + [1, 2]]), {"nbits": 4, "axis": 1, "group_size": 8}, "float16")
def test_minmax_of_any_matrix_is_exact(W, layout, meta_dtype):
    groups = Groups(*W.shape, layout["group_size"], layout["axis"])
    config = {**layout, "solver": "minmax", "balance": "none", "meta_dtype": meta_dtype}
    scale, zero = reference.minmax(W, groups, layout["nbits"], meta_dtype)
    if not np.isfinite(scale).all():
        with pytest.raises(ValueError, match="does not fit float16"):
            hqq_cpp.quantize(W, config)
        return
    codes = reference.encode(W, scale, zero, groups, layout["nbits"])
    W_r = reference.dequantize(codes, scale, zero, groups)
    if reference.underflows(W, W_r, scale, groups, layout["nbits"], meta_dtype):
        with pytest.raises(ValueError, match="too small for float16; use meta_dtype bfloat16"):
            hqq_cpp.quantize(W, config)
        return
    check_minmax(W, hqq_cpp.quantize(W, config), groups, meta_dtype)


@properties
@given(
    matrices(),
    layouts,
    st.sampled_from(("minmax", "hqq", "joint")),
    st.sampled_from(("none", "sinkhorn")),
    float_metadata,
    st.booleans(),
    st.booleans(),
)
def test_results_are_finite(W, layout, solver, balance, meta_dtype, quant_scale, quant_zero):
    config = {
        **layout,
        "solver": solver,
        "balance": balance,
        "meta_dtype": meta_dtype,
        "quant_scale": quant_scale,
        "quant_zero": quant_zero,
    }
    q = hqq_cpp.quantize(W, config)
    scale, zero = metadata(q)
    assert np.isfinite(scale).all() and (scale > 0).all()
    assert np.isfinite(zero).all()
    assert np.isfinite(hqq_cpp.dequantize(q)).all()


@properties
@given(matrices(), layouts)
def test_statistics_of_any_matrix(W, layout):
    config = {**layout, "balance": "none", "meta_dtype": "bfloat16"}
    q, stats = hqq_cpp.quantize(W, config, stats=True)
    for name, value in reference.error_stats(W, hqq_cpp.dequantize(q)).items():
        assert getattr(stats, name) == pytest.approx(value, rel=1e-5, abs=1e-30), name


def assert_never_worse(W, q, baseline, groups, lp_norm=2.0, importance=None):
    """No group's error is above that of the baseline, up to float32 sums of at most 64 + n/64 terms
    and, below float32's normal numbers, their absolute rounding."""
    errors = [
        reference.group_errors(W, hqq_cpp.dequantize(one), groups, lp_norm, importance)
        for one in (q, baseline)
    ]
    relative = 2e-5 if lp_norm == 2 else 2e-4  # powers: see docs/solver.md
    tiny = groups.sizes() * (2.0**-148 if lp_norm == 2 else 1e-18**lp_norm)
    worse = errors[0] > errors[1] * (1 + relative) + tiny
    assert not worse.any(), (errors[0][worse], errors[1][worse])


@properties
@given(matrices(), layouts, float_metadata, st.sampled_from((2.0, 2.0, 1.0, 0.7)))
def test_joint_is_never_worse_than_minmax(W, layout, meta_dtype, lp_norm):
    config = {**layout, "balance": "none", "meta_dtype": meta_dtype}
    q = hqq_cpp.quantize(W, {**config, "solver": "joint", "lp_norm": lp_norm})
    baseline = hqq_cpp.quantize(W, {**config, "solver": "minmax"})
    groups = Groups(*W.shape, layout["group_size"], layout["axis"])
    assert_never_worse(W, q, baseline, groups, lp_norm)


def make_importance(cols, seed):
    """Mean squares as layers have them: a few columns far above the rest, some never used."""
    rng = np.random.default_rng(seed)
    importance = np.exp(rng.standard_normal(cols) * 2).astype(np.float32)
    importance[rng.random(cols) < 0.1] = 0
    importance[rng.integers(cols)] = 1
    return importance


def effective_importance(importance):
    """A column that was never used counts as 1e-4 of the mean."""
    importance = np.asarray(importance, np.float64)
    return np.maximum(importance / importance.mean(), 1e-4)


@properties
@given(matrices(), layouts, float_metadata, st.integers(0, 1000))
def test_weighted_error_is_never_worse(W, layout, meta_dtype, seed):
    config = {**layout, "balance": "none", "meta_dtype": meta_dtype}
    importance = make_importance(W.shape[1], seed)
    q = hqq_cpp.quantize(W, {**config, "solver": "joint"}, importance=importance)
    baseline = hqq_cpp.quantize(W, {**config, "solver": "minmax"})
    groups = Groups(*W.shape, layout["group_size"], layout["axis"])
    assert_never_worse(W, q, baseline, groups, importance=effective_importance(importance))


def assert_same_tensors(a, b):
    a, b = a.tensors(), b.tensors()
    assert list(a) == list(b)
    for name in a:
        assert_same_bits(a[name], b[name])


@properties
@given(matrices(), layouts, st.integers(-40, 40), st.integers(0, 1000))
def test_scale_of_importance_does_not_matter(W, layout, exponent, seed):
    config = {**layout, "meta_dtype": "float32"}
    importance = make_importance(W.shape[1], seed)
    a = hqq_cpp.quantize(W, config, importance=importance)
    b = hqq_cpp.quantize(W, config, importance=importance * np.float32(2.0**exponent))
    assert_same_tensors(a, b)


@properties
@given(matrices(), layouts, st.sampled_from(("minmax", "joint")), st.randoms(use_true_random=False))
def test_rows_are_independent(W, layout, solver, random):
    config = {**layout, "axis": 1, "solver": solver, "balance": "none", "meta_dtype": "float32"}
    order = list(range(len(W)))
    random.shuffle(order)
    a, b = hqq_cpp.quantize(W, config), hqq_cpp.quantize(W[order], config)
    for name in ("W_q", "scale", "zero"):
        assert_same_bits(np.asarray(getattr(a, name))[order], np.asarray(getattr(b, name)))


@properties
@given(
    matrices(),
    layouts,
    st.sampled_from(("minmax", "hqq", "joint")),
    st.sampled_from(("none", "sinkhorn")),
    st.booleans(),
)
def test_threads_do_not_matter(W, layout, solver, balance, weighted):
    config = {**layout, "solver": solver, "balance": balance, "meta_dtype": "float32"}
    importance = make_importance(W.shape[1], 1) if weighted else None
    one = hqq_cpp.quantize(W, config, importance=importance, threads=1)
    for threads in (2, 3, 5, 8):
        other = hqq_cpp.quantize(W, config, importance=importance, threads=threads)
        assert_same_tensors(one, other)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("axis", (0, 1))
def test_nonfinite_weights_are_named(W, axis, value):
    damaged = W.copy()
    damaged[3, 140] = damaged[20, 7] = value
    with pytest.raises(ValueError, match=r"^\[fc\] W holds 2 values .*first at \[3, 140\]"):
        hqq_cpp.quantize(damaged, {"axis": axis}, name="fc")


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (np.ones(149, np.float32), "importance has 149 values; W has 150 columns"),
        (np.where(np.arange(150) == 3, -1, 1), r"importance\[3\] is -1"),
        (np.where(np.arange(150) == 5, np.nan, 1), r"importance\[5\] is nan"),
        (np.zeros(150), "importance is all zeros"),
    ],
)
def test_importance_is_checked(W, importance, message):
    with pytest.raises(ValueError, match=message):
        hqq_cpp.quantize(W, {}, importance=importance.astype(np.float32))


def test_overflow_of_float16_is_refused(W):
    config = {"solver": "minmax", "balance": "none", "nbits": 4}
    with pytest.raises(ValueError, match="does not fit float16; use meta_dtype bfloat16"):
        hqq_cpp.quantize(W * np.float32(1e9), config)
    assert hqq_cpp.quantize(W * np.float32(1e9), {**config, "meta_dtype": "bfloat16"})
