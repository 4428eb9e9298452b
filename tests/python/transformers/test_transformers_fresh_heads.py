"""Layers whose weight does not come from the checkpoint: they are initialized, dense and
trainable, as without quantization."""

import pytest

torch = pytest.importorskip("torch", reason="Transformers needs torch")
transformers = pytest.importorskip("transformers", reason="the integration needs Transformers")

from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    initialization,
)

import hqq_cpp
import hqq_cpp.transformers
from folder_maker import change
from hqq_cpp.find.layers import quantized_layers

IDS = torch.arange(1, 9)[None]
Q4 = dict(nbits=4, group_size=32)
TEXT = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
)

pytestmark = pytest.mark.usefixtures("log")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> dense folder; name + "-q": the same, quantized."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    vit = ViTConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        image_size=32, patch_size=8, num_labels=20,
    )  # fmt: skip
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**TEXT, pad_token_id=0)),
        "classifier": LlamaForSequenceClassification(
            LlamaConfig(**TEXT, pad_token_id=0, num_labels=7)
        ),
        "bert": BertModel(BertConfig(**TEXT)),
        "bert-mlm": BertForMaskedLM(BertConfig(**TEXT)),
        "vit": ViTForImageClassification(vit),
    }
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)  # biases other than 0
        model.save_pretrained(root / name)
        hqq_cpp.quantize_checkpoint(root / name, root / f"{name}-q", Q4)
    return root


def load(cls, folder, quantize, **kwargs):
    """On load, or from the quantized folder."""
    if quantize:
        return cls.from_pretrained(folder, quantization_config=hqq_cpp.HqqConfig(**Q4), **kwargs)
    return cls.from_pretrained(f"{folder}-q", **kwargs)


def assert_fresh(model, name, std=0.02):
    """A dense layer, initialized as without quantization, and all else read."""
    head = model.get_submodule(name)
    assert type(head) is nn.Linear and head.weight.requires_grad
    assert torch.isfinite(head.weight).all() and 0.4 * std < head.weight.std() < 2 * std
    if head.bias is not None:
        assert head.bias.requires_grad and not head.bias.any()
    for parameter_name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.float()).all(), parameter_name
    assert len(list(quantized_layers(model))) >= 5


on_load_and_folder = pytest.mark.parametrize("quantize", [True, False], ids=["on load", "folder"])


@on_load_and_folder
@pytest.mark.parametrize(
    "cls, source, head",
    [
        (LlamaForSequenceClassification, "llama", "score"),
        (BertForSequenceClassification, "bert", "classifier"),
        (BertForTokenClassification, "bert-mlm", "classifier"),
    ],
)
def test_a_new_head(folders, tmp_path, cls, source, head, quantize):
    model = load(cls, folders / source, quantize, num_labels=3)
    assert_fresh(model, head)
    loss = model(IDS, labels=torch.ones(IDS.shape if "Token" in cls.__name__ else 1).long()).loss
    loss.backward()
    assert model.get_submodule(head).weight.grad.abs().sum() > 0
    # The head that was trained is saved and comes back.
    with torch.no_grad():
        model.get_submodule(head).weight.mul_(3)
    model.eval().save_pretrained(tmp_path)
    again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@on_load_and_folder
def test_another_number_of_labels(folders, log, quantize):
    x = torch.randn(1, 3, 32, 32)
    for cls, source, head, inputs in (
        (ViTForImageClassification, "vit", "classifier", x),
        (LlamaForSequenceClassification, "classifier", "score", IDS),
    ):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            load(cls, folders / source, quantize, num_labels=5)
        rows = 20 if source == "vit" else 7
        assert f"ckpt: torch.Size([{rows}, 64]) vs model:torch.Size([5, 64])" in log.text
        model = load(cls, folders / source, quantize, num_labels=5, ignore_mismatched_sizes=True)
        assert_fresh(model, head)
        assert model(inputs).logits.shape == (1, 5)
        # With the right number it is quantized as any layer.
        same = load(cls, folders / source, quantize, num_labels=rows)
        assert isinstance(same.get_submodule(head), hqq_cpp.HqqLinear)
    assert "become dense" not in log.text


def test_another_number_of_labels_without_descriptions(folders, tmp_path):
    folder = change(folders / "vit-q", tmp_path / "q", layers=None)
    model = ViTForImageClassification.from_pretrained(
        folder, num_labels=5, ignore_mismatched_sizes=True
    )
    assert_fresh(model, "classifier")


