"""Models and checkpoints as the package hqq and Transformers 4 wrote them, for the tests of both
loaders."""

import copy
import json

import pytest
import torch
import transformers
from hqq.core import quantize as upstream
from safetensors.torch import save_file

import hqq_cpp
from hqq_cpp.transformers import _versions

# For layers with view_as_float.
needs_float_codes = pytest.mark.xfail(
    not _versions.KEEPS_FLOAT_CODES,
    raises=hqq_cpp.FormatError,
    strict=True,
    reason="Transformers before 5.21 rounds the codes: loading refuses",
)

BASE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
TOKENS = torch.arange(24).reshape(2, 12) * 3


def llama(**settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(BASE | settings))
    return transformers.LlamaForCausalLM(config).eval()


def mixtral(**settings):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **BASE, num_local_experts=4, num_experts_per_tok=2, **settings
    )
    return transformers.MixtralForCausalLM(config).eval()


def hqq_linear(linear, compute_dtype=torch.float32, optimize=False, **settings):
    config = upstream.BaseQuantizeConfig(**settings)
    # The solver, which is slow, changes nothing about how layers are stored.
    config["weight_quant_params"]["optimize"] = optimize
    linear = copy.deepcopy(linear)
    return upstream.HQQLinear(linear, config, compute_dtype=compute_dtype, device="cpu")


def quantize(model, settings_of):
    """(state dict as Transformers 4 saved it, the same model with upstream's dense weights)."""
    dense = copy.deepcopy(model)
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        settings = settings_of(name) if isinstance(module, torch.nn.Linear) else None
        if settings is None:
            continue
        layer = hqq_linear(module, **settings)
        del state[f"{name}.weight"]
        state.pop(f"{name}.bias", None)
        state |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
        dense.get_submodule(name).weight.data = layer.dequantize()
    return state, dense


def all_but_head(**settings):
    return lambda name: None if name == "lm_head" else settings


def config_for(quant_config, **more):
    return {
        "quant_config": quant_config,
        "quant_method": "hqq",
        "skip_modules": ["lm_head"],
        **more,
    }


def save(folder, model, state, quantization_config, shards=1):
    """Neighbouring tensors end up in different shards."""
    folder.mkdir()
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    names = ["model.safetensors"] if shards == 1 else names
    weight_map = {key: names[i % shards] for i, key in enumerate(sorted(state))}
    for name in names:
        tensors = {k: v.detach().contiguous() for k, v in state.items() if weight_map[k] == name}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(folder, auto=transformers.AutoModelForCausalLM, **kwargs):
    model, info = auto.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def assert_same_model(model, dense, tolerance=2e-6):
    for name, module in dense.named_modules():
        found = model.get_submodule(name)
        if isinstance(found, hqq_cpp.HqqLinear):
            torch.testing.assert_close(found.dequantize(), module.weight.data, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=tolerance)


def assert_saves_in_our_format(model, folder, shard_size="20KB"):
    model.save_pretrained(folder, max_shard_size=shard_size)
    saved = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert saved["quantizer"] == "hqq_cpp"
    assert torch.equal(logits(load(folder)), logits(model))


def quantize_mixtral(model, settings_of, gate=False):
    """As quantize(), with the names of Transformers 4."""
    dense = copy.deepcopy(model)
    renamed = {}
    for name, value in model.state_dict().items():
        name = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(value):
                w1, w3 = both.chunk(2)
                prefix = name.removesuffix("gate_up_proj") + str(e)
                renamed |= {f"{prefix}.w1.weight": w1, f"{prefix}.w3.weight": w3}
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            renamed |= {f"{prefix}{e}.w2.weight": w2 for e, w2 in enumerate(value)}
        else:
            renamed[name] = value
    state = {}
    for name, value in renamed.items():
        path = name.removesuffix(".weight")
        settings = settings_of(path)
        if settings is None:
            state[name] = value
            continue
        linear = torch.nn.Linear(*value.shape[::-1], bias=False)
        linear.weight.data = value.detach().clone()
        layer = hqq_linear(linear, **settings)
        state |= {f"{path}.{key}": tensor for key, tensor in layer.state_dict().items()}
        value = layer.dequantize()
        target = path.replace(".block_sparse_moe.", ".mlp.")
        if ".experts." not in target:
            dense.get_parameter(f"{target}.weight").data = value
            continue
        parent, e, matrix = target.rsplit(".", 2)
        experts = dense.get_submodule(parent)
        rows = value.shape[0]
        if matrix == "w2":
            experts.down_proj.data[int(e)] = value
        else:
            start = rows if matrix == "w3" else 0
            experts.gate_up_proj.data[int(e), start : start + rows] = value
    return state, dense


def experts_and_attention(gate=False, **settings):
    parts = ("experts", "_proj", "block_sparse_moe.gate") if gate else ("experts", "_proj")
    return lambda path: settings if any(part in path for part in parts) else None
