"""collect_importance_folder and the command: one layer in memory at a time."""

import subprocess
import sys
import weakref

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

import hqq_cpp
from hqq_cpp import _cli
from hqq_cpp.importance.collect import collect_importance, load_importance
from hqq_cpp.importance.folder import (
    LayeredCheckpoint,
    collect_importance_folder,
)

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}


def save(folder, name, config, **arguments):
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    model.save_pretrained(folder, **arguments)
    return model


def reload(folder, name):
    return getattr(transformers, name).from_pretrained(folder)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_as_in_memory_from_shards(tmp_path, tied):
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied)
    save(tmp_path / "m", "LlamaForCausalLM", config, max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    out = tmp_path / "importance.safetensors"
    result = collect_importance_folder(tmp_path / "m", out, n=300, seed=5)
    expected = collect_importance(reload(tmp_path / "m", "LlamaForCausalLM"), n=300, seed=5)
    # Tied: no file has lm_head.weight.
    assert set(result) == set(expected) - ({"lm_head"} if tied else set())
    for name in result:
        close(result[name], expected[name])
    loaded = load_importance(out)
    assert loaded.keys() == result.keys()
    assert all(torch.equal(loaded[name], result[name]) for name in result)
    hqq_cpp.quantize_checkpoint(tmp_path / "m", tmp_path / "q", {"nbits": 3}, importance=out)


def test_experts_have_the_names_of_the_files(tmp_path):
    config = transformers.Qwen3MoeConfig(**SMALL, **EXPERTS)
    save(tmp_path / "m", "Qwen3MoeForCausalLM", config)
    names = set(load_file(tmp_path / "m" / "model.safetensors"))
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in names
    out = tmp_path / "importance.safetensors"
    result = collect_importance_folder(tmp_path / "m", out, n=100)
    expected = collect_importance(reload(tmp_path / "m", "Qwen3MoeForCausalLM"), n=100)
    assert {f"{name}.weight" for name in result} <= names
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts"
        for e in range(4):
            close(result[f"{prefix}.{e}.gate_proj"], expected[f"{prefix}.gate_up_proj"][e])
            close(result[f"{prefix}.{e}.up_proj"], expected[f"{prefix}.gate_up_proj"][e])
            close(result[f"{prefix}.{e}.down_proj"], expected[f"{prefix}.down_proj"][e])
    report = hqq_cpp.quantize_checkpoint(
        tmp_path / "m", tmp_path / "q", {"nbits": 3, "group_size": 8}, importance=out
    )
    balances = {layer.name: layer.config.balance for layer in report.layers}
    assert balances["model.layers.2.mlp.experts.3.down_proj"] == "none"


def test_ten_experts_keep_their_order(tmp_path):
    config = transformers.Qwen3MoeConfig(**SMALL, **{**EXPERTS, "num_experts": 12})
    save(tmp_path / "m", "Qwen3MoeForCausalLM", config)
    result = collect_importance_folder(tmp_path / "m", None, n=200)
    expected = collect_importance(reload(tmp_path / "m", "Qwen3MoeForCausalLM"), n=200)
    for e in range(12):
        name = "model.layers.1.mlp.experts"
        close(result[f"{name}.{e}.down_proj"], expected[f"{name}.down_proj"][e])


def test_fused_experts_in_the_file(tmp_path):
    config = transformers.GptOssConfig(**SMALL, num_local_experts=4, head_dim=16)
    save(tmp_path / "m", "GptOssForCausalLM", config)
    result = collect_importance_folder(tmp_path / "m", None, n=50)
    # Stored as [experts, in, out], which quantize_checkpoint takes for [experts, out, in].
    assert not any("experts" in name for name in result)
    assert result["model.layers.2.self_attn.o_proj"].shape == (32,)


def test_a_headless_model_and_one_with_conv1d(tmp_path):
    bert = transformers.BertConfig(**SMALL)
    save(tmp_path / "bert", "BertModel", bert)
    result = collect_importance_folder(tmp_path / "bert", None, n=50)
    expected = collect_importance(reload(tmp_path / "bert", "BertModel"), n=50)
    assert result.keys() == expected.keys()
    for name in result:
        close(result[name], expected[name])
    gpt2 = transformers.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=64, tie_word_embeddings=False
    )
    save(tmp_path / "gpt2", "GPT2LMHeadModel", gpt2)
    assert set(collect_importance_folder(tmp_path / "gpt2", None, n=50)) == {"lm_head"}


def live_layers(model, layers):
    return [
        name
        for name in layers
        if any(not p.is_meta for p in model.get_submodule(name).parameters())
    ]