@on_load_and_folder
def test_the_base_model(folders, quantize):
    """The folder of a model with a head, and that of one without, in each other's class."""
    base = load(BertModel, folders / "bert-mlm", quantize)
    assert_fresh_pooler = base.pooler.dense
    assert type(assert_fresh_pooler) is nn.Linear and not assert_fresh_pooler.bias.any()
    model = load(BertForMaskedLM, folders / "bert", quantize)
    assert_fresh(model, "cls.predictions.transform.dense")


@on_load_and_folder
def test_a_head_of_another_class(folders, quantize, log):
    """The file has a head that the model does not have."""
    model = load(BertForSequenceClassification, folders / "bert-mlm", quantize)
    assert_fresh(model, "classifier")
    assert "cls.predictions.transform.dense" in log.text and "UNEXPECTED" in log.text


@on_load_and_folder
def test_a_new_bias(folders, tmp_path, quantize):
    """Of a layer whose weight is quantized: initialized as that of a dense layer."""
    model = load(LlamaForCausalLM, folders / "llama", quantize, attention_bias=True)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, hqq_cpp.HqqLinear)
    assert layer.bias.device.type == "cpu" and not layer.bias.any()


def test_initialization_never_meets_packed_tensors(folders):
    """Of a model whose _init_weights goes through all parameters below it."""

    class Xavier(LlamaForSequenceClassification):
        def _init_weights(self, module):
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    initialization.xavier_uniform_(parameter)

    for quantize in (True, False):
        model = load(Xavier, folders / "llama", quantize, num_labels=3)
        plain = load(LlamaForSequenceClassification, folders / "llama", quantize, num_labels=3)
        for name, module in quantized_layers(model):
            other = plain.get_submodule(name)
            assert all(a is b or torch.equal(a, b) for a, b in zip(module.packed(), other.packed()))
        assert_fresh(model, "score", std=(2 / 67) ** 0.5)


@on_load_and_folder
def test_nothing_of_the_checkpoint(folders, tmp_path, quantize):
    """A model of which the checkpoint has nothing is no quantized model."""
    config = BertConfig(**TEXT)
    error = ValueError if quantize else hqq_cpp.FormatError
    with pytest.raises(error, match="has none of the|hold no W_q of a layer of BertModel"):
        load(BertModel, folders / "llama", quantize, config=config if quantize else None)


@on_load_and_folder
@pytest.mark.parametrize("device_map", ["cpu", "auto", "disk"])
def test_device_maps(folders, tmp_path, quantize, device_map):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    if device_map == "disk":
        device_map = {"model.embed_tokens": "cpu", "model.layers": "disk"}
        device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "score": "cpu"}
    model = load(
        LlamaForSequenceClassification, folders / "llama", quantize, num_labels=3,
        device_map=device_map, offload_folder=tmp_path,
    )  # fmt: skip
    assert type(model.score) is nn.Linear and model.score.weight.std() < 0.04
    assert len(list(quantized_layers(model))) == 7
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()


def test_pickled_checkpoints(folders, tmp_path):
    """pytorch_model.bin, in shards."""
    model = LlamaForCausalLM.from_pretrained(folders / "llama")
    model.config.save_pretrained(tmp_path)
    import json

    state, files = model.state_dict(), ("a.bin", "b.bin")
    index = {name: files[i % 2] for i, name in enumerate(state)}
    for file in files:
        torch.save({k: v for k, v in state.items() if index[k] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    loaded = load(LlamaForSequenceClassification, tmp_path, True, num_labels=3)
    assert_fresh(loaded, "score")


def test_a_state_dict(folders):
    model = LlamaForCausalLM.from_pretrained(folders / "llama")
    loaded = LlamaForSequenceClassification.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(),
        quantization_config=hqq_cpp.HqqConfig(**Q4),
    )  # fmt: skip
    assert_fresh(loaded, "score")


@on_load_and_folder
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("source", ["llama", "bert"])
def test_peft_trains_the_head(folders, tmp_path, quantize, task, source):
    peft = pytest.importorskip("peft", reason="needs peft")
    kind = "SequenceClassification" if task == "SEQ_CLS" else "TokenClassification"
    cls = getattr(transformers, f"{source.capitalize()}For{kind}")
    model = load(cls, folders / source, quantize, num_labels=3)
    name = "classifier" if source == "bert" else "score"
    before = model.get_submodule(name).weight.detach().clone()
    config = peft.LoraConfig(task_type=task, r=4, target_modules=["q_proj", "query"])
    model = peft.get_peft_model(model, config)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(f"{name}.modules_to_save" in n and n.endswith("weight") for n in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    labels = torch.ones(1 if task == "SEQ_CLS" else IDS.shape).long()
    model(input_ids=IDS, labels=labels).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    base = load(cls, folders / source, quantize, num_labels=3)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.allclose(again(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5)
    head = again.base_model.model.get_submodule(name).modules_to_save["default"]
    assert not torch.equal(head.weight, before)


def test_modules_to_save_of_a_dense_head(folders):
    peft = pytest.importorskip("peft", reason="needs peft")
    model = load(LlamaForCausalLM, folders / "llama", True)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, modules_to_save=["lm_head"])
    model = peft.get_peft_model(model, config)
    assert model.lm_head.modules_to_save["default"].weight.requires_grad


@on_load_and_folder
def test_peft_trains_a_head_of_the_checkpoint(folders, tmp_path, quantize):
    """It is quantized; what peft trains whole is a dense copy of it."""
    peft = pytest.importorskip("peft", reason="needs peft")
    cls = LlamaForSequenceClassification
    model = load(cls, folders / "classifier", quantize, num_labels=7)
    assert isinstance(model.score, hqq_cpp.HqqLinear)
    before = model(IDS).logits
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, modules_to_save=["embed_tokens"])
    model = peft.get_peft_model(model, config)
    head = model.base_model.model.score.modules_to_save["default"]
    assert type(head) is nn.Linear and head.weight.requires_grad
    assert torch.allclose(model(IDS).logits, before, atol=1e-4)
    model(input_ids=IDS, labels=torch.ones(1).long()).loss.backward()
    with torch.no_grad():
        head.weight -= head.weight.grad
    model.save_pretrained(tmp_path)
    base = load(cls, folders / "classifier", quantize, num_labels=7)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-5)
    assert type(again.merge_and_unload().score) is nn.Linear


