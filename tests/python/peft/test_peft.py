"""Adapters of the package peft on quantized layers: training, merging, saving."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from transformers import LlamaConfig, LlamaForCausalLM

import hqq_cpp
import hqq_cpp.peft
from adapter_maker import (  # noqa: F401
    LINEAR,
    assert_same,
    dense_twin,
    disturb,
    ids,
    lora,
    packed,
    quantize,
    quantized,
    small,
)
from hqq_cpp.peft.lora import HqqLoraLinear

VARIANTS = {
    "lora": {},
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_equals_that_on_dense_layers(quantized, ids, variant):
    twin = disturb(peft.get_peft_model(dense_twin(quantized), lora(**VARIANTS[variant])))
    base = quantized(ids).logits
    model = peft.get_peft_model(quantized, lora(**VARIANTS[variant]))
    if variant != "orthogonal":
        torch.testing.assert_close(model(ids).logits, base)
    layers = [m for m in model.modules() if isinstance(m, HqqLoraLinear)]
    assert len(layers) == 2 * {"names": 2, "bias": 1}.get(variant, len(LINEAR))
    assert "HqqLinear(in_features=64, out_features=64" in repr(layers[0])
    missing, unexpected = model.load_state_dict(
        {k: v for k, v in twin.state_dict().items() if "lora_" in k}, strict=False
    )
    assert not unexpected and not any("lora_" in name for name in missing)
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-4)

    # Gradients of the adapter.
    for m in (model, twin):
        m.train()
        m(ids, labels=ids).loss.backward()
    gradients = {n: p.grad for n, p in twin.named_parameters() if p.requires_grad}
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trainable.keys()
    for name, parameter in trainable.items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_one_layer(dtype, compiled):
    torch.manual_seed(3)
    layer = hqq_cpp.quantize_linear(torch.nn.Linear(64, 48, dtype=dtype), {"nbits": 3})
    wrapped = HqqLoraLinear(layer, "default", lora(), r=4, lora_alpha=8)
    for p in (wrapped.lora_A.default.weight, wrapped.lora_B.default.weight):
        p.data.normal_()
    W, bias = layer.dequantize(), layer.bias.detach().float()
    A = wrapped.lora_A.default.weight.detach().float().requires_grad_()
    B = wrapped.lora_B.default.weight.detach().float().requires_grad_()
    x = torch.randn(2, 16, 64).to(dtype).requires_grad_()
    grad_y = torch.randn(2, 16, 48).to(dtype)
    run = torch.compile(wrapped, backend="aot_eager", fullgraph=True) if compiled else wrapped
    y = run(x)
    assert y.dtype == dtype
    y.backward(grad_y)

    x_f = x.detach().float().requires_grad_()
    expected = x_f @ W.T + bias + (x_f @ A.T @ B.T) * 2
    expected.backward(grad_y.float())
    digits = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for got, want in (
        (y, expected),
        (x.grad, x_f.grad),
        (wrapped.lora_A.default.weight.grad, A.grad),
        (wrapped.lora_B.default.weight.grad, B.grad),
    ):
        assert (got.float() - want).norm() <= digits * want.norm()
        assert want.norm() > 1
    assert all(p.grad is None for p in layer.packed() if p is not None)


def test_merge_requantizes_and_unmerge_restores_every_bit(quantized, ids):
    model = disturb(peft.get_peft_model(quantized, lora()), 0.15)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before, adapted = packed(model), model(ids).logits
    W = layer.base_layer.dequantize() + layer.get_delta_weight("default")
    expected = hqq_cpp.quantize(W.detach(), layer.base_layer.layer_config)
    model.merge_adapter()
    assert torch.equal(layer.base_layer.W_q, torch.from_dlpack(expected.W_q))
    assert torch.equal(layer.base_layer.scale, torch.from_dlpack(expected.scale))
    merged = model(ids).logits
    assert not torch.equal(merged, adapted)
    # 4 bits: near the adapted model, and nearer than the base.
    with model.disable_adapter():  # unmerges
        base = model(ids).logits
    assert (merged - adapted).norm() < 0.6 * (base - adapted).norm()
    assert_same(packed(model), before)
    assert torch.equal(model(ids).logits, adapted)
    with pytest.warns(UserWarning, match="nothing to unmerge"):
        model.unmerge_adapter()


def test_merge_keeps_adding_and_unmerges_to_the_start(quantized, ids):
    model = peft.get_peft_model(quantized, lora(lora_bias=True, target_modules=["q_proj"]))
    model.add_adapter("second", lora(use_dora=True))
    disturb(model)
    model.base_model.set_adapter(["default", "second"])
    disturb(model, seed=2)
    before = packed(model)
    model.merge_adapter(["default"])
    one = packed(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(["second"])
        model.merge_adapter(["second"])  # merged already: nothing happens
    two = packed(model)
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer."
    for key in ("W_q", "bias"):
        assert not torch.equal(before[name + key], one[name + key])
    assert not torch.equal(one[name + "W_q"], two[name + "W_q"])
    model.unmerge_adapter()
    assert_same(packed(model), before)


def test_merge_and_unload(quantized, ids):
    model = disturb(peft.get_peft_model(quantized, lora()))
    reference = copy.deepcopy(model)
    reference.merge_adapter()
    unloaded = model.merge_and_unload(safe_merge=True)
    assert not any("lora" in name for name, _ in unloaded.named_modules())
    assert type(unloaded.model.layers[0].self_attn.q_proj) is hqq_cpp.HqqLinear
    torch.testing.assert_close(unloaded(ids).logits, reference(ids).logits, rtol=0, atol=0)


def test_unload_gives_the_model_back(small, quantized, ids):
    model = disturb(peft.get_peft_model(quantized, lora()))
    assert_same(packed(model.unload()), packed(small[1]))


@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_broken_adapter_is_not_merged(quantized, safe_merge):
    model = peft.get_peft_model(quantized, lora(target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_B.default.weight.data[3, 1] = float("nan")
    before = packed(model)
    message = "adapter 'default' would give weights with NaN" if safe_merge else "NaN or Inf"
    with pytest.raises(ValueError, match=message):
        layer.merge(safe_merge=safe_merge)
    assert not layer.merged
    assert_same(packed(model), before)


def test_what_cannot_be_merged_or_made(quantized):
    layer = quantized.model.layers[0].mlp.up_proj
    wrapped = HqqLoraLinear(layer, "default", lora(lora_bias=True), r=4, lora_alpha=8)
    with pytest.raises(ValueError, match="lora_bias=True, but the layer has no bias"):
        wrapped.merge()
    for init in ("pissa", "pissa_niter_4", "olora", "loftq"):
        config = lora()
        config.init_lora_weights = init
        with pytest.raises(ValueError, match=rf"\[peft\] init_lora_weights='{init}' subtracts"):
            peft.get_peft_model(copy.deepcopy(quantized), config)
    with pytest.raises(ValueError, match="positive integer"):
        peft.get_peft_model(
            copy.deepcopy(quantized), peft.LoraConfig(r=0, target_modules=["q_proj"])
        )
    with pytest.warns(UserWarning, match="fan_in_fan_out is True"):
        peft.get_peft_model(copy.deepcopy(quantized), lora(fan_in_fan_out=True))


@pytest.mark.parametrize("target", ["q_proj.weight", "experts.gate_up_proj", "gate_up_proj.W_q"])
def test_adapters_on_quantized_parameters_are_refused(quantized, target):
    q = hqq_cpp.quantize(torch.randn(8, 64), {"nbits": 4})
    quantized.model.experts = torch.nn.ModuleDict({"gate_up_proj": hqq_cpp.HqqExperts([q, q])})
    config = lora(target_modules=["v_proj"], target_parameters=[target])
    with pytest.raises(
        ValueError, match=rf"\[peft\] target_parameters has '{target}', but model\."
    ):
        peft.get_peft_model(quantized, config)


def test_several_adapters(quantized, ids):
    model = peft.get_peft_model(quantized, lora())
    base = model(ids).logits
    disturb(model)
    first = model(ids).logits
    model.add_adapter("second", lora(target_modules=["v_proj"]))
    model.set_adapter("second")
    disturb(model, seed=2)
    second = model(ids).logits
    assert not torch.allclose(first, second, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base)
    # One adapter for each row of the batch.
    with torch.no_grad():
        mixed = model(ids, adapter_names=["default", "second"]).logits
    torch.testing.assert_close(mixed[0], first[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], second[1], rtol=1e-4, atol=1e-4)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, first)
    model.delete_adapter("second")
    with pytest.raises(ValueError, match="second"):
        model.set_adapter("second")


def test_save_and_reload(quantized, ids, tmp_path):
    model = disturb(peft.get_peft_model(copy.deepcopy(quantized), lora(use_dora=True)))
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized, tmp_path)
    assert torch.equal(again(ids).logits, expected)
    with pytest.raises(RuntimeError, match="size mismatch"):
        wider = LlamaConfig(**{**quantized.config.to_dict(), "intermediate_size": 128})
        other = quantize(LlamaForCausalLM(wider))
        peft.PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("reentrant", [False, True])
def test_kbit_training_with_checkpointing(quantized, ids, reentrant):
    quantized.to(torch.bfloat16)
    before = packed(quantized)
    model = peft.prepare_model_for_kbit_training(
        quantized, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    assert model.is_gradient_checkpointing
    assert_same(packed(model), before)
    assert not any(p.requires_grad for p in model.parameters())
    model = peft.get_peft_model(model, lora())
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # The same as for peft's own quantized layers: adapters in float32 under a model in bfloat16.
    assert all(p.dtype == torch.float32 for p in trainable.values())
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    model.train()
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(p.grad is not None for p in trainable.values())
    after = {k.replace("base_layer.", ""): v for k, v in packed(model).items()}
    assert_same({k.removeprefix("base_model.model."): v for k, v in after.items()}, before)


def test_training_needs_the_mark_of_a_quantized_model(quantized):
    # Without hqq_quantized peft casts every float16 parameter, and our scales are of that type.
    del quantized.hqq_quantized
    model = peft.prepare_model_for_kbit_training(quantized)
    assert model.model.layers[0].mlp.up_proj.scale.dtype == torch.float32


def test_finetuning_repairs_a_2_bit_model(repository):
    """A short run of examples/lora_finetune.py."""
    sys.path.insert(0, str(repository / "examples"))
    try:
        import lora_finetune as example
    finally:
        sys.path.pop(0)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    folder = repository / "examples" / "tiny-llama"
    text = (repository / "examples" / "text" / "valid.txt").read_text(encoding="utf-8")[:60000]
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    train, held_out = ids[:-4096], ids[-4096:]
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = quantize(copy.deepcopy(dense), nbits=2)
    goal, before = example.perplexity(dense, held_out), example.perplexity(model, held_out)
    model = peft.get_peft_model(model, lora(r=8))
    losses = example.finetune(model, train, 30, 4, 64, 3e-3, teacher=dense)
    after = example.perplexity(model, held_out)
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert goal < after < before
    assert before - after > 0.1 * (before - goal)
