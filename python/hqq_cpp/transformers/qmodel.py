"""qmodel.pt: the one file from which upstream's AutoHQQHFModel.from_quantized reads weights."""

from __future__ import annotations

import glob
import os
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn

from ..errors import FormatError
from ..models import upstream

_FILE = "qmodel.pt"
_KEYS = upstream.KEYS | {"bias"}


def write_qmodel(folder: str | os.PathLike) -> str:
    """Adds qmodel.pt to a folder that ``hqq-cpp convert --to upstream`` wrote.

    Upstream's ``AutoHQQHFModel.from_quantized(folder)`` and
    ``HQQModelForCausalLM.from_quantized(folder)`` read it. It holds all weights a second time; the
    safetensors files beside it are for Transformers 4 and may be deleted.

    Args:
        folder: With config.json and safetensors files in upstream's layout.

    Returns:
        The path of the file.

    Raises:
        FormatError: If the folder holds no layer in upstream's layout, or weights that qmodel.pt
            has no place for.
    """
    folder = os.fspath(folder)
    tensors = _read_tensors(folder)
    if not any(name.endswith(".W_q") for name in tensors):
        raise FormatError(
            f"[write_qmodel] {folder} holds no W_q of a layer: it must be a folder that "
            "'hqq-cpp convert --to upstream' wrote"
        )
    modules = _by_module(_skeleton(folder), tensors, folder)
    path = os.path.join(folder, _FILE)
    partial = path + ".partial"
    try:
        torch.save(modules, partial)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    return path


def _read_tensors(folder: str) -> dict[str, torch.Tensor]:
    """All tensors, mapped: none is read before it is written."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))):
        with safe_open(path, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open has no __iter__
    return tensors


def _skeleton(folder: str) -> nn.Module:
    """The model without weights, by the class that upstream makes of its config."""
    config = transformers.AutoConfig.from_pretrained(folder)
    vars(config).pop("quantization_config", None)
    (architecture, *_) = config.architectures or [""]
    auto = transformers.AutoModel
    if "CausalLM" in architecture:
        auto = transformers.AutoModelForCausalLM
    elif "SequenceClassification" in architecture:
        auto = transformers.AutoModelForSequenceClassification
    with torch.device("meta"):
        return auto.from_config(config)


def _by_module(
    model: nn.Module, tensors: dict[str, torch.Tensor], folder: str
) -> dict[str, dict[str, Any]]:
    """{module: its state dict as upstream's serialize_weights has it}."""
    owned: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        owned.setdefault(path, {})[last] = tensor
    leaves = {name for name, module in model.named_modules() if not module._modules}
    prefix = model.base_model_prefix + "."
    if not owned.keys() & leaves:  # the files are of a model with a head, the skeleton has none
        owned = {path.removeprefix(prefix): entry for path, entry in owned.items()}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        # Upstream stores what is tied twice.
        path, from_path = target.rpartition(".")[0], source.rpartition(".")[0]
        if path not in owned and from_path in owned:
            owned[path] = owned[from_path]
    lost = sorted(path for path in owned if path not in leaves)
    if lost:
        raise FormatError(
            f"[write_qmodel] {folder} has weights of {lost[0] or 'the model itself'}"
            + (f" and {len(lost) - 1} more modules" if len(lost) > 1 else "")
            + f", for which {_FILE} has no place: {type(model).__name__} has no such layer, or it "
            "is not the last in its branch"
        )
    return {
        path: _decode(entry) if "W_q" in entry else dict(entry) for path, entry in owned.items()
    }


def _decode(entry: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A layer's values as Python objects, where safetensors needs tensors."""
    values = upstream.decode({key: tensor for key, tensor in entry.items() if key in _KEYS})
    for key in ("unpack_view_dtype", "compute_dtype"):
        values[key] = getattr(torch, values[key].removeprefix("torch."))
    for key in ("quant_scale", "quant_zero", "view_as_float", "offload_meta", "channel_wise"):
        values[key] = bool(values.get(key, key == "channel_wise"))
    for key in ("optimize", "round_zero"):
        values[key] = bool(values.get(key, False))
    values["stores_quant_config"] = True
    values["shape"] = torch.Size(values["shape"])
    values.pop("encoded_state_dict", None)
    return values