@pytest.mark.parametrize("name", ["embed_tokens", "block"])
def test_peft_trains_dense_copies(folders, name):
    """Of an embedding, and of all that is below a module."""
    peft = pytest.importorskip("peft", reason="needs peft")
    config = hqq_cpp.HqqConfig(nbits=8, dynamic_config={"embed_tokens": {"nbits": 8}})
    model = LlamaForCausalLM.from_pretrained(folders / "llama", quantization_config=config)
    before = model(IDS).logits
    names = [name if name == "embed_tokens" else "mlp"]
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=names)
    )
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
    assert len(trained) == (1 if name == "embed_tokens" else 3)
    assert torch.allclose(model(IDS).logits, before, atol=1e-3)
    model(IDS).logits.sum().backward()


# Another number of tokens.


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_resizing_quantized_embeddings_is_refused(tmp_path, name, tie):
    model = LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=tie))
    model.save_pretrained(tmp_path)
    config = hqq_cpp.HqqConfig(**Q4, dynamic_config={name: {"nbits": 8}}, skip_modules=())
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
    if tie and name == "lm_head":
        model.resize_token_embeddings(72)  # the embedding alone decides, and it is dense
        assert model(IDS).logits.shape[-1] == 72
        return
    before = model(IDS).logits
    for arguments in ((72,), (60,), (None, 48)):
        with pytest.raises(ValueError, match=f"{name} is quantized to 8 bits for 64 tokens"):
            model.resize_token_embeddings(*arguments)
    assert model.config.vocab_size == 64 and torch.equal(model(IDS).logits, before)
    # The same number is no change.
    model.resize_token_embeddings(64)
    model.resize_token_embeddings(pad_to_multiple_of=32)
    assert torch.equal(model(IDS).logits, before)


def test_resizing_dense_embeddings(folders):
    model = load(LlamaForCausalLM, folders / "llama", False)
    model.resize_token_embeddings(72)
    assert model(IDS).logits.shape[-1] == 72 and model.config.vocab_size == 72


@pytest.mark.parametrize("name", ["mobilebert.embeddings.word_embeddings", "cls.predictions.dense"])
def test_resizing_that_begins_elsewhere_is_refused(tmp_path, name):
    """MobileBERT changes cls.predictions.dense first."""
    config = transformers.MobileBertConfig(
        **TEXT, embedding_size=32, intra_bottleneck_size=32, num_feedforward_networks=1
    )
    transformers.MobileBertForMaskedLM(config).save_pretrained(tmp_path)
    config = hqq_cpp.HqqConfig(dynamic_only=True, dynamic_config={name: Q4})
    model = transformers.MobileBertForMaskedLM.from_pretrained(tmp_path, quantization_config=config)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=f"{name} is quantized to 4 bits for 64 tokens"):
        model.resize_token_embeddings(72)
    assert shapes == {n: p.shape for n, p in model.named_parameters()}
