"""What HqqLinear and HqqExperts share: packed tensors as parameters that keep their types and
shapes."""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import backends
from .._core import LayerConfig
from ..backends import cuda_calls, packing
from ..format import (
    CPU_TILES,
    CUDA_TILES,
    FORMAT_1,
    TENSOR_NAMES,
    Layout,
    PackedWeight,
    Packing,
    Specs,
    Tensors,
    dtype_name,
    layout_of,
    nbytes_of,
    packed_weight,
)
from .checks import check_tensors
from .watched import is_watched

if TYPE_CHECKING:
    from typing_extensions import Self

# Every call of a layer needs them: faster than a loop.
_fetch = operator.itemgetter(*TENSOR_NAMES)

# Two threads may run a model for the first time.
_repacking = threading.RLock()

# W_q -> its codes that a recorded CUDA graph reads. Their memory lives as long as the parameter stays on
# its device, in whatever order its codes are.
_recorded: MutableMapping[torch.Tensor, torch.Tensor] = WeakIdKeyDictionary()

# A parameter without elements, the first of a module: code that asks the first parameter of a model
# for its dtype, or the first that is floating, gets the type the model computes in, and not that of
# packed bytes or of scales. It is in no state_dict.
DTYPE_MARKER = "dtype_marker"

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
# Types that weights can have.
WEIGHT_DTYPES = tuple(_DTYPES.values())


class Replaced(NamedTuple):
    """What a quantized module took the place of, for the way back."""

    kind: str  # as Layer.kind
    cls: type[nn.Module]
    requires_grad: bool  # of its weight


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


def _nobody() -> None:
    """A weak reference to nothing."""


