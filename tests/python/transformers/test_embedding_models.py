"""Embeddings in models of Transformers: quantized on load, saved, read again."""

import pytest

import model_maker

torch = pytest.importorskip("torch", reason="HqqEmbedding is a torch module")
transformers = pytest.importorskip("transformers", reason="models of Transformers are made")

import hqq_cpp
import hqq_cpp.transformers

IDS = torch.arange(3, 15)[None]


@pytest.fixture(autouse=True)
def restore_backend():
    transformers.logging.disable_progress_bar()
    yield
    hqq_cpp.set_backend("auto", mode="auto")


# Models of Transformers.

TEXT = dict(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=4, max_position_embeddings=64,
)  # fmt: skip
# name -> (model class, config class, config, rules, embedding, layers tied to it)
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT | {"tie_word_embeddings": True},
              {"embed_tokens": {"nbits": 8}}, "model.embed_tokens", ["lm_head"]),
    "untied": ("LlamaForCausalLM", "LlamaConfig", TEXT,
               {"model.embed_tokens": {"nbits": 8}}, "model.embed_tokens", []),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config",
             dict(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=64),
             {"*.wte": {"nbits": 8, "quant_scale": True}, "*.wpe": {"nbits": 6}},
             "transformer.wte", ["lm_head"]),
    # Its embedding multiplies the rows.
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", TEXT | {"head_dim": 16},
               {"embed_tokens": {"nbits": 8}}, "model.embed_tokens", ["lm_head"]),
    # Its head has a bias.
    "bert": ("BertForMaskedLM", "BertConfig", TEXT, {"re:.*_embeddings": {"nbits": 8}},
             "bert.embeddings.word_embeddings", ["cls.predictions.decoder"]),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           dict(vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4),
           {"shared": {"nbits": 8}}, "shared",
           ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
}  # fmt: skip


def make(name):
    model_class, config_class, settings, *_ = MODELS[name]
    torch.manual_seed(0)
    special = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = getattr(transformers, config_class)(**settings, **special)
    return getattr(transformers, model_class)(config).eval()


def logits(model):
    extra = {"decoder_input_ids": IDS} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        return model(IDS, **extra).logits


def check_tied(model, embedding, tied):
    table = model.get_submodule(embedding)
    assert isinstance(table, hqq_cpp.HqqEmbedding) and table.nbits == 8
    for name in tied:
        assert model.get_submodule(name).W_q is table.W_q


@pytest.mark.parametrize("name", MODELS)
def test_models(name, tmp_path):
    *_, rules, embedding, tied = MODELS[name]
    # T5 keeps wo in float32 when it is loaded.
    config = hqq_cpp.HqqConfig(dynamic_config=rules, skip_modules=["lm_head", "wo"])
    dense = make(name)
    dense.save_pretrained(tmp_path / "dense")
    cls = type(dense)
    before, dense_class = logits(dense), type(dense.get_input_embeddings())

    model, info = cls.from_pretrained(
        tmp_path / "dense", quantization_config=config, output_loading_info=True
    )
    assert not any(info.values()) and model.dtype == torch.float32
    check_tied(model, embedding, tied)
    expected = logits(model)
    assert 0 < (expected - before).abs().max() < 0.5 * before.abs().max()

    in_place = hqq_cpp.quantize_model_(dense, config)
    check_tied(in_place, embedding, tied)
    assert torch.equal(logits(in_place), expected)

    for number, source in enumerate((model, in_place)):
        folder = tmp_path / f"saved{number}"
        source.save_pretrained(folder)
        stored = hqq_cpp.Checkpoint(folder)
        assert embedding in stored.quantized_layers()
        assert not set(tied) & {key.rpartition(".")[0] for key in stored.tensor_names} or (
            name == "bert"  # its bias
        )
        again, info = cls.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()) and again.dtype == torch.float32
        check_tied(again, embedding, tied)
        assert torch.equal(logits(again), expected)
        again.tie_weights()
        check_tied(again, embedding, tied)
        assert torch.equal(logits(source), expected)

    back = again.dequantize()
    assert type(back.get_input_embeddings()) is dense_class
    for other in tied:
        assert back.get_submodule(other).weight is back.get_submodule(embedding).weight
    assert torch.allclose(logits(back), expected, atol=1e-4)

    if name != "gpt2":  # whose transposed layers the command leaves dense
        hqq_cpp.quantize_checkpoint(tmp_path / "dense", tmp_path / "command", config)
        loaded, info = cls.from_pretrained(tmp_path / "command", output_loading_info=True)
        assert not any(info.values())
        check_tied(loaded, embedding, tied)
        assert torch.equal(logits(loaded), expected)


