"""Every family of models quantizes on load, is saved and comes back: tiny, random ones made from
their configs."""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="Transformers needs torch")
transformers = pytest.importorskip("transformers", reason="the integration needs Transformers")

import hqq_cpp
import hqq_cpp.transformers
from hqq_cpp.find.layers import quantized_layers
from hqq_cpp.nn.experts import HqqExperts

IDS = torch.arange(3, 15)[None]
TEXT = dict(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
BERT = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
VISION = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32,
    patch_size=8,
)  # fmt: skip
SPECIAL = dict(eos_token_id=2, bos_token_id=1, pad_token_id=0)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
DEEPSEEK = dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, n_group=1, topk_group=1,
    q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
    first_k_dense_replace=1,
)  # fmt: skip
WHISPER = dict(
    vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=16,
    max_source_positions=20, max_target_positions=32, decoder_start_token_id=1,
)  # fmt: skip


def ids():
    return {"input_ids": IDS}


def pixels():
    return {"pixel_values": torch.randn(1, 3, 32, 32)}


def both():
    return ids() | pixels()


def mel():
    return {"input_features": torch.randn(1, 16, 40), "decoder_input_ids": IDS}


def seq2seq():
    return ids() | {"decoder_input_ids": IDS}


# name -> (model class, config class, config, input, layers, share of the weights that is quantized)
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT, ids, 14, 0.8),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", TEXT | {"head_dim": 16}, ids, 14, 0.8),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", TEXT | {"head_dim": 16}, ids, 14, 0.8),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", TEXT | {"pad_token_id": 0}, ids, 8, 0.8),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config",
             dict(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64), ids, 8, 0.8),
    "bert": ("BertModel", "BertConfig", BERT, ids, 13, 0.8),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", BERT, ids, 13, 0.8),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           dict(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4,
                decoder_start_token_id=0), seq2seq, 14, 0.7),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER | SPECIAL, mel, 16, 0.7),
    "vit": ("ViTModel", "ViTConfig", VISION, pixels, 13, 0.8),
    "clip": ("CLIPModel", "CLIPConfig", dict(text_config=BERT | SPECIAL, vision_config=VISION), both, 26, 0.8),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", None, ids, 28, 0.8),
    "mamba": ("MambaForCausalLM", "MambaConfig",
              dict(vocab_size=128, hidden_size=64, state_size=8, num_hidden_layers=2), ids, 8, 0.8),
    "mamba2": ("Mamba2ForCausalLM", "Mamba2Config",
               dict(vocab_size=128, hidden_size=64, state_size=8, num_hidden_layers=2, num_heads=8,
                    head_dim=16, n_groups=1, chunk_size=8), ids, 4, 0.7),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", TEXT | {"num_local_experts": 4}, ids, 12, 0.9),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", TEXT | MOE | {"head_dim": 16}, ids, 12, 0.85),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config",
                    TEXT | DEEPSEEK | {"num_key_value_heads": 4}, ids, 18, 0.85),
    # Its experts are stored transposed, with biases.
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig",
                TEXT | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, ids, 12, 0.9),
}  # fmt: skip


def make(name):
    model_class, config_class, settings, *_ = MODELS[name]
    if name == "llava":
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**TEXT),
            vision_config=transformers.CLIPVisionConfig(**VISION),
            image_token_id=1,
        )
    else:
        config = getattr(transformers, config_class)(**settings)
    torch.manual_seed(0)
    return getattr(transformers, model_class)(config).to(torch.bfloat16).eval()


def outputs(model, inputs):
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        return model(**inputs)[0].float()


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.disable_progress_bar()


@pytest.mark.parametrize("name", MODELS)
def test_model(name, tmp_path):
    *_, inputs, layers, share = MODELS[name]
    torch.manual_seed(0)
    inputs = inputs()
    source = make(name)
    source.save_pretrained(tmp_path / "dense")
    config = hqq_cpp.HqqConfig(nbits=8, group_size=32)
    model = type(source).from_pretrained(tmp_path / "dense", quantization_config=config)
    found = dict(quantized_layers(model))
    assert len(found) == layers
    weights = sum(torch.Size(m.dense_shape).numel() for m in found.values())
    assert weights >= share * sum(p.numel() for p in source.parameters())
    exact, ours = outputs(source, inputs), outputs(model, inputs)
    # Two experts whose router scores are nearly equal may change places.
    limit = 0.15 if name in ("deepseek-v3", "qwen3-moe", "mixtral", "gpt-oss") else 0.03
    if name == "clip":
        limit *= source.logit_scale.exp().item() / exact.norm()  # a cosine near 0, times that
    assert (ours - exact).norm() < limit * exact.norm()

    model.save_pretrained(tmp_path / "quantized")
    again, info = type(source).from_pretrained(tmp_path / "quantized", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(outputs(again, inputs), ours)
    assert len(dict(quantized_layers(again))) == layers


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory):
    """A random Qwen3-MoE as hubs have it: one tensor per expert and projection."""
    folder = tmp_path_factory.mktemp("moe")
    make("qwen3-moe").save_pretrained(folder)
    names = hqq_cpp.Checkpoint(folder).tensor_names
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in names
    return folder


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def test_experts_have_their_own_bits(tiny_moe):
    config = hqq_cpp.HqqConfig(
        nbits=8,
        group_size=32,
        dynamic_config={
            "mlp.experts.gate_up_proj": {"nbits": 2},
            "*.experts.down_proj": {"nbits": 3},
        },
    )
    experts = load(tiny_moe, quantization_config=config).model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, HqqExperts)
    assert (experts.gate_up_proj.nbits, experts.down_proj.nbits) == (2, 3)


