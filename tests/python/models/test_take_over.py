"""Layers that upstream's hqq holds in memory, and folders for its own loader."""

import copy
import json
import pickle

import pytest

torch = pytest.importorskip("torch", reason="layers need torch")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="models need it")
hqq_quantize = pytest.importorskip("hqq.core.quantize", reason="it makes the layers")

from torch import nn

import hqq_cpp
import hqq_cpp.transformers
from cli_runner import run
from hqq_cpp.transformers.qmodel import write_qmodel
from upstream_maker import TOKENS, hqq_linear, llama, logits


@pytest.fixture(autouse=True)
def exact_products():
    hqq_cpp.set_backend("auto", mode="exact")
    yield
    hqq_cpp.set_backend("auto", mode="auto")


def quantized_llama(**settings):
    """A model in memory as AutoHQQHFModel.quantize_model leaves it."""
    model = llama()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, hqq_linear(module, **settings))
    model.hqq_quantized = True
    model.to = lambda *args, **kwargs: model
    return model


@pytest.mark.parametrize("view_as_float", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 6, 5, 4, 3, 2, 1.58, 1])
def test_a_layer_keeps_its_codes(nbits, axis, view_as_float):
    torch.manual_seed(0)
    layer = hqq_linear(
        nn.Linear(96, 64), nbits=nbits, group_size=32, axis=axis, view_as_float=view_as_float
    )
    taken = hqq_cpp.from_upstream(layer.eval())
    assert isinstance(taken, hqq_cpp.HqqLinear) and not taken.training
    assert taken.nbits == nbits and taken.layer_config.axis == axis
    assert torch.equal(taken.dequantize(), layer.dequantize())
    assert torch.equal(taken.bias, layer.bias)
    x = torch.randn(3, 96)
    torch.testing.assert_close(taken(x), layer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_compute_type_is_kept(dtype):
    layer = hqq_linear(nn.Linear(64, 32), dtype, nbits=4, group_size=64)
    taken = hqq_cpp.from_upstream(layer)
    assert taken.weight.dtype == taken.bias.dtype == taken.scale.dtype == dtype


def test_no_layer_of_hqq_is_refused():
    with pytest.raises(TypeError, match="torch.nn.modules.linear.Linear is no HQQLinear"):
        hqq_cpp.from_upstream(nn.Linear(8, 8))
    empty = hqq_quantize.HQQLinear(None, None, device="cpu", initialize=False)
    with pytest.raises(ValueError, match="not quantized yet"):
        hqq_cpp.from_upstream(empty)


def test_layers_are_no_weights():
    with pytest.raises(TypeError, match=r"HQQLinear; it must be a QuantizedTensor.*from_upstream"):
        hqq_cpp.HqqLinear(hqq_linear(nn.Linear(64, 32), nbits=4, group_size=64))


def test_quantizing_what_is_quantized_says_what_to_call():
    layer = hqq_linear(nn.Linear(64, 32), nbits=4, group_size=64)
    with pytest.raises(ValueError, match=r"by upstream's hqq: hqq_cpp.from_upstream\(layer\)"):
        hqq_cpp.quantize_linear(layer, {"nbits": 4})
    with pytest.raises(ValueError, match="quantized already .*nbits=4"):
        hqq_cpp.quantize_linear(hqq_cpp.from_upstream(layer), {"nbits": 3})


def test_a_model_is_taken_over_saved_and_trained(tmp_path):
    model = quantized_llama(nbits=4, group_size=32, axis=1)
    with torch.no_grad():
        expected = model(TOKENS).logits
    taken = hqq_cpp.take_over_(model)
    assert taken is model
    assert not any(hqq_cpp.models.take_over.is_upstream_layer(m) for m in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)
    assert "to" not in vars(model)  # hqq had replaced it, so that the model does not move
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    again(TOKENS, labels=TOKENS).loss.backward()
    assert again.model.embed_tokens.weight.grad is not None


def test_layers_that_format_1_cannot_hold_become_dense():
    # Groups of 64 run over the ends of rows of 96.
    model = nn.Sequential(hqq_linear(nn.Linear(96, 64), nbits=4, group_size=64, axis=1))
    model.append(hqq_linear(nn.Linear(64, 32), nbits=4, group_size=64, axis=1))
    dense = model[0].dequantize()
    with pytest.raises(ValueError, match="group"):
        hqq_cpp.from_upstream(model[0])
    with pytest.warns(UserWarning, match=r"1 of 2 layers become dense.*: 0 \("):
        hqq_cpp.take_over_(model)
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, dense)
    assert isinstance(model[1], hqq_cpp.HqqLinear)


