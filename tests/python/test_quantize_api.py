"""HqqConfig, quantize, dequantize, QuantizedTensor, safetensors and checkpoints through Python."""

import copy
import itertools
import json
import pickle
import types

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import hqq_cpp

INPUT_DTYPES = (np.float16, np.float32, np.float64)


def tensor_bytes(q):
    return {name: tensor.numpy().tobytes() for name, tensor in q.tensors().items()}


def same(a, b):
    return tensor_bytes(a) == tensor_bytes(b) and a.config == b.config and a.shape == b.shape


# ---- HqqConfig -----------------------------------------------------------------------------------


def test_config_defaults_and_repr():
    config = hqq_cpp.HqqConfig()
    assert (config.nbits, config.group_size, config.axis) == (4, 64, 1)
    assert (config.solver, config.balance, config.meta_dtype) == ("joint", "auto", "float16")
    assert (config.lp_norm, config.iterations, config.round_zero) == (None, None, None)
    assert (config.quant_zero, config.quant_scale, config.dynamic_only) == (False, False, False)
    assert (config.beta, config.kappa, config.skip_modules) == (10, 1.01, ("lm_head",))
    assert repr(config) == "HqqConfig()"
    changed = hqq_cpp.HqqConfig(1.58, None, skip_modules=[], lp_norm=0.5)
    assert eval(repr(changed), {"HqqConfig": hqq_cpp.HqqConfig}) == changed != config


@pytest.mark.parametrize(
    "field, value, wrong",
    [
        ("nbits", 1.58, 7),
        ("group_size", None, 12),
        ("axis", 0, 2),
        ("solver", "hqq", "hgg"),
        ("balance", "none", "some"),
        ("lp_norm", 0.7, 3),
        ("iterations", 3, 0),
        ("quant_zero", True, 1),
        ("quant_scale", True, "yes"),
        ("meta_dtype", "bfloat16", "int8"),
        ("dynamic_config", {"mlp.up_proj": None}, {"a[": {}}),
        ("skip_modules", ("q_proj", "*.k_proj"), "lm_head"),
        ("beta", 2.5, 0),
        ("kappa", 1.5, 0.5),
        ("round_zero", False, "no"),
        ("dynamic_only", True, None),
    ],
)
def test_config_fields(field, value, wrong):
    config = hqq_cpp.HqqConfig(**{field: value})
    assert getattr(config, field) == value
    assigned = hqq_cpp.HqqConfig()
    setattr(assigned, field, value)
    assert assigned == config
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config and again is not config
    assert hqq_cpp.HqqConfig.from_dict(config.to_dict()) == config
    assert hqq_cpp.HqqConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    named = "a[" if field == "dynamic_config" else field
    with pytest.raises(ValueError, match=rf"\[config.*{named.replace('[', '.')}"):
        hqq_cpp.HqqConfig(**{field: wrong})
    with pytest.raises(ValueError, match=r"\[config"):
        setattr(assigned, field, wrong)
    assert assigned == config, "a refused value must change nothing"


def test_config_is_not_equal_to_other_things():
    assert hqq_cpp.HqqConfig() != 4 and hqq_cpp.HqqConfig() != {}
    with pytest.raises(TypeError, match="unhashable"):
        hash(hqq_cpp.HqqConfig())


def test_unknown_settings_name_the_nearest():
    with pytest.raises(ValueError, match="'nbit'; did you mean 'nbits'"):
        hqq_cpp.HqqConfig(nbit=3)
    with pytest.raises(ValueError, match="'grup_size'; did you mean 'group_size'"):
        hqq_cpp.HqqConfig.from_dict({"grup_size": 64})
    with pytest.raises(AttributeError):
        hqq_cpp.HqqConfig().nbit = 3


def test_config_values_of_numpy_and_torch():
    torch = pytest.importorskip("torch", reason="its dtypes are accepted too")
    config = hqq_cpp.HqqConfig(
        nbits=np.int64(3), group_size=np.int32(32), beta=np.float32(2), quant_zero=np.bool_(True)
    )
    assert (config.nbits, config.group_size, config.beta, config.quant_zero) == (3, 32, 2, True)
    for dtype, name in ((torch.bfloat16, "bfloat16"), (np.float32, "float32")):
        rules = {"mlp.up_proj": {"meta_dtype": dtype}}
        config = hqq_cpp.HqqConfig(meta_dtype=dtype, dynamic_config=rules)
        assert config.meta_dtype == config.layer("mlp.up_proj")["meta_dtype"] == name
    assert hqq_cpp.HqqConfig(meta_dtype=np.dtype("float32")).meta_dtype == "float32"
    with pytest.raises(ValueError, match="float64"):
        hqq_cpp.HqqConfig(meta_dtype=torch.float64)


