"""The experts function of Transformers for quantized experts: only experts that tokens are routed to are read."""

from __future__ import annotations

import torch

from ..nn.experts import HqqExperts

EXPERTS_FUNCTION = "hqq_cpp"


def experts_forward(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Runs a module of experts whose parameters are HqqExperts, or dense.

    Args:
        hidden_states: [tokens, hidden].
        top_k_index: [tokens, k]: the experts of each token; numbers >= num_experts are ignored.
        top_k_weights: [tokens, k].

    Returns:
        [tokens, hidden].
    """
    experts = top_k_index.reshape(-1)
    order = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts, minlength=self.num_experts)[: self.num_experts].tolist()
    tokens = order // top_k_index.shape[-1]
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    outputs = hidden_states.new_zeros(experts.numel(), hidden_states.shape[-1])
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows = order[start : start + count]
        x = hidden_states[tokens[start : start + count]]
        start += count
        x = _project(self, up_name, x, expert)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        x = _project(self, "down_proj", x, expert)
        if getattr(self, "has_post_expert_norm", False):
            x = self.post_expert_norm(x)
        outputs[rows] = x.to(outputs.dtype)
    weighted = outputs * top_k_weights.reshape(-1, 1).to(outputs.dtype)
    return weighted.view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)


def _project(module: torch.nn.Module, name: str, x: torch.Tensor, expert: int) -> torch.Tensor:
    weight = getattr(module, name)
    bias = getattr(module, name + "_bias")[expert] if module.has_bias else None
    if isinstance(weight, HqqExperts) and not module.is_transposed:
        return weight.linear(x, expert, bias)
    dense = weight[expert].to(x.dtype)
    return torch.nn.functional.linear(x, dense.t() if module.is_transposed else dense, bias)
