"""Names in a config that fit no layer are mentioned, with the nearest; a parent's name covers what
is below it."""

import logging
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hqq_cpp

torch = pytest.importorskip("torch")

from torch import nn


@pytest.fixture
def model_path(model):
    return model


LAYERS = [
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.10.mlp.up_proj",
    "model.vision_tower.layers.0.fc1",
]


def block():
    return nn.ModuleDict(
        {
            "self_attn": nn.ModuleDict({"q_proj": nn.Linear(32, 32)}),
            "mlp": nn.ModuleDict({"up_proj": nn.Linear(32, 32), "gate": nn.Linear(32, 8)}),
            "norm": nn.LayerNorm(32),
        }
    )


def net():
    return nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(16, 32),
            "layers": nn.ModuleList([block(), block()]),
            "vision_tower": nn.ModuleDict({"fc1": nn.Linear(32, 32)}),
            "lm_head": nn.Linear(32, 16),
        }
    )


def quantized_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, hqq_cpp.HqqLinear)}


@pytest.mark.parametrize(
    "entry, skipped",
    [
        ("mlp", ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"]),
        ("layers.0", ["layers.0.mlp.up_proj", "layers.0.self_attn.q_proj"]),
        ("vision_tower", ["vision_tower.fc1"]),
        ("layers", ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "layers.0.self_attn.q_proj",
                    "layers.1.self_attn.q_proj"]),
    ],
)  # fmt: skip
def test_a_parent_in_skip_modules_covers_what_is_below(entry, skipped):
    config = {"nbits": 4, "skip_modules": [entry, "lm_head"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = quantized_names(hqq_cpp.quantize_model_(net(), config))
    assert not names & set(skipped)
    everything = quantized_names(hqq_cpp.quantize_model_(net(), {"nbits": 4}))
    assert names | set(skipped) == everything


def test_a_rule_for_a_parent_does_not_reach_embeddings():
    rules = {"layers.0": {"nbits": 8}, "embed_tokens": {"nbits": 6}, "vision_tower": None}
    model = hqq_cpp.quantize_model_(net(), {"nbits": 4, "dynamic_config": rules})
    assert model["layers"][0]["mlp"]["up_proj"].nbits == 8
    assert model["layers"][1]["mlp"]["up_proj"].nbits == 4
    assert model["embed_tokens"].nbits == 6
    assert type(model["vision_tower"]["fc1"]) is nn.Linear
    whole = nn.ModuleDict({"model": net()})
    hqq_cpp.quantize_model_(whole, {"dynamic_config": {"model": {"nbits": 3}}})
    assert whole["model"]["layers"][0]["mlp"]["up_proj"].nbits == 3
    assert type(whole["model"]["embed_tokens"]) is nn.Embedding


def test_the_tag_of_an_embedding_fits_below_a_decoder():
    config = hqq_cpp.HqqConfig(dynamic_config={"embed_tokens": {"nbits": 8}})
    assert config.layer("model.decoder.embed_tokens", must_be_named=True).nbits == 8
    assert config.layer("model.embed_tokens", must_be_named=True).nbits == 8
    assert config.layer("model.decoder.embed_positions", must_be_named=True) is None


# The rule once more, from its words in docs/cli.md.


def runs(path):
    """{run of whole components: whether it is the end}"""
    parts = path.split(".")
    found = {}
    for begin in range(len(parts)):
        for end in range(begin + 1, len(parts) + 1):
            if begin == 0 or not parts[begin].isdigit():
                run = ".".join(parts[begin:end])
                found[run] = found.get(run, False) or end == len(parts)
    return found


def settings_by_the_words(config, layer):
    rules, skip = config
    if layer in rules:
        return rules[layer]
    fits = {}
    for path in (layer, hqq_cpp.layer_tag(layer)):
        for run, ends in runs(path).items():
            fits[run] = fits.get(run, False) or ends
    if any(entry in fits or entry == layer.split(".")[-1] for entry in skip):
        return None
    ranks = [(fits[key], key.count(".")) for key in rules if key in fits]
    for key, value in rules.items():
        if key in fits and (fits[key], key.count(".")) == max(ranks):
            return value
    return 4


components = st.sampled_from(["model", "layers", "0", "1", "10", "mlp", "up_proj", "up", "vision"])
names = st.lists(components, min_size=1, max_size=5).map(".".join)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.dictionaries(names, st.sampled_from([2, 3, 8]), max_size=5),
    st.lists(names, max_size=2),
    names,
)
def test_which_rule_wins(rules, skip, layer):
    config = hqq_cpp.HqqConfig(
        nbits=4, dynamic_config={key: {"nbits": n} for key, n in rules.items()}, skip_modules=skip
    )
    found = config.layer(layer)
    assert (found and found.nbits) == settings_by_the_words((rules, skip), layer)


def test_unmatched_names_have_their_nearest():
    config = hqq_cpp.HqqConfig(
        dynamic_config={"mlp.upproj": {"nbits": 3}, "model.layers.2": {"nbits": 8}},
        skip_modules=["lm_head", "vision", "q_prj"],
    )
    assert config.unmatched_names(LAYERS, ["model.norm"], ["mlp.up_proj"]) == [
        "dynamic_config names no layer: 'mlp.upproj'; nearest is 'mlp.up_proj'",
        "dynamic_config names no layer: 'model.layers.2'; nearest is 'model.layers.0'",
        "skip_modules names no layer: 'vision'; nearest is 'vision_tower'",
        "skip_modules names no layer: 'q_prj'; nearest is 'q_proj'",
        "importance names no layer: 'mlp.up_proj'; nearest is 'model.layers.0.mlp.up_proj'",
    ]
    assert hqq_cpp.HqqConfig(skip_modules=["norm"]).unmatched_names(LAYERS, ["model.norm"]) == []


def test_quantize_model_warns_once_of_all(recwarn):
    config = {"nbits": 4, "skip_modules": ["lm_head", "fc2"], "dynamic_config": {"*.uproj": None}}
    hqq_cpp.quantize_model_(net(), config, importance={"layers.0.mlp.upproj": torch.ones(32)})
    (warning,) = recwarn.list
    assert str(warning.message) == (
        "[quantize] dynamic_config names no layer: '*.uproj'; nearest is 'up_proj'. "
        "skip_modules names no layer: 'fc2'; nearest is 'fc1'. "
        "importance names no layer: 'layers.0.mlp.upproj'; nearest is 'layers.0.mlp.up_proj'"
    )
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "names",
    [
        {"skip_modules": ["lm_head"]},
        {"skip_modules": ["norm", "embed_tokens", "gate", "layers.1.mlp.up_proj"]},
        {"dynamic_config": {"gate": {"nbits": 8}, "re:.*q_proj": {"nbits": 3}}},
        {"importance": {"layers.1.mlp.up_proj": torch.ones(32), "lm_head": torch.ones(32)}},
    ],
)
def test_names_of_dense_layers_are_no_mistakes(names):
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hqq_cpp.quantize_model_(model, hqq_cpp.HqqConfig(**names))