def test_one_layer_is_loaded_at_a_time(tmp_path):
    config = transformers.Qwen3MoeConfig(**SMALL, **EXPERTS)
    save(tmp_path / "m", "Qwen3MoeForCausalLM", config)
    folder = LayeredCheckpoint(tmp_path / "m")
    model = folder.model
    assert folder.layers == [f"model.layers.{i}" for i in range(3)]
    seen, old = [], []

    def watch(module, args):
        seen.append(live_layers(model, folder.layers))
        # Weights of the layers before are not only off the model, but gone.
        assert all(reference() is None for reference in old)
        old.extend(weakref.ref(p) for p in module.parameters())

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(watch)
    assert live_layers(model, folder.layers) == []
    ids = torch.arange(20)[None]
    with torch.no_grad(), folder.streamed_layers():
        logits = model(input_ids=ids).logits
    assert seen == [[name] for name in folder.layers]
    assert live_layers(model, folder.layers) == []
    with torch.no_grad():
        close(logits, reload(tmp_path / "m", "Qwen3MoeForCausalLM")(input_ids=ids).logits)


MEASURE = """
import sys
import torch, transformers, hqq_cpp
from hqq_cpp.importance.folder import collect_importance_folder
torch.set_num_threads(1)
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
import transformers.models.llama.modeling_llama as llama
collect_importance_folder(sys.argv[2], None, n=8)  # imports and thread pools
before = resident()
top = before
def watch(*_):
    global top
    top = max(top, resident())
original = llama.LlamaDecoderLayer.forward
def forward(*args, **kwargs):
    watch()
    result = original(*args, **kwargs)
    watch()
    return result
llama.LlamaDecoderLayer.forward = forward
collect_importance_folder(sys.argv[1], None, n=8)
print((top - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_about_a_layer(tmp_path, run_python):
    big = {**SMALL, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 9}
    config = transformers.LlamaConfig(**{**big, "num_attention_heads": 6, "num_key_value_heads": 6})
    model = save(tmp_path / "m", "LlamaForCausalLM", config)
    save(tmp_path / "small", "LlamaForCausalLM", transformers.LlamaConfig(**SMALL))
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    total = sum(p.nbytes for p in model.parameters())
    assert total > 9 * layer > 80e6
    done = run_python(MEASURE, tmp_path / "m", tmp_path / "small")
    assert done.returncode == 0, done.stderr
    used = int(done.stdout.splitlines()[-1])
    assert 0.5 * layer < used < 3 * layer


def test_folders_that_do_not_serve(tmp_path):
    config = transformers.LlamaConfig(**SMALL)
    save(tmp_path / "m", "LlamaForCausalLM", config)
    with pytest.raises(ValueError, match=r"\[importance\] tokens 'x' must be 'random'"):
        collect_importance_folder(tmp_path / "m", None, tokens="x")
    hqq_cpp.quantize_checkpoint(tmp_path / "m", tmp_path / "q", {"nbits": 4, "group_size": 8})
    with pytest.raises(ValueError, match=r"is already quantized: .*\"hqq_cpp\""):
        collect_importance_folder(tmp_path / "q", None)
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        collect_importance_folder(tmp_path, None)

    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file)
    missing = {k: v for k, v in weights.items() if k != "model.layers.1.mlp.up_proj.weight"}
    save_file(missing, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights for model.layers.1.mlp.up_proj.weight"):
        collect_importance_folder(tmp_path / "m", None)
    missing = {k: v for k, v in weights.items() if k != "model.norm.weight"}
    save_file(missing, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights for model.norm.weight"):
        collect_importance_folder(tmp_path / "m", None)
    wrong = {**weights, "model.layers.2.mlp.up_proj.weight": torch.zeros(3, 32)}
    save_file(wrong, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit the model.*model.layers.2.mlp.up_proj"):
        collect_importance_folder(tmp_path / "m", None)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        collect_importance_folder(tmp_path / "m", None)


def test_the_command(tmp_path, model):
    out = tmp_path / "importance.safetensors"
    arguments = ["importance", model, out, "--tokens", 64, "--seed", 7]
    done = subprocess.run(
        [sys.executable, "-m", "hqq_cpp._cli", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "importance of 21 layers" in done.stdout and "Loading weights" not in done.stderr
    expected = collect_importance(
        transformers.AutoModelForCausalLM.from_pretrained(model), n=64, seed=7
    )
    for name, vector in load_importance(out).items():
        close(vector, expected[name])


def test_the_command_fails_with_one_line(tmp_path, monkeypatch, capsys):
    for arguments, code, message in [
        ((tmp_path, tmp_path / "out"), 4, "has no config.json"),
        ((tmp_path, tmp_path / "out", "--tokens", "0"), 2, "n 0 must be a number of tokens"),
    ]:
        monkeypatch.setattr(sys, "argv", ["hqq-cpp", "importance", *map(str, arguments)])
        assert _cli.main() == code
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err
    monkeypatch.setattr(sys, "argv", ["hqq-cpp", "importance", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        _cli.main()
    assert exit.value.code == 2 and "required: OUT" in capsys.readouterr().err
