"""Models of Transformers inside of other modules, sentence-transformers' above all: what they save
loads right."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn

import hqq_cpp

SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=48
)  # fmt: skip
# By the name that one layer has in the whole, by a tag and by patterns.
RULES = {
    "0.model.encoder.layer.1.output.dense": {"nbits": 8},
    "*.self.query": {"nbits": 6},
    "*.layer.0.attention.self.key": None,
    "*word_embeddings": {"nbits": 8},
}
CONFIG = {"nbits": 4, "group_size": 32, "dynamic_config": RULES}
WORDS = [*"abcdefghijklmnopqrstuvwxyz", "cat", "sat", "mat", "the", "on"]
SENTENCES = ["the cat sat on the mat", "a b c", "z the y"]


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, initializer_range=0.2)
    return transformers.BertModel(config).eval()


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.2)
    return transformers.LlamaForCausalLM(config).eval()


def outputs(model):
    with torch.no_grad():
        found = model(input_ids=torch.arange(10)[None])
    return found.logits if "logits" in found else found.last_hidden_state


def settings_in(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


class Wrapper(nn.Module):
    """As a LightningModule or a model of timm keeps it."""

    def __init__(self, **models):
        super().__init__()
        self.models = nn.ModuleDict(models)
        self.head = nn.Linear(32, 32)


@pytest.fixture(scope="module")
def sentence_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    bert().save_pretrained(folder)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_a_sentence_transformer(sentence_folder, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models

    part = models.Transformer(str(sentence_folder))
    pooling = models.Pooling(32)
    whole = sentence_transformers.SentenceTransformer(modules=[part, pooling], device="cpu")
    hqq_cpp.quantize_model_(whole, CONFIG)
    expected = whole.encode(SENTENCES)
    whole.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert (again.encode(SENTENCES) == expected).all()
    a, b = whole.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    bits = {n: m.nbits for n, m in again.named_modules() if isinstance(m, hqq_cpp.HqqLinear)}
    assert set(bits.values()) == {4, 6, 8}


def test_settings_have_the_names_of_the_part(tmp_path):
    model = bert()
    # The name of the whole's layer, spelled as in RULES.
    whole = nn.Sequential(Wrapper())
    whole[0].model = model
    hqq_cpp.quantize_model_(whole, CONFIG)
    model.save_pretrained(tmp_path)
    settings = settings_in(tmp_path)
    config = hqq_cpp.HqqConfig.from_dict(settings)
    for name, module in model.named_modules():
        if isinstance(module, hqq_cpp.HqqLinear):
            assert config.layer(name) == module.layer_config, name
    assert config.layer("encoder.layer.1.output.dense").nbits == 8
    assert config.layer("encoder.layer.1.attention.self.query").nbits == 6
    assert config.layer("encoder.layer.0.attention.self.key") is None
    assert "encoder.layer.0.attention.self.key" in settings["not_quantized"]
    assert isinstance(model.embeddings.word_embeddings, hqq_cpp.HqqEmbedding)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(outputs(again), outputs(model))


def test_several_in_one(tmp_path):
    whole = Wrapper(one=bert(), two=llama())
    hqq_cpp.quantize_model_(whole, {"nbits": 4, "group_size": 32})
    for name, part in whole.models.items():
        part.save_pretrained(tmp_path / name)
        again = type(part).from_pretrained(tmp_path / name)
        assert torch.equal(outputs(again), outputs(part))
        assert (
            sum(isinstance(m, hqq_cpp.HqqLinear) for m in again.modules())
            == {"one": 13, "two": 14}[name]
        )


def test_a_part_that_stayed_dense(tmp_path):
    whole = Wrapper(one=bert(), two=llama())
    hqq_cpp.quantize_model_(whole, {"nbits": 4, "group_size": 32}, filter=lambda n, m: "two" in n)
    whole.models.one.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("on_load", [False, True])
def test_models_in_models(tmp_path, on_load):
    """The outer one is saved as ever, and so is the inner one alone."""
    config = {
        "nbits": 4,
        "group_size": 32,
        "dynamic_config": {"model.layers.1.mlp.up_proj": {"nbits": 8}},
    }
    outer = llama()
    if on_load:
        outer.save_pretrained(tmp_path / "dense")
        settings = hqq_cpp.HqqConfig.from_dict(config)
        outer = type(outer).from_pretrained(tmp_path / "dense", quantization_config=settings)
    else:
        hqq_cpp.quantize_model_(outer, config)
    inner = outer.model
    for part, name in ((outer, "outer"), (inner, "inner")):
        part.save_pretrained(tmp_path / name)
        again = type(part).from_pretrained(tmp_path / name)
        assert torch.equal(outputs(again), outputs(part))
    assert again.layers[1].mlp.up_proj.nbits == 8
    # The names of the outer one.
    assert (
        settings_in(tmp_path / "outer")["dynamic_config"]
        == outer.config.quantization_config.to_dict()["dynamic_config"]
    )


def test_inner_models_with_a_config_of_their_own(tmp_path):
    vision = dict(SIZES, image_size=8, patch_size=4)
    del vision["vocab_size"]
    config = transformers.CLIPConfig(text_config=SIZES, vision_config=vision, projection_dim=32)
    torch.manual_seed(0)
    outer = transformers.CLIPModel(config).eval()
    hqq_cpp.quantize_model_(outer, {"nbits": 4, "group_size": 32})
    outer.save_pretrained(tmp_path / "outer")
    raw = json.loads((tmp_path / "outer" / "config.json").read_text())
    assert "quantization_config" in raw and "quantization_config" not in raw["text_config"]

    inner = next(
        m for m in outer.modules()
        if isinstance(m, transformers.PreTrainedModel) and m.config is outer.config.text_config
    )  # fmt: skip
    inner.save_pretrained(tmp_path / "inner")
    assert settings_in(tmp_path / "inner")["nbits"] == 4
    again = type(inner).from_pretrained(tmp_path / "inner")
    a, b = inner.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    # And the outer one once more.
    outer.save_pretrained(tmp_path / "later")
    again = transformers.CLIPModel.from_pretrained(tmp_path / "later").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in outer.state_dict().items())


def test_below_peft(tmp_path):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    hqq_cpp.quantize_model_(wrapped, {"nbits": 4, "group_size": 32})
    base = wrapped.unload()
    assert isinstance(base, transformers.PreTrainedModel)
    base.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path)
    assert torch.equal(outputs(again), outputs(base))
    assert isinstance(again.model.layers[0].self_attn.q_proj, hqq_cpp.HqqLinear)
