"""resize_token_embeddings of models whose embeddings are quantized: refused before anything
changes."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..nn.base import QuantizedModule

# Models that override the first call the others before it.
_MARK = "_asks_hqq_cpp"
_METHODS = ("resize_token_embeddings", "_get_resized_embeddings", "_get_resized_lm_head")


def register() -> None:
    """Has Transformers ask first. Doing it again changes nothing."""
    for name in _METHODS:
        method = getattr(PreTrainedModel, name)
        if not hasattr(method, _MARK):
            setattr(PreTrainedModel, name, _asking(method))


def _asking(method: Callable) -> Callable:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def asking(self, *args: Any, **kwargs: Any):
        _refuse_quantized(self, signature.bind(self, *args, **kwargs).arguments)
        return method(self, *args, **kwargs)

    setattr(asking, _MARK, True)
    return asking


def _refuse_quantized(model: nn.Module, given: dict[str, Any]) -> None:
    """Refuses another number of tokens where input or output embeddings are quantized."""
    tokens, multiple = given.get("new_num_tokens"), given.get("pad_to_multiple_of")
    for module, dim in _embeddings(model, given):
        if not isinstance(module, QuantizedModule):
            continue
        rows = module.dense_shape[dim]
        wanted = rows if tokens is None else tokens
        if isinstance(multiple, int) and multiple > 0:
            wanted = -(-wanted // multiple) * multiple
        if wanted != rows:
            name = next(name for name, other in model.named_modules() if other is module)
            raise ValueError(
                f"[resize_token_embeddings] {name} is quantized to {module.nbits:g} bits for "
                f"{rows} tokens, which cannot become {wanted}: leave it dense when you quantize "
                "(skip_modules, or no rule in dynamic_config), or resize the dense model, save it "
                "and quantize that"
            )


def _embeddings(model: nn.Module, given: dict[str, Any]) -> Iterator[tuple[nn.Module, int]]:
    """The modules that would be resized, each with the dimension of its tokens."""
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        with contextlib.suppress(NotImplementedError, AttributeError):  # a model without
            yield get(), 0
    module = given.get("old_embeddings", given.get("old_lm_head"))
    yield module, 1 if given.get("transposed") else 0