def test_config_values_of_no_use():
    with pytest.raises(ValueError, match="type object"):
        hqq_cpp.HqqConfig(nbits=object())
    with pytest.raises(ValueError, match="too large"):
        hqq_cpp.HqqConfig(iterations=10**30)
    with pytest.raises(ValueError, match="key must be a string"):
        hqq_cpp.HqqConfig.from_dict({3: 4})
    deep = {}
    for _ in range(100):
        deep = {"a": deep}
    with pytest.raises(ValueError, match="64 levels"):
        hqq_cpp.HqqConfig(dynamic_config=deep)
    for wrong in (7, "nbits=4", [4]):
        with pytest.raises(TypeError, match="HqqConfig, a dict or None"):
            hqq_cpp.HqqConfig.from_dict(wrong)


def test_rules_and_layers():
    config = hqq_cpp.HqqConfig(
        nbits=4,
        dynamic_config={"mlp.down_proj": {"nbits": 6}, "visual.*": None, "*.q_proj": {"nbits": 3}},
        skip_modules=["lm_head", "*.k_proj"],
    )
    assert list(config.dynamic_config) == ["mlp.down_proj", "visual.*", "*.q_proj"]
    assert config.layer("model.layers.5.mlp.down_proj")["nbits"] == 6
    assert config.layer("model.layers.5.self_attn.q_proj")["nbits"] == 3
    assert config.layer("model.layers.5.mlp.up_proj")["nbits"] == 4
    for skipped in ("lm_head", "model.layers.0.self_attn.k_proj", "visual.blocks.0.qkv"):
        assert config.layer(skipped) is None
    assert hqq_cpp.layer_tag("model.layers.11.mlp.down_proj") == "mlp.down_proj"


def test_what_attributes_give_cannot_be_changed_by_mistake():
    config = hqq_cpp.HqqConfig(dynamic_config={"a": None})
    with pytest.raises(TypeError):
        config.dynamic_config["b"] = None
    with pytest.raises(AttributeError):
        config.skip_modules.append("b")


UPSTREAM = {
    "weight_quant_params": {"nbits": 3, "group_size": 32, "axis": 0, "optimize": True},
    "scale_quant_params": None,
    "zero_quant_params": {"nbits": 8, "group_size": 128},
}


def test_dicts_of_others_and_objects_with_to_dict():
    config = hqq_cpp.HqqConfig.from_dict(UPSTREAM)
    assert (config.nbits, config.group_size, config.axis, config.balance) == (3, 32, 0, "none")
    assert config.quant_zero and not config.quant_scale
    wrapped = {"quant_config": UPSTREAM, "quant_method": "hqq", "skip_modules": ["lm_head"]}
    assert hqq_cpp.HqqConfig.from_dict(wrapped) == config
    assert hqq_cpp.HqqConfig.from_dict(types.MappingProxyType(wrapped)) == config
    holder = types.SimpleNamespace(to_dict=lambda: wrapped)
    assert hqq_cpp.HqqConfig.from_dict(holder) == config
    assert hqq_cpp.HqqConfig.from_dict(config) == config
    assert hqq_cpp.HqqConfig.from_dict(None) == hqq_cpp.HqqConfig()
    W = np.eye(32, dtype=np.float32)
    assert same(hqq_cpp.quantize(W, holder), hqq_cpp.quantize(W, config))


def test_config_of_transformers():
    transformers = pytest.importorskip("transformers", reason="its HqqConfig is read")
    theirs = transformers.HqqConfig(nbits=2, group_size=16, skip_modules=["lm_head", "a"])
    ours = hqq_cpp.HqqConfig.from_dict(theirs)
    assert (ours.nbits, ours.group_size, ours.skip_modules) == (2, 16, ("lm_head", "a"))


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


# ---- QuantizedTensor and dequantize ----------------------------------------------------------------


