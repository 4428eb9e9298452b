"""Importance of experts: every expert's own, blended with that of all."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn

from hqq_cpp.importance.collect import collect_importance
from hqq_cpp.importance.experts import BLEND_TOKENS, blend

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def qwen(**settings):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **SMALL,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=2,
        head_dim=16,
        **settings,
    )
    return transformers.Qwen3MoeForCausalLM(config).eval()


def test_blend_by_hand():
    totals = torch.tensor([[30.0, 0.0], [10.0, 8.0], [0.0, 0.0]])
    counts = torch.tensor([10, 10, 0])
    result = blend(totals, counts, k=2)
    # The common mean is [2, 0.4].
    expected = [[34 / 12, 0.8 / 12], [14 / 12, 8.8 / 12], [2, 0.4]]
    torch.testing.assert_close(result, torch.tensor(expected))
    assert blend(totals * 0, counts * 0).tolist() == [[0, 0]] * 3


def by_hand(model, ids, mask=None):
    """Sums and counts of the only layer, from the router's own choice and dense experts."""
    block = model.model.layers[0].mlp
    inputs, routes = [], []
    handles = [
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
        block.experts.register_forward_pre_hook(lambda _, args: routes.append(args[1])),
    ]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    x = inputs[0].reshape(-1, 32)
    keep = torch.ones(len(x), dtype=torch.bool) if mask is None else mask.flatten().bool()
    ups, downs, counts = [], [], []
    for e in range(6):
        rows = x[(routes[0] == e).any(1) & keep]
        gate, up = (rows @ block.experts.gate_up_proj[e].T).chunk(2, -1)
        middle = nn.functional.silu(gate) * up
        ups.append(rows.square().sum(0))
        downs.append(middle.square().sum(0))
        counts.append(len(rows))
    counts = torch.tensor(counts)
    return [blend(torch.stack(sums).double(), counts).float() for sums in (ups, downs)], counts


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_see_the_tokens_routed_to_them(implementation):
    model = qwen(experts_implementation=implementation)
    before = model.config._experts_implementation
    ids = torch.randint(100, (2, 11))
    (up, down), counts = by_hand(model, ids)
    assert counts.sum() == 2 * 22 and counts.min() < BLEND_TOKENS
    result = collect_importance(model, batches=[ids])
    name = "model.layers.0.mlp.experts."
    torch.testing.assert_close(result[name + "gate_up_proj"], up.detach())
    torch.testing.assert_close(result[name + "down_proj"], down.detach())
    assert model.config._experts_implementation == before


def test_padding_does_not_count_for_experts():
    model = qwen()
    ids = torch.randint(100, (2, 11))
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, 3:] = 0
    (up, down), counts = by_hand(model, ids, mask)
    assert counts.sum() == 2 * 14
    result = collect_importance(model, batches=[{"input_ids": ids, "attention_mask": mask}])
    name = "model.layers.0.mlp.experts."
    torch.testing.assert_close(result[name + "gate_up_proj"], up.detach())
    torch.testing.assert_close(result[name + "down_proj"], down.detach())


def test_outputs_are_those_of_the_model():
    model = qwen()
    ids = torch.randint(100, (1, 30))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    got = []
    collect_importance(model, batches=[lambda model: got.append(model(input_ids=ids).logits)])
    torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-5)


def test_the_implementation_is_restored_after_an_error():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = qwen()
    before, functions = model.config._experts_implementation, set(ALL_EXPERTS_FUNCTIONS)
    model.model.layers[0].mlp.experts.gate_up_proj.data[:] = float("nan")
    with pytest.raises(ValueError, match=r"\[model.layers.0.mlp.experts.down_proj\] .* NaN or Inf"):
        collect_importance(model, n=40)

    def broken(model):
        assert model.config._experts_implementation != before
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        collect_importance(model, batches=broken)
    assert model.config._experts_implementation == before
    assert set(ALL_EXPERTS_FUNCTIONS) == functions


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "DeepseekV3"])
def test_other_families(name):
    torch.manual_seed(0)
    settings = {
        "Mixtral": {"num_local_experts": 4},
        "GptOss": {"num_local_experts": 4, "head_dim": 16},
        "DeepseekV3": {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "moe_intermediate_size": 48,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
    }[name]
    config = getattr(transformers, f"{name}Config")(**SMALL, **settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    result = collect_importance(model, n=60)
    assert result["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 32)
    assert result["model.layers.0.mlp.experts.down_proj"].shape == (4, 48)


def test_experts_that_are_modules_are_blended_too():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({"w": nn.Linear(2, 2)}) for _ in range(3))

        def forward(self, x):
            for expert, rows in zip(self.experts, (x[:6], x[:0], x[6:])):
                expert["w"](rows)

    x = torch.cat([torch.full((6, 2), 1.0), torch.full((2, 2), 3.0)])
    result = collect_importance(Model(), batches=[x])
    mean = (6 + 2 * 9) / 8
    expected = [(6 + BLEND_TOKENS * mean) / (6 + BLEND_TOKENS), mean]
    expected += [(18 + BLEND_TOKENS * mean) / (2 + BLEND_TOKENS)]
    for e in range(3):
        torch.testing.assert_close(result[f"experts.{e}.w"], torch.full((2,), expected[e]))