def test_there_and_back_through_the_upstream_format(tmp_path):
    dense = make("llama")
    dense.save_pretrained(tmp_path / "dense")
    config = hqq_cpp.HqqConfig(balance="none", dynamic_config=MODELS["llama"][3])
    expected = logits(hqq_cpp.quantize_model_(dense, config))
    hqq_cpp.quantize_checkpoint(tmp_path / "dense", tmp_path / "ours", config)
    hqq_cpp.convert_checkpoint(tmp_path / "ours", tmp_path / "upstream", "upstream")
    model, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "upstream", output_loading_info=True
    )
    assert not any(info.values())
    check_tied(model, "model.embed_tokens", ["lm_head"])
    assert torch.equal(logits(model), expected)


def test_without_a_rule_embeddings_stay(tmp_path):
    make("llama").save_pretrained(tmp_path / "dense")
    config = hqq_cpp.HqqConfig(dynamic_config={"model.layers.*": {"nbits": 3}})
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config
    )
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    assert model.lm_head.weight is model.model.embed_tokens.weight
    report = hqq_cpp.quantize_checkpoint(tmp_path / "dense", tmp_path / "command", config)
    assert report.copied == ["model.embed_tokens.weight"]


def test_rules_per_tag_as_transformers_has_them(tmp_path):
    make("llama").save_pretrained(tmp_path / "dense")
    config = transformers.HqqConfig(dynamic_config={"embed_tokens": {"nbits": 8, "group_size": 64}})
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config
    )
    assert [row.name for row in model.hqq_report().rows] == ["model.embed_tokens"]
    check_tied(model, "model.embed_tokens", ["lm_head"])


@pytest.mark.parametrize("pre_quantized", [False, True])
def test_offloaded_to_disk(pre_quantized, tmp_path):
    pytest.importorskip("accelerate", reason="device_map needs it")
    dense = make("llama")
    dense.save_pretrained(tmp_path / "model")
    options = {"quantization_config": hqq_cpp.HqqConfig(dynamic_config=MODELS["llama"][3])}
    expected = logits(hqq_cpp.quantize_model_(dense, options["quantization_config"]))
    if pre_quantized:
        dense.save_pretrained(tmp_path / "model")
        options = {}
    parts = ("model.layers", "model.norm", "model.rotary_emb")
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={"model.embed_tokens": "disk", "lm_head": "disk"} | dict.fromkeys(parts, "cpu"),
        offload_folder=tmp_path / "offload",
        **options,
    )
    assert torch.equal(logits(model), expected)


def test_a_tied_weight_with_a_tensor_of_its_own_is_refused(tmp_path):
    make("llama").save_pretrained(tmp_path / "dense")
    tensors = dict(hqq_cpp.load_safetensors(tmp_path / "dense" / "model.safetensors"))
    tensors = {name: tensor.numpy().copy() for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    hqq_cpp.save_safetensors(tmp_path / "dense" / "model.safetensors", tensors, {"format": "pt"})
    config = hqq_cpp.HqqConfig(dynamic_config=MODELS["llama"][3])
    with pytest.raises(ValueError, match="lm_head.weight is tied to model.embed_tokens.weight"):
        transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=config
        )


def test_the_command_quantizes_embeddings_by_name(rng, tmp_path):
    tensors = model_maker.llama_layer(rng, 0, 64, 128)
    tensors["model.embed_tokens.weight"] = model_maker.bfloat16(rng, (96, 64))
    model_maker.save_model(tmp_path / "model", [tensors])
    embedding = "model.embed_tokens"
    for rule, found in (
        (embedding, True),
        ("embed_tokens", True),
        ("*.embed_*", True),
        ("re:.*tokens", True),
        ("mlp.down_proj", False),
    ):
        config = hqq_cpp.HqqConfig(dynamic_config={rule: {"nbits": 8}})
        out = tmp_path / "out"
        report = hqq_cpp.quantize_checkpoint(tmp_path / "model", out, config, force=True)
        assert (embedding in [layer.name for layer in report.layers]) == found, rule
        assert report.copied == ([] if found else [f"{embedding}.weight"])
        assert hqq_cpp.verify_checkpoint(out).ok
        if found:
            assert hqq_cpp.Checkpoint(out).load(embedding).nbits == 8
