"""Roles of tensors from Python: the binding, live models, and folders that the command wrote."""

import pytest

import hqq_cpp
from hqq_cpp import _core

torch = pytest.importorskip("torch", reason="the layers need torch")

from hqq_cpp.find.layers import find_layers, find_roles, places_of, quantized_layers

IDS = torch.arange(3, 11)[None]


def test_roles_of_a_list():
    roles = _core.Roles(
        [
            ("a.weight", (8, 16), torch.bfloat16),
            ("b.weight", [8, 16], "int32"),
            ("c.weight", (8, 16), "float8_e4m3fn"),
            ("h.0.attn.c_attn.weight", torch.Size([16, 16]), "float32"),
        ],
        '{"decoder": {"model_type": "gpt2"}}',
    )
    names = ("a.weight", "b.weight", "c.weight", "h.0.attn.c_attn.weight", "d.weight")
    assert [roles.role(name) for name in names] == ["linear", "none", "none", "conv1d", "none"]


def test_refusals():
    with pytest.raises(hqq_cpp.FormatError, match="config.json"):
        _core.Roles([], "{")
    with pytest.raises(ValueError, match='role "layer" must be one of none, linear, head'):
        _core.settings_of(hqq_cpp.HqqConfig(), "a", "layer")
    with pytest.raises(ValueError, match="balance"):
        _core.resolve_balance("some", False)


def test_names_of_adapters():
    assert _core.is_adapter_name("lora_A") and not _core.is_adapter_name("base_layer")


def test_balance_auto():
    assert _core.resolve_balance("auto", False) == "sinkhorn"
    assert _core.resolve_balance("auto", True) == "none"
    assert _core.resolve_balance("sinkhorn", True) == "sinkhorn"


class Block(torch.nn.Module):
    """An nn.Linear for each sort of router, and what only looks like one."""

    def __init__(self):
        super().__init__()
        self.mixer = torch.nn.ModuleDict({"gate": torch.nn.Linear(64, 4)})
        self.router = torch.nn.ModuleDict({"classifier": torch.nn.Linear(64, 4)})
        self.moe = torch.nn.ModuleDict(
            {
                "choose": torch.nn.Linear(64, 3),
                "experts": torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(3)),
            }
        )
        self.gate = torch.nn.Linear(64, 64)

    def forward(self, x):
        for part in (self.mixer.gate, self.router.classifier, self.moe.choose):
            part(x)
        return self.gate(self.moe.experts[0](x))


LAYERS = ["moe.experts.0", "moe.experts.1", "moe.experts.2", "gate"]


def test_routers_of_live_models_stay():
    model = Block()
    assert [layer.name for layer in find_layers(model)] == LAYERS
    rules = {"mixer.gate": {"nbits": 8}, "*": {"nbits": 4}}
    hqq_cpp.quantize_model_(model, {"dynamic_config": rules})
    assert [name for name, _ in quantized_layers(model)] == LAYERS
    # Quantized experts are experts still.
    assert find_roles(places_of(model)).role("moe.choose.weight") == "router"


def test_importance_is_that_of_layers():
    vectors = hqq_cpp.collect_importance(Block(), batches=[torch.randn(5, 64)])
    assert sorted(vectors) == ["gate", "moe.experts.0"]


def test_a_head_by_another_name_is_skipped_as_lm_head():
    def net():
        return torch.nn.ModuleDict(
            {"a": torch.nn.Linear(64, 64), "embed_out": torch.nn.Linear(64, 64, bias=False)}
        )

    assert [layer.role for layer in find_layers(net())] == ["linear", "head"]
    model = hqq_cpp.quantize_model_(net(), {"nbits": 4})
    assert [name for name, _ in quantized_layers(model)] == ["a"]
    model = hqq_cpp.quantize_model_(net(), {"nbits": 4, "skip_modules": []})
    assert [name for name, _ in quantized_layers(model)] == ["a", "embed_out"]


# Folders.


def nemotron_h(transformers):
    config = transformers.NemotronHConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=16,
        n_groups=2, conv_kernel=4, n_routed_experts=4, moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=64, num_experts_per_tok=2,
        layers_block_type=["mamba", "moe", "attention"],
    )  # fmt: skip
    return transformers.NemotronHForCausalLM(config)


def switch(transformers):
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2,
        num_heads=4, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config)


def granite_moe(transformers):
    config = transformers.GraniteMoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.GraniteMoeForCausalLM(config)


def musicgen(transformers):
    config = transformers.MusicgenDecoderConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, ffn_dim=64,
        num_codebooks=2,
    )  # fmt: skip
    return transformers.MusicgenForCausalLM(config)


def ctrl(transformers):
    config = transformers.CTRLConfig(
        vocab_size=64, n_positions=64, n_embd=64, dff=64, n_layer=1, n_head=4
    )
    return transformers.CTRLLMHeadModel(config)


def gpt2_with_cross_attention(transformers):
    config = transformers.GPT2Config(
        n_embd=64, n_layer=1, n_head=4, vocab_size=64, n_positions=64, add_cross_attention=True,
        is_decoder=True,
    )  # fmt: skip
    vision = transformers.ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        image_size=32, patch_size=8,
    )  # fmt: skip
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, config)
    return transformers.VisionEncoderDecoderModel(both)


def logits(model):
    ids = IDS.repeat(2, 1) if hasattr(model.config, "num_codebooks") else IDS
    torch.manual_seed(0)
    inputs = {"input_ids": ids}
    if hasattr(model.config, "encoder"):
        inputs = {"pixel_values": torch.randn(1, 3, 32, 32), "decoder_input_ids": ids}
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**inputs).logits.float()


@pytest.mark.parametrize(
    "make", [nemotron_h, switch, granite_moe, musicgen, ctrl, gpt2_with_cross_attention]
)
def test_the_command_and_from_pretrained_quantize_the_same(make, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the integration needs Transformers")
    import hqq_cpp.transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    source = make(transformers).eval()
    source.save_pretrained(tmp_path / "dense")
    settings = {"nbits": 8, "group_size": 32}
    report = hqq_cpp.quantize_checkpoint(tmp_path / "dense", tmp_path / "quantized", settings)
    modules = dict(source.named_modules())
    for layer in report.layers:
        assert not isinstance(modules.get(layer.name), torch.nn.Embedding)
        assert not any(part in ("router", "gate") for part in layer.name.split("."))
    folder = type(source).from_pretrained(tmp_path / "quantized")
    config = hqq_cpp.HqqConfig(**settings)
    loaded = type(source).from_pretrained(tmp_path / "dense", quantization_config=config)
    conv1d = {
        name
        for name, module in modules.items()
        if isinstance(module, transformers.pytorch_utils.Conv1D)
    }
    kept = source._keep_in_fp32_modules or ()
    expected = {name for name, _ in quantized_layers(loaded)} - conv1d
    found = {name for name, _ in quantized_layers(folder)}
    assert {name for name in found if name.rpartition(".")[2] not in kept} == expected
    exact = logits(source)
    assert (logits(folder) - exact).norm() < 0.05 * exact.norm()
