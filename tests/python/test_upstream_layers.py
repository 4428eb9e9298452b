"""Upstream's layers in plain torch, and layers that Transformers merges or cuts while it reads."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="models need torch")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="models need it")
quantize = pytest.importorskip("hqq.core.quantize", reason="it makes the layers")

from transformers import conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

import hqq_cpp
import hqq_cpp.transformers
from hqq_cpp.models import upstream
from upstream_maker import (
    BASE,
    assert_saves_in_our_format,
    config_for,
    hqq_linear,
    llama,
    load,
    logits,
    save,
)


def layer(**settings):
    torch.manual_seed(0)
    return hqq_linear(torch.nn.Linear(96, 48, bias=False), **settings)


@pytest.mark.parametrize("view_as_float", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 6, 5, 4, 3, 2, 1])
def test_dense_weights_are_those_of_upstream(nbits, axis, view_as_float):
    made = layer(nbits=nbits, group_size=64 if axis else 48, axis=axis, view_as_float=view_as_float)
    meta = upstream.decode(made.state_dict())
    assert meta["nbits"] == nbits and meta["axis"] == axis
    assert torch.equal(upstream.dequantize(meta, torch.float32, "x"), made.dequantize())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scale": None}, "tensor scale of a quantized layer is missing"),
        ({"packing": "9bit"}, "no packing '9bit'"),
        ({"W_q": torch.zeros(4, 4)}, "4bit_u8 needs a torch.uint8 matrix"),
        ({"W_q": torch.zeros(30, 63, dtype=torch.uint8)}, "3780 codes"),
        ({"W_q": torch.zeros(8, 64, dtype=torch.uint8)}, "1024 codes"),
        ({"scale": torch.ones(7, 1)}, r"scale \[7, 1\]"),
    ],
)
def test_layers_that_do_not_fit_together_are_refused(change, message):
    meta = upstream.decode(layer(nbits=4, group_size=64).state_dict()) | change
    with pytest.raises(hqq_cpp.FormatError, match=rf"\[x\].*{message}"):
        upstream.dequantize(meta, torch.float32, "x")


def test_encoding_is_that_of_upstream():
    made = layer(nbits=3, group_size=64)
    expected = made.state_dict()
    made.encoded_state_dict = False
    encoded = upstream.encode(made.state_dict(), "x")
    assert encoded.keys() == expected.keys()
    for key, tensor in expected.items():
        assert encoded[key].dtype == tensor.dtype and torch.equal(encoded[key], tensor), key


# Linear layers that Transformers puts together, or cuts.


def convert(monkeypatch, model_type, converter):
    """Lets Transformers read another layout of a model."""
    conversion_mapping.get_checkpoint_conversion_mapping(model_type)  # fills the table
    table = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setitem(table, model_type, [converter])


def phi3():
    torch.manual_seed(0)
    config = transformers.Phi3Config(**BASE, pad_token_id=0)
    return transformers.Phi3ForCausalLM(config).eval()


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_below_each_other(tmp_path, monkeypatch, axis):
    sources = [".mlp.gate_proj.weight", ".mlp.up_proj.weight"]
    converter = WeightConverter(sources, ".mlp.gate_up_proj.weight", [Concatenate(dim=0)])
    convert(monkeypatch, "phi3", converter)
    model = phi3()
    dense = copy.deepcopy(model)
    state = dict(model.state_dict())
    for i in range(2):
        prefix = f"model.layers.{i}.mlp."
        halves = []
        for name, half in zip(("gate", "up"), state.pop(f"{prefix}gate_up_proj.weight").chunk(2)):
            linear = torch.nn.Linear(*half.shape[::-1], bias=False)
            linear.weight.data = half
            made = hqq_linear(linear, nbits=4, group_size=32, axis=axis)
            state |= {f"{prefix}{name}_proj.{k}": v for k, v in made.state_dict().items()}
            halves.append(made.dequantize())
        dense.get_submodule(f"{prefix}gate_up_proj").weight.data = torch.cat(halves)
    quant_config = quantize.BaseQuantizeConfig(nbits=4, group_size=32, axis=axis)
    loaded = load(save(tmp_path / "old", model, state, config_for(quant_config)))
    merged = loaded.model.layers[1].mlp.gate_up_proj
    # Groups that run over all rows cannot be put below each other.
    assert type(merged) is (hqq_cpp.HqqLinear if axis == 1 else torch.nn.Linear)
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=0, atol=2e-6)
    if axis == 1:
        assert_saves_in_our_format(loaded, tmp_path / "new")


def test_rows_that_are_cut_become_dense(tmp_path, monkeypatch):
    targets = [".mlp.up_proj.weight", ".mlp.gate_proj.weight"]
    converter = WeightConverter(".mlp.ff_proj.weight", targets, [Chunk(dim=0)])
    convert(monkeypatch, "llama", converter)
    model = llama()
    dense = copy.deepcopy(model)
    state = dict(model.state_dict())
    for i in range(2):
        prefix = f"model.layers.{i}.mlp."
        names = ("up_proj", "gate_proj")
        both = torch.cat([state.pop(f"{prefix}{name}.weight") for name in names])
        linear = torch.nn.Linear(*both.shape[::-1], bias=False)
        linear.weight.data = both
        made = hqq_linear(linear, nbits=4, group_size=32)
        state |= {f"{prefix}ff_proj.{k}": v for k, v in made.state_dict().items()}
        for name, half in zip(names, made.dequantize().chunk(2)):
            dense.get_submodule(prefix + name).weight.data = half
    # One layer that stays quantized.
    down = hqq_linear(model.model.layers[0].mlp.down_proj, nbits=4, group_size=32)
    dense.model.layers[0].mlp.down_proj.weight.data = down.dequantize()
    name = "model.layers.0.mlp.down_proj"
    del state[f"{name}.weight"]
    state |= {f"{name}.{k}": v for k, v in down.state_dict().items()}
    quant_config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
    loaded = load(save(tmp_path / "old", model, state, config_for(quant_config)))
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert isinstance(loaded.get_submodule(name), hqq_cpp.HqqLinear)
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=0, atol=2e-6)
