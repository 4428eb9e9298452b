"""collect_importance: mean squares of the inputs of linear layers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn

import hqq_cpp
from hqq_cpp.importance.collect import (
    collect_importance,
    load_importance,
    save_importance,
)


def llama(**settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            **settings,
        }
    )
    return transformers.LlamaForCausalLM(config)


def test_two_layers_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    x = torch.tensor([[[1.0, 2.0], [3.0, -4.0]]])
    result = collect_importance(model, batches=[x, x * 2])
    # (1 + 9 + 4 + 36) / 4 and (4 + 16 + 16 + 64) / 4; then relu([1, -2]), relu([3, 4]).
    assert result["0"].tolist() == [12.5, 25.0]
    assert result["2"].tolist() == [12.5, 20.0]
    assert result["0"].dtype == torch.float32 and list(result) == ["0", "2"]


def test_inputs_of_all_kinds_of_batches():
    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x, y):
            return self.a(x) + self.b(input=y)

    model = Add()
    x, y = torch.full((4, 3), 2.0), torch.full((4, 3), 3.0)
    for batches in (
        [(x, y)],
        [{"x": x, "y": y}],
        [lambda model: model(x, y)],
        lambda model: model(x, y),
        iter([[x, y]]),
    ):
        result = collect_importance(model, batches=batches)
        assert result["a"].tolist() == [4] * 3 and result["b"].tolist() == [9] * 3


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (torch.ones(1, 2), "batches is of type Tensor"),
        ({"x": torch.ones(1, 2)}, "batches is of type dict"),
        (3, "batches is of type int"),
        ([3], "a batch is of type int"),
        ([], "no linear layer of Sequential saw any input"),
        ([torch.zeros(3, 2)], "no linear layer of Sequential saw any input"),
    ],
)
def test_wrong_batches_raise(batches, message):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"\[importance\].*" + message):
        collect_importance(model, batches=batches)


def test_inputs_changed_in_place_are_seen_again():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            self.a(x)
            return self.b(x.mul_(2))

    result = collect_importance(Twice(), batches=[torch.ones(5, 2)])
    assert result["a"].tolist() == [1, 1] and result["b"].tolist() == [4, 4]


def test_a_layer_that_runs_twice_counts_all_rows():
    layer = nn.Linear(2, 2)
    run = [lambda _: (layer(torch.ones(3, 2)), layer(torch.full((1, 2), 3.0)))]
    assert collect_importance(nn.Sequential(layer), batches=run)["0"].tolist() == [3, 3]


def test_pointwise_convolutions_by_channel():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 3))
    x = torch.arange(1.0, 4.0).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    result = collect_importance(model, batches=[x])
    assert list(result) == ["0"] and result["0"].tolist() == [1, 4, 9]


def test_quantized_layers_are_layers():
    linear = nn.Linear(64, 8)
    model = nn.Sequential(hqq_cpp.quantize_linear(linear, {"nbits": 4}))
    x = torch.randn(10, 64)
    result = collect_importance(model, batches=[x])
    torch.testing.assert_close(result["0"], x.pow(2).mean(0))


def test_not_finite_names_the_first_layer():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"\[1\] 1 of 2 sums of squares .* NaN or Inf"):
        collect_importance(model, batches=[torch.ones(1, 2)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_squares_do_not_overflow_or_round(dtype):
    x = torch.full((3000, 1), 300.0, dtype=dtype)  # 90000 is beyond float16
    result = collect_importance(nn.Sequential(nn.Linear(1, 1, dtype=dtype)), batches=[x])
    assert result["0"].item() == 90000


def test_modes_are_restored_and_dropout_is_off():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2), nn.Dropout(0.5).eval())
    result = collect_importance(model, batches=[torch.ones(100, 2)])
    assert result["1"].tolist() == [1, 1]
    assert [m.training for m in model] == [True, True, False]
    model[1].weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError):
        collect_importance(model, batches=[torch.ones(1, 3)])
    assert [m.training for m in model] == [True, True, False]
    assert not model[1]._forward_pre_hooks


def test_random_tokens_reach_every_layer_of_llama():
    model = llama()
    result = collect_importance(model, n=100, seed=3)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(result) == set(linears)
    for name, vector in result.items():
        assert vector.shape == (linears[name].in_features,) and (vector > 0).all()
    again = collect_importance(model, n=100, seed=3)
    assert all(torch.equal(result[name], again[name]) for name in result)
    other = collect_importance(model, n=100, seed=4)
    assert not torch.equal(result["lm_head"], other["lm_head"])


def test_given_tokens_agree_with_hidden_states():
    model = llama().eval()
    ids = torch.randint(100, (2, 20))
    result = collect_importance(model, tokens=ids)
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
        for i, layer in enumerate(model.model.layers):
            x = layer.input_layernorm(out.hidden_states[i])
            expected = x.pow(2).mean((0, 1))
            for name in "qkv":
                got = result[f"model.layers.{i}.self_attn.{name}_proj"]
                torch.testing.assert_close(got, expected)
        # The last of the hidden states is after the last norm; all positions count for the head.
        expected = out.hidden_states[-1].pow(2).mean((0, 1))
        torch.testing.assert_close(result["lm_head"], expected)


def test_long_input_runs_in_windows():
    model = llama()
    lengths = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    collect_importance(model, n=130)  # of 64 positions
    collect_importance(model, tokens=list(range(70)))
    assert lengths == [(1, 44)] * 3 + [(1, 64), (1, 6)]


def test_special_tokens_are_not_drawn():
    model = llama(vocab_size=12, bos_token_id=0, eos_token_id=[1, 2], pad_token_id=11)
    seen = set()
    model.model.embed_tokens.register_forward_pre_hook(
        lambda _, args: seen.update(args[0].flatten().tolist())
    )
    collect_importance(model, n=500)
    assert seen == set(range(3, 11))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": "text"}, "tokens 'text' must be 'random'"),
        ({"n": 0}, "n 0 must be a number of tokens"),
        ({"n": 1.5}, "n 1.5 must be a number of tokens"),
        ({"tokens": [0.5]}, r"tokens is torch.float32 \[1\]"),
        ({"tokens": [1], "batches": []}, "both tokens and batches"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=r"\[importance\] .*" + message):
        collect_importance(llama(), **arguments)


def test_other_modules_need_batches():
    with pytest.raises(ValueError, match="Sequential contains none; give batches="):
        collect_importance(nn.Sequential(nn.Linear(2, 2)))
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(ValueError, match="all weights of LlamaForCausalLM are on device meta"):
        collect_importance(empty)


def test_padding_does_not_count():
    model = llama().eval()
    ids = torch.randint(100, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 4:] = 0
    result = collect_importance(model, batches=[{"input_ids": ids, "attention_mask": mask}])
    alone = collect_importance(model, batches=[ids[:1], ids[1:, :4]])
    for name in alone:
        torch.testing.assert_close(result[name], alone[name], rtol=1e-4, atol=1e-6)
    everything = collect_importance(model, batches=[ids])
    assert not torch.allclose(result["lm_head"], everything["lm_head"], rtol=1e-4)


def tiny(name, model="", **settings):
    cls = getattr(transformers, f"{name}Config")
    return getattr(transformers, model or f"{name}Model")(cls(**settings))


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SMALL, "intermediate_size": 48, "image_size": 16, "patch_size": 8}


def make_llava():
    text = {"vocab_size": 100, "intermediate_size": 48, "num_key_value_heads": 2, **SMALL}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION},
        text_config={"model_type": "llama", **text},
        image_token_index=99,
    )
    return transformers.LlavaForConditionalGeneration(config)


MODELS = {
    "bert": lambda: tiny("Bert", intermediate_size=48, vocab_size=90, **SMALL),
    "roberta": lambda: tiny(
        "Roberta", intermediate_size=48, vocab_size=90, max_position_embeddings=30, **SMALL
    ),
    "gpt2": lambda: tiny("GPT2", vocab_size=90, n_embd=32, n_layer=1, n_head=2, n_positions=40),
    "t5": lambda: tiny("T5", vocab_size=90, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2),
    "vit": lambda: tiny("ViT", **VISION),
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={"vocab_size": 90, "intermediate_size": 48, **SMALL}, vision_config=VISION
        )
    ),
    "llava": make_llava,
    "whisper": lambda: tiny(
        "Whisper",
        vocab_size=90,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    ),
    "mamba": lambda: tiny(
        "Mamba", vocab_size=90, hidden_size=32, num_hidden_layers=1, state_size=4
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_random_input_reaches_all_layers(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    result = collect_importance(model, n=64)
    unreached = {"mamba": {"layers.0.mixer.dt_proj"}}.get(name, set())
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    layers = {n for n, m in model.named_modules() if isinstance(m, kinds)}
    assert layers and layers - set(result) <= unreached
    if name == "gpt2":
        assert result["h.0.mlp.c_proj"].shape == (128,)


def test_a_model_inside_a_module_is_found():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()
            self.dense = nn.Linear(2, 2)

    result = collect_importance(Wrapper(), n=10)
    assert "inner.model.layers.1.mlp.down_proj" in result and "dense" not in result


def test_accelerate_offload(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = llama().eval()
    expected = collect_importance(model, n=50)
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    result = collect_importance(model, n=50)
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], expected[name]) for name in result)


def test_saved_files_are_read_back_and_quantize(tmp_path, model):
    llm = transformers.AutoModelForCausalLM.from_pretrained(model)
    path = tmp_path / "importance.safetensors"
    result = collect_importance(llm, n=64, save=path)
    loaded = load_importance(path)
    assert loaded.keys() == result.keys()
    assert all(torch.equal(loaded[name], result[name]) for name in result)
    assert "lm_head" not in loaded  # tied: no tensor of the checkpoint
    report = hqq_cpp.quantize_checkpoint(model, tmp_path / "out", {"nbits": 3}, importance=path)
    assert {layer.config.balance for layer in report.layers} == {"none"}
    with pytest.raises(OSError):
        save_importance(tmp_path / "no" / "folder", loaded)
    with pytest.raises(OSError):
        load_importance(tmp_path / "none")


def test_importance_lowers_the_error_of_the_outputs(model):
    llm = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    importance = collect_importance(llm, n=256)
    layer = llm.model.layers[1].mlp.down_proj
    inputs = []
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    llm(input_ids=torch.randint(3, 2000, (1, 200), generator=torch.Generator().manual_seed(9)))

    def error(vector):
        config = {"nbits": 2, "balance": "none"}
        q = hqq_cpp.quantize(layer.weight.detach(), config, importance=vector)
        difference = torch.from_numpy(hqq_cpp.dequantize(q)) - layer.weight.detach()
        return (inputs[0] @ difference.T).square().mean().item()

    plain, weighted = error(None), error(importance["model.layers.1.mlp.down_proj"])
    assert np.isfinite(weighted) and weighted < 0.95 * plain