def test_models_without_a_head_and_layers_quantized_before():
    model = net()
    del model["lm_head"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hqq_cpp.quantize_model_(model, {"nbits": 4, "skip_modules": ["lm_head", "mlp"]})
        rules = {"q_proj": {"nbits": 8}, "mlp": {"nbits": 3}}
        hqq_cpp.quantize_model_(model, {"dynamic_config": rules})


def test_the_refusal_of_nothing_to_quantize_says_what_fits_nothing():
    config = {"dynamic_only": True, "dynamic_config": {"mlp.upproj": {"nbits": 4}}}
    with pytest.raises(ValueError, match="nothing to quantize.*nearest is 'mlp.up_proj'"):
        hqq_cpp.quantize_model_(net(), config)


def test_quantize_checkpoint_reports_and_warns(model_path, tmp_path):
    config = {"skip_modules": ["mlp.dwn_proj"], "dynamic_config": {"self_attn": {"nbits": 8}}}
    sentence = "skip_modules names no layer: 'mlp.dwn_proj'; nearest is 'mlp.down_proj'"
    with pytest.warns(UserWarning, match="mlp.dwn_proj") as record:
        report = hqq_cpp.quantize_checkpoint(model_path, tmp_path / "out", config, dry_run=True)
    assert report.warnings == [sentence]
    assert [str(w.message) for w in record] == [f"[quantize] {sentence}"]
    bits = {layer.tag: layer.config.nbits for layer in report.layers}
    assert bits["self_attn.q_proj"] == 8 and bits["mlp.down_proj"] == 4


def test_quantize_checkpoint_says_nothing_when_all_fit(model_path, tmp_path):
    config = {"skip_modules": ["lm_head", "mlp", "model.norm"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = hqq_cpp.quantize_checkpoint(model_path, tmp_path / "out", config, dry_run=True)
    assert report.warnings == []
    assert not [layer.name for layer in report.layers if ".mlp." in layer.name]


def test_an_importance_file_of_another_model_is_refused(model_path, tmp_path):
    vectors = {"model.layers.0.mlp.upproj": np.ones(256, np.float32)}
    message = 'no layer "model.layers.0.mlp.upproj"; nearest is "model.layers.0.mlp.up_proj"'
    with pytest.raises(hqq_cpp.FormatError, match=message):
        hqq_cpp.quantize_checkpoint(model_path, tmp_path / "out", importance=vectors, dry_run=True)


class Log(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture
def log():
    handler = Log()
    logger = logging.getLogger("transformers.hqq_cpp")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture
def load(model_path):
    transformers = pytest.importorskip("transformers")
    import hqq_cpp.transformers  # noqa: F401

    def load(config):
        auto = transformers.AutoModelForCausalLM
        return auto.from_pretrained(model_path, quantization_config=config)

    return load


def test_from_pretrained_warns_for_our_config(load, log):
    rules = {"self_attn.q_prj": {"nbits": 8}}
    config = hqq_cpp.HqqConfig(nbits=4, dynamic_config=rules, skip_modules=["model.layers.0", "x"])
    config.importance = {"model.layers.0.mlp.up_prj": torch.ones(256)}
    model = load(config)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert isinstance(model.model.layers[1].mlp.up_proj, hqq_cpp.HqqLinear)
    (line,) = log.lines
    assert "dynamic_config names no layer: 'self_attn.q_prj'; nearest is 'self_attn.q_proj'" in line
    assert "skip_modules names no layer: 'x'" in line
    assert "importance names no layer: 'model.layers.0.mlp.up_prj'; nearest is" in line


def test_from_pretrained_warns_for_the_config_of_transformers(load, log):
    transformers = pytest.importorskip("transformers")
    settings = {"nbits": 4, "group_size": 64}
    rules = {"self_attn.q_proj": settings, "mlp.upproj": settings}
    model = load(transformers.HqqConfig(dynamic_config=rules))
    assert isinstance(model.model.layers[0].self_attn.q_proj, hqq_cpp.HqqLinear)
    (line,) = log.lines
    assert "dynamic_config names no layer: 'mlp.upproj'; nearest is 'mlp.up_proj'" in line


def test_from_pretrained_says_nothing_when_all_fit(load, log):
    transformers = pytest.importorskip("transformers")
    load(transformers.HqqConfig(nbits=4, group_size=64, skip_modules=["lm_head", "mlp", "norm"]))
    assert log.lines == []
