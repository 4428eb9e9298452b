"""Checkpoints that Transformers 4 and upstream hqq wrote load with the weights that upstream
computes from them."""

import json
import logging

import pytest

torch = pytest.importorskip("torch", reason="models need torch")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="models need it")
upstream = pytest.importorskip("hqq.core.quantize", reason="it makes the checkpoints")

import hqq_cpp
import hqq_cpp.transformers
from upstream_maker import (
    TOKENS,
    all_but_head,
    assert_same_model,
    assert_saves_in_our_format,
    config_for,
    experts_and_attention,
    llama,
    load,
    logits,
    mixtral,
    needs_float_codes,
    quantize,
    quantize_mixtral,
    save,
)


@pytest.mark.parametrize(
    "settings",
    [
        {"nbits": 8, "group_size": 64, "axis": 1, "optimize": True},
        {"nbits": 5, "group_size": None, "axis": 1},
        pytest.param(
            {"nbits": 4, "group_size": 64, "axis": 1, "view_as_float": True},
            marks=needs_float_codes,
        ),
        {"nbits": 3, "group_size": 32, "axis": 1},
        {"nbits": 3, "group_size": 64, "axis": 0},
        {"nbits": 2, "group_size": 16, "axis": 0},
        {"nbits": 1.58, "group_size": 8, "axis": 1},
        {"nbits": 1, "group_size": 16, "axis": 1},
    ],
    ids=str,
)
def test_loads_layers_cut_over_shards(tmp_path, settings):
    model = llama(attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    state, dense = quantize(model, all_but_head(**settings))
    folder = save(
        tmp_path / "old", model, state, config_for(upstream.BaseQuantizeConfig()), shards=3
    )
    loaded = load(folder)
    layers = [m for m in loaded.modules() if isinstance(m, hqq_cpp.HqqLinear)]
    assert len(layers) == 14 and {layer.nbits for layer in layers} == {settings["nbits"]}
    assert_same_model(loaded, dense)
    assert_saves_in_our_format(loaded, tmp_path / "new")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_metadata_keeps_its_values(tmp_path, dtype):
    model = llama()
    state, _ = quantize(model, all_but_head(nbits=4, compute_dtype=dtype))
    folder = save(tmp_path / "old", model, state, config_for(upstream.BaseQuantizeConfig()))
    loaded = load(folder, dtype=dtype)
    name = "model.layers.1.mlp.down_proj"
    layer = loaded.get_submodule(name)
    assert layer.scale.dtype == layer.zero.dtype == layer.weight.dtype == dtype
    assert torch.equal(layer.scale.flatten(), state[f"{name}.scale"].flatten())
    assert torch.equal(layer.zero.flatten(), state[f"{name}.zero"].flatten())


def test_layers_of_different_bits(tmp_path):
    tags = {"self_attn.q_proj": 8, "mlp.down_proj": 2}
    bits = {tag: {"nbits": n, "group_size": 32} for tag, n in tags.items()}
    model = llama()
    state, dense = quantize(model, lambda name: bits.get(".".join(name.split(".")[-2:])))
    quant_config = {tag: upstream.BaseQuantizeConfig(**settings) for tag, settings in bits.items()}
    loaded = load(save(tmp_path / "old", model, state, config_for(quant_config)))
    assert loaded.get_submodule("model.layers.0.self_attn.q_proj").nbits == 8
    assert loaded.get_submodule("model.layers.1.mlp.down_proj").nbits == 2
    assert type(loaded.get_submodule("model.layers.1.mlp.up_proj")) is torch.nn.Linear
    assert_same_model(loaded, dense)
    assert_saves_in_our_format(loaded, tmp_path / "new")


def before_0_2_3(state):
    """Files of hqq that did not store its quant_config."""
    new = (".stores_quant_config", ".channel_wise", ".optimize", ".round_zero")
    return {key: value for key, value in state.items() if not key.endswith(new)}


def old_config(quant_config):
    """HQQLinear popped offload_meta out of the dict that config.json got."""
    return {key: value for key, value in quant_config.items() if key != "offload_meta"}


@pytest.mark.parametrize(
    "quantization_config",
    [
        config_for(old_config(upstream.BaseQuantizeConfig(nbits=4))),
        config_for(
            {"mlp.up_proj": old_config(upstream.BaseQuantizeConfig()), "mlp.down_proj": None}
        ),
        config_for(upstream.BaseQuantizeConfig(nbits=4), show_progress=True),
        {"quant_config": upstream.BaseQuantizeConfig(nbits=4), "quant_method": "hqq"},
        config_for({"nbits": 4, "some_old_name": 7}),
        {"quant_method": "hqq"},
    ],
    ids=["no offload_meta", "null", "show_progress", "no skip_modules", "unknown", "empty"],
)
def test_files_and_configs_of_first_versions(tmp_path, quantization_config):
    model = llama()
    state, dense = quantize(model, all_but_head(nbits=4))
    loaded = load(save(tmp_path / "old", model, before_0_2_3(state), quantization_config))
    assert_same_model(loaded, dense)
    assert_saves_in_our_format(loaded, tmp_path / "new")


def test_offloaded_metadata(tmp_path):
    model = llama()
    state, dense = quantize(model, all_but_head(nbits=4))
    for key in [key for key in state if key.endswith(".scale")]:
        name = key.removesuffix(".scale")
        both = (state.pop(f"{name}.zero"), state.pop(f"{name}.scale"))
        state[f"{name}.zero_scale"] = torch.stack(both)
        state[f"{name}.offload_meta"] = torch.tensor(1, dtype=torch.uint8)
    loaded = load(save(tmp_path / "old", model, state, config_for(upstream.BaseQuantizeConfig())))
    assert_same_model(loaded, dense)


def test_biases_that_the_architecture_lacks(tmp_path):
    model = llama()
    state, dense = quantize(model, all_but_head(nbits=4))
    name = "model.layers.1.mlp.up_proj"
    bias = state[f"{name}.bias"] = torch.randn(128)
    dense.get_submodule(name).bias = torch.nn.Parameter(bias)
    loaded = load(save(tmp_path / "old", model, state, config_for(upstream.BaseQuantizeConfig())))
    assert torch.equal(loaded.get_submodule(name).bias, bias)
    assert_same_model(loaded, dense)
    assert_saves_in_our_format(loaded, tmp_path / "new")


def test_the_base_model_alone(tmp_path):
    model = llama()
    state, dense = quantize(model, all_but_head(nbits=4))
    folder = save(tmp_path / "old", model, state, config_for(upstream.BaseQuantizeConfig()))
    loaded = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        hidden = loaded(TOKENS).last_hidden_state
        torch.testing.assert_close(hidden, dense.model(TOKENS).last_hidden_state, rtol=0, atol=2e-6)


def test_names_of_an_older_architecture(tmp_path):
    """Transformers renames what Llava was when hqq could save it, and the layers with it."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=llama().config,
        image_token_index=95,
        vision_feature_layer=-1,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    text = {"nbits": 4, "group_size": 32}
    state, dense = quantize(model, lambda name: text if "language_model.layers" in name else None)
    old = {
        key.replace("model.language_model.", "language_model.model.")
        .replace("model.vision_tower", "vision_tower")
        .replace("model.multi_modal", "multi_modal")
        .replace("lm_head", "language_model.lm_head"): value
        for key, value in state.items()
    }
    assert "language_model.model.layers.1.mlp.up_proj.W_q" in old
    quantization_config = config_for(upstream.BaseQuantizeConfig(**text))
    folder = save(tmp_path / "old", model, old, quantization_config)
    loaded = load(folder, auto=transformers.AutoModelForImageTextToText)
    assert_same_model(loaded, dense)
    loaded.save_pretrained(tmp_path / "new")
    again = load(tmp_path / "new", auto=transformers.AutoModelForImageTextToText)
    assert torch.equal(logits(again), logits(loaded))


def test_pytorch_model_bin(tmp_path):
    model = llama()
    state, dense = quantize(model, all_but_head(nbits=4))
    folder = save(tmp_path / "old", model, {}, config_for(upstream.BaseQuantizeConfig()))
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert_same_model(load(folder), dense)


def test_offload_to_disk(tmp_path):
    model = llama()
    state, dense = quantize(model, all_but_head(nbits=4))
    folder = save(tmp_path / "old", model, state, config_for(upstream.BaseQuantizeConfig()))
    names = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    device_map = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
    device_map["model.layers.1"] = "disk"
    loaded = load(folder, device_map=device_map, offload_folder=tmp_path / "offloaded")
    assert loaded.model.layers[1].mlp.up_proj.W_q.device.type == "meta"
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=0, atol=2e-6)


# What format 1 cannot hold.


def test_groups_over_the_ends_of_rows_become_dense(tmp_path, caplog, monkeypatch):
    model = llama(hidden_size=96, intermediate_size=128)
    state, dense = quantize(model, all_but_head(nbits=3, group_size=64))
    folder = save(tmp_path / "old", model, state, config_for(upstream.BaseQuantizeConfig()))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    loaded = load(folder)
    # Rows of 96 weights; only down_proj has others.
    kinds = {name.split(".")[-1]: type(m) for name, m in loaded.named_modules() if "_proj" in name}
    assert kinds.pop("down_proj") is hqq_cpp.HqqLinear
    assert set(kinds.values()) == {torch.nn.Linear}
    assert "12 of 14 quantized weights become dense" in caplog.text
    assert "groups of 64 weights run over the ends of rows of 96" in caplog.text
    assert_same_model(loaded, dense)
    assert_saves_in_our_format(loaded, tmp_path / "new")


# Mixtures of experts: one layer per expert in the files, one parameter in Transformers 5.


@pytest.mark.parametrize(
    "settings",
    [
        {"nbits": 4, "group_size": 64, "axis": 1},
        {"nbits": 2, "group_size": 16, "axis": 0},
        {"nbits": 3, "group_size": None, "axis": 0},
        {"nbits": 8, "group_size": None, "axis": 1},
    ],
    ids=str,
)
def test_experts_are_merged(tmp_path, settings):
    model = mixtral()
    state, dense = quantize_mixtral(model, experts_and_attention(**settings))
    assert "model.layers.1.block_sparse_moe.experts.3.w3.W_q" in state
    folder = save(
        tmp_path / "old", model, state, config_for(upstream.BaseQuantizeConfig()), shards=2
    )
    loaded = load(folder)
    for i, layer in enumerate(loaded.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            experts = getattr(layer.mlp.experts, name)
            assert isinstance(experts, hqq_cpp.HqqExperts) and experts.nbits == settings["nbits"]
            expected = getattr(dense.model.layers[i].mlp.experts, name).data
            torch.testing.assert_close(experts.dequantize(), expected, rtol=0, atol=1e-6)
    assert_same_model(loaded, dense, tolerance=1e-5)
    assert_saves_in_our_format(loaded, tmp_path / "new")


def test_quantized_router_becomes_dense(tmp_path, caplog, monkeypatch):
    model = mixtral()
    state, dense = quantize_mixtral(model, experts_and_attention(gate=True, nbits=8))
    folder = save(tmp_path / "old", model, state, config_for(upstream.BaseQuantizeConfig()))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    loaded = load(folder)
    assert "2 of 14 quantized weights become dense" in caplog.text
    assert_same_model(loaded, dense, tolerance=1e-5)
    assert_saves_in_our_format(loaded, tmp_path / "new")


def test_experts_of_different_bits_become_dense(tmp_path, caplog, monkeypatch):
    def settings_of(path):
        if "experts" not in path:
            return None
        return {"nbits": 2 if path.endswith("2.w3") else 4, "group_size": 64}

    model = mixtral()
    state, dense = quantize_mixtral(model, settings_of)
    folder = save(tmp_path / "old", model, state, config_for(upstream.BaseQuantizeConfig()))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    loaded = load(folder)
    assert "2 of 4 quantized weights become dense" in caplog.text
    assert "different settings" in caplog.text
    experts = loaded.model.layers[0].mlp.experts
    assert isinstance(experts.down_proj, hqq_cpp.HqqExperts)
    assert isinstance(experts.gate_up_proj, torch.nn.Parameter)
    assert_same_model(loaded, dense, tolerance=1e-5)
    assert_saves_in_our_format(loaded, tmp_path / "new")


def test_experts_without_some_expert_are_refused(tmp_path):
    model = mixtral()
    state, _ = quantize_mixtral(model, experts_and_attention(nbits=4))
    state = {key: value for key, value in state.items() if ".experts.2.w3." not in key}
    folder = save(tmp_path / "old", model, state, config_for(upstream.BaseQuantizeConfig()))
    with pytest.raises(hqq_cpp.FormatError, match="does not have quantized"):
        load(folder)


# Broken checkpoints.


def broken(tmp_path, change, model=None):
    model = model or llama()
    state, _ = quantize(model, all_but_head(nbits=4))
    change(state)
    return save(tmp_path / "old", model, state, config_for(upstream.BaseQuantizeConfig()))


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop(f"{NAME}.shape"), "shape"),
        (lambda state: state.pop(f"{NAME}.zero"), "zero"),
        (
            lambda state: state.update({f"{NAME}.nbits": torch.tensor(7, dtype=torch.int32)}),
            "nbits",
        ),
        (lambda state: state.update({f"{NAME}.packing": torch.tensor([65]).byte()}), "packing"),
    ],
    ids=["no shape", "no zero", "nbits", "packing"],
)
def test_broken_layers_are_refused(tmp_path, change, message):
    with pytest.raises(hqq_cpp.FormatError, match=f"{NAME}.*{message}"):
        load(broken(tmp_path, change))


def test_codes_above_the_largest_are_refused(tmp_path, caplog, monkeypatch):
    model = llama()
    state, _ = quantize(model, all_but_head(nbits=5))
    state[f"{NAME}.W_q"][3, 5] = 32
    folder = save(tmp_path / "old", model, state, config_for(upstream.BaseQuantizeConfig()))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(RuntimeError, match="CONVERSION"):
        load(folder)
    assert "the code 32" in caplog.text and NAME in caplog.text


def test_layers_of_another_shape_are_refused(tmp_path, caplog, monkeypatch):
    folder = broken(tmp_path, lambda state: None)
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 192}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder)
    assert "ckpt: torch.Size([64, 128]) vs model:torch.Size([64, 192])" in caplog.text


def test_checkpoint_without_quantized_layers_is_refused(tmp_path):
    model = llama()
    folder = save(
        tmp_path / "old", model, model.state_dict(), config_for(upstream.BaseQuantizeConfig())
    )
    with pytest.raises(hqq_cpp.FormatError, match="hold no W_q"):
        load(folder)


def test_layers_of_another_model_are_refused(tmp_path):
    def rename(state):
        for key in list(state):
            state[key.replace(".layers.", ".blocks.")] = state.pop(key)

    with pytest.raises(hqq_cpp.FormatError, match="none of the 14 quantized layers"):
        load(broken(tmp_path, rename))


def test_a_plain_dict_is_no_file(tmp_path):
    llama().save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(
        tmp_path, quantization_config={"quant_method": "hqq", "nbits": 2, "group_size": 16}
    )
    layer = loaded.get_submodule(NAME)
    assert layer.nbits == 2 and layer.layer_config.group_size == 16
    with pytest.raises(ValueError, match="nbit"):
        auto.from_pretrained(tmp_path, quantization_config={"quant_method": "hqq", "nbit": 2})
