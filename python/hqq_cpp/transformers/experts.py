"""The experts function of Transformers for quantized experts: only experts that tokens are routed
to are read."""

from __future__ import annotations

import torch
from transformers.utils import logging

from ..backends.common import expert_rows
from ..find.layers import is_experts
from ..nn.experts import HqqExperts

logger = logging.get_logger("transformers.hqq_cpp")

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
    # The last place counts what is routed to no expert here; sorting put it at the end.
    counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=experts.device)
    counts.scatter_add_(0, experts.clamp(max=self.num_experts), torch.ones_like(experts))
    counts = counts[:-1]
    x = hidden_states[order // top_k_index.shape[-1]]
    x = _project(self, "gate_up_proj" if self.has_gate else "up_proj", x, counts)
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = _project(self, "down_proj", x, counts)
    if getattr(self, "has_post_expert_norm", False):
        x = self.post_expert_norm(x)
    outputs = torch.empty_like(x).index_copy(0, order, x)
    weighted = outputs * top_k_weights.reshape(-1, 1)
    return weighted.view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)


def _project(
    module: torch.nn.Module, name: str, x: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    weight = getattr(module, name)
    bias = getattr(module, name + "_bias") if module.has_bias else None
    if isinstance(weight, HqqExperts):
        # A call, not a method: hooks that bring offloaded tensors run on calls.
        return weight(x, counts, bias, transposed=module.is_transposed)
    # A projection that the settings leave dense.
    y = x.new_zeros(x.shape[0], weight.shape[2 if module.is_transposed else 1])
    for expert, rows in expert_rows(counts):
        matrix = weight[expert].t() if module.is_transposed else weight[expert]
        offset = None if bias is None else bias[expert]
        y[rows] = torch.nn.functional.linear(x[rows], matrix, offset)
    return y


def warn_of_dense_experts(model: torch.nn.Module) -> None:
    """Experts that no rule left out, in modules whose code cannot take a quantized weight."""
    stayed = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and ".experts." in f".{name}" and parameter.is_floating_point()
    ]

    def is_ours(name: str) -> bool:
        owner = model.get_submodule(name.rpartition(".")[0])
        return isinstance(owner, HqqExperts) or is_experts(owner)

    stayed = [(name, parameter) for name, parameter in stayed if not is_ours(name)]
    if stayed:
        share = sum(p.numel() for _, p in stayed) / sum(p.numel() for p in model.parameters())
        owner = type(model.get_submodule(stayed[0][0].rpartition(".")[0])).__name__
        logger.warning(
            f"[quantize] {len(stayed)} tensors of experts ({100 * share:.0f} % of the parameters) "
            f"stay dense: {owner} does not run through Transformers' experts interface"
        )
