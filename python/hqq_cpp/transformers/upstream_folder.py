"""Folders of AutoHQQHFModel.save_quantized (qmodel.pt) and save_to_safetensors of upstream hqq."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

from ..errors import FormatError
from ..models import upstream
from . import config as _config


class UpstreamSource(_config.HqqQuantizationConfig):
    """Stands in for the quantization_config that such a folder lacks."""

    def __init__(self, tensors: dict[str, torch.Tensor] | None):
        super().__init__()
        self.quant_method = "hqq"
        self.tensors = tensors

    def __deepcopy__(self, memo: dict) -> UpstreamSource:
        return self


def load_upstream(
    folder: str | os.PathLike,
    *,
    cache_dir: str | os.PathLike | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    model_class: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Loads a folder that upstream hqq wrote: AutoHQQHFModel.save_quantized or save_to_safetensors.

    Nothing but tensors and plain values is unpickled. save_pretrained() of the result writes format
    1, which from_pretrained() reads.

    Args:
        folder: With config.json and qmodel.pt, or safetensors files. Or the name of a repository
            on the hub: "mobiuslabsgmbh/Llama-2-7b-chat-hf_1bitgs8_hqq". What the local cache has is
            not downloaded again; with HF_HUB_OFFLINE=1 nothing is.
        cache_dir: Folder of the local cache; None: the hub's own.
        revision: Branch, tag or commit of the repository; None: its main branch.
        dtype: Of what is not quantized; None: what config.json says.
        device_map: As from_pretrained() takes it.
        model_class: A model class of Transformers; None: the architecture that config.json names,
            or the causal one of its model_type if it names none.
        **kwargs: For its from_pretrained().

    Raises:
        FormatError: If the files hold anything hqq does not write.
        ValueError: If the folder has no such file, the model class is unknown, or the hub's cache
            has no such repository and it cannot be downloaded.
    """
    folder = _local_folder(os.fspath(folder), cache_dir, revision)
    pickled = os.path.join(folder, "qmodel.pt")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    if "config.json" not in names or not (
        "qmodel.pt" in names or any(name.endswith(".safetensors") for name in names)
    ):
        raise ValueError(
            f"[load_upstream] {folder} must be a folder with config.json and qmodel.pt or "
            "safetensors files"
        )
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model_class = model_class or _model_class(config)
    tensors = _flatten(load_pickle(pickled), pickled) if "qmodel.pt" in names else None
    return model_class.from_pretrained(
        None if tensors is not None else folder,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        device_map=device_map,
        quantization_config=UpstreamSource(tensors),
        **kwargs,
    )


def _local_folder(name: str, cache_dir: Any, revision: str | None) -> str:
    """The folder itself, or that of a repository in the hub's cache."""
    # The hub has names such as "owner/name" or "name", which are no paths.
    if os.path.exists(name) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, cache_dir=cache_dir, revision=revision)
    except (OSError, ValueError) as error:  # offline, unknown, or no access
        raise ValueError(
            f"[load_upstream] {name} is no folder, and as a repository of the hub it is neither in "
            f"the local cache nor can it be downloaded: {str(error).strip().splitlines()[0]}"
        ) from None


def _model_class(config: Any) -> Any:
    architectures = config.architectures or []
    for architecture in architectures:
        if (found := getattr(transformers, architecture, None)) is not None:
            return found
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if not architectures and type(config) in causal:
        return causal[type(config)]
    raise ValueError(
        "[load_upstream] Transformers has no model class "
        f"{', '.join(architectures) or '(none is named)'}, which config.json asks for: pass "
        "model_class"
    )


def load_pickle(path: str) -> Mapping[str, Any]:
    """torch.load without code: tensors, dicts and plain values only.

    Raises:
        FormatError: If there is anything else.
    """
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before zip archives cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise FormatError(
            f"[{path}] holds more than tensors, numbers, texts and dtypes, or is cut off: "
            + str(error).strip().splitlines()[0]
        ) from None
    if not isinstance(loaded, Mapping):
        raise FormatError(f"[{path}] holds a {type(loaded).__name__}; it must be a state dict")
    return loaded


def _flatten(modules: Mapping[str, Any], path: str) -> dict[str, torch.Tensor]:
    """A state dict from {module: {key: value}}."""
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in modules.items():
        if not isinstance(entry, Mapping):
            raise FormatError(
                f"[{path}] {name} is a {type(entry).__name__}; it must be the state dict of a "
                "module"
            )
        if "W_q" in entry:
            entry = upstream.encode(entry, f"{path}, {name}")
        for key, value in entry.items():
            if not isinstance(value, torch.Tensor):
                raise FormatError(
                    f"[{path}] {name}.{key} is a {type(value).__name__}; it must be a tensor"
                )
            tensors[f"{name}.{key}"] = value.detach()
    return tensors
