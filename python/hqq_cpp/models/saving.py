"""save_model: any torch model with quantized layers, as a folder in format 1."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import save_safetensors
from ..nn.base import QuantizedModule
from ..nn.experts import HqqExperts
from .described import (
    config_of,
    describe_all,
    metadata_of,
    not_quantized,
    quantization_config,
)
from .messages import listed

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> None:
    """Saves a model with quantized layers, for load_model() and the command ``hqq-cpp``.

    The folder has safetensors files of format 1 and a config.json with the settings. What the
    state_dict has is stored as it is, and what is tied once. The folder is there whole or not at
    all: files are written beside it and renamed.

    Args:
        model: Any module with quantized layers below it. Models of Transformers and diffusers have
            save_pretrained, which also writes their own configuration.
        folder: Where to; its parents are made.
        max_shard_size: Bytes of a file, or such as "500MB"; the tensors of a layer stay together.
        overwrite: Replaces a checkpoint that is there.

    Raises:
        ValueError: If the model has no quantized layer, is one itself, or has a state that cannot
            be stored (on device meta, no tensor, a type that safetensors lacks).
        FileExistsError: If the folder has files, and overwrite is False or they are no checkpoint.
        OSError: If it cannot be written.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
        >>> hqq_cpp.save_model(hqq_cpp.quantize_model_(net, {"nbits": 4}), folder / "net")
        >>> sorted(path.name for path in (folder / "net").iterdir())
        ['config.json', 'model.safetensors']
    """
    target = Path(os.path.realpath(folder))
    _check_target(target, overwrite)
    layers = _layers(model)
    state = _state(model)
    layers = {name: module for name, module in layers.items() if f"{name}.W_q" in state}
    shards = _shards(state, layers, _bytes(max_shard_size))
    config = {"quantization_config": quantization_config(config_of(model), not_quantized(model))}
    with _folder_at(target) as part:
        _write_shards(part, shards, layers)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _layers(model: nn.Module) -> dict[str, QuantizedModule]:
    """Every quantized layer by all names that lead to it."""
    if isinstance(model, QuantizedModule):
        raise ValueError(
            f"[save_model] {type(model).__name__} is a single layer, and its tensors would have no "
            "name: put it into a module, such as torch.nn.Sequential(layer)"
        )
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedModule)
    }
    if not layers:
        raise ValueError(
            f"[save_model] there is no quantized layer below {type(model).__name__}; "
            "quantize_model_ makes them, and torch.save stores dense models"
        )
    merged = [n for n, m in layers.items() if isinstance(m, HqqExperts) and m.parts > 1]
    if merged:
        raise ValueError(
            f"[save_model] {listed(merged)}: experts that were merged from several layers are "
            "stored by save_pretrained, which cuts them apart again"
        )
    return layers


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state_dict, with what several names share under the first of them."""
    named = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    identity = {name: id(tensor) for name, tensor in named}
    seen: set[int] = set()
    state = {}
    for name, value in model.state_dict().items():
        _check_storable(name, value)
        key = identity.get(name)
        if key is None or key not in seen:
            state[name] = value
        if key is not None:
            seen.add(key)
    return state


def _check_storable(name: str, value: Any) -> None:
    problem = ""
    if not isinstance(value, torch.Tensor):
        problem = f"is a {type(value).__name__}; only tensors can be stored"
    elif value.is_meta:
        problem = "is on device meta (not loaded, or offloaded); load the weights first"
    elif type(value) not in (torch.Tensor, nn.Parameter) or value.layout != torch.strided:
        sort = f"{type(value).__name__} with layout {value.layout}"
        problem = f"is a {sort}; only plain dense tensors can be stored"
    elif value.is_complex() or value.is_quantized:
        problem = f"is {value.dtype}, which safetensors lacks"
    if problem:
        raise ValueError(f"[save_model] {name} {problem}")


def _bytes(size: int | str) -> int:
    text = str(size).strip().upper()
    number = text.rstrip("KMGIB")
    unit = text[len(number) :] or "B"
    try:
        value = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError):
        value = 0
    if value < 1:
        raise ValueError(
            f"[save_model] max_shard_size is {size!r}; it must be a number of bytes of at least 1, "
            "or such as '500MB' or '5GB'"
        )
    return value


def _shards(
    state: dict[str, torch.Tensor], layers: dict[str, QuantizedModule], most: int
) -> list[dict[str, torch.Tensor]]:
    """The tensors by file, those of a layer in one."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size, last = 0, None
    for name, tensor in state.items():
        owner = name.rpartition(".")[0]
        together = owner in layers and owner == last
        if shards[-1] and not together:
            module = layers.get(owner)
            nbytes = tensor.nbytes if module is None else module.packed_nbytes
            if size + nbytes > most:
                shards.append({})
                size = 0
        shards[-1][name] = tensor
        size, last = size + tensor.nbytes, owner
    return shards


def _write_shards(
    folder: Path, shards: list[dict[str, torch.Tensor]], layers: dict[str, QuantizedModule]
) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        there = {name: module for name, module in layers.items() if f"{name}.W_q" in shard}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
        save_safetensors(
            folder / file, tensors, {"format": "pt", **metadata_of(*describe_all(there))}
        )
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"[save_model] {target} is a file; give the name of a folder")
    names = os.listdir(target) if target.exists() else []
    if not names:
        return
    if not overwrite:
        raise FileExistsError(
            f"[save_model] {target} has {len(names)} files or folders in it; overwrite=True "
            "replaces a checkpoint"
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise FileExistsError(
            f"[save_model] {target} is no checkpoint: it has {len(names)} files or folders in it, "
            "and no .safetensors file; overwrite=True replaces nothing else"
        )


@contextmanager
def _folder_at(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` if nothing fails, and else goes away."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    # Inside of it, since mkdtemp gives rights to the owner alone.
    part, old = scratch / "new", scratch / "old"
    try:
        part.mkdir()
        yield part
        if target.exists():
            os.rename(target, old)
        os.rename(part, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
        raise
    finally:
        # An old folder that could not be put back stays.
        if target.exists() or not old.exists():
            shutil.rmtree(scratch, ignore_errors=True)
