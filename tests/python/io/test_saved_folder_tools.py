"""The C++ tools on folders that save_pretrained wrote: every shard describes all layers, and cuts
through them."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="models need torch")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="models need it")

import hqq_cpp
import hqq_cpp.transformers

LAYERS = 14
NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, folder). Read only."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    config = {"nbits": 4, "group_size": 32, "balance": "none", "skip_modules": ["lm_head"]}
    hqq_cpp.quantize_model_(model, config)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder, max_shard_size="6KB")
    return model, folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path / "copy")
    return tmp_path / "copy"


def test_the_folder_cuts_layers(saved):
    """What the other tests stand on."""
    _, folder = saved
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    names = {key.removesuffix(".W_q") for key in index if key.endswith(".W_q")}
    assert any(index[f"{name}.W_q"] != index[f"{name}.scale"] for name in names)
    texts = {hqq_cpp.safetensors_metadata(path)["hqq_cpp"] for path in folder.glob("*.safetensors")}
    assert len(texts) == 1 and len(json.loads(texts.pop())["layers"]) == LAYERS


def test_checkpoint_reads_every_layer(saved):
    model, folder = saved
    checkpoint = hqq_cpp.Checkpoint(folder)
    assert len(checkpoint.quantized_layers()) == LAYERS
    for name in checkpoint.quantized_layers():
        layer = model.get_submodule(name)
        q = checkpoint.load(name)
        np.testing.assert_array_equal(np.asarray(q.W_q), layer.W_q.numpy())
        np.testing.assert_array_equal(hqq_cpp.dequantize(q), layer.dequantize().numpy())
    with pytest.raises(ValueError, match="no quantized layer"):
        checkpoint.load("lm_head")


def test_dequantize_and_diff(saved, tmp_path):
    model, folder = saved
    hqq_cpp.dequantize_checkpoint(folder, tmp_path / "dense", dtype="float32")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    weight = dense.get_submodule(NAME).weight
    assert type(dense.get_submodule(NAME)) is torch.nn.Linear
    assert torch.equal(weight, model.get_submodule(NAME).dequantize())
    assert not [
        d.name for d in hqq_cpp.diff_checkpoints(folder, tmp_path / "dense") if not d.identical
    ]

    with torch.no_grad():
        weight[3, 5] += 1
    dense.save_pretrained(tmp_path / "changed")
    differ = [
        d.name for d in hqq_cpp.diff_checkpoints(folder, tmp_path / "changed") if not d.identical
    ]
    assert differ == [f"{NAME}.weight"]


def test_convert_to_upstream_and_load_that(saved, tmp_path):
    model, folder = saved
    hqq_cpp.convert_checkpoint(folder, tmp_path / "upstream", to="upstream")
    config = json.loads((tmp_path / "upstream" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "hqq"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "upstream")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_verify_says_what_is_missing(saved, copy):
    report = hqq_cpp.verify_checkpoint(saved[1])
    assert report.layers == LAYERS and not report.ok
    assert len(report.problems) == 1
    assert report.problems[0].startswith("hqq_cpp.manifest.json is missing")

    (path,) = [p for p in copy.glob("*.safetensors") if f"{NAME}.scale" in keys_of(p)]
    rewrite(path, lambda tensors: tensors[f"{NAME}.scale"].__setitem__(0, np.nan))
    problems = hqq_cpp.verify_checkpoint(copy).problems
    assert len(problems) == 2 and NAME in problems[1] and "not finite" in problems[1]


def keys_of(path):
    return hqq_cpp.load_safetensors(path).keys()


def rewrite(path, change):
    """The file with other tensors, and the metadata it had."""
    metadata = hqq_cpp.safetensors_metadata(path)
    tensors = {k: np.array(v) for k, v in hqq_cpp.load_safetensors(path).items()}
    change(tensors)
    path.unlink()
    hqq_cpp.save_safetensors(path, tensors, metadata)


def test_a_tensor_that_is_in_no_shard(copy):
    (path,) = [p for p in copy.glob("*.safetensors") if f"{NAME}.zero" in keys_of(p)]
    rewrite(path, lambda tensors: tensors.pop(f"{NAME}.zero"))
    index = copy / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    del entries["weight_map"][f"{NAME}.zero"]
    index.write_text(json.dumps(entries))
    with pytest.raises(hqq_cpp.FormatError, match=f'"{NAME}.zero" is missing'):
        hqq_cpp.Checkpoint(copy).quantized_layers()
    assert any(f'"{NAME}.zero" is missing' in p for p in hqq_cpp.verify_checkpoint(copy).problems)


def test_weights_that_are_stored_transposed(tmp_path):
    """Conv1D of GPT-2: c_proj is square, so that nothing else would tell."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "dense")
    hqq_cpp.quantize_model_(model, {"nbits": 4, "group_size": 32, "balance": "none"})
    model.save_pretrained(tmp_path / "saved")
    hqq_cpp.dequantize_checkpoint(tmp_path / "saved", tmp_path / "back", dtype="float32")
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back").eval()
    for name in ("c_attn", "c_proj"):
        weight = model.get_submodule(f"transformer.h.0.attn.{name}").dequantize()
        assert torch.equal(back.get_submodule(f"transformer.h.0.attn.{name}").weight, weight.t())
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        hqq_cpp.set_backend("auto", mode="exact")
        expected = model(ids).logits
        hqq_cpp.set_backend("auto", mode="auto")
        torch.testing.assert_close(back(ids).logits, expected, rtol=0, atol=1e-4)
    differences = {
        d.name: d for d in hqq_cpp.diff_checkpoints(tmp_path / "dense", tmp_path / "saved")
    }
    found = differences["transformer.h.0.attn.c_proj.weight"]
    assert found.note == "" and 0 < found.relative < 0.2


def test_a_wrong_list_of_transposed_weights_is_refused(copy):
    shards = sorted(copy.glob("*.safetensors"))
    for shard in shards:
        tensors, metadata = hqq_cpp.load_safetensors(shard), hqq_cpp.safetensors_metadata(shard)
        description = json.loads(metadata["hqq_cpp"]) | {"transposed": ["lm_head"]}
        tensors = {name: np.array(value) for name, value in tensors.items()}
        hqq_cpp.save_safetensors(shard, tensors, metadata | {"hqq_cpp": json.dumps(description)})
    with pytest.raises(hqq_cpp.FormatError, match="transposed .* names .*lm_head"):
        hqq_cpp.dequantize_checkpoint(copy, copy.parent / "dense")
