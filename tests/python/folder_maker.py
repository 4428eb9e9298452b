"""Quantized folders of any make: what older versions and other tools may have written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hqq_cpp


def pack(source: Path, folder: Path, layers: Mapping[str, Mapping[str, Any]]) -> Path:
    """A copy of a dense folder in which weights [out, in], whatever they are, are quantized.

    Args:
        source: With one model.safetensors.
        folder: The new one.
        layers: Name of a weight in the file -> its settings.
    """
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    tensors, described = load_file(file), {}
    for name, settings in layers.items():
        weight = tensors.pop(name)
        config = hqq_cpp.HqqConfig(**{"group_size": 32, **settings}, skip_modules=())
        q = hqq_cpp.quantize(weight.float(), config)
        layer = name.removesuffix(".weight")
        for key, tensor in q.tensors().items():
            tensors[f"{layer}.{key}"] = torch.from_dlpack(tensor).clone()
        described[layer] = q.config.to_dict() | {
            "tensor": name,
            "shape": list(weight.shape),
            "dtype": str(weight.dtype).removeprefix("torch."),
        }
    text = json.dumps({"format_version": 1, "layers": described})
    save_file(tensors, file, {"format": "pt", "hqq_cpp": text})
    config = json.loads((folder / "config.json").read_text())
    settings = hqq_cpp.HqqConfig(group_size=32).to_dict()
    config["quantization_config"] = {"quant_method": "hqq_cpp", "format_version": 1, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def change(
    source: Path,
    folder: Path,
    tensors: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None,
    layers: Callable[[dict[str, dict]], Any] | None = lambda layers: None,
    config: Callable[[dict[str, Any]], Any] = lambda config: None,
) -> Path:
    """A copy of a quantized folder whose tensors, described layers (None: without them) and
    config.json went through functions."""
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    found = load_file(file)
    tensors(found)
    if layers is None:
        metadata.pop("hqq_cpp")
    else:
        described = json.loads(metadata["hqq_cpp"])
        layers(described["layers"])
        metadata["hqq_cpp"] = json.dumps(described)
    save_file(found, file, metadata)
    settings = json.loads((folder / "config.json").read_text())
    config(settings)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