class QuantizedModule(nn.Module):
    """A module around the tensors of quantized matrices.

    The tensors are parameters without gradient: state_dict has the keys of a checkpoint, and
    whatever moves parameters (``to``, accelerate's hooks) moves them. Casts leave them alone and
    change ``compute_dtype``, which is the type of the marker.
    """

    # QuantizeStats of the weight as a dict, or a list of them for experts; None if it came from a
    # file.
    quantize_stats: Any = None

    # None if it was not made from a layer of a model.
    replaced: Replaced | None = None

    # Transformers initializes what lacks this mark; there is nothing to initialize here.
    _is_hf_initialized = True

    # Names of tensors -> the parameters that were registered here: those that the module owns.
    # FSDP, offloading hooks and torch.func lend it others by writing to _parameters.
    _registered: dict[str, weakref.ref[nn.Parameter]]

    # Identities of the tensors, once they are checked and known to be owned.
    _ready: tuple[int, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_registered", "_ready")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._own()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in nn.Module; setattr() comes here, too."""
        if name == "weight":
            raise AttributeError(
                "[module] the weight of a quantized layer is packed and cannot be set: quantize_(W) "
                "quantizes another one; leave the layer out of tensor-parallel plans, "
                "parametrizations and pruning"
            )
        super().register_parameter(name, param)
        if name in TENSOR_NAMES:
            self._own(name)

    def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
        """As in nn.Module. With recurse=False in format 1 and without the marker: who asks the module
        itself is about to shard, offload or replace what it owns, and looks every name up in a
        state_dict."""
        if not recurse:
            self._give()
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if recurse or name.rpartition(".")[2] != DTYPE_MARKER:
                yield name, parameter

    def _replicate_for_data_parallel(self):
        raise ValueError(
            "[module] torch.nn.DataParallel copies parameters that have gradients, not packed "
            "weights; use torch.nn.parallel.DistributedDataParallel, one process a GPU"
        )

    def _setup(
        self,
        config: LayerConfig,
        shape: tuple[int, ...],
        compute_dtype: torch.dtype,
        parts: int = 1,
    ) -> None:
        """Attributes of a module whose dense weight has `shape` ([experts,] out, in)."""
        # Not "config", which Transformers takes for one of its own.
        self.layer_config = config
        self.dense_shape = tuple(shape)
        self.out_features, self.in_features = shape[-2:]
        self._layout: Layout = layout_of(config, self.dense_shape, parts)
        marker = torch.empty(0, dtype=compute_dtype, device="cpu")
        self.register_parameter(DTYPE_MARKER, nn.Parameter(marker, requires_grad=False))

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the dense weight."""
        return self._parameters[DTYPE_MARKER].dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        marker = self._parameters[DTYPE_MARKER]
        marker.data = torch.empty(0, dtype=dtype, device=marker.device)

    def place_marker(self) -> None:
        """Takes the marker to where the tensors are: loaders that set them do not know it."""
        marker, device = self._parameters[DTYPE_MARKER], self._parameters["W_q"].device
        # Never to meta: nobody would have a value for it.
        if device.type != "meta" and marker.device != device:
            empty = torch.empty(0, dtype=marker.dtype, device=device)
            self._parameters[DTYPE_MARKER] = nn.Parameter(empty, requires_grad=False)

    def _register_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        for name in TENSOR_NAMES:
            tensor = tensors.get(name)
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, tensor)
        self.place_marker()

    def _specs(self) -> Specs:
        """Shape and dtype of every tensor this module has, in format 1."""
        return self._layout.specs()

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
            self.register_parameter(name, nn.Parameter(tensor.to(device), requires_grad=False))
        self.place_marker()

    def packed(self) -> Tensors:
        """The stored tensors, tiled or in format 1."""
        parameters = self._parameters
        if torch.compiler.is_compiling():  # which cannot trace _fetch
            return Tensors(*[parameters[name] for name in TENSOR_NAMES])
        return Tensors._make(_fetch(parameters))

    def packed_weight(self) -> PackedWeight:
        """The stored tensors with their settings, shape and packing."""
        return packed_weight(self._layout, self.packed())

    def _own(self, *names: str) -> None:
        """Takes the parameters of these names, or all, for the module's own."""
        self._ready = None
        registered = self.__dict__.setdefault("_registered", {})
        for name in names or TENSOR_NAMES:
            parameter = self._parameters.get(name)
            # Not FakeTensor, DTensor and other classes that stand for something else.
            if type(parameter) is nn.Parameter:
                registered[name] = weakref.ref(parameter)
            else:
                registered.pop(name, None)

    def _owns(self, tensors: Tensors) -> bool:
        """Whether the tensors are the module's for good, and no other process sees their memory."""
        owned = [self._registered.get(name, _nobody)() for name in TENSOR_NAMES]
        if not all(map(operator.is_, owned, tensors)):
            return False
        # torch says of all memory of a GPU that it can be shared.
        return not (tensors.W_q.is_cpu and tensors.W_q.is_shared())

    def _give(self) -> None:
        """Format 1 for code that takes tensors of this module away."""
        if self._parameters.get("W_q") is not None and self.is_tiled:
            if self._owns(self.packed()):
                self.untile_()
        self._ready = None

    def checked(self) -> PackedWeight:
        """packed_weight(), when its tensors are what the kernels read.

        Raises:
            ValueError: If the tensors are those of other settings, of two orders, sharded, or have
                no memory.
        """
        weight = packed_weight(self._layout, self.packed())
        # Nothing of it is for compilers and tracers, which have seen the layer without them.
        if torch.compiler.is_compiling():
            return weight
        if not self.is_ready(weight.tensors) and not torch.jit.is_tracing():
            check_tensors(weight)
            self._ready = tuple(map(id, weight.tensors)) if self._owns(weight.tensors) else None
        codes = weight.tensors.W_q
        if cuda_calls.is_capturing(codes):
            _recorded[codes] = codes.data
        return weight

    def prepared(self) -> PackedWeight:
        """checked(), in the packing that is read fastest where the tensors are.

        They are reordered in place, once, unless something watches or they are not the module's own.
        """
        weight = self.checked()
        if torch.compiler.is_compiling():
            return weight
        wanted = backends.packing_for(weight)
        if weight.packing == wanted or is_watched():
            return weight
        if self.may_repack(weight):
            self._repack(wanted)
            return self.packed_weight()
        return weight

    def may_repack(self, weight: PackedWeight) -> bool:
        """Whether a product may reorder what checked() gave."""
        # Tiles of another device come past the module, which owns them in no case.
        if weight.packing != FORMAT_1:
            return True
        codes = weight.tensors.W_q
        read_by_graph = codes in _recorded and _recorded[codes].data_ptr() == codes.data_ptr()
        return self._ready is not None and not read_by_graph

    def is_ready(self, tensors: Tensors) -> bool:
        """Whether packed() has given these tensors to checked() before, and the module owns them."""
        return tuple(map(id, tensors)) == self._ready

    @property
    def is_tiled(self) -> bool:
        """Whether the codes are in the order of the kernels of a device instead of format 1."""
        return self.packed_weight().packing != FORMAT_1

    def tile_(self) -> Self:
        """Puts the codes into the order of the kernels of their device, where there is one.

        The first forward pass does it, unless it is compiled or recorded to a CUDA graph, or the
        tensors are not the module's own: sharded, offloaded, or in memory that processes share. Only
        the order in memory changes: state_dict(), moving to a CPU and everything else gives format 1
        again.
        """
        weight = self.checked()
        self._own()
        kernels = backends.kernels_for(weight.tensors.W_q)
        if kernels is not None:
            self._repack(kernels.packing_for(weight))
        return self

    def untile_(self) -> Self:
        """Format 1 again, bit for bit."""
        self._repack(FORMAT_1)
        return self

    def _repack(self, wanted: Packing) -> None:
        with _repacking, torch.inference_mode(False):
            weight = self.packed_weight()
            if weight.packing != wanted:
                self._set_data(packing.repack(weight, wanted).tensors)

    def _set_data(self, tensors: Tensors) -> None:
        # The parameters stay the same objects: modules that share them see the new order. The codes
        # tell which it is, so they come last: another thread may look.
        for parameter, tensor in reversed(list(zip(self.packed(), tensors))):
            if parameter is not None and tensor is not parameter:
                parameter.data = tensor

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + DTYPE_MARKER, None)
        if self.is_tiled:
            plain = packing.format_1(self.packed_weight()).tensors
            for name, tensor in plain.present().items():
                if tensor is not self._parameters[name]:
                    destination[prefix + name] = tensor

    @property
    def nbits(self) -> float:
        """8, 6, 5, 4, 3, 2, 1.58 or 1."""
        return self.layer_config.nbits

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.W_q.device

    @property
    def packed_nbytes(self) -> int:
        """Bytes of all tensors of the quantized weight in format 1."""
        return nbytes_of(self._specs())

    @property
    def bits_per_weight(self) -> float:
        """8 * packed_nbytes / number of weights."""
        return 8 * self.packed_nbytes / torch.Size(self.dense_shape).numel()

    def _apply(self, fn, recurse=True):
        # Tiles of a GPU stay where they are, or move to another: graphs hold their address.
        if self.packed_weight().packing == CPU_TILES:
            self.untile_()
        weight = self.packed_weight()
        kept = {name: tensor.data for name, tensor in weight.tensors.present().items()}
        super()._apply(fn, recurse)
        if self._parameters["W_q"].device != kept["W_q"].device:
            # Who moves a layer away wants its memory back; the graph is to be recorded again.
            _recorded.pop(weight.tensors.W_q, None)
        for name, value in kept.items():
            parameter = self._parameters[name]
            if parameter.dtype != value.dtype:
                parameter.data = value.to(parameter.device)
        codes = self._parameters["W_q"]
        if weight.packing == CUDA_TILES and codes.device.type != cuda_calls.DEVICE_TYPE:
            before = weight._replace(tensors=weight.tensors._replace(W_q=kept["W_q"]))
            codes.data = packing.format_1(before).tensors.W_q.to(codes.device)
        self._own()
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
                f"{k}={getattr(self.layer_config, k)}" for k in ("nbits", "group_size", "axis")
            )
            error_msgs.append(
                f"[{prefix[:-1] or 'load_state_dict'}] does not fit a layer of {settings}, balance="
                f"{self.layer_config.balance} for a weight {list(self.dense_shape)}: "
                + "; ".join(wrong)
            )
            return
        given = prefix + "W_q"
        is_assigned = local_metadata.get("assign_to_params_buffers", False)
        if is_assigned or self.packed_weight().packing != CUDA_TILES:
            self.untile_()
        elif given in state_dict:
            # The new codes go to the same memory, so that recorded graphs see them.
            codes = state_dict[given].to(self.device)
            state_dict = {**state_dict, given: cuda_calls.pack(self._layout, codes)}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + DTYPE_MARKER in missing_keys:
            missing_keys.remove(prefix + DTYPE_MARKER)
        self.place_marker()

    def _repr_settings(self) -> str:
        config = self.layer_config
        balance = "" if config.balance == "none" else f", balance={config.balance}"
        return f"nbits={config.nbits}, group_size={config.group_size}, axis={config.axis}{balance}"
