"""dequantize_model_ and PreTrainedModel.dequantize: the modules that there were."""

import copy
import json
import pickle
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="the layers need torch")

from torch import nn

import hqq_cpp
from hqq_cpp.find.layers import quantized_layers

EIGHT = {"nbits": 8}
IDS = torch.arange(3, 15)[None]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Label(nn.Linear):
    """Another name."""


class Table(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = Table(64, 32, padding_idx=1)
        self.mix = Label(32, 32)
        self.conv = nn.Conv2d(32, 16, 1, bias=False, padding="same")
        self.head = nn.Linear(16, 8).to(torch.bfloat16)

    def forward(self, ids):
        x = self.mix(self.tokens(ids))
        return self.head(self.conv(x.mT[..., None]).flatten(2).mT.bfloat16())


def net():
    model = Net()
    model.mix.bias.requires_grad_(False)
    model.head.weight.requires_grad_(False)
    model.conv.eval()
    model.conv.note = "first"
    return model


RULES = EIGHT | {"dynamic_config": {"tokens": {"nbits": 8}}}


def described(model):
    """Everything that is not a value."""
    return (
        repr(model),
        {n: (type(m), m.training) for n, m in model.named_modules()},
        {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()},
        {n: {k for k in vars(m) if k != "_is_hf_initialized"} for n, m in model.named_modules()},
    )


@pytest.mark.parametrize("copied", ["as it is", "deepcopy", "pickle"])
def test_every_kind_comes_back(copied):
    model = hqq_cpp.quantize_model_(net(), RULES)
    assert len(list(quantized_layers(model))) == 4
    expected = model(IDS)
    W_r = {name: module.dequantize() for name, module in quantized_layers(model)}
    if copied != "as it is":
        model = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert hqq_cpp.dequantize_model_(model) is model
    assert described(model) == described(net())
    for name, weight in W_r.items():
        layer = model.get_submodule(name)
        dense = weight[..., None, None] if name == "conv" else weight
        assert torch.equal(layer.weight, dense.to(layer.weight.dtype))
    torch.testing.assert_close(model(IDS), expected, atol=0.02, rtol=0.02)
    # And from there on like any other.
    model.load_state_dict(net().state_dict())
    assert len(list(quantized_layers(hqq_cpp.quantize_model_(model, RULES)))) == 4


def test_types():
    model = hqq_cpp.quantize_model_(net(), RULES)
    for dtype in (torch.float16, "bfloat16"):
        dense = hqq_cpp.dequantize_model_(copy.deepcopy(model), dtype)
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        assert {parameter.dtype for parameter in dense.parameters()} == {wanted}
        assert not dense.mix.bias.requires_grad and dense.mix.weight.requires_grad
    half = hqq_cpp.dequantize_model_(copy.deepcopy(model).half())
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    with pytest.raises(ValueError, match="dtype torch.int8 is not one of"):
        hqq_cpp.dequantize_model_(model, torch.int8)
    assert len(list(quantized_layers(model))) == 4


def test_layers_that_were_made_alone():
    model = nn.Sequential(hqq_cpp.quantize_linear(nn.Linear(64, 8), EIGHT), nn.ReLU())
    assert type(hqq_cpp.dequantize_model_(model)[0]) is nn.Linear


def test_nothing_to_do_is_refused():
    with pytest.raises(ValueError, match="there is no quantized layer below Sequential"):
        hqq_cpp.dequantize_model_(nn.Sequential(nn.Linear(4, 4)))
    layer = hqq_cpp.quantize_linear(nn.Linear(64, 8), EIGHT)
    with pytest.raises(ValueError, match=r"a single layer; layer.dequantize\(\) gives its weight"):
        hqq_cpp.dequantize_model_(layer)
    model = hqq_cpp.quantize_model_(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8)), EIGHT)
    model[1].to("meta")
    with pytest.raises(ValueError, match="1 of 2 layers are on device meta: load their weights"):
        hqq_cpp.dequantize_model_(model)
    assert isinstance(model[0], hqq_cpp.HqqLinear)


# Models of Transformers.

TEXT = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
)  # fmt: skip
BERT = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
GPT2 = dict(
    vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
)  # fmt: skip
# name -> (class, config class, config, rules)
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, {"*.wte": EIGHT}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", TEXT | {"num_local_experts": 4}, {}),
    "bert": ("BertForMaskedLM", "BertConfig", BERT, {"re:.*word_embeddings": EIGHT}),
    "falcon": ("FalconForCausalLM", "FalconConfig",
               {k: TEXT[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")}
               | dict(num_attention_heads=2, bos_token_id=1, eos_token_id=2), {}),
}  # fmt: skip

PLAIN = """
import json, sys, torch, transformers
transformers.logging.disable_progress_bar()
for name, folder in json.loads(sys.argv[1]).items():
    given = torch.load(folder + "/given.pt")
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert "hqq_cpp" not in sys.modules
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(given["ids"]).logits, given["logits"])
    kinds = {n: type(m).__name__ for n, m in model.named_modules()}
    assert kinds == given["kinds"], name
"""


def test_transformers_alone_loads_the_dense_model(tmp_path):
    transformers = pytest.importorskip("transformers", reason="models of Transformers are made")
    import hqq_cpp.transformers

    transformers.logging.disable_progress_bar()
    saved = {}
    for name, (model_class, config_class, settings, rules) in MODELS.items():
        config = getattr(transformers, config_class)(**settings)
        model = getattr(transformers, model_class)(config).eval()
        kinds = {n: type(m).__name__ for n, m in model.named_modules()}
        hqq_cpp.quantize_model_(model, EIGHT | {"dynamic_config": rules, "skip_modules": None})
        quantized = model(IDS).logits
        model.save_pretrained(tmp_path / "quantized" / name)
        model = type(model).from_pretrained(tmp_path / "quantized" / name)
        assert model.is_quantized and model.hqq_quantized
        assert model.dequantize() is model and not list(quantized_layers(model))
        for mark in ("hf_quantizer", "quantization_method", "hqq_quantized"):
            assert not hasattr(model, mark)
        assert not model.is_quantized and not hasattr(model.config, "quantization_config")
        assert kinds == {n: type(m).__name__ for n, m in model.named_modules()}
        folder = tmp_path / "dense" / name
        model.save_pretrained(folder)
        with torch.no_grad():
            logits = model(IDS).logits
        torch.testing.assert_close(logits, quantized, atol=0.02, rtol=0.02)
        torch.save({"ids": IDS, "logits": logits, "kinds": kinds}, folder / "given.pt")
        saved[model_class] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(saved)], capture_output=True, text=True,
        cwd=tmp_path, env={"HF_HUB_OFFLINE": "1", "HQQ_CPP_NO_HOOK": "1", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_models_inside_of_others_are_dense_again():
    transformers = pytest.importorskip("transformers", reason="models of Transformers are made")
    import hqq_cpp.transformers

    inner = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    hqq_cpp.quantize_model_(inner, EIGHT)
    outer = hqq_cpp.quantize_model_(nn.Sequential(nn.Linear(32, 32), inner), EIGHT)
    hqq_cpp.dequantize_model_(outer)
    assert not inner.is_quantized and not hasattr(inner, "hf_quantizer")
    assert type(outer[0]) is type(inner.model.layers[0].mlp.up_proj) is nn.Linear
