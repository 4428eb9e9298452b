"""resize_token_embeddings of models whose embeddings are quantized: refused before anything
changes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..nn.module import QuantizedModule

# Models that override the first call the others before it.
_METHODS = ("resize_token_embeddings", "_get_resized_embeddings", "_get_resized_lm_head")


def register() -> None:
    """Has Transformers ask first. Doing it again changes nothing."""
    for name in _METHODS:
        method = getattr(PreTrainedModel, name)
        if not hasattr(method, "_asks_hqq_cpp"):
            setattr(PreTrainedModel, name, _asking(method))


def _asking(method: Callable) -> Callable:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def asking(self, *args: Any, **kwargs: Any):
        given = signature.bind(self, *args, **kwargs).arguments
        _refuse_quantized(self, given.get("new_num_tokens"), given.get("pad_to_multiple_of"))
        return method(self, *args, **kwargs)

    asking._asks_hqq_cpp = True
    return asking


def _refuse_quantized(model: nn.Module, tokens: int | None, multiple: int | None) -> None:
    """Refuses another number of tokens where input or output embeddings are quantized."""
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            module = get()
        except (NotImplementedError, AttributeError):  # a model without
            continue
        if not isinstance(module, QuantizedModule):
            continue
        rows = wanted = module.dense_shape[0]
        if tokens is not None:
            wanted = tokens
        if isinstance(multiple, int) and multiple > 0:
            wanted = -(-wanted // multiple) * multiple
        if wanted != rows:
            name = next(name for name, other in model.named_modules() if other is module)
            raise ValueError(
                f"[resize_token_embeddings] {name} is quantized to {module.nbits:g} bits and has "
                f"{rows} rows, which cannot become {wanted}: leave it dense when you quantize "
                "(skip_modules, or no rule in dynamic_config), or resize the dense model, save it "
                "and quantize that"
            )
