"""Importance of fused experts: every expert's own, blended with that of all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..find.layers import is_experts

# Tokens that the mean over all experts counts for. The mean of n squares of a normal variable has
# the relative variance 2 / n, and the mean squares of experts differ from their common mean by a
# relative variance v; the estimate with the least expected error gives the common mean the weight
# of 2 / v tokens. v = 1/8 is a deviation of 35 % between experts.
BLEND_TOKENS = 16


def blend(totals: torch.Tensor, counts: torch.Tensor, k: float = BLEND_TOKENS) -> torch.Tensor:
    """Mean squares of experts, drawn to the common mean: (n_e own_e + k mean) / (n_e + k).

    Args:
        totals: Sums of squares [experts, in].
        counts: int64 [experts]: tokens in every sum, n_e.
        k: How many tokens the common mean counts for.

    Returns:
        [experts, in]; zeros if there were no tokens at all.
    """
    mean = totals.sum(0) / counts.sum().clamp(min=1)
    return (totals + k * mean) / (counts.to(totals.dtype) + k)[:, None]


@contextmanager
def recorded_experts(model: nn.Module, recorder: Any) -> Iterator[None]:
    """Inside, experts of Transformers tell `recorder` what every expert got.

    Experts that Transformers' experts interface does not run are left alone.
    """
    names = {module: name for name, module in model.named_modules() if _can_run(module)}
    if not names or "transformers" not in sys.modules:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def function(module, hidden_states, top_k_index, top_k_weights):
        if module not in names:  # of another model that shares the config
            return _run(module, hidden_states, top_k_index, top_k_weights, lambda *_: None)
        keep = _kept_tokens(recorder.mask, hidden_states)

        def record(key, expert, rows, tokens):
            rows = rows if keep is None else rows[keep[tokens]]
            if rows.shape[0] > 0:
                name = f"{names[module]}.{key}" if names[module] else key
                recorder.add_experts(name, expert, module.num_experts, rows)

        return _run(module, hidden_states, top_k_index, top_k_weights, record)

    # A name of its own: collections in other threads have theirs.
    key = f"hqq_cpp_importance_{id(recorder)}"
    configs = {id(module.config): module.config for module in names}.values()
    before = [(config, config._experts_implementation_internal) for config in configs]
    ALL_EXPERTS_FUNCTIONS[key] = function
    try:
        for config, _ in before:
            config._experts_implementation_internal = key
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation_internal = implementation
        del ALL_EXPERTS_FUNCTIONS[key]


def _can_run(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return is_experts(module) and hasattr(config, "_experts_implementation_internal")


def _kept_tokens(mask: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor | None:
    if mask is None or mask.numel() != hidden_states.shape[0]:
        return None
    return mask.flatten().to(hidden_states.device)


def _run(module, hidden_states, top_k_index, top_k_weights, record):
    """Experts one by one; record(parameter, expert, rows, tokens) sees what goes into a matrix."""
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    result = torch.zeros_like(hidden_states, dtype=torch.float32)
    hit = [e for e in top_k_index.unique().tolist() if 0 <= e < module.num_experts]
    for expert in hit:
        tokens, places = torch.where(top_k_index == expert)
        x = hidden_states[tokens]
        record(up_name, expert, x, tokens)
        x = _linear(module, up_name, expert, x)
        x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
        record("down_proj", expert, x, tokens)
        x = _linear(module, "down_proj", expert, x)
        if getattr(module, "has_post_expert_norm", False):
            x = module.post_expert_norm(x)
        weights = top_k_weights[tokens, places, None]
        result.index_add_(0, tokens, (x * weights).to(result.dtype))
    return result.to(hidden_states.dtype)


def _linear(module: nn.Module, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)[expert]  # HqqExperts dequantizes it
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return nn.functional.linear(x, weight.t() if module.is_transposed else weight, bias)
