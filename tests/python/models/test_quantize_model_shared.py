"""quantize_model_ on layers that parts of a model share, and on those that hold adapters."""

import pytest

torch = pytest.importorskip("torch", reason="the layers need torch")

from torch import nn

import hqq_cpp
from hqq_cpp.find.layers import find_layers, survey
from odd_models import EIGHT, close, names, quietly


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Shared layers.


def test_a_shared_module_is_one_layer():
    layer = nn.Linear(64, 64)
    block = nn.Sequential(nn.Linear(64, 64))
    model = nn.ModuleDict({"list": nn.ModuleList([layer, nn.ReLU(), layer]), "again": layer})
    model["blocks"] = nn.ModuleList([block, block])
    x = torch.randn(3, 64)
    expected, inner = layer(x), block(x)
    seen = []
    quietly(model, EIGHT, progress=lambda *a: seen.append(a))
    assert seen == [("list.0", 1, 2), ("blocks.0.0", 2, 2)]
    assert model["list"][0] is model["list"][2] is model["again"]
    assert model["blocks"][0] is model["blocks"][1] is block
    close(model["again"](x), expected)
    close(model["blocks"][1](x), inner)
    assert len(hqq_cpp.hqq_report(model).rows) == 2
    hqq_cpp.dequantize_model_(model)
    assert type(model["again"]) is nn.Linear and model["list"][0] is model["again"]
    assert model["list"][2] is model["again"]


def test_a_shared_weight_is_one_layer():
    model = nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Linear(64, 32, bias=False)})
    model["b"].weight = model["a"].weight
    model["c"] = nn.ModuleList([model["b"]])
    (layer,) = find_layers(model)
    assert (layer.name, layer.tied, layer.aliases) == ("a", ("b",), ("c.0",))
    bias = model["a"].bias
    quietly(model, EIGHT)
    assert model["a"].W_q is model["b"].W_q and model["c"][0] is model["b"]
    assert model["a"].bias is bias and model["b"].bias is None
    x = torch.randn(3, 64)
    torch.testing.assert_close(model["a"](x), model["b"](x) + bias)
    hqq_cpp.dequantize_model_(model)
    assert model["a"].weight is model["b"].weight and model["c"][0] is model["b"]


def test_all_names_of_a_shared_layer_count():
    layer = nn.Linear(64, 64)

    def model():
        return nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(64, 64)})

    four = quietly(model(), {"nbits": 8, "dynamic_config": {"b": {"nbits": 4}}})
    assert four["a"] is four["b"] and (four["a"].nbits, four["c"].nbits) == (4, 8)
    assert names(quietly(model(), EIGHT | {"skip_modules": ["b"]})) == ["c"]
    assert names(quietly(model(), EIGHT | {"dynamic_config": {"b": None}})) == ["c"]
    importance = {"b": torch.rand(64) + 0.1}
    assert quietly(model(), EIGHT, importance=importance)["a"].layer_config.balance == "none"


def test_modules_that_hold_each_other():
    class Child(nn.Module):
        def __init__(self, parent):
            super().__init__()
            self.parent, self.layer = parent, nn.Linear(64, 64)

    model = nn.Module()
    model.child = Child(model)
    assert [layer.name for layer in survey(quietly(model, EIGHT))] == []
    assert isinstance(model.child.layer, hqq_cpp.HqqLinear)


# Adapters.


def test_adapters_by_name_stay():
    block = nn.ModuleDict(
        {
            "base_layer": nn.Linear(64, 64),
            "lora_A": nn.ModuleDict({"default": nn.Linear(64, 8)}),
            "lora_B": nn.Linear(8, 64),
        }
    )
    assert names(quietly(nn.Sequential(block), EIGHT)) == ["0.base_layer"]


def test_adapters_of_peft_stay_and_train(tmp_path):
    peft = pytest.importorskip("peft", reason="adapters")
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 8))
    config = peft.LoraConfig(target_modules=["0", "2"], modules_to_save=["3"], use_dora=True)
    model = peft.get_peft_model(model, config)
    x = torch.randn(5, 64)
    expected = model(x)
    quietly(model, EIGHT)
    start = "base_model.model."
    assert names(model) == [f"{start}0.base_layer", f"{start}2.base_layer"]
    close(model(x), expected)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, 0.1)
    losses = []
    for _ in range(5):
        loss = model(x).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    trained = model(x)
    model.merge_adapter()
    assert torch.allclose(model(x), trained, atol=0.02 * float(trained.detach().abs().max()))
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), trained)
    hqq_cpp.dequantize_model_(model)
    assert type(model.base_model.model[0]) is peft.tuners.lora.layer.Linear
    close(model(x), trained)
    model.merge_adapter()
    close(model(x), trained)


@pytest.mark.parametrize("tuner, merges", [("VeraConfig", True), ("IA3Config", False)])
def test_other_adapters_merge_as_on_a_model_that_was_quantized_first(tuner, merges):
    peft = pytest.importorskip("peft", reason="adapters")
    config = getattr(peft, tuner)(target_modules=["0", "1"])
    if tuner == "IA3Config":
        config.feedforward_modules = []
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model = quietly(peft.get_peft_model(model, config), EIGHT)
    base, x = model.base_model.model[0].get_base_layer(), torch.randn(3, 64)
    before, expected = base.dequantize(), model(x)
    if not merges:
        with pytest.raises(ValueError, match="cannot be merged into a quantized layer"):
            model.merge_adapter()
        return
    model.merge_adapter()
    close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(base.dequantize(), before)


def test_a_merged_adapter_keeps_its_layer_dense():
    peft = pytest.importorskip("peft", reason="adapters")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="0.base_layer .an adapter is merged into it"):
        hqq_cpp.quantize_model_(model, EIGHT)
    assert names(model) == ["base_model.model.1"]


def test_prompts_of_peft_stay():
    peft = pytest.importorskip("peft", reason="adapters")
    transformers = pytest.importorskip("transformers", reason="a model with prompts")
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    prompts = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16
    )
    model = peft.get_peft_model(model, prompts)
    hqq_cpp.quantize_model_(model, EIGHT | {"dynamic_config": {"*.wte": {"nbits": 8}}})
    assert all(name.startswith("base_model.") for name in names(model))
    assert model.word_embeddings is model.base_model.transformer.wte
    assert isinstance(model.word_embeddings, hqq_cpp.HqqEmbedding)
    assert model(torch.arange(4)[None]).logits.isfinite().all()
