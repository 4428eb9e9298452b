"""The type a quantized model computes in is what its first parameter, and .dtype, say."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import hqq_cpp
from hqq_cpp.nn.base import DTYPE_MARKER

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EMBEDDING = {"nbits": 8, "group_size": 32, "dynamic_config": {"0": {"nbits": 8, "group_size": 32}}}


def net(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 32, bias=bias), nn.Linear(32, 8, bias=bias)]
    return hqq_cpp.quantize_model_(nn.Sequential(*layers).to(dtype), {"nbits": 4})


def first(model):
    return next(model.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_first_parameter(dtype, bias):
    quantized = net(dtype, bias)
    assert first(quantized).dtype == dtype == first(quantized[0]).dtype
    assert next(p.dtype for p in quantized.parameters() if p.is_floating_point()) == dtype
    assert first(quantized).device == quantized[0].W_q.device
    for other in DTYPES:
        assert first(quantized.to(other)).dtype == other == quantized[0].compute_dtype
        # Packed tensors keep their types.
        assert quantized[0].W_q.dtype == torch.uint8 and quantized[0].scale.dtype == torch.float16


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_and_experts(dtype):
    table = nn.Sequential(nn.Embedding(40, 64)).to(dtype)
    assert first(hqq_cpp.quantize_model_(table, EMBEDDING)).dtype == dtype
    q = hqq_cpp.quantize(torch.randn(8, 64), {"nbits": 4})
    experts = nn.Sequential(hqq_cpp.HqqExperts([q, q], dtype=dtype))
    assert first(experts).dtype == dtype == experts[0].dtype


def test_it_is_no_part_of_the_weights():
    quantized = net()
    assert not [name for name in quantized.state_dict() if DTYPE_MARKER in name]
    assert all(p.numel() == 0 for n, p in quantized.named_parameters() if DTYPE_MARKER in n)
    # What hooks move one by one.
    assert DTYPE_MARKER not in dict(quantized[0].named_parameters(recurse=False))
    # A strict load needs nothing that state_dict() lacks, and still sees what is missing.
    state = quantized.state_dict()
    assert net().load_state_dict(state, strict=True).missing_keys == []
    with pytest.raises(RuntimeError, match='Missing key.*"0.scale"'):
        net().load_state_dict({k: v for k, v in state.items() if k != "0.scale"})


def test_copies_keep_it():
    quantized, x = net(torch.bfloat16), torch.randn(3, 64, dtype=torch.bfloat16)
    for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert first(other).dtype == torch.bfloat16 and torch.equal(other(x), quantized(x))
        assert first(other.float()).dtype == torch.float32
        assert first(quantized).dtype == torch.bfloat16


def test_meta_modules():
    config = hqq_cpp.HqqConfig(nbits=4, balance="none").layer("x")
    with torch.device("meta"):
        layer = hqq_cpp.HqqLinear.empty(config, 8, 64, True, dtype=torch.bfloat16)
    assert layer.W_q.is_meta and layer.compute_dtype == torch.bfloat16
    # What loaders that replace parameters leave behind must not stay on meta.
    assert not layer.dtype_marker.is_meta
    assert layer.to_empty(device="cpu").compute_dtype == torch.bfloat16


def test_code_that_lists_parameters():
    quantized, x = net(), torch.randn(3, 64)
    expected = quantized(x)
    parameters = dict(quantized.named_parameters())
    assert torch.equal(torch.func.functional_call(quantized, parameters, (x,)), expected)
    program = torch.export.export(quantized, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    optimizer = torch.optim.AdamW(quantized.parameters(), lr=0.1)
    quantized(x.requires_grad_()).sum().backward()
    optimizer.step()
    assert first(quantized).grad is None


def test_offloaded_to_the_cpu():
    """accelerate's hooks look every name up in the state_dict."""
    accelerate = pytest.importorskip("accelerate")
    quantized, x = net(), torch.randn(3, 64)
    expected = copy.deepcopy(quantized)(x)
    accelerate.cpu_offload(quantized, torch.device("cpu"))
    assert quantized[0].W_q.is_meta
    assert torch.equal(quantized(x), expected) and first(quantized).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_models_of_transformers(dtype):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=48,
    )
    dense = transformers.LlamaForCausalLM(config).to(dtype)
    rules = {"embed_tokens": {"nbits": 8, "group_size": 32}}
    small = hqq_cpp.quantize_model_(dense, {"nbits": 8, "group_size": 32, "dynamic_config": rules})
    assert small.dtype == dtype == first(small).dtype == small.model.dtype
    assert small.to(torch.float64).dtype == torch.float64