def reference_dequantize(q):
    """W_r by the NumPy reference, from the tensors alone."""
    config = q.config
    groups = reference.Groups(*q.shape, config["group_size"], config["axis"])

    def metadata(name):
        tensor = getattr(q, name)
        if config["quant_" + name]:
            step, offset = getattr(q, name + "_step"), getattr(q, name + "_offset")
            return reference.expand_metadata(tensor.numpy(), step.numpy(), offset.numpy())
        return tensor.numpy().astype(np.float32)

    codes = reference.unpack_rows(q.W_q.numpy(), config["nbits"], q.in_features)
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
        assert {name: q.config[name] for name in config} == config


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


def test_attributes(rng):
    config = {"nbits": 3, "group_size": 32, "quant_scale": True, "balance": "sinkhorn"}
    q = hqq_cpp.quantize(rng.standard_normal((16, 72)), config)
    assert (q.shape, q.out_features, q.in_features) == ((16, 72), 16, 72)
    assert (q.nbits, q.group_size, q.axis) == (3, 32, 1)
    assert list(q.tensors()) == "W_q scale zero scale_step scale_offset col_scale".split()
    assert q.zero_step is None and q.scale_step.shape == (1,)
    assert q.nbytes == sum(tensor.nbytes for tensor in q.tensors().values())
    assert q.bits_per_weight == pytest.approx(8 * q.nbytes / (16 * 72))
    assert repr(q).startswith("QuantizedTensor([16, 72], nbits=3, group_size=32, axis=1, bits")
    assert q.W_q.data_ptr == q.W_q.data_ptr == q.tensors()["W_q"].data_ptr
    assert copy.copy(q).W_q.data_ptr == q.W_q.data_ptr
    assert same(copy.deepcopy(q), q)
    with pytest.raises(AttributeError):
        q.W_q = None
    q.config["nbits"] = 8
    assert q.nbits == 3, "config is a copy"


def test_from_tensors_shares_memory(rng):
    q = hqq_cpp.quantize(rng.standard_normal((16, 64)), {"balance": "none"})
    arrays = {name: tensor.numpy() for name, tensor in q.tensors().items()}
    shared = hqq_cpp.QuantizedTensor.from_tensors(arrays, hqq_cpp.HqqConfig(), (16, 64))
    assert shared.W_q.data_ptr == q.W_q.data_ptr
    assert shared.config["balance"] == "none", "auto is resolved by what is there"


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"W_r": np.zeros(1)}, ValueError, "unknown tensor 'W_r'; did you mean 'W_q'"),
        ({"zero": None}, hqq_cpp.FormatError, "zero is missing"),
        ({"W_q": np.zeros((16, 31), "u1")}, hqq_cpp.FormatError, r"W_q has the shape \[16, 31\]"),
        ({"scale": np.zeros((16, 1))}, hqq_cpp.FormatError, "scale is float64; it must be float16"),
        ({"scale_step": np.zeros(1, "f4")}, hqq_cpp.FormatError, "scale_step is present"),
        ({"col_scale": np.zeros(63, "f2")}, hqq_cpp.FormatError, "col_scale has the shape"),
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


# ---- safetensors ---------------------------------------------------------------------------------


def test_safetensors_round_trip(tmp_path, rng):
    safetensors = pytest.importorskip("safetensors.numpy", reason="the reference reader")
    arrays = {
        "strided": rng.standard_normal((6, 8))[::2, ::2],
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 3), np.int16),
        "scalar": np.array(3, np.uint64),
    }
    path = tmp_path / "a.safetensors"
    hqq_cpp.save_safetensors(path, arrays, {"key": "value"})
    assert hqq_cpp.safetensors_metadata(path) == {"key": "value"}
    for loaded in (hqq_cpp.load_safetensors(str(path)), safetensors.load_file(path)):
        assert loaded.keys() == arrays.keys()
        for name, array in arrays.items():
            assert np.array_equal(np.asarray(loaded[name]), array)
            assert tuple(loaded[name].shape) == array.shape


def test_save_safetensors_refuses(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="safetensors, a. .*complex128"):
        hqq_cpp.save_safetensors(path, {"a": np.zeros(1, complex)})
    with pytest.raises(ValueError, match="name must be a string, not int"):
        hqq_cpp.save_safetensors(path, {1: np.zeros(1)})
    with pytest.raises(TypeError):
        hqq_cpp.save_safetensors(path, {"a": np.zeros(1)}, {"a": 1})
    assert list(tmp_path.iterdir()) == []


# ---- checkpoints ---------------------------------------------------------------------------------

LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "3bit"
    report = hqq_cpp.quantize_checkpoint(model, folder, {"nbits": 3})
    return folder, report


