"""Folders that upstream's own save_quantized and save_to_safetensors wrote, also those of its
first versions."""

import collections
import json

import pytest

torch = pytest.importorskip("torch", reason="models need torch")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="models need it")
upstream = pytest.importorskip("hqq.core.quantize", reason="it makes the checkpoints")
base = pytest.importorskip("hqq.models.hf.base", reason="it makes the folders")

import hqq_cpp
from hqq_cpp.transformers import load_upstream
from upstream_maker import (
    TOKENS,
    all_but_head,
    assert_same_model,
    assert_saves_in_our_format,
    hqq_linear,
    llama,
    needs_float_codes,
    quantize,
)

NAME = "model.layers.0.mlp.up_proj"


def upstream_model(**settings):
    """A model whose layers are HQQLinear, in float32, and one with their dense weights."""
    model = llama(attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    _, dense = quantize(model, all_but_head(**settings))
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, hqq_linear(module, **settings))
    return model, dense


def write_config(folder, model):
    folder.mkdir(exist_ok=True)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "settings",
    [
        {"nbits": 4, "group_size": 64, "axis": 1},
        {"nbits": 3, "group_size": 32, "axis": 0},
        {"nbits": 8, "group_size": None, "axis": 1},
        {"nbits": 1.58, "group_size": 8, "axis": 1},
        pytest.param(
            {"nbits": 2, "group_size": 16, "axis": 1, "view_as_float": True},
            marks=needs_float_codes,
        ),
    ],
    ids=str,
)
def test_save_quantized(tmp_path, settings):
    model, dense = upstream_model(**settings)
    base.AutoHQQHFModel.save_quantized(model, str(tmp_path))
    assert (tmp_path / "qmodel.pt").is_file()
    loaded = load_upstream(tmp_path)
    layers = [m for m in loaded.modules() if isinstance(m, hqq_cpp.HqqLinear)]
    assert len(layers) == 14 and {layer.nbits for layer in layers} == {settings["nbits"]}
    assert_same_model(loaded, dense)
    assert_saves_in_our_format(loaded, tmp_path / "new")


@pytest.mark.parametrize("per_file", [5, 1])
def test_save_to_safetensors(tmp_path, per_file):
    model, dense = upstream_model(nbits=4)
    folder = tmp_path / "old"
    base.AutoHQQHFModel.save_to_safetensors(
        model, str(folder), num_blocks_per_file=per_file, verbose=False
    )
    assert len(list(folder.glob("*.safetensors"))) == (1 if per_file == 5 else 2)
    loaded = load_upstream(folder)
    assert_same_model(loaded, dense)
    assert_saves_in_our_format(loaded, tmp_path / "new")


