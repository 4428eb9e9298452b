"""collect_importance: the mean square of every linear layer's input, from one forward pass."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..checkpoints import load_safetensors, save_safetensors
from ..find.kinds import kind_of
from ..find.layers import find_roles, places_of
from ..nn.conv import HqqPointwiseConv2d
from ..nn.linear import HqqLinear
from .experts import blend, recorded_experts
from .inputs import run_random

# Experts that are modules of their own: "model.layers.0.mlp.experts.3.down_proj".
_EXPERT_NAME = re.compile(r"^(.*\bexperts)\.(\d+)\.(.+)$")
_METADATA = {"format": "pt", "hqq_cpp.kind": "importance"}


class Recorder:
    """Adds up the squares of the inputs of linear layers while it is entered.

    Args:
        model: Any torch module.
        head: A layer whose input is recorded whole, but which then works on one position only: the
            logits of random tokens are of no use, and with a large vocabulary they are the largest
            tensor.

    Attributes:
        mask: bool [B, T]: positions of the running batch that count, or None for all.
    """

    def __init__(self, model: nn.Module, head: nn.Module | None = None):
        self.mask: torch.Tensor | None = None
        self._model = model
        self._head = head
        self._names: list[str] = []
        # Layer -> [in] or [experts, in], and the rows that are in it: [] or [experts].
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._last: tuple[Any, ...] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Recorder:
        roles = find_roles(places_of(self._model))
        for name, module in self._model.named_modules():
            channels_dim = input_channels_dim(module)
            # Routers are never quantized.
            is_router = roles.role(f"{name}.weight" if name else "weight") == "router"
            if channels_dim is not None and not is_router:
                self._names.append(name)
                hook = self._hook(name, channels_dim)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                self._stack.callback(handle.remove)
        self._stack.enter_context(recorded_experts(self._model, self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._last = None
        self._stack.close()

    def _hook(self, name: str, channels_dim: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if not isinstance(x, torch.Tensor) or x.numel() == 0:
                return None
            self._add(name, *self._square_sum(x, channels_dim))
            if module is self._head and args and x.ndim == 3:
                return (x[:, -1:], *args[1:]), kwargs
            return None

        return hook

    def _square_sum(self, x: torch.Tensor, channels_dim: int) -> tuple[torch.Tensor, int]:
        # q, k and v (gate and up) read one tensor: its sum is taken once. In inference mode tensors
        # have no version, so a change in between could not be seen.
        version = None if x.is_inference() else x._version
        key = (version, channels_dim)
        if version is not None and self._last is not None:
            last, last_key, result = self._last
            if last() is x and last_key == key:
                return result
        rows = x.detach().movedim(channels_dim, -1)
        mask = self.mask
        if mask is not None and rows.shape[:-1] == mask.shape:
            rows = rows[mask.to(rows.device)]
        elif mask is not None and rows.shape[:-1] == (mask.numel(),):
            rows = rows[mask.flatten().to(rows.device)]
        rows = rows.reshape(-1, rows.shape[-1])
        result = square_sum(rows), rows.shape[0]
        self._last = (weakref.ref(x), key, result)
        return result

    def _add(self, name: str, total: torch.Tensor, count: int) -> None:
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(total, dtype=accumulator_dtype(total.device))
            self._counts[name] = torch.zeros((), dtype=torch.int64)
        self._sums[name] += total.to(self._sums[name].device)
        self._counts[name] += count

    def add_experts(self, name: str, expert: int, experts: int, rows: torch.Tensor) -> None:
        """Adds the rows [n, in] that one of `experts` experts of a layer got."""
        if name not in self._sums:
            self._sums[name] = torch.zeros(
                experts, rows.shape[-1], dtype=accumulator_dtype(rows.device), device=rows.device
            )
            self._counts[name] = torch.zeros(experts, dtype=torch.int64)
        self._sums[name][expert] += square_sum(rows).to(self._sums[name].device)
        self._counts[name][expert] += rows.shape[0]

    def result(self) -> dict[str, torch.Tensor]:
        """Layer -> float32 [in] or [experts, in] on the CPU, but for layers that saw only zeros.

        Raises:
            ValueError: If an input was NaN or Inf; it names the first such layer of the pass.
        """
        means: dict[str, torch.Tensor] = {}
        for name, total in self._sums.items():
            total, count = total.double().cpu(), self._counts[name]
            _check_finite(name, total)
            if count.ndim == 1:
                means[name] = blend(total, count)
            elif count > 0:
                means[name] = total / count
        means |= self._single_experts()
        return {
            name: mean.float().contiguous() for name, mean in means.items() if mean.any(-1).all()
        }

    def _single_experts(self) -> dict[str, torch.Tensor]:
        """Experts that are linear layers of their own are blended as fused ones are."""
        groups: dict[tuple[str, str], list[str]] = {}
        for name in self._names:
            if match := _EXPERT_NAME.match(name):
                groups.setdefault((match[1], match[3]), []).append(name)
        means: dict[str, torch.Tensor] = {}
        for names in groups.values():
            seen = [name for name in names if name in self._sums]
            if not seen or len({self._sums[name].shape for name in seen}) > 1:
                continue
            nothing = torch.zeros_like(self._sums[seen[0]]).double().cpu()
            totals = [self._sums.get(name, nothing).double().cpu() for name in names]
            counts = [int(self._counts.get(name, 0)) for name in names]
            means |= zip(names, blend(torch.stack(totals), torch.tensor(counts)))
        return means


def collect_importance(
    model: nn.Module,
    tokens: Any = "random",
    n: int = 512,
    seed: int = 0,
    *,
    batches: Any = None,
    save: str | os.PathLike[str] | None = None,
) -> dict[str, torch.Tensor]:
    """The mean square of every linear layer's input: the importance that quantization takes.

    One forward pass without gradients, in eval mode, which is restored. By default over random
    input, which needs no data: uniformly random token ids; normal noise as pixels, log-mel
    spectrogram or waveform for models that take these. Towers of multimodal models run on noise of
    their own.

    Layers are those that quantize_model_ takes: nn.Linear, Transformers' Conv1D, convolutions 1x1,
    and fused experts of Transformers, where every expert gets the mean over the tokens routed to
    it, drawn to that of all experts when these are few. Works on any device, and with accelerate's
    offload.

    Args:
        model: A model of Transformers, or a module that contains one; with `batches` any torch
            module.
        tokens: 'random', or the token ids to run: an integer tensor [T] or [B, T].
        n: How many random tokens, in windows of at most 512. 128 are enough for most models, not
            for experts.
        seed: Of the random input. It is the same on every device.
        batches: The input, in place of random one: an iterable of tensors (the main input), tuples
            (positional arguments), dicts (keyword arguments), or callables, which get the model. Or
            one callable that gets the model. Positions that a 2-D attention_mask of a dict leaves
            out do not count.
        save: Where to write the result as a safetensors file (docs/format.md).

    Returns:
        Name of the layer (without .weight) -> float32 [in_features], on the CPU; fused experts:
        name of the parameter -> [experts, in_features]. Layers that saw no input, or nothing but
        zeros, are left out.

    Raises:
        ValueError: If the model runs on no input that is known here and there are no `batches`, if
            an input of a layer was NaN or Inf, or if no layer saw any input.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
        >>> hqq_cpp.collect_importance(model, batches=[torch.tensor([[1.0, 2.0], [3.0, 0.0]])])
        {'0': tensor([5., 2.])}
    """
    check_arguments(tokens, n)
    _check_not_meta(model)
    head = None
    if batches is None:
        head = logits_layer(model)
    elif not isinstance(tokens, str):
        raise ValueError("[importance] there are both tokens and batches; give one of them")
    with torch.no_grad(), eval_mode(model), Recorder(model, head) as recorder:
        if batches is None:
            run_random(model, tokens, n, seed)
        else:
            _run_batches(model, batches, recorder)
    result = _without_tied(model, recorder.result())
    if save is not None:
        save_importance(save, result)
    return result


def _without_tied(model: nn.Module, importance: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that are shared with an embedding are never quantized."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    result = {name: v for name, v in importance.items() if f"{name}.weight" not in tied}
    if not result:
        raise ValueError(
            f"[importance] no linear layer of {type(model).__name__} saw any input (but zeros); "
            "give batches that reach its layers"
        )
    return result


def save_importance(path: str | os.PathLike[str], importance: Mapping[str, torch.Tensor]) -> None:
    """Writes the file that quantize_checkpoint and a config take (docs/format.md).

    Args:
        path: The safetensors file.
        importance: Layer -> [in_features] or [experts, in_features].
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in importance.items()}
    save_safetensors(path, tensors, _METADATA)


