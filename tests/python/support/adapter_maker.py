"""Small quantized models, and adapters of the package peft for them."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from transformers import LlamaConfig, LlamaForCausalLM

import hqq_cpp
import hqq_cpp.peft

hqq_cpp.peft.register()


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def small():
    """A random dense Llama, and the same with 4-bit layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        initializer_range=0.2,
    )
    dense = LlamaForCausalLM(config).eval()
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return dense, quantize(copy.deepcopy(dense))


@pytest.fixture
def quantized(small):
    return copy.deepcopy(small[1])


@pytest.fixture
def ids():
    return torch.arange(48).reshape(2, 24) * 7 % 64


def quantize(model, nbits=4):
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, hqq_cpp.quantize_linear(module, {"nbits": nbits}, name))
    # What peft asks of a model before it leaves the types of its parameters alone.
    model.hqq_quantized = True
    return model


def dense_twin(quantized):
    """The same model with nn.Linear layers of the dequantized weights."""
    twin = copy.deepcopy(quantized)
    for name, module in list(twin.named_modules()):
        if isinstance(module, hqq_cpp.HqqLinear):
            linear = torch.nn.Linear(
                module.in_features, module.out_features, module.bias is not None
            )
            linear.weight.data = module.dequantize()
            if module.bias is not None:
                linear.bias.data = module.bias.data.clone()
            twin.set_submodule(name, linear.to(module.compute_dtype))
    return twin


def disturb(model, size=0.05, seed=1):
    """Gives an adapter random weights, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * size
            parameter.data += noise.to(parameter.dtype)
    return model.eval()


def packed(model):
    names = {
        name for name, module in model.named_modules() if isinstance(module, hqq_cpp.HqqLinear)
    }
    state = model.state_dict()
    return {k: v.clone() for k, v in state.items() if k.rpartition(".")[0] in names}


def assert_same(a, b):
    assert a and a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def lora(**options):
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    return peft.LoraConfig(**{**defaults, **options})