def test_dtype_and_device_map(tmp_path):
    model, _ = upstream_model(nbits=4, compute_dtype=torch.float16)
    base.AutoHQQHFModel.save_quantized(model, str(tmp_path))
    loaded = load_upstream(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert loaded.dtype == torch.bfloat16
    layer = loaded.get_submodule(NAME)
    assert layer.scale.dtype == torch.float16 and layer.weight.dtype == torch.bfloat16
    assert loaded(TOKENS).logits.dtype == torch.bfloat16


# The layout of hqq 0.1: {"W_q", "meta": {...}, "bias"}, with metadata that may be quantized itself.


def first_version(layer, quant_scale=False, quant_zero=False, offload=False):
    """(entry of qmodel.pt, dense weight) of an HQQLinear."""
    meta = dict(layer.meta)
    dtype = layer.compute_dtype
    dense = dict(meta)
    for key, wanted in (("scale", quant_scale), ("zero", quant_zero)):
        meta[f"quant_{key}"] = wanted
        if not wanted:
            continue
        grouped = key == "scale" or offload
        settings = {"nbits": 8, "channel_wise": grouped, "group_size": 128 if grouped else None}
        codes, own = upstream.Quantizer.quantize(
            meta.pop(key), **settings, optimize=False, device="cpu"
        )
        own["compute_dtype"] = dtype
        meta |= {f"{key}_q": codes, f"meta_{key}": own}
        dense[key] = upstream.Quantizer.dequantize(codes, own)
    if offload:
        keys = ("zero_q", "scale_q") if quant_scale else ("zero", "scale")
        meta["zero_scale"] = torch.stack([meta.pop(key) for key in keys])
    entry = {"W_q": layer.W_q.data, "meta": meta, "bias": layer.bias}
    return entry, upstream.Quantizer.dequantize(layer.W_q.data, dense)


@pytest.mark.parametrize(
    "quantized",
    [
        {},
        {"quant_scale": True},
        {"quant_zero": True},
        {"quant_scale": True, "quant_zero": True},
        {"offload": True},
        {"quant_scale": True, "quant_zero": True, "offload": True},
    ],
    ids=str,
)
def test_first_versions(tmp_path, quantized):
    model, dense = upstream_model(nbits=2, group_size=16)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, upstream.HQQLinear):
            weights[name], dense.get_submodule(name).weight.data = first_version(
                module, **quantized
            )
        elif not list(module.children()) and module.state_dict():
            weights[name] = dict(module.state_dict())
    assert "meta" in weights[NAME]
    write_config(tmp_path, model)
    torch.save(weights, tmp_path / "qmodel.pt")
    loaded = load_upstream(tmp_path)
    assert_same_model(loaded, dense)
    assert_saves_in_our_format(loaded, tmp_path / "new")


# Folders that are refused.


def saved_weights(tmp_path):
    model, _ = upstream_model(nbits=4)
    base.AutoHQQHFModel.save_quantized(model, str(tmp_path))
    return torch.load(tmp_path / "qmodel.pt", weights_only=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w[NAME].pop("zero"), "zero"),
        (lambda w: w[NAME].update(nbits="four"), "nbits"),
        (lambda w: w[NAME].update(axis=[1]), "axis is a list"),
        (lambda w: w[NAME].update(lora=torch.ones(1)), "no value named 'lora'"),
        (lambda w: w[NAME].update(quant_scale=True), "scale_q or meta_scale is missing"),
        (lambda w: w["model.norm"].update(weight=1.5), "model.norm.weight is a float"),
        (lambda w: w.update({"model.norm": torch.ones(64)}), "model.norm is a Tensor"),
        (lambda w: w[NAME].update(shape=torch.Size([64, 64])), NAME),
    ],
)
def test_broken_layers_are_refused(tmp_path, change, message):
    weights = saved_weights(tmp_path)
    change(weights)
    torch.save(weights, tmp_path / "qmodel.pt")
    with pytest.raises(hqq_cpp.FormatError, match=message):
        load_upstream(tmp_path)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize("thing", [Evil(), collections.UserDict()], ids=["code", "class"])
def test_pickles_with_code_are_refused(tmp_path, thing):
    weights = saved_weights(tmp_path)
    weights[NAME]["axis"] = thing
    torch.save(weights, tmp_path / "qmodel.pt")
    with pytest.raises(hqq_cpp.FormatError, match="more than tensors"):
        load_upstream(tmp_path)


def test_files_that_are_cut_off_are_refused(tmp_path):
    saved_weights(tmp_path)
    path = tmp_path / "qmodel.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(hqq_cpp.FormatError, match="qmodel.pt"):
        load_upstream(tmp_path)
    torch.save([1], path)
    with pytest.raises(hqq_cpp.FormatError, match="holds a list"):
        load_upstream(tmp_path)


def test_folders_without_weights_or_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a folder with config.json"):
        load_upstream(tmp_path / "nowhere")
    saved_weights(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(ValueError, match="no model class NoSuchModel.*pass model_class"):
        load_upstream(tmp_path)
    loaded = load_upstream(tmp_path, model_class=transformers.LlamaForCausalLM)
    assert isinstance(loaded.get_submodule(NAME), hqq_cpp.HqqLinear)
    (tmp_path / "qmodel.pt").unlink()
    with pytest.raises(ValueError, match="qmodel.pt or safetensors"):
        load_upstream(tmp_path)
