"""collect_importance_folder: importance of a checkpoint folder, one layer in memory at a time."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import _core
from ..checkpoints import load_safetensors
from ..find.kinds import kind_of
from ..source_check import check_dense_source
from .collect import Recorder, check_arguments, eval_mode, logits_layer, save_importance
from .inputs import run_random


def collect_importance_folder(
    model_dir: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    tokens: Any = "random",
    n: int = 512,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """collect_importance for a folder of save_pretrained, without loading the whole model.

    The model is built without memory. What lies outside of the lists of decoder (or encoder) layers
    is loaded; a layer of the lists is loaded when it runs, with all windows of tokens at once, and
    dropped afterwards. Fused experts are put together as Transformers does when it loads them. A
    model without such a list is loaded whole.

    Names are those of the checkpoint's tensors, without .weight: experts that a file stores one by
    one ("experts.3.down_proj") get a vector each, and quantize_checkpoint takes the result. Tensors
    that are the transpose of their layer's weight (Conv1D of GPT-2) are left out, as
    quantize_checkpoint does.

    Args:
        model_dir: Folder with config.json and safetensors files.
        out: The safetensors file to write (docs/format.md), or None.
        tokens: 'random', or token ids [T] or [B, T].
        n: How many random tokens.
        seed: Of the random tokens.

    Returns:
        What the file holds: name -> float32 [in_features], or [experts, in_features].

    Raises:
        ValueError: If the folder holds a quantized model, lacks weights, or as collect_importance.
        FileNotFoundError: If there are no config.json and safetensors files.

    Example:
        >>> importance = hqq_cpp.collect_importance_folder(model, None, n=128)
        >>> importance["model.layers.0.mlp.down_proj"].shape
        torch.Size([640])
    """
    check_arguments(tokens, n)
    folder = LayeredCheckpoint(Path(model_dir))
    model = folder.model
    recorder = Recorder(model, logits_layer(model))
    with torch.no_grad(), eval_mode(model), folder.streamed_layers(), recorder:
        run_random(model, tokens, n, seed, one_batch=True)
    result = folder.checkpoint_names(recorder.result())
    if not result:
        raise ValueError(f"[importance] no layer of {str(model_dir)!r} saw any input")
    if out is not None:
        save_importance(out, result)
    return result


class LayeredCheckpoint:
    """A model on device meta, and the files that its weights are in.

    Attributes:
        model: The model; all but the layers of its lists is loaded.
        layers: Names of the modules that are loaded only while they run.
    """

    def __init__(self, folder: Path):
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._folder = folder
        self._files = _weight_files(folder)
        check_dense_source(self._files, "importance")
        self.model, self._dtype = _empty_model(folder)
        self._mapping = get_model_conversion_mapping(self.model)
        self._targets = self._read_targets()
        self.layers = self._find_layers()
        # Layer ("" for all the rest) -> its tensors in the files.
        self._keys: dict[str, list[str]] = defaultdict(list)
        for key, (target, _) in self._targets.items():
            self._keys[self._layer_of(target)].append(key)
        self._load_rest()

    def streamed_layers(self) -> ExitStack:
        """A context in which layers load their weights before they run, and drop them after."""
        stack = ExitStack()
        for name in self.layers:
            module = self.model.get_submodule(name)
            empty = _tensors(module)
            # First of the hooks before, and called even if forward fails.
            before = module.register_forward_pre_hook(self._loader(name), prepend=True)
            after = module.register_forward_hook(_dropper(module, empty), always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        return stack

    def _loader(self, name: str):
        def load(module: nn.Module, args: Any) -> None:
            self._load(self._keys[name])
            missing = [key for key, t in _tensors(module).items() if t.is_meta]
            if missing:
                raise ValueError(
                    f"[importance] {str(self._folder)!r} has no weights for {name}.{missing[0]}"
                    f"{f' and {len(missing) - 1} more of that layer' if missing[1:] else ''}"
                )

        return load

    def checkpoint_names(self, importance: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Renames the layers of the model to those of the files, one vector per stored matrix."""
        result = {}
        seen: dict[tuple[str, str], int] = defaultdict(int)
        for key, (target, pattern) in self._targets.items():
            vector = importance.get(target.removesuffix(".weight"))
            number = seen[target, pattern]
            seen[target, pattern] += 1
            if vector is None:
                continue
            shape = self._shapes[key]
            if vector.ndim == 2 and len(shape) == 2:
                vector = vector[number]  # files have the experts in this order
            if len(shape) >= 2 and self._fits(target, shape, vector):
                result[key.removesuffix(".weight")] = vector.clone()
        return result

    def _fits(self, target: str, shape: tuple[int, ...], vector: torch.Tensor) -> bool:
        module = self.model.get_submodule(target.rpartition(".")[0])
        kind = kind_of(module)
        is_conv1d = kind is not None and kind.name == "conv1d"
        transposed = is_conv1d or getattr(module, "is_transposed", False)
        return not transposed and shape[1 if len(shape) == 4 else -1] == vector.shape[-1]

    def _read_targets(self) -> dict[str, tuple[str, str]]:
        """Tensor in the files -> the parameter that it goes into, and the pattern that says so."""
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        wanted = self.model.state_dict()
        prefix = self.model.base_model_prefix
        self._shapes, self._file_of = _headers(self._files)
        targets = {}
        # Experts are numbered in this order, as the loader stacks them.
        for key in sorted(self._shapes, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
            if target not in wanted and key in wanted:
                target, pattern = key, None
            targets[key] = (target, pattern or "")
        return targets

    def _find_layers(self) -> list[str]:
        names: list[str] = []
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        shared = {*tied, *tied.values()}
        targets = {target for target, _ in self._targets.values()}
        for name, module in self.model.named_modules():
            inside = any(name.startswith(f"{other}.") for other in names)
            if inside or not isinstance(module, nn.ModuleList) or len(module) < 2:
                continue
            layers = [f"{name}.{i}" for i in range(len(module))]
            if not all(_is_layer(self.model, layer) for layer in module):
                continue
            # Weights that are somewhere else as well, or initialised, are no layer's own.
            own = [f"{l}.{key}" for l, m in zip(layers, module) for key in _tensors(m)]
            if shared.isdisjoint(own) and targets.issuperset(own):
                names += layers
        return names

    def _layer_of(self, target: str) -> str:
        for name in self._prefixes(target):
            if name in self._layer_set:
                return name
        return ""

    @staticmethod
    def _prefixes(target: str) -> list[str]:
        parts = target.split(".")
        return [".".join(parts[:i]) for i in range(1, len(parts))]

    @property
    def _layer_set(self) -> set[str]:
        if not hasattr(self, "_cached_layers"):
            self._cached_layers = set(self.layers)
        return self._cached_layers

    def _load(self, keys: list[str]) -> Any:
        """Puts tensors of the files into the model, with Transformers' conversions."""
        from safetensors import safe_open
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        settings = LoadStateDictConfig(
            dtype=self._dtype,
            dtype_plan=self.model._get_dtype_plan(self._dtype),
            weight_mapping=self._mapping,
        )
        with ExitStack() as stack, _quiet():
            files = {
                path: stack.enter_context(safe_open(path, framework="pt"))
                for path in {self._file_of[key] for key in keys}
            }
            slices = {key: files[self._file_of[key]].get_slice(key) for key in keys}
            info, _ = convert_and_load_state_dict_in_model(self.model, slices, settings)
        problems = [*map(str, info.mismatched_keys), *map(str, info.conversion_errors.values())]
        if problems:
            raise ValueError(
                f"[importance] weights of {str(self._folder)!r} do not fit the model of its "
                f"config.json: {problems[0]}"
            )
        return info

    def _load_rest(self) -> None:
        model = self.model
        info = self._load(self._keys[""])
        outside = {key for key in info.missing_keys if not self._layer_of(key)}
        info.missing_keys.clear()
        info.missing_keys.update(outside)
        model.mark_tied_weights_as_initialized(info)
        # Buffers that no file has are computed in the initialisation; layers have nothing to
        # initialise.
        for name in self.layers:
            for tensor in _tensors(model.get_submodule(name)).values():
                tensor._is_hf_initialized = True
        model._move_missing_keys_from_meta_to_device(outside, None, None, None)
        model._initialize_missing_keys(False)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        weights = [key for key in info.missing_keys if key in dict(model.named_parameters())]
        if weights:
            raise ValueError(
                f"[importance] {str(self._folder)!r} has no weights for {weights[0]}"
                f"{f' and {len(weights) - 1} more' if weights[1:] else ''}"
            )


def _empty_model(folder: Path) -> tuple[Any, torch.dtype]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    names = getattr(config, "architectures", None) or []
    cls = getattr(transformers, names[0], None) if names else None
    cls = transformers.AutoModel if cls is None else cls
    dtype = getattr(config, "dtype", None) or torch.float32
    # A CPU may lack float16 arithmetic, and 65504 squared is near.
    dtype = torch.float32 if dtype == torch.float16 else dtype
    with torch.device("meta"):
        make = cls.from_config if cls is transformers.AutoModel else cls._from_config
        return make(config, dtype=dtype), dtype


def _weight_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"[importance] {str(folder)!r} has no config.json")
    if index.is_file():
        names = sorted(set(_core.read_json_file(index)["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"[importance] {str(folder)!r} has no {name}")
    return [str(folder / name) for name in names]


def _headers(files: list[str]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    shapes, file_of = {}, {}
    for path in files:
        # A map of the file: nothing is read but the header.
        for key, tensor in load_safetensors(path).items():
            shapes[key], file_of[key] = tuple(tensor.shape), path
    return shapes, file_of


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a state_dict, not detached."""
    return dict(module.state_dict(keep_vars=True))


def _dropper(module: nn.Module, empty: dict[str, torch.Tensor]) -> Callable[..., None]:
    def drop(*arguments: Any) -> None:
        for name, tensor in empty.items():
            path, _, last = name.rpartition(".")
            setattr(module.get_submodule(path), last, tensor)

    return drop


def _is_layer(model: nn.Module, module: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    whole = getattr(model, "_no_split_modules", None) or ()
    return isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in whole


class _quiet:
    """No progress bar per layer."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *exception: Any) -> None:
        from transformers.utils import logging

        if self._shown:
            logging.enable_progress_bar()
