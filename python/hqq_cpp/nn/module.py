"""What HqqLinear and HqqExperts share: packed tensors as parameters that keep their types and
shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .dequantize import TENSOR_NAMES, Layout, Weight, dtype_name, layout_of, tensor_specs

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def parse_dtype(dtype: torch.dtype | str | None, default: torch.dtype) -> torch.dtype:
    """A floating torch dtype from itself or its name.

    Raises:
        ValueError: If it is no type that weights can have.
    """
    if dtype is None:
        return default
    dtype = _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in _DTYPES.values():
        raise ValueError(f"[dequantize] dtype {dtype} is not one of {', '.join(_DTYPES)}")
    return dtype


class QuantizedModule(nn.Module):
    """A module around the tensors of quantized matrices.

    The tensors are parameters without gradient: state_dict has the keys of a checkpoint, and
    whatever moves parameters (``to``, accelerate's hooks) moves them. Casts leave them alone and
    change ``compute_dtype``.
    """

    # QuantizeStats of the weight as a dict, or a list of them for experts; None if it came from a
    # file.
    quantize_stats: Any = None

    # Transformers initializes what lacks this mark; there is nothing to initialize here.
    _is_hf_initialized = True

    def _setup(
        self, config: dict[str, Any], shape: tuple[int, ...], compute_dtype: torch.dtype
    ) -> None:
        """Attributes of a module whose dense weight has `shape` ([experts,] out, in)."""
        # Not "config", which Transformers takes for one of its own.
        self.layer_config = dict(config)
        self.dense_shape = tuple(shape)
        self.out_features, self.in_features = shape[-2:]
        self.compute_dtype = compute_dtype
        self._layout: Layout = layout_of(config, *shape[-2:])

    def _register_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        for name in TENSOR_NAMES:
            tensor = tensors.get(name)
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, tensor)

    def _specs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor this module has."""
        lead = self.dense_shape[:-2]
        specs = tensor_specs(self.layer_config, self.out_features, self.in_features)
        return {name: ((*lead, *shape), dtype) for name, (shape, dtype) in specs.items()}

    def _empty_tensors(self, device: torch.device | str) -> dict[str, torch.Tensor]:
        return {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in self._specs().items()
        }

    def set_packed(self, tensors: dict[str, torch.Tensor], device: torch.device | str) -> None:
        """Sets the stored tensors; they must be those of _specs()."""
        specs = self._specs()
        if tensors.keys() != specs.keys():
            raise ValueError(
                f"[module] the tensors are {', '.join(tensors)}; they must be {', '.join(specs)}"
            )
        for name, (shape, dtype) in specs.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise ValueError(
                    f"[module] {name} is {dtype_name(tensor.dtype)} {list(tensor.shape)}; "
                    f"it must be {dtype_name(dtype)} {list(shape)}"
                )
            self._parameters[name] = nn.Parameter(tensor.to(device), requires_grad=False)

    def packed(self) -> Weight:
        """The stored tensors."""
        tensors = self._parameters
        return Weight(*(tensors[name] for name in TENSOR_NAMES))

    @property
    def nbits(self) -> float:
        """8, 6, 5, 4, 3, 2, 1.58 or 1."""
        return self.layer_config["nbits"]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.W_q.device

    @property
    def packed_nbytes(self) -> int:
        """Bytes of all tensors of the quantized weight."""
        return sum(t.nbytes for t in self.packed() if t is not None)

    @property
    def bits_per_weight(self) -> float:
        """8 * packed_nbytes / number of weights."""
        return 8 * self.packed_nbytes / torch.Size(self.dense_shape).numel()

    def _apply(self, fn, recurse=True):
        kept = {
            name: value for name in TENSOR_NAMES if (value := self._parameters[name]) is not None
        }
        kept = {name: value.data for name, value in kept.items()}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            parameter = self._parameters[name]
            if parameter.dtype != value.dtype:
                parameter.data = value.to(parameter.device)
        # fn is what .to(), .half() and the like do to a tensor.
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Refuses tensors of other settings, which copying would cast or broadcast silently."""
        specs = self._specs()
        wrong = []
        for name in TENSOR_NAMES:
            given = state_dict.get(prefix + name)
            if given is None:
                continue
            if name not in specs:
                wrong.append(f"{name} is present, but the settings exclude it")
                continue
            shape, dtype = specs[name]
            if tuple(given.shape) != tuple(shape) or given.dtype != dtype:
                wrong.append(
                    f"{name} is {dtype_name(given.dtype)} {list(given.shape)}; it must be "
                    f"{dtype_name(dtype)} {list(shape)}"
                )
        if wrong:
            settings = ", ".join(
                f"{k}={self.layer_config[k]}" for k in ("nbits", "group_size", "axis")
            )
            error_msgs.append(
                f"[{prefix[:-1] or 'load_state_dict'}] does not fit a layer of {settings}, balance="
                f"{self.layer_config['balance']} for a weight {list(self.dense_shape)}: "
                + "; ".join(wrong)
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _repr_settings(self) -> str:
        config = self.layer_config
        balance = "" if config["balance"] == "none" else f", balance={config['balance']}"
        return f"nbits={config['nbits']}, group_size={config['group_size']}, axis={config['axis']}{balance}"
