"""Layers as upstream hqq stores them: their keys, and their dense weights in plain torch.

The C++ library converts what format 1 can hold (_core.from_upstream); what it cannot is dequantized
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import _core
from ..errors import FormatError

# A bias is an ordinary parameter; offload_meta stacks zero and scale.
KEYS = frozenset(_core.UPSTREAM_KEYS) - {"bias"} | {"zero_scale"}

# packing -> (fields of a word, bits of a field, type of a word)
_PACKINGS = {
    "8bit_u8": (1, 8, torch.uint8),
    "4bit_u8": (2, 4, torch.uint8),
    "3bit_32": (10, 3, torch.int32),
    "2bit_u8": (4, 2, torch.uint8),
    "1bit_u8": (8, 1, torch.uint8),
}
_TEXTS = ("packing", "unpack_view_dtype", "compute_dtype")
_ARRAYS = ("W_q", "scale", "zero", "zero_scale", "bias")


def dequantize(meta: Mapping[str, Any], dtype: torch.dtype, where: str) -> torch.Tensor:
    """The dense weight of a layer.

    Args:
        meta: W_q, scale, zero and the settings as Python values, as decode() gives them.
        dtype: To compute in.
        where: Of messages.

    Raises:
        FormatError: If something is missing or does not fit together.
    """
    missing = [key for key in ("W_q", "scale", "zero", "packing", "shape") if meta.get(key) is None]
    if missing:
        raise FormatError(f"[{where}] tensor {missing[0]} of a quantized layer is missing")
    if meta["packing"] not in _PACKINGS:
        raise FormatError(
            f"[{where}] there is no packing {meta['packing']!r}; it must be one of "
            f"{', '.join(_PACKINGS)}"
        )
    fields, bits, word = _PACKINGS[meta["packing"]]
    packed = meta["W_q"]
    if meta.get("view_as_float"):
        packed = packed.contiguous().view(word)
    if packed.dtype != word or packed.ndim != 2:
        raise FormatError(
            f"[{where}] W_q is {packed.dtype} {list(packed.shape)}; {meta['packing']} needs a "
            f"{word} matrix"
        )
    mask = (1 << bits) - 1
    codes = torch.cat([(packed >> bits * (fields - 1 - k)) & mask for k in range(fields)])
    shape = tuple(int(n) for n in meta["shape"])
    rows, rest = divmod(torch.Size(shape).numel(), max(codes.shape[1], 1))
    if rest or rows > codes.shape[0]:
        raise FormatError(
            f"[{where}] W_q holds {codes.numel()} codes, which are no weight {list(shape)}"
        )
    scale, zero = (torch.as_tensor(meta[key]).to(dtype) for key in ("scale", "zero"))
    try:
        return ((codes[:rows].to(dtype) - zero) * scale).reshape(shape)
    except RuntimeError:
        raise FormatError(
            f"[{where}] scale {list(scale.shape)} and zero {list(zero.shape)} do not fit the codes "
            f"{[rows, codes.shape[1]]}"
        ) from None


def decode(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Python values for the tensors of a safetensors file."""
    meta: dict[str, Any] = {}
    for key, tensor in tensors.items():
        if key in _ARRAYS:
            meta[key] = tensor
        elif key in _TEXTS:
            meta[key] = bytes(tensor.flatten().tolist()).decode("latin-1")
        else:
            values = tensor.flatten().tolist()
            meta[key] = values if key == "shape" else values[0] if values else None
    if "zero_scale" in meta:
        meta["zero"], meta["scale"] = meta.pop("zero_scale")
    return meta


def encode(entry: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
    """The tensors that a safetensors file would hold for a layer of a qmodel.pt.

    Scales and zeros that hqq 0.1 quantized themselves are dequantized.

    Raises:
        FormatError: For a value of another kind than hqq's.
    """
    entry = dict(entry)
    entry |= entry.pop("meta", None) or {}
    if entry.get("quant_zero") or entry.get("quant_scale"):
        _dequantize_metadata(entry, where)
    encoded: dict[str, torch.Tensor] = {}
    for key, value in entry.items():
        if value is None:
            continue
        if key not in KEYS and key != "bias":
            raise FormatError(f"[{where}] hqq has no value named {key!r}")
        if key in _ARRAYS and isinstance(value, torch.Tensor):
            encoded[key] = value.detach()
        elif isinstance(value, bool):
            encoded[key] = torch.tensor(int(value), dtype=torch.uint8)
        elif isinstance(value, int):
            encoded[key] = torch.tensor(value, dtype=torch.int32)
        elif isinstance(value, float):
            encoded[key] = torch.tensor(value, dtype=torch.float32)
        elif isinstance(value, (str, torch.dtype)):
            encoded[key] = torch.tensor(list(str(value).encode("latin-1")), dtype=torch.uint8)
        elif key == "shape":
            encoded[key] = torch.tensor(list(value), dtype=torch.int64)
        else:
            raise FormatError(
                f"[{where}] {key} is a {type(value).__name__}, which hqq does not store"
            )
    if encoded:
        encoded["encoded_state_dict"] = torch.tensor(1, dtype=torch.uint8)
    return encoded


def _dequantize_metadata(entry: dict[str, Any], where: str) -> None:
    """Replaces zero_q and scale_q, codes with metadata of their own, by zero and scale."""
    dtype = entry.get("compute_dtype") or torch.float16
    if "zero_scale" in entry:
        both = entry.pop("zero_scale")
        for key, value in zip(("zero", "scale"), both):
            entry[f"{key}_q" if entry.get(f"quant_{key}") else key] = value
    for key in ("zero", "scale"):
        if not entry.get(f"quant_{key}"):
            continue
        codes, meta = entry.pop(f"{key}_q", None), entry.pop(f"meta_{key}", None)
        if codes is None or not isinstance(meta, Mapping):
            raise FormatError(f"[{where}] quant_{key} is set, but {key}_q or meta_{key} is missing")
        entry[key] = dequantize({**meta, "W_q": codes}, dtype, f"{where}, {key}")
        entry[f"quant_{key}"] = False
