"""Quantized folders in which something is missing or wrong."""

import json

import pytest

torch = pytest.importorskip("torch", reason="Transformers needs torch")
transformers = pytest.importorskip("transformers", reason="the integration needs Transformers")

from torch import nn
from transformers import (
    LlamaForCausalLM,
)

import hqq_cpp
import hqq_cpp.transformers
from folder_maker import change, outputs

pytestmark = pytest.mark.usefixtures("log")


IDS = torch.arange(3, 15)[None]


NAME = "model.layers.1.mlp.up_proj"
KEYS = ("W_q", "scale", "zero", "scale_step", "scale_offset", "col_scale")


@pytest.mark.parametrize("described", [True, False], ids=["described", "bare"])
@pytest.mark.parametrize("key", KEYS)
def test_a_missing_tensor_is_named(quantized_llama, tmp_path, key, described):
    if key == "col_scale" and not described:
        pytest.skip("nothing says then that there was one")
    layers = (lambda layers: None) if described else None
    folder = change(quantized_llama, tmp_path / "q", lambda t: t.pop(f"{NAME}.{key}"), layers)
    for kwargs in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(hqq_cpp.FormatError, match=f"{NAME}.{key} is missing: .* 5 of the 6"):
            transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def test_a_missing_layer_is_named(quantized_llama, tmp_path):
    def pop(tensors):
        for key in KEYS:
            del tensors[f"{NAME}.{key}"]

    folder = change(quantized_llama, tmp_path / "q", pop)
    with pytest.raises(hqq_cpp.FormatError, match=f"describe are not in them: {NAME}; a shard"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_layer_that_was_made_dense_again(quantized_llama, tmp_path):
    weight = torch.from_numpy(hqq_cpp.dequantize(hqq_cpp.Checkpoint(quantized_llama).load(NAME)))

    def dequantize(tensors):
        for key in KEYS:
            del tensors[f"{NAME}.{key}"]
        tensors[f"{NAME}.weight"] = weight

    folder = change(quantized_llama, tmp_path / "q", dequantize)
    auto = transformers.AutoModelForCausalLM
    dense = auto.from_pretrained(folder, dtype=torch.float32)
    assert type(dense.get_submodule(NAME)) is nn.Linear
    exact = outputs(auto.from_pretrained(quantized_llama, dtype=torch.float32), IDS)
    assert (outputs(dense, IDS) - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t[f"{NAME}.W_q"][:-1], r"W_q is U8 \[639, 128\]; it must be uint8 \[640, 128\]"),
        (lambda t: t[f"{NAME}.W_q"].to(torch.int32), r"W_q is I32 .* must be uint8"),
        (lambda t: t[f"{NAME}.zero"][:, :2], r"zero is F16 \[640, 2\]; it must be float16 \[640"),
        (lambda t: t[f"{NAME}.zero"].float(), r"zero is F32 .* must be float16"),
    ],
    ids=["rows", "codes' type", "groups", "metadata's type"],
)
def test_wrong_tensors_are_named(quantized_llama, tmp_path, edit, message):
    def set_tensor(tensors):
        key = message.split(" ")[0]
        tensors[f"{NAME}.{key}"] = edit(tensors).contiguous()

    folder = change(quantized_llama, tmp_path / "q", set_tensor)
    for kwargs in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(hqq_cpp.FormatError, match=f"{NAME}.{message}"):
            transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda layer: layer.update(balance="none"), "col_scale is left over.*balance=none"),
        (lambda layer: layer.update(nbits=7), "description that cannot be read: .*nbits is 7"),
        (lambda layer: layer.update(balance="auto"), "cannot be read: .*balance is 'auto'"),
        (lambda layer: layer.update(shape=[512]), r"cannot be read: shape is \[512\]"),
        (lambda layer: layer.update(unknown=1), "cannot be read: .*unknown"),
        (lambda layer: layer.pop("tensor"), "no description of layers"),
        (lambda layer: layer.update(shape="x"), "no description of layers"),
    ],
    ids=["left over", "nbits", "auto", "shape", "unknown", "no tensor", "text"],
)
def test_wrong_descriptions_are_refused(quantized_llama, tmp_path, edit, message):
    folder = change(quantized_llama, tmp_path / "q", layers=lambda layers: edit(layers[NAME]))
    with pytest.raises(hqq_cpp.FormatError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_missing_shard_is_refused(model, tmp_path):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=hqq_cpp.HqqConfig()
    )
    loaded.save_pretrained(tmp_path, max_shard_size="1MB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    (tmp_path / last).unlink()
    with pytest.raises((OSError, hqq_cpp.FormatError), match=last):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    # Also when the index does not name it.
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != last}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(hqq_cpp.FormatError, match="a shard is missing"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_state_dict_alone_is_refused(quantized_llama):
    from safetensors.torch import load_file

    config = transformers.AutoConfig.from_pretrained(quantized_llama)
    state = load_file(quantized_llama / "model.safetensors")
    with pytest.raises(ValueError, match="is read from its files"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)