def test_quantize_checkpoint_reports(model, quantized):
    folder, report = quantized
    assert report.weights == sum(np.prod(layer.shape) for layer in report.layers)
    assert report.copied == ["model.embed_tokens.weight"]
    assert report.bytes_after < report.bytes_before / 2 and 3 < report.bits_per_weight < 4
    layer = next(layer for layer in report.layers if layer.name == LAYER)
    assert (layer.tag, layer.shape, layer.config["nbits"]) == ("mlp.down_proj", (256, 640), 3)
    assert 0.1 < layer.stats.relative_error < 0.3
    document = json.loads(json.dumps(report.to_dict()))
    assert document["layers"][0]["stats"]["rms_error"] == report.layers[0].stats.rms_error
    assert report.layers[0] == report.layers[0] != report.layers[1]


def test_checkpoint_layers_equal_quantize(model, quantized):
    folder, _ = quantized
    dense, checkpoint = hqq_cpp.Checkpoint(model), hqq_cpp.Checkpoint(folder)
    assert dense.quantized_layers() == [] and len(checkpoint.quantized_layers()) == 21
    for name in checkpoint.quantized_layers()[:4]:
        expected = hqq_cpp.quantize(dense.tensor(name + ".weight"), {"nbits": 3}, name=name)
        loaded = checkpoint.load(name)
        assert tensor_bytes(loaded) == tensor_bytes(expected)
        assert np.array_equal(hqq_cpp.dequantize(loaded), hqq_cpp.dequantize(expected))


def test_checkpoint_reads(model, quantized):
    checkpoint = hqq_cpp.Checkpoint(quantized[0])
    assert checkpoint.path == quantized[0] and not checkpoint.is_sharded
    assert checkpoint.shard_names == ["model.safetensors"]
    assert LAYER + ".W_q" in checkpoint and LAYER + ".weight" not in checkpoint
    assert list(checkpoint) == checkpoint.tensor_names and len(checkpoint) == len(list(checkpoint))
    assert checkpoint.config["quantization_config"]["nbits"] == 3
    assert checkpoint.metadata["format"] == "pt"
    assert checkpoint.tensor("model.norm.weight").dtype == "bfloat16"
    assert checkpoint.total_bytes == quantized[1].bytes_after
    assert "tensors in 1 file)" in repr(checkpoint)
    alone = hqq_cpp.Checkpoint(model / "model.safetensors")
    assert len(alone) == len(hqq_cpp.Checkpoint(model))


def test_checkpoint_refuses(model, quantized, tmp_path):
    with pytest.raises(FileNotFoundError):
        hqq_cpp.Checkpoint(tmp_path / "nowhere")
    with pytest.raises(hqq_cpp.FormatError):
        hqq_cpp.Checkpoint(tmp_path)
    checkpoint = hqq_cpp.Checkpoint(quantized[0])
    with pytest.raises(KeyError, match="no tensor 'x'"):
        checkpoint.tensor("x")
    with pytest.raises(ValueError, match="embed"):
        checkpoint.load("model.embed_tokens")
    with pytest.raises(ValueError):
        checkpoint.load(LAYER, expert=1)


def test_dry_run_writes_nothing(model, tmp_path):
    report = hqq_cpp.quantize_checkpoint(model, tmp_path / "out", {"nbits": 2}, dry_run=True)
    assert len(report.layers) == 21 and list(tmp_path.iterdir()) == []


def test_importance_as_dict_and_as_file(model, quantized, tmp_path, rng):
    importance = {LAYER: rng.random(640).astype(np.float32)}
    path = tmp_path / "importance.safetensors"
    hqq_cpp.save_safetensors(path, importance)
    for name, form in (("dict", importance), ("file", path)):
        out = tmp_path / name
        hqq_cpp.quantize_checkpoint(model, out, {"nbits": 3}, importance=form)
        dense = hqq_cpp.Checkpoint(model).tensor(LAYER + ".weight")
        expected = hqq_cpp.quantize(dense, {"nbits": 3}, importance=importance[LAYER])
        assert tensor_bytes(hqq_cpp.Checkpoint(out).load(LAYER)) == tensor_bytes(expected)
    with pytest.raises(ValueError, match="5"):
        wrong = {LAYER: np.ones(5, np.float32)}
        hqq_cpp.quantize_checkpoint(model, tmp_path / "x", importance=wrong)
    assert not (tmp_path / "x").exists()


