"""quantize, dequantize and QuantizedTensor through Python."""

import copy
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hqq_cpp
import reference

INPUT_DTYPES = (np.float16, np.float32, np.float64)


def tensor_bytes(q):
    return {name: tensor.numpy().tobytes() for name, tensor in q.tensors().items()}


def same(a, b):
    return tensor_bytes(a) == tensor_bytes(b) and a.config == b.config and a.shape == b.shape


# ---- quantize ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_layouts_of_w_give_equal_bytes(rng, dtype):
    W = rng.standard_normal((24, 80)).astype(dtype)
    expected = hqq_cpp.quantize(W, {"nbits": 4})
    wide = np.zeros((48, 100), dtype)
    wide[::2, 10:90] = W
    swapped = W.astype(W.dtype.newbyteorder())
    readonly = W.copy()
    readonly.flags.writeable = False
    layouts = {
        "rows apart": wide[::2, 10:90],
        "columns first": np.asfortranarray(W),
        "rows backwards": W[::-1].copy()[::-1],
        "columns backwards": W[:, ::-1].copy()[:, ::-1],
        "byte order": swapped,
        "read-only": readonly,
        "Tensor": hqq_cpp.Tensor(W),
        "list": W.tolist() if dtype is np.float64 else W,
    }
    for name, layout in layouts.items():
        assert same(hqq_cpp.quantize(layout, {"nbits": 4}), expected), name
    broadcast = np.broadcast_to(W[:1], (24, 80))
    assert same(hqq_cpp.quantize(broadcast), hqq_cpp.quantize(broadcast.copy()))


def test_torch_weights(rng):
    torch = pytest.importorskip("torch", reason="its tensors are weights too")
    W = torch.from_numpy(rng.standard_normal((24, 80))).float()
    for source in (W, W.half(), W.bfloat16(), W.double(), W.t().contiguous().t()):
        expected = hqq_cpp.quantize(source.float().numpy(), {"nbits": 4})
        # float64 is rounded to float32 first; the 16-bit types are exact.
        assert same(hqq_cpp.quantize(source, {"nbits": 4}), expected)
    assert same(hqq_cpp.quantize(torch.nn.Parameter(W)), hqq_cpp.quantize(W))


@pytest.mark.parametrize(
    "W, message",
    [
        (np.zeros(8), r"shape \[8\]; it must be a matrix"),
        (np.zeros((2, 8, 8)), r"shape \[2, 8, 8\]; it must be a matrix"),
        (np.zeros((8, 8), int), "W is int64; it must be float32"),
        (np.zeros((8, 8), bool), "W is bool"),
        (np.zeros((0, 8)), r"\[0, 8\]; it must not be empty"),
        (np.zeros((8, 8), complex), "complex128, which is not supported"),
        (np.full((8, 8), np.nan), "NaN"),
        ("text", "not supported"),
        (None, "not supported"),
    ],
)
def test_what_is_no_weight_is_refused(W, message):
    with pytest.raises(ValueError, match=message):
        hqq_cpp.quantize(W)


def test_names_select_settings_and_stand_in_messages():
    W = np.eye(64, dtype=np.float32)
    config = hqq_cpp.HqqConfig(dynamic_config={"mlp.up_proj": {"nbits": 2}})
    assert hqq_cpp.quantize(W, config, name="model.layers.0.mlp.up_proj").nbits == 2
    assert hqq_cpp.quantize(W, config, name="model.layers.0.mlp.down_proj").nbits == 4
    assert hqq_cpp.quantize(W, config).nbits == 4
    with pytest.raises(ValueError, match=r"\[lm_head\].*unquantized"):
        hqq_cpp.quantize(W, config, name="lm_head")
    with pytest.raises(ValueError, match=r"\[mlp.gate_proj\].*matrix"):
        hqq_cpp.quantize(np.zeros(3), config, name="mlp.gate_proj")


