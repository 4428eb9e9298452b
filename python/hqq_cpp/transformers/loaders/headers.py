"""Reads and checks the headers of a checkpoint in format 1 before any weight is read;
docs/format.md."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from ... import _core
from ..._core import HqqConfig, LayerConfig, packed_row_bytes
from ...errors import FormatError
from ...format import TENSOR_NAMES, dtype_name, layout_of
from ...models.described import METADATA, NOT_SETTINGS
from ...nn.experts import HqqExperts
from ...nn.linear import HqqLinear
from .._versions import dot_natural_key
from .key_map import KeyMap
from .targets import Stored

_DTYPES = {
    "U8": torch.uint8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
}  # fmt: skip
_NAMES_IN_ERRORS = 3


class TensorHeader(NamedTuple):
    """Shape and safetensors type of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: str


class Headers(NamedTuple):
    """The headers of all files of a checkpoint."""

    # Names of all tensors.
    keys: set[str]
    # Layer -> its packed tensors, for names that end like those of format 1.
    packed: dict[str, dict[str, TensorHeader]]
    # Layer -> its description.
    described: dict[str, dict[str, Any]]


def read_headers(files: Iterable[str]) -> Headers:
    """Reads no weight.

    Raises:
        FormatError: If a file is no safetensors file, or its description of layers is broken.
    """
    headers = Headers(set(), {}, {})
    for file in files:
        if not file.endswith(".safetensors"):
            raise FormatError(
                f"[from_pretrained] {file} is no safetensors file; quantized checkpoints are "
                "stored in those"
            )
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  safe_open has no __iter__
                headers.keys.add(key)
                name, _, last = key.rpartition(".")
                if last in TENSOR_NAMES:
                    tensor = opened.get_slice(key)
                    header = TensorHeader(tuple(tensor.get_shape()), tensor.get_dtype())
                    headers.packed.setdefault(name, {})[last] = header
            text = (opened.metadata() or {}).get(METADATA)
        if text is not None:
            headers.described.update(_descriptions(file, text))
    return headers


def _descriptions(file: str, text: str) -> dict[str, dict[str, Any]]:
    """The layers that the metadata of a file describes."""
    try:
        read = _core.parse_json(text, "metadata hqq_cpp")
        version, layers = read.get("format_version", _core.FORMAT_VERSION), read["layers"]
        whole = all(
            isinstance(layer["tensor"], str) and all(type(n) is int for n in layer["shape"])
            for layer in layers.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise FormatError(f"[from_pretrained] {file}: metadata hqq_cpp is no description of layers")
    if version != _core.FORMAT_VERSION:
        raise FormatError(
            f"[from_pretrained] {file} has format version {version}; this version of hqq_cpp reads "
            f"{_core.FORMAT_VERSION}"
        )
    return layers


def stored_layers(headers: Headers, key_map: KeyMap, config: HqqConfig) -> list[Stored]:
    """The quantized layers of the files, in natural order.

    Layers that the model does not have are left out: Transformers reports or ignores them.

    Raises:
        FormatError: If a tensor of a layer that the model has is missing, or is left over, or has
            not the shape and type that the layer's settings imply.
    """
    stored = []
    for name in sorted(_names(headers), key=dot_natural_key):
        tensors, description = headers.packed[name], headers.described.get(name)
        layer = (
            _undescribed(name, tensors, key_map, config)
            if description is None
            else _described(name, description)
        )
        if layer is None or key_map.place(layer.tensor) is None:
            continue
        _check(layer, tensors)
        layer.has_bias = f"{name}.bias" in headers.keys
        layer.keys = list(tensors)
        stored.append(layer)
    return stored


def check_described(headers: Headers, key_map: KeyMap) -> None:
    """Refuses files without any tensor of a layer that they describe and the model has."""
    lost = [
        name
        for name, description in headers.described.items()
        if name not in headers.packed
        and description["tensor"] not in headers.keys
        and key_map.place(description["tensor"]) is not None
    ]
    if lost:
        more = ", ..." if len(lost) > _NAMES_IN_ERRORS else ""
        raise FormatError(
            f"[from_pretrained] {len(lost)} of {len(headers.described)} layers that the files "
            f"describe are not in them: {', '.join(lost[:_NAMES_IN_ERRORS])}{more}; a shard is "
            "missing, or the folder is not complete"
        )


def _names(headers: Headers) -> list[str]:
    """Names of the quantized layers. W_q may be what is missing."""

    def is_layer(name: str, tensors: dict[str, TensorHeader]) -> bool:
        others = name in headers.described or {"scale", "zero"} <= tensors.keys()
        return "W_q" in tensors or (others and f"{name}.weight" not in headers.keys)

    return [name for name, tensors in headers.packed.items() if is_layer(name, tensors)]


def _described(name: str, description: dict[str, Any]) -> Stored:
    try:
        settings = LayerConfig.from_dict(
            {k: v for k, v in description.items() if k not in NOT_SETTINGS}
        )
        shape = tuple(description["shape"])
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"shape is {list(shape)}; it must be [out, in] or [experts, out, in]")
        parts = description.get("parts", 1)
    except (ValueError, TypeError) as error:
        raise FormatError(
            f"[from_pretrained] {name} has a description that cannot be read: {error}"
        ) from None
    return Stored(name, description["tensor"], shape=shape, settings=settings, parts=parts)