def test_existing_destination_needs_force(model, quantized, tmp_path):
    out = tmp_path / "out"
    hqq_cpp.quantize_checkpoint(model, out, {"nbits": 2})
    with pytest.raises(ValueError, match="out"):
        hqq_cpp.quantize_checkpoint(model, out, {"nbits": 3})
    hqq_cpp.quantize_checkpoint(model, out, {"nbits": 3}, force=True)
    file = "model.safetensors"
    assert (out / file).read_bytes() == (quantized[0] / file).read_bytes()


def test_verify_dequantize_diff_convert(model, quantized, tmp_path):
    folder, report = quantized
    verified = hqq_cpp.verify_checkpoint(folder)
    assert verified.ok and verified.layers == 21 and verified.problems == []

    hqq_cpp.dequantize_checkpoint(folder, tmp_path / "dense")
    dense = hqq_cpp.Checkpoint(tmp_path / "dense").tensor(LAYER + ".weight")
    assert dense.dtype == "bfloat16", "what config.json says"
    q = hqq_cpp.Checkpoint(folder).load(LAYER)
    assert np.array_equal(dense.numpy(), hqq_cpp.dequantize(q, "bfloat16").numpy())

    diffs = {diff.name: diff for diff in hqq_cpp.diff_checkpoints(model, folder)}
    assert diffs["model.norm.weight"].identical
    diff = next(diff for name, diff in diffs.items() if name.startswith(LAYER))
    stats = next(layer.stats for layer in report.layers if layer.name == LAYER)
    assert diff.relative == pytest.approx(stats.relative_error, rel=1e-3)

    plain = tmp_path / "plain"
    hqq_cpp.quantize_checkpoint(model, plain, {"nbits": 3, "balance": "none"})
    hqq_cpp.convert_checkpoint(plain, tmp_path / "upstream", "upstream")
    hqq_cpp.convert_checkpoint(tmp_path / "upstream", tmp_path / "back", "hqq_cpp")
    assert all(d.identical for d in hqq_cpp.diff_checkpoints(plain, tmp_path / "back"))


def test_checkpoint_functions_refuse(model, quantized, tmp_path):
    folder, _ = quantized
    with pytest.raises(ValueError, match="'upstream' or 'hqq_cpp'"):
        hqq_cpp.convert_checkpoint(folder, tmp_path / "x", "gguf")
    with pytest.raises(ValueError, match="int8"):
        hqq_cpp.dequantize_checkpoint(folder, tmp_path / "x", "int8")
    with pytest.raises(ValueError, match="no folder|not a folder"):
        hqq_cpp.verify_checkpoint(tmp_path / "nowhere")
    with pytest.raises(OSError):
        hqq_cpp.diff_checkpoints(model, tmp_path / "nowhere")
    damaged = tmp_path / "damaged"
    hqq_cpp.quantize_checkpoint(model, damaged)
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1000] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    report = hqq_cpp.verify_checkpoint(damaged)
    assert not report.ok and "model.safetensors" in report.problems[0]


# ---- progress ------------------------------------------------------------------------------------


def test_progress(model, tmp_path):
    seen = []
    report = hqq_cpp.quantize_checkpoint(model, tmp_path / "out", progress=seen.append)
    assert seen[-1].done == seen[-1].total == report.weights
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[0].stage == "quantize" and seen[0].current and seen[-1].seconds > 0
    assert set(seen[0].to_dict()) == {"stage", "current", "done", "total", "seconds"}


def test_progress_runs_in_the_calling_thread(model, tmp_path):
    import threading

    threads = set()
    hqq_cpp.verify_checkpoint(model, progress=lambda _: threads.add(threading.get_ident()))
    assert threads == {threading.get_ident()}


def test_progress_stops_the_work(model, tmp_path):
    with pytest.raises(hqq_cpp.Interrupted):
        hqq_cpp.quantize_checkpoint(model, tmp_path / "out", progress=lambda _: False)
    assert not (tmp_path / "out").exists()


def test_exceptions_of_progress_arrive_unchanged(model, tmp_path):
    class Mine(Exception):
        pass

    def fail(progress):
        raise Mine(progress.stage)

    with pytest.raises(Mine, match="quantize"):
        hqq_cpp.quantize_checkpoint(model, tmp_path / "out", progress=fail)
    assert not (tmp_path / "out").exists()


def test_progress_must_be_callable(model, tmp_path):
    with pytest.raises(TypeError, match="callable or None, not int"):
        hqq_cpp.quantize_checkpoint(model, tmp_path / "out", progress=3)