def test_stats_are_those_of_the_definition(rng):
    W = rng.standard_normal((33, 100), dtype=np.float32)
    q, stats = hqq_cpp.quantize(W, {"nbits": 3}, stats=True)
    assert same(q, hqq_cpp.quantize(W, {"nbits": 3}))
    expected = reference.error_stats(W, hqq_cpp.dequantize(q))
    assert stats.to_dict() == pytest.approx(expected, rel=1e-6)
    assert stats == copy_of_stats(W) and stats != 3
    assert repr(stats).startswith("QuantizeStats(mean_abs_error=0.")
    with pytest.raises(AttributeError):
        stats.rms_error = 0


def copy_of_stats(W):
    return hqq_cpp.quantize(W, {"nbits": 3}, stats=True)[1]


def test_importance_lowers_the_error_where_it_is_high(rng):
    W = rng.standard_normal((32, 64), dtype=np.float32)
    importance = np.where(np.arange(64) % 8 == 0, 100.0, 0.01)
    config = {"nbits": 2, "balance": "none"}

    def error(q):
        return (((W - hqq_cpp.dequantize(q)) ** 2) * importance).mean()

    weighted = hqq_cpp.quantize(W, config, importance=importance)
    assert error(weighted) < 0.7 * error(hqq_cpp.quantize(W, config))
    for form in (importance.tolist(), importance.astype(np.float32), hqq_cpp.Tensor(importance)):
        assert same(hqq_cpp.quantize(W, config, importance=form), weighted)