def _undescribed(
    name: str, tensors: dict[str, TensorHeader], key_map: KeyMap, config: HqqConfig
) -> Stored | None:
    """A layer of files that lost their metadata: config.json has its settings, the model its
    shape. None if the model does not have it."""
    # Experts are stored without ".weight".
    found = [(t, place) for t in (f"{name}.weight", name) if (place := key_map.place(t))]
    if not found:
        return None
    tensor, place = found[0]
    settings = config.layer(place.parameter.removesuffix(".weight")) or config.layer(name)
    if settings is None:
        raise FormatError(
            f"[from_pretrained] {name} is quantized in the files, but config.json leaves it "
            "unquantized"
        )
    settings = settings.replace(balance="sinkhorn" if "col_scale" in tensors else "none")
    shape = key_map.shape(place)
    W_q = tensors.get("W_q")
    if W_q is not None:
        # A head may have another number of rows, which Transformers compares; a Conv1D keeps its
        # weight transposed, a convolution in more dimensions.
        columns = (shape[-1], math.prod(shape[1:]), shape[0])
        fits = [c for c in columns if packed_row_bytes(settings.nbits, c) == W_q.shape[-1]]
        shape = (*W_q.shape[:-1], (fits or columns)[0])
    return Stored(name, tensor, shape=shape, settings=settings)


def _check(layer: Stored, tensors: dict[str, TensorHeader]) -> None:
    """Refuses a layer whose tensors are not those that its settings imply."""
    where = f"[from_pretrained] {layer.name}"
    try:
        specs = layout_of(layer.settings, layer.shape, layer.parts).specs()
    except ValueError as error:
        raise FormatError(f"{where} has a description that cannot be read: {error}") from None
    missing = [name for name in specs if name not in tensors]
    if missing:
        raise FormatError(
            f"{where}.{missing[0]} is missing: the files have {len(specs) - len(missing)} of the "
            f"{len(specs)} tensors of the layer; a shard is missing, or the folder is not complete"
        )
    for name, header in tensors.items():
        if name not in specs:
            raise FormatError(
                f"{where}.{name} is left over: the settings of the layer exclude it "
                f"({_short(layer)})"
            )
        shape, dtype = specs[name]
        if header.shape != tuple(shape) or _DTYPES.get(header.dtype) != dtype:
            raise FormatError(
                f"{where}.{name} is {header.dtype} {list(header.shape)}; it must be "
                f"{dtype_name(dtype)} {list(shape)} for a weight {list(layer.shape)} of "
                + _short(layer)
            )


def _short(layer: Stored) -> str:
    keys = ("nbits", "group_size", "axis", "balance", "quant_scale", "quant_zero", "meta_dtype")
    return ", ".join(f"{key}={getattr(layer.settings, key)}" for key in keys)


def empty_stored(
    settings: LayerConfig, shape: tuple[int, ...], parts: int
) -> HqqLinear | HqqExperts:
    """A module of its own for a stored layer, on device meta."""
    if len(shape) == 3:
        return HqqExperts.empty(settings, shape, parts=parts, device="meta")
    return HqqLinear.empty(settings, *shape, device="meta")