def test_models_without_such_layers_are_refused():
    with pytest.raises(ValueError, match="Sequential has no HQQLinear"):
        hqq_cpp.take_over_(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"from_upstream\(\) takes a single layer"):
        hqq_cpp.take_over_(hqq_linear(nn.Linear(64, 32), nbits=4, group_size=64))


def test_layers_prepared_for_other_kernels_are_refused_before_any_change():
    prepared = type("MarlinLinear", (nn.Module,), {"__module__": "hqq.backends.marlin"})()
    model = nn.Sequential(hqq_linear(nn.Linear(64, 32), nbits=4, group_size=64), prepared)
    with pytest.raises(ValueError, match=r"1 was prepared.*\(MarlinLinear\).*prepare_for_infer"):
        hqq_cpp.take_over_(model)
    assert hqq_cpp.models.take_over.is_upstream_layer(model[0])


# Folders for hqq's own loader.


def upstream_folder(tmp_path, model, *arguments, **settings):
    model.save_pretrained(tmp_path / "dense")
    config = {"nbits": 4, "group_size": 32, "balance": "none"} | settings
    hqq_cpp.quantize_checkpoint(tmp_path / "dense", tmp_path / "quantized", config)
    done = run("convert", tmp_path / "quantized", tmp_path / "up", "--to", "upstream", *arguments)
    return tmp_path / "up", done


@pytest.mark.parametrize("tied", [False, True])
def test_hqq_loads_what_convert_wrote(tmp_path, tied):
    from hqq.models.hf.base import AutoHQQHFModel

    folder, _ = upstream_folder(tmp_path, llama(tie_word_embeddings=tied), nbits=3)
    assert not list(folder.glob("*.partial"))
    loaded = AutoHQQHFModel.from_quantized(str(folder), compute_dtype=torch.float32, device="cpu")
    assert type(loaded.model.layers[0].mlp.up_proj) is hqq_quantize.HQQLinear
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    with torch.no_grad():
        found = loaded(TOKENS).logits
    torch.testing.assert_close(found, logits(ours), rtol=0, atol=2e-5)
    # And the way back.
    back = hqq_cpp.transformers.load_upstream(folder, dtype=torch.float32)
    assert torch.equal(logits(back), logits(ours))


def test_convert_can_leave_it_out(tmp_path):
    folder, _ = upstream_folder(tmp_path, llama(), "--no-qmodel")
    assert not (folder / "qmodel.pt").exists()


def test_convert_says_why_it_is_not_there(tmp_path):
    model = llama()
    model.config.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(tmp_path / "dense")
    hqq_cpp.quantize_checkpoint(
        tmp_path / "dense", tmp_path / "quantized", {"nbits": 4, "balance": "none"}
    )
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    config["model_type"] = "of-nobody"
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    done = run("convert", tmp_path / "quantized", tmp_path / "up", "--to", "upstream")
    assert "qmodel.pt" in done.stderr and "was not written" in done.stderr
    assert not (tmp_path / "up" / "qmodel.pt").exists()


def test_write_qmodel_refuses_other_folders(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(hqq_cpp.FormatError, match="holds no W_q of a layer"):
        write_qmodel(tmp_path / "dense")


def test_qmodel_holds_plain_values_only(tmp_path):
    folder, _ = upstream_folder(tmp_path, llama())
    modules = torch.load(folder / "qmodel.pt", weights_only=True)
    layer = modules["model.layers.1.mlp.down_proj"]
    oracle = hqq_linear(nn.Linear(128, 64, bias=False), nbits=4, group_size=32)
    oracle.encoded_state_dict = False
    expected = oracle.state_dict()
    assert layer.keys() == expected.keys()
    kinds = {key: type(value) for key, value in expected.items()}
    assert {key: type(value) for key, value in layer.items()} == kinds | {"W_q": torch.Tensor}


# Names of the hub.


def test_load_upstream_finds_repositories_in_the_local_cache(tmp_path):
    folder, _ = upstream_folder(tmp_path, llama())
    commit = "0" * 40
    repository = tmp_path / "cache" / "models--someone--tiny-hqq"
    snapshot = repository / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    copy_of = copy.copy(folder)
    copy_of.rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = hqq_cpp.transformers.load_upstream(
        "someone/tiny-hqq", cache_dir=tmp_path / "cache", dtype=torch.float32
    )
    assert isinstance(loaded.model.layers[0].mlp.up_proj, hqq_cpp.HqqLinear)
    with pytest.raises(ValueError, match="someone/other is no folder, and as a repository"):
        hqq_cpp.transformers.load_upstream("someone/other", cache_dir=tmp_path / "cache")


def test_taken_layers_pickle():
    taken = hqq_cpp.from_upstream(hqq_linear(nn.Linear(64, 32), nbits=2, group_size=64))
    assert torch.equal(pickle.loads(pickle.dumps(taken)).dequantize(), taken.dequantize())