@pytest.mark.parametrize(
    "importance, message",
    [
        (np.ones(7), "7 values; W has 8 columns"),
        ([], "0 values; W has 8 columns"),
        (np.ones((1, 8)), r"shape \[1, 8\]; it must be 1-D"),
        (-np.ones(8), "importance.0. is -1"),
        (np.full(8, np.nan), "importance.0. is nan"),
        (np.zeros(8), "all zeros"),
        (np.full(8, 1e300), "importance.0. is inf"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_importance_that_does_not_fit(importance, message):
    with pytest.raises(ValueError, match=message):
        hqq_cpp.quantize(np.ones((4, 8)), {"group_size": 8}, importance=importance)


# ---- QuantizedTensor and dequantize --------------------------------------------------------------


def reference_dequantize(q):
    """W_r by the NumPy reference, from the tensors alone."""
    config = q.config
    groups = reference.Groups(*q.shape, config.group_size, config.axis)

    def metadata(name):
        tensor = getattr(q, name)
        if getattr(config, "quant_" + name):
            step, offset = getattr(q, name + "_step"), getattr(q, name + "_offset")
            return reference.expand_metadata(tensor.numpy(), step.numpy(), offset.numpy())
        return tensor.numpy().astype(np.float32)

    codes = reference.unpack_rows(q.W_q.numpy(), config.nbits, q.in_features)
    col_scale = None if q.col_scale is None else q.col_scale.numpy().astype(np.float32)
    return reference.dequantize(codes, metadata("scale"), metadata("zero"), groups, col_scale)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", reference.NBITS)
def test_dequantize_equals_the_reference(rng, nbits, axis):
    options = itertools.product((8, 64, None), reference.META_DTYPES, ("none", "sinkhorn"))
    for count, (group_size, meta_dtype, balance) in enumerate(options):
        W = rng.standard_normal((24, 200), dtype=np.float32)
        config = {"nbits": nbits, "axis": axis, "group_size": group_size, "balance": balance}
        config |= {"meta_dtype": meta_dtype, "quant_scale": count % 2 == 0}
        config |= {"quant_zero": count % 3 == 0}
        q = hqq_cpp.quantize(W, config)
        expected = reference_dequantize(q)
        assert np.array_equal(hqq_cpp.dequantize(q, threads=3), expected)
        codes = reference.unpack_rows(q.W_q.numpy(), nbits, 200)
        assert np.array_equal(q.codes(), codes)
        assert {name: getattr(q.config, name) for name in config} == config


@settings(max_examples=150)
@given(data=st.data())
def test_packed_rows_of_any_codes(data):
    """The NumPy packer and the library agree, for every width and length."""
    nbits = data.draw(st.sampled_from(reference.NBITS))
    rows, cols = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 200))
    seed = data.draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(0, reference.max_code(nbits) + 1, (rows, cols))
    packed = reference.pack_rows(codes.astype(np.uint8), nbits)
    tensors = {"W_q": packed, "scale": np.ones((rows, 1), "f4"), "zero": np.zeros((rows, 1), "f4")}
    config = {"nbits": nbits, "group_size": None, "meta_dtype": "float32"}
    q = hqq_cpp.QuantizedTensor.from_tensors(tensors, config, (rows, cols))
    assert np.array_equal(q.codes(), codes)
    assert np.array_equal(hqq_cpp.dequantize(q), codes.astype(np.float32))
    if cols >= 2:
        # Rows that hold the smallest and the largest code have scale 1 and zero 0 again.
        codes[:, 0], codes[:, -1] = 0, reference.max_code(nbits)
        config |= {"solver": "minmax", "balance": "none"}
        assert np.array_equal(hqq_cpp.quantize(codes.astype("f4"), config).codes(), codes)


@settings(max_examples=60)
@given(
    nbits=st.sampled_from(reference.NBITS),
    axis=st.sampled_from([0, 1]),
    rows=st.integers(1, 40),
    cols=st.integers(1, 130),
    group_size=st.sampled_from([8, 16, 40, 64, None]),
    meta=st.sampled_from(reference.META_DTYPES),
    quant=st.tuples(st.booleans(), st.booleans()),
    balance=st.sampled_from(["none", "sinkhorn"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_round_trips(nbits, axis, rows, cols, group_size, meta, quant, balance, seed):
    W = np.random.default_rng(seed).standard_normal((rows, cols), dtype=np.float32)
    config = {"nbits": nbits, "axis": axis, "group_size": group_size, "meta_dtype": meta}
    config |= {"quant_scale": quant[0], "quant_zero": quant[1], "balance": balance}
    q, stats = hqq_cpp.quantize(W, config, stats=True)
    W_r = hqq_cpp.dequantize(q)
    assert np.array_equal(W_r, reference_dequantize(q))
    assert stats.max_abs_error == pytest.approx(np.abs(W - W_r).max(), rel=1e-6)
    assert same(pickle.loads(pickle.dumps(q)), q)
    rebuilt = hqq_cpp.QuantizedTensor.from_tensors(q.tensors(), q.config, q.shape)
    assert same(rebuilt, q)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("solver", ["minmax", "hqq", "joint"])
def test_constant_groups_with_quantized_zeros(rng, axis, solver):
    """Ordinary weights in groups of one: their zeros must not take all bits of their block."""
    W = rng.standard_normal((40, 1) if axis == 1 else (1, 40)).astype(np.float32)
    for meta in ("float16", "bfloat16", "float32"):
        config = {"axis": axis, "group_size": None, "solver": solver, "meta_dtype": meta}
        config["quant_zero"] = True
        error = np.abs(hqq_cpp.dequantize(hqq_cpp.quantize(W, config)) - W).max()
        assert error < 0.01


def test_dequantize_dtypes(rng):
    q = hqq_cpp.quantize(rng.standard_normal((8, 64)))
    W_r = hqq_cpp.dequantize(q)
    assert W_r.dtype == np.float32 and W_r.shape == (8, 64) and W_r.flags.writeable
    for dtype in ("float16", np.float64, np.dtype("float16")):
        dense = hqq_cpp.dequantize(q, dtype)
        assert dense.dtype == dtype and np.array_equal(dense, W_r.astype(dtype))
    dense = hqq_cpp.dequantize(q, "bfloat16")
    assert isinstance(dense, hqq_cpp.Tensor) and dense.dtype == "bfloat16"
    assert np.array_equal(dense.numpy(), reference.round_bf16(W_r))
    for wrong in ("int8", "float99", np.int32):
        with pytest.raises(ValueError, match=r"\[dequantize\]"):
            hqq_cpp.dequantize(q, wrong)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("group_size", [4096, 2**31, 2**62, 2**63 - 8])
def test_groups_longer_than_the_matrix(rng, group_size, axis):
    W = rng.standard_normal((4, 64), dtype=np.float32)
    config = {"group_size": group_size, "axis": axis, "balance": "none"}
    q = hqq_cpp.quantize(W, config)
    assert q.scale.size == (4 if axis == 1 else 1)
    assert np.array_equal(hqq_cpp.dequantize(q), reference_dequantize(q))


def test_attributes(rng):
    config = {"nbits": 3, "group_size": 32, "quant_scale": True, "balance": "sinkhorn"}
    q = hqq_cpp.quantize(rng.standard_normal((16, 72)), config)
    assert (q.shape, q.out_features, q.in_features) == ((16, 72), 16, 72)
    assert (q.nbits, q.group_size, q.axis) == (3, 32, 1)
    assert list(q.tensors()) == ["W_q", "scale", "zero", "scale_step", "scale_offset", "col_scale"]
    assert q.zero_step is None and q.scale_step.shape == (1,)
    assert q.nbytes == sum(tensor.nbytes for tensor in q.tensors().values())
    assert q.bits_per_weight == pytest.approx(8 * q.nbytes / (16 * 72))
    assert repr(q).startswith("QuantizedTensor([16, 72], nbits=3, group_size=32, axis=1, bits")
    assert q.W_q.data_ptr == q.W_q.data_ptr == q.tensors()["W_q"].data_ptr
    assert copy.copy(q).W_q.data_ptr == q.W_q.data_ptr
    assert same(copy.deepcopy(q), q)
    with pytest.raises(AttributeError):
        q.W_q = None
    with pytest.raises(AttributeError):
        q.config.nbits = 8


def test_from_tensors_shares_memory(rng):
    q = hqq_cpp.quantize(rng.standard_normal((16, 64)), {"balance": "none"})
    arrays = {name: tensor.numpy() for name, tensor in q.tensors().items()}
    shared = hqq_cpp.QuantizedTensor.from_tensors(arrays, hqq_cpp.HqqConfig(), (16, 64))
    assert shared.W_q.data_ptr == q.W_q.data_ptr
    assert shared.config.balance == "none", "auto is resolved by what is there"


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"W_r": np.zeros(1)}, ValueError, "unknown tensor 'W_r'; did you mean 'W_q'"),
        ({"zero": None}, hqq_cpp.FormatError, "zero is missing"),
        ({"W_q": np.zeros((16, 31), "u1")}, hqq_cpp.FormatError, r"W_q is uint8 \[16, 31\]"),
        (
            {"scale": np.zeros((16, 1))},
            hqq_cpp.FormatError,
            r"scale is float64 \[16, 1\]; it must be float16",
        ),
        ({"scale_step": np.zeros(1, "f4")}, hqq_cpp.FormatError, "scale_step is present"),
        ({"col_scale": np.zeros(63, "f2")}, hqq_cpp.FormatError, r"col_scale is float16 \[63\]"),
        ({"W_q": np.zeros((16, 32), complex)}, ValueError, "W_q. .*complex128"),
    ],
)
def test_from_tensors_refuses(rng, change, error, message):
    q = hqq_cpp.quantize(rng.standard_normal((16, 64)), {"balance": "none"})
    with pytest.raises(error, match=message):
        hqq_cpp.QuantizedTensor.from_tensors({**q.tensors(), **change}, None, (16, 64))


@pytest.mark.parametrize("shape", [(16, 65), (0, 64), (-16, -64), (2**62, 2**62), (2**40, 2**40)])
def test_from_tensors_refuses_shapes(rng, shape):
    q = hqq_cpp.quantize(rng.standard_normal((16, 64)), {"balance": "none"})
    with pytest.raises(ValueError):
        hqq_cpp.QuantizedTensor.from_tensors(q.tensors(), None, shape)


def test_unpickling_validates(rng):
    q = hqq_cpp.quantize(rng.standard_normal((16, 64)), {"balance": "none"})
    config, shape, tensors = q.__getstate__()
    target = hqq_cpp.QuantizedTensor.__new__(hqq_cpp.QuantizedTensor)
    with pytest.raises(hqq_cpp.FormatError):
        target.__setstate__((config, (17, 64), tensors))
    with pytest.raises(hqq_cpp.FormatError, match="3 parts"):
        target.__setstate__((config, shape))