def test_some_experts_stay_dense(tiny_moe):
    config = hqq_cpp.HqqConfig(group_size=32, nbits=8, dynamic_config={"*.gate_up_proj": None})
    model = load(tiny_moe, quantization_config=config)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, torch.nn.Parameter)
    assert isinstance(experts.down_proj, HqqExperts)
    exact, ours = outputs(load(tiny_moe), ids()), outputs(model, ids())
    assert (ours - exact).norm() < 0.15 * exact.norm()


def test_only_routed_experts_are_read(tiny_moe):
    """NaN in an expert that no token is routed to changes nothing; in one that is, everything."""
    model = load(tiny_moe, quantization_config=hqq_cpp.HqqConfig(group_size=32))
    block = model.model.layers[0].mlp
    x = torch.randn(1, 1, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = block(x)
        expected = expected[0] if isinstance(expected, tuple) else expected
        seen = []
        handle = block.experts.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
        block(x)
        handle.remove()
        (routed,) = seen
        idle = next(e for e in range(4) if e not in routed)
        for expert, equal in ((idle, True), (int(routed.flatten()[0]), False)):
            block.experts.down_proj.scale[expert].fill_(float("nan"))
            y = block(x)
            y = y[0] if isinstance(y, tuple) else y
            assert torch.equal(y, expected) == equal


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"balance": "none"},
        {"quant_scale": True, "quant_zero": True},
        {"axis": 0, "group_size": 8},
    ],
    ids=str,
)
def test_folders_of_the_command(tiny_moe, tmp_path, settings):
    """hqq-cpp quantizes expert by expert; Transformers merges them, and writes them apart again."""
    settings = {"nbits": 3, "group_size": 32} | settings
    hqq_cpp.quantize_checkpoint(tiny_moe, tmp_path / "q", settings)
    model, info = load(tmp_path / "q", output_loading_info=True)
    assert not any(info.values()), info
    experts = model.model.layers[1].mlp.experts
    checkpoint = hqq_cpp.Checkpoint(tmp_path / "q")
    for expert in (0, 3):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        gate, up, down = (
            torch.from_numpy(hqq_cpp.dequantize(checkpoint.load(f"{prefix}.{name}")))
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        assert torch.equal(experts.gate_up_proj.dequantize(expert), torch.cat([gate, up]))
        assert torch.equal(experts.down_proj.dequantize(expert), down)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(load(tmp_path / "again"), ids()), outputs(model, ids()))
    again = hqq_cpp.Checkpoint(tmp_path / "again")
    assert again.quantized_layers() == checkpoint.quantized_layers()
    name = "model.layers.1.mlp.experts.3.gate_proj"
    assert again.load(name).config.nbits == 3
    assert (again.load(name).codes() == checkpoint.load(name).codes()).all()


def test_importance_of_single_experts(tiny_moe, tmp_path):
    """A file made for the folder serves the fused experts of the loaded model."""
    found = hqq_cpp.collect_importance_folder(tiny_moe, tmp_path / "importance.safetensors", n=64)
    assert "model.layers.0.mlp.experts.3.up_proj" in found
    config = hqq_cpp.HqqConfig(
        nbits=2, group_size=32, importance=str(tmp_path / "importance.safetensors")
    )
    model = load(tiny_moe, quantization_config=config)
    hqq_cpp.quantize_checkpoint(
        tiny_moe, tmp_path / "q", {"nbits": 2, "group_size": 32},
        importance=tmp_path / "importance.safetensors",
    )  # fmt: skip
    other = load(tmp_path / "q")
    for layer in (0, 1):
        for name in ("gate_up_proj", "down_proj"):
            path = f"model.layers.{layer}.mlp.experts.{name}"
            assert torch.equal(
                model.get_submodule(path).dequantize(), other.get_submodule(path).dequantize()
            )


def test_copies(tiny_moe):
    import copy

    model = load(tiny_moe, quantization_config=hqq_cpp.HqqConfig(group_size=32))
    assert torch.equal(outputs(copy.deepcopy(model), ids()), outputs(model, ids()))


def test_compiles_whole(tiny_moe):
    torch._dynamo.reset()
    model = load(
        tiny_moe, quantization_config=hqq_cpp.HqqConfig(group_size=32), dtype=torch.float32
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        eager, fast = model(IDS, use_cache=False).logits, compiled(IDS, use_cache=False).logits
    assert (eager - fast).abs().max() < 1e-4 * eager.abs().max()


def test_gradients_through_experts(tiny_moe):
    model = load(
        tiny_moe, quantization_config=hqq_cpp.HqqConfig(group_size=32), dtype=torch.float32
    )
    dense = load(tiny_moe, dtype=torch.float32)
    for name, module in quantized_layers(model):
        target = dense.get_parameter(name if isinstance(module, HqqExperts) else f"{name}.weight")
        target.data = module.dequantize()
    x = [m.get_input_embeddings()(IDS).detach().requires_grad_() for m in (model, dense)]
    grads = []
    for m, embeddings in zip((model, dense), x):
        loss = m(inputs_embeds=embeddings, use_cache=False).logits.square().mean()
        grads += torch.autograd.grad(loss, embeddings)
    assert (grads[0] - grads[1]).norm() < 1e-4 * grads[1].norm()


def test_experts_without_interface_warn(tmp_path):
    """Llama 4 multiplies all experts at once, in code that takes a dense parameter."""
    config = transformers.Llama4TextConfig(
        **TEXT, head_dim=16, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=128
    )
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path)
    code = (
        "import sys, hqq_cpp, hqq_cpp.transformers as h, transformers as t\n"
        "t.Llama4ForCausalLM.from_pretrained(sys.argv[1], quantization_config=hqq_cpp.HqqConfig())"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tensors of experts" in done.stderr and "Llama4TextExperts does not run" in done.stderr
