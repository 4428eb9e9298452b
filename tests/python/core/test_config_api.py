"""HqqConfig from Python: fields, dicts of others, rules, refusals."""

import copy
import json
import pickle
import types

import numpy as np
import pytest

import hqq_cpp


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
        ("grow_beta", True, 1),
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
        assert config.meta_dtype == config.layer("mlp.up_proj").meta_dtype == name
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
    assert config.layer("model.layers.5.mlp.down_proj").nbits == 6
    assert config.layer("model.layers.5.self_attn.q_proj").nbits == 3
    assert config.layer("model.layers.5.mlp.up_proj").nbits == 4
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
    assert hqq_cpp.quantize(W, holder).config == hqq_cpp.quantize(W, config).config


def test_config_of_transformers():
    transformers = pytest.importorskip("transformers", reason="its HqqConfig is read")
    theirs = transformers.HqqConfig(nbits=2, group_size=16, skip_modules=["lm_head", "a"])
    ours = hqq_cpp.HqqConfig.from_dict(theirs)
    assert (ours.nbits, ours.group_size, ours.skip_modules) == (2, 16, ("lm_head", "a"))


def test_the_class_is_no_config():
    W = np.eye(64, dtype=np.float32)
    for call in (
        lambda: hqq_cpp.HqqConfig.from_dict(hqq_cpp.HqqConfig),
        lambda: hqq_cpp.quantize(W, hqq_cpp.HqqConfig),
        lambda: hqq_cpp.quantize_linear(W, hqq_cpp.HqqConfig),
    ):
        with pytest.raises(ValueError, match=r"the class HqqConfig; make an object of it: HqqConf"):
            call()


# ---- LayerConfig ---------------------------------------------------------------------------------


def test_layer_config_is_frozen_and_hashable():
    config = hqq_cpp.LayerConfig(nbits=1.58, group_size=None, meta_dtype=np.float32)
    assert (config.nbits, config.group_size, config.meta_dtype) == (1.58, None, "float32")
    assert isinstance(hqq_cpp.LayerConfig(nbits=3.0).nbits, int)
    for field in config.to_dict():
        with pytest.raises(AttributeError):
            setattr(config, field, getattr(config, field))
    equal = hqq_cpp.LayerConfig.from_dict(config.to_dict())
    assert equal == config and hash(equal) == hash(config) and config != config.replace(axis=0)
    assert config != config.to_dict()
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config
    assert eval(repr(config), {"LayerConfig": hqq_cpp.LayerConfig}) == config
    assert repr(hqq_cpp.LayerConfig()) == "LayerConfig()"


def test_layer_config_is_what_a_layer_has():
    rules = {"a": hqq_cpp.LayerConfig(nbits=2, solver="hqq")}
    config = hqq_cpp.HqqConfig(dynamic_config=rules)
    assert config.layer("a") == rules["a"]
    assert hqq_cpp.HqqConfig.from_dict(rules["a"]).layer("any") == rules["a"]
    q = hqq_cpp.quantize(np.eye(64, dtype=np.float32), rules["a"])
    assert q.config == rules["a"].replace(balance="sinkhorn")
    # Settings of one layer have no rules, and so no skip_modules.
    W = np.eye(64, dtype=np.float32)
    assert hqq_cpp.quantize(W, rules["a"], name="lm_head").config == q.config
    with pytest.raises(ValueError, match="lm_head"):
        hqq_cpp.quantize(W, config, name="lm_head")


def test_layer_config_refuses():
    with pytest.raises(ValueError, match="'nbit'; did you mean 'nbits'"):
        hqq_cpp.LayerConfig(nbit=3)
    with pytest.raises(ValueError, match="'nbit'; did you mean 'nbits'"):
        hqq_cpp.LayerConfig().replace(nbit=3)
    with pytest.raises(ValueError, match="one of 8, 6, 5"):
        hqq_cpp.LayerConfig(nbits=7)
    with pytest.raises(ValueError, match="unknown key 'skip_modules'"):
        hqq_cpp.LayerConfig.from_dict({"skip_modules": []})