def load_importance(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Reads such a file.

    Returns:
        Layer -> [in_features] or [experts, in_features], copies of what the file holds.
    """
    return {
        name: torch.from_dlpack(tensor).clone() for name, tensor in load_safetensors(path).items()
    }


def check_arguments(tokens: Any, n: int) -> None:
    """Raises ValueError unless tokens and n are what collect_importance takes."""
    if isinstance(tokens, str) and tokens != "random":
        raise ValueError(
            f"[importance] tokens {tokens!r} must be 'random' or a tensor of token ids"
        )
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"[importance] n {n!r} must be a number of tokens, 1 or more")


def square_sum(rows: torch.Tensor) -> torch.Tensor:
    """Sum of squares over the rows of [n, in], in float32.

    Of the ways torch has, this is the fastest on a CPU for both bfloat16 and float32 (vector_norm
    over the first dimension takes 5 to 10 times as long).
    """
    return rows.float().square().sum(0)


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it, so that millions of batches add up."""
    return torch.float32 if device.type == "mps" else torch.float64


def input_channels_dim(module: nn.Module) -> int | None:
    """The dimension of its input that a linear layer contracts; None for other modules."""
    if isinstance(module, HqqPointwiseConv2d):
        return -3
    if isinstance(module, HqqLinear):
        return -1
    kind = kind_of(module)
    if kind is None or kind.obstacle:
        return None
    return {"linear": -1, "conv1d": -1, "conv2d": -3}.get(kind.name)


def logits_layer(model: nn.Module) -> nn.Module | None:
    """The layer that makes a language model's logits, if the model names one."""
    if not type(model).__name__.endswith(("ForCausalLM", "ForConditionalGeneration")):
        return None
    return getattr(model, "get_output_embeddings", lambda: None)()


@contextmanager
def eval_mode(model: nn.Module):
    """Eval mode inside; every module has its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_finite(name: str, total: torch.Tensor) -> None:
    bad = int((~torch.isfinite(total)).sum())
    if bad:
        raise ValueError(
            f"[{name}] {bad} of {total.numel()} sums of squares of its input are NaN or Inf; the "
            "weights before "
            f"it may be broken or uninitialised, or the dtype too small (try torch.float32)"
        )


def _check_not_meta(model: nn.Module) -> None:
    parameters = list(model.parameters())
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    if parameters and all(p.is_meta for p in parameters) and not offloaded:
        raise ValueError(
            f"[importance] all weights of {type(model).__name__} are on device meta; load the "
            "model first, or use "
            f"collect_importance_folder"
        )


def _run_batches(model: nn.Module, batches: Any, recorder: Recorder) -> None:
    if callable(batches):
        batches(model)
        return
    if isinstance(batches, (torch.Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise ValueError(
            f"[importance] batches is of type {type(batches).__name__}; it must be an iterable of "
            "tensors, tuples, dicts "
            f"or callables: [batch]"
        )
    for batch in batches:
        _run_batch(model, batch, recorder)


def _run_batch(model: nn.Module, batch: Any, recorder: Recorder) -> None:
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    if isinstance(batch, Mapping):
        arguments = {key: move(value) for key, value in batch.items()}
        mask = arguments.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not mask.bool().all():
            recorder.mask = mask.bool()
        try:
            model(**arguments)
        finally:
            recorder.mask = None
    elif isinstance(batch, torch.Tensor):
        model(move(batch))
    elif isinstance(batch, (tuple, list)):
        model(*map(move, batch))
    elif callable(batch):
        batch(model)
    else:
        raise ValueError(
            f"[importance] a batch is of type {type(batch).__name__}; it must be a tensor, a "
            "tuple, a dict or "
            f"callable"
        )
