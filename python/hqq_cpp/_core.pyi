"""
The C++ part of hqq_cpp. Import hqq_cpp instead.
"""
from __future__ import annotations
import collections.abc
import numpy
import os
import pathlib
import typing
import typing_extensions
__all__: list[str] = ['BIT_WIDTHS', 'BitWidth', 'Checkpoint', 'CudaLayer', 'CudaPlace', 'CudaSolver', 'FORMAT_VERSION', 'HqqConfig', 'LayerConfig', 'LayerReport', 'METADATA_BLOCK', 'NativeLayer', 'Progress', 'QuantizeReport', 'QuantizeStats', 'QuantizedTensor', 'Roles', 'TENSOR_NAMES', 'TERNARY_DIGITS', 'Tensor', 'TensorDiff', 'TiledTensor', 'UPSTREAM_KEYS', 'VerifyReport', 'can_tile', 'cli_main', 'convert_checkpoint', 'cpu_target', 'cpu_targets', 'cuda_is_available', 'cuda_require_device', 'default_threads', 'dequantize', 'dequantize_checkpoint', 'diff_checkpoints', 'dtype_code', 'find_quantization', 'from_upstream', 'is_adapter_name', 'layer_tag', 'linear', 'linear_mode_code', 'load_safetensors', 'packed_row_bytes', 'parse_json', 'parse_upstream', 'quantize', 'quantize_checkpoint', 'read_json_file', 'resolve_balance', 'safetensors_metadata', 'save_safetensors', 'settings_of', 'tensor_specs', 'tile_specs', 'verify_checkpoint']
class Tensor:
    """
    A read-only array in CPU memory: shape, element type and bytes.

    It exists because NumPy has no bfloat16. ``numpy()`` and ``numpy.asarray`` give NumPy arrays,
    ``torch.from_dlpack`` torch tensors, both without a copy (bfloat16 to NumPy: a float32 copy). Views
    keep the memory alive. Do not write to it through torch, which knows no read-only tensors: it may be
    a file.

    Args:
        array: A NumPy array, a torch tensor, anything with ``__dlpack__`` on a CPU, or what
            ``numpy.asarray`` takes. The memory is shared where the array is contiguous.

    Raises:
        ValueError: If the array is not in CPU memory or its element type is not one of safetensors'.

    Example:
        >>> import numpy as np
        >>> t = hqq_cpp.Tensor(np.arange(6, dtype=np.float16).reshape(2, 3))
        >>> t
        Tensor(float16, [2, 3])
        >>> t.numpy()[1].tolist()
        [3.0, 4.0, 5.0]
    """
    def __array__(self, dtype: typing.Any = None, copy: typing.Any = None) -> typing.Any:
        """
        For numpy.asarray: see numpy().
        """
    def __dlpack__(self, *, stream: typing.Any = None, max_version: typing.Any = None, dl_device: typing.Any = None, copy: typing.Any = None) -> typing_extensions.CapsuleType:
        """
        For torch.from_dlpack and other consumers of DLPack.
        """
    def __dlpack_device__(self) -> tuple[int, int]:
        """
        (1, 0): the CPU.
        """
    def __getstate__(self) -> tuple:
        ...
    def __init__(self, array: typing.Any) -> None:
        ...
    def __len__(self) -> int:
        ...
    def __repr__(self) -> str:
        ...
    def __setstate__(self, arg0: tuple) -> None:
        ...
    def numpy(self) -> numpy.ndarray:
        """
        The tensor as a NumPy array.

        Returns:
            A read-only array that shares the memory, or a float32 copy if the tensor is bfloat16.

        Raises:
            ValueError: If the tensor has one of the 8-bit float types, which NumPy lacks.

        Example:
            >>> hqq_cpp.Tensor([1.0, 2.0]).numpy().tolist()
            [1.0, 2.0]
        """
    @property
    def data_ptr(self) -> int:
        """
        Address of the first element.
        """
    @property
    def dtype(self) -> str:
        """
        Element type: 'float32', 'bfloat16', 'uint8', ...
        """
    @property
    def nbytes(self) -> int:
        """
        Bytes of the elements.
        """
    @property
    def ndim(self) -> int:
        """
        Number of dimensions.
        """
    @property
    def shape(self) -> tuple[int, ...]:
        """
        Sizes of the dimensions.
        """
    @property
    def size(self) -> int:
        """
        Number of elements.
        """
class LayerConfig:
    """
    The settings of one layer, which cannot be changed.

    ``HqqConfig.layer(name)`` gives the settings of a layer of a model, ``QuantizedTensor.config`` those
    that a matrix was quantized with.

    Args:
        nbits: 8, 6, 5, 4, 3, 2, 1.58 (three levels) or 1.
        group_size: Weights that share a scale and a zero: a multiple of 8, or None for one group per
            row (axis 1) or column (axis 0).
        axis: 1: groups lie inside rows; 0: inside columns.
        solver: 'joint', 'hqq' or 'minmax'.
        balance: 'sinkhorn', 'none', or 'auto', which a stored layer never has.
        lp_norm: Norm of the error that is minimised; None: 2 for joint, 0.7 for hqq.
        iterations: Steps of the solver; None: what suits it.
        quant_zero: Zeros are 8-bit codes.
        quant_scale: Scales are 8-bit codes.
        meta_dtype: Type of stored scales and zeros: 'float16', 'bfloat16', 'float32'.
        beta: Penalty of the half-quadratic solvers (used when lp_norm < 2).
        kappa: Growth of beta a step, where grow_beta is set.
        round_zero: Round the zero before solver 'hqq' starts; None: only at 4 bits.
        grow_beta: Multiply beta by kappa after every step of solver 'hqq'.

    Raises:
        ValueError: If a value is not allowed, or for an unknown argument (naming the nearest known
            one).

    Example:
        >>> config = hqq_cpp.LayerConfig(nbits=3, group_size=128)
        >>> config.nbits, config.replace(nbits=2).nbits
        (3, 2)
        >>> config == hqq_cpp.HqqConfig(nbits=3, group_size=128).layer("model.layers.0.mlp.up_proj")
        True
    """
    @staticmethod
    def from_dict(settings: dict) -> LayerConfig:
        """
        Reads a dict.

        Args:
            settings: As to_dict() gives it, every key optional, or upstream's settings of a layer
                (``{"weight_quant_params": ...}``).

        Raises:
            ValueError: For an unknown key (naming the nearest known one) or a value that is not allowed.

        Example:
            >>> hqq_cpp.LayerConfig.from_dict({"nbits": 2}) == hqq_cpp.LayerConfig(nbits=2)
            True
        """
    def __copy__(self) -> LayerConfig:
        ...
    def __deepcopy__(self, memo: dict) -> LayerConfig:
        ...
    def __eq__(self, arg0: typing.Any) -> bool:
        ...
    def __getstate__(self) -> dict:
        ...
    def __hash__(self) -> int:
        ...
    def __init__(self, nbits: int | float = 4, group_size: int | None = 64, axis: int | None = 1, solver: str = 'joint', balance: str = 'auto', lp_norm: float | None = None, iterations: int | None = None, quant_zero: bool = False, quant_scale: bool = False, meta_dtype: typing.Any = 'float16', beta: int | float = 10.0, kappa: int | float = 1.01, round_zero: bool | None = None, grow_beta: bool = False, **kwargs) -> None:
        ...
    def __repr__(self) -> str:
        ...
    def __setstate__(self, arg0: dict) -> None:
        ...
    def replace(self, **kwargs) -> LayerConfig:
        """
        A copy with other values.

        Args:
            **changes: Settings by name.

        Raises:
            ValueError: For an unknown setting or a value that is not allowed.

        Example:
            >>> hqq_cpp.LayerConfig().replace(axis=0).axis
            0
        """
    def to_dict(self) -> dict:
        """
        All settings as a dict that ``json.dumps`` takes.

        Example:
            >>> hqq_cpp.LayerConfig(nbits=2).to_dict()["nbits"]
            2
        """
    @property
    def axis(self) -> int:
        ...
    @property
    def balance(self) -> str:
        ...
    @property
    def beta(self) -> float:
        ...
    @property
    def group_size(self) -> int | None:
        ...
    @property
    def grow_beta(self) -> bool:
        ...
    @property
    def iterations(self) -> int | None:
        ...
    @property
    def kappa(self) -> float:
        ...
    @property
    def lp_norm(self) -> float | None:
        ...
    @property
    def meta_dtype(self) -> str:
        ...
    @property
    def nbits(self) -> int | float:
        ...
    @property
    def quant_scale(self) -> bool:
        ...
    @property
    def quant_zero(self) -> bool:
        ...
    @property
    def round_zero(self) -> bool | None:
        ...
    @property
    def solver(self) -> str:
        ...
class HqqConfig:
    """
    How a model is quantized.

    Every argument is an attribute that can be read and set; setting checks the value at once. Rules of
    ``dynamic_config`` take what they do not name from the settings at the moment they are given.

    Args:
        nbits: 8, 6, 5, 4, 3, 2, 1.58 (three levels) or 1.
        group_size: Weights that share a scale and a zero: a multiple of 8, or None for one group per
            row (axis 1) or column (axis 0).
        axis: 1: groups lie inside rows; 0: inside columns, as upstream hqq groups them.
        solver: 'joint' (fits scale and zero), 'hqq' (upstream's algorithm) or 'minmax' (round to
            nearest).
        balance: 'sinkhorn' (a factor per input column), 'none', or 'auto': sinkhorn unless the layer
            has importance weights.
        lp_norm: Norm of the error that is minimised; None: 2 for joint, 0.7 for hqq.
        iterations: Steps of the solver; None: what suits it.
        quant_zero: Store zeros as 8-bit codes.
        quant_scale: Store scales as 8-bit codes.
        meta_dtype: Type of stored scales and zeros: 'float16', 'bfloat16', 'float32', or the NumPy or
            torch dtype.
        dynamic_config: Name of layers or of a parent, glob or 're:' regex -> settings that differ
            there, or None to leave the layers unquantized. Their order counts.
        skip_modules: Names of layers or of parents, globs or 're:' regexes of layers to leave as they
            are.
        beta: Penalty of the half-quadratic solvers (used when lp_norm < 2).
        kappa: Growth of beta a step, where grow_beta is set.
        round_zero: Round the zero before solver 'hqq' starts; None: only at 4 bits, like upstream.
        dynamic_only: Leave every layer unquantized that no rule names.
        grow_beta: Multiply beta by kappa after every step of solver 'hqq', as upstream's master branch
            does. Its releases do not.
        importance: Weights of the squared errors of each layer's input columns: a mapping from layer
            names to arrays [in_features], or a safetensors file of such (``hqq-cpp importance``);
            'random': collect them (quantize_model_ and from_pretrained only). Not part of
            ``to_dict()``.

    Raises:
        ValueError: If a value is not allowed, or for an unknown argument (naming the nearest known
            one).

    Example:
        >>> config = hqq_cpp.HqqConfig(nbits=3, dynamic_config={"mlp.down_proj": {"nbits": 6}})
        >>> config.layer("model.layers.0.mlp.down_proj").nbits
        6
        >>> config.layer("model.layers.0.self_attn.q_proj").nbits
        3
        >>> config.layer("lm_head") is None
        True
    """
    __hash__: typing.ClassVar[None] = None
    quant_method: typing.ClassVar[str] = 'hqq_cpp'
    axis: int
    balance: str
    beta: int | float
    group_size: int | None
    iterations: int | None
    kappa: int | float
    lp_norm: float | None
    meta_dtype: str
    nbits: int | float
    quant_scale: bool
    quant_zero: bool
    round_zero: bool | None
    solver: str
    @staticmethod
    def from_dict(config: typing.Any) -> HqqConfig:
        """
        Reads a dict.

        Args:
            config: Our own form (every key optional), that of Transformers' ``HqqConfig``, upstream's
                ``BaseQuantizeConfig`` (alone or per layer tag), a LayerConfig, an object whose
                ``to_dict()`` gives one of these, or None for the defaults.

        Raises:
            ValueError: For an unknown key (naming the nearest known one) or a value that is not allowed.
            TypeError: If it is none of these.

        Example:
            >>> upstream = {"weight_quant_params": {"nbits": 2, "group_size": 16, "axis": 1}}
            >>> hqq_cpp.HqqConfig.from_dict(upstream).nbits
            2
        """
    def __copy__(self) -> HqqConfig:
        ...
    def __deepcopy__(self, memo: dict) -> HqqConfig:
        ...
    def __eq__(self, arg0: typing.Any) -> bool:
        ...
    def __getstate__(self) -> tuple[str, typing.Any]:
        ...
    def __init__(self, nbits: int | float = 4, group_size: int | None = 64, axis: int | None = 1, solver: str = 'joint', balance: str = 'auto', lp_norm: float | None = None, iterations: int | None = None, quant_zero: bool = False, quant_scale: bool = False, meta_dtype: typing.Any = 'float16', dynamic_config: dict[str, dict | None] | None = None, skip_modules: collections.abc.Sequence | None = ('lm_head',), beta: int | float = 10.0, kappa: int | float = 1.01, round_zero: bool | None = None, dynamic_only: bool = False, grow_beta: bool = False, importance: typing.Any = None, **kwargs) -> None:
        ...
    def __repr__(self) -> str:
        ...
    def __setstate__(self, arg0: tuple) -> None:
        ...
    def layer(self, name: str, must_be_named: bool = False) -> LayerConfig | None:
        """
        The settings of one layer.

        Args:
            name: Full name without '.weight', such as 'model.layers.0.mlp.down_proj'.
            must_be_named: Only rules that name the layer itself count, neither the defaults nor a rule for
                a parent: what decides about embeddings.

        Returns:
            A LayerConfig, or None if the layer stays unquantized.

        Example:
            >>> hqq_cpp.HqqConfig().layer("model.layers.0.mlp.up_proj").group_size
            64
        """
    def to_dict(self) -> dict:
        """
        All settings as a dict that ``json.dumps`` and ``from_dict`` take.

        Example:
            >>> hqq_cpp.HqqConfig(nbits=2).to_dict()["nbits"]
            2
        """
    def unmatched_names(self, layers: collections.abc.Sequence[str], others: collections.abc.Sequence[str] = [], importance: collections.abc.Sequence[str] = []) -> list[str]:
        """
        What in the config fits no layer of a model: most often a typing mistake.

        Args:
            layers: Full names of all matrices of the model without '.weight', also of those that stay
                dense.
            others: Names of its other weights, which skip_modules may name.
            importance: Names of importance vectors, which must be full names.

        Returns:
            A sentence for each of the first eight names, with the nearest one that exists, and one that
            counts the rest.

        Example:
            >>> hqq_cpp.HqqConfig(skip_modules=["q_prj"]).unmatched_names(["model.layers.0.q_proj"])
            ["skip_modules names no layer: 'q_prj'; nearest is 'q_proj'"]
        """
    @property
    def dynamic_config(self) -> dict[str, dict | None] | None:
        """
        Rules as a read-only mapping; assign a new dict to change them.
        """
    @dynamic_config.setter
    def dynamic_config(self, arg1: dict[str, dict | None] | None) -> None:
        ...
    @property
    def dynamic_only(self) -> bool:
        """
        Whether layers that no rule names stay unquantized.
        """
    @dynamic_only.setter
    def dynamic_only(self, arg1: bool) -> None:
        ...
    @property
    def grow_beta(self) -> bool:
        """
        Whether beta grows by kappa a step of solver 'hqq'.
        """
    @grow_beta.setter
    def grow_beta(self, arg1: bool) -> None:
        ...
    @property
    def importance(self) -> typing.Any:
        """
        Where importance comes from: None, 'random', a path or a mapping.
        """
    @importance.setter
    def importance(self, arg1: typing.Any) -> None:
        ...
    @property
    def skip_modules(self) -> tuple[str, ...]:
        """
        Layers left as they are, as a tuple; assign a new one to change them.
        """
    @skip_modules.setter
    def skip_modules(self, arg1: collections.abc.Sequence | None) -> None:
        ...
class BitWidth:
    """
    A bit width and how its codes are packed into rows.

    A code is split into two planes, low bits first. A row is a sequence of blocks, and a block stores
    one plane after the other; a ternary block stores five codes a byte.
    """
    @property
    def block(self) -> int:
        """
        Codes of a block; the last one of a row may be shorter.
        """
    @property
    def high_bits(self) -> int:
        """
        Bits of the second plane; 0: there is none.
        """
    @property
    def low_bits(self) -> int:
        """
        Bits of the first plane; 0: ternary.
        """
    @property
    def max_code(self) -> int:
        """
        Largest code.
        """
    @property
    def nbits(self) -> int | float:
        """
        8, 6, 5, 4, 3, 2, 1.58 or 1.
        """
class QuantizedTensor:
    """
    A quantized matrix [out_features, in_features].

    W_r = (W_q - zero) * scale * col_scale. Made by ``quantize``, ``Checkpoint.load`` and
    ``from_tensors``; immutable. Tensors share memory with it and keep that memory alive.

    Attributes:
        W_q: uint8 [out_features, bytes a row], codes packed inside the row (docs/format.md).
        scale, zero: meta_dtype, or uint8 codes with quant_scale, quant_zero. [out_features, groups of a
            row] for axis 1; [out_features / group_size, in_features] for axis 0, or [1, groups] when
            group_size does not divide out_features.
        scale_step, scale_offset, zero_step, zero_offset: float32, one per 128 codes: value = code *
            step + offset. None without quant_scale, quant_zero.
        col_scale: meta_dtype [in_features], or None when the layer is not balanced.

    Example:
        >>> import numpy as np
        >>> W = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
        >>> q = hqq_cpp.quantize(W, {"nbits": 4, "group_size": 32, "balance": "none"})
        >>> q
        QuantizedTensor([8, 64], nbits=4, group_size=32, axis=1, bits_per_weight=5)
        >>> q.W_q.shape, q.scale.shape, q.col_scale is None
        ((8, 32), (8, 2), True)
    """
    @staticmethod
    def from_tensors(tensors: dict, config: typing.Any, shape: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]) -> QuantizedTensor:
        """
        Builds a quantized matrix from its tensors.

        Args:
            tensors: Name -> array (NumPy, torch, Tensor, anything with __dlpack__), as ``tensors()`` gives
                them. Contiguous arrays are shared, not copied: do not change them afterwards.
            config: Settings they were made with: a LayerConfig, or a dict of settings.
                balance 'auto' stands for what the presence of col_scale says.
            shape: (out_features, in_features).

        Raises:
            ValueError: For an unknown name.
            FormatError: If a tensor is missing, or has another shape or dtype than config and shape demand.

        Example:
            >>> import numpy as np
            >>> tensors = {"W_q": np.array([[0b11100100, 0b11100100]], np.uint8),
            ...            "scale": np.array([[0.5]], np.float16), "zero": np.array([[1]], np.float16)}
            >>> q = hqq_cpp.QuantizedTensor.from_tensors(tensors, {"nbits": 2, "group_size": 8}, (1, 8))
            >>> hqq_cpp.dequantize(q)[0, :4].tolist()
            [-0.5, 0.0, 0.5, 1.0]
        """
    def __copy__(self) -> QuantizedTensor:
        ...
    def __getstate__(self) -> tuple[LayerConfig, tuple[int, int], dict]:
        ...
    def __repr__(self) -> str:
        ...
    def __setstate__(self, arg0: tuple) -> None:
        ...
    def codes(self) -> numpy.ndarray:
        """
        The codes, unpacked.

        Returns:
            uint8 NumPy array [out_features, in_features], a copy.

        Example:
            >>> import numpy as np
            >>> W = np.array([[0, 1, 2, 3, 0, 1, 2, 3]], np.float32)
            >>> hqq_cpp.quantize(W, {"nbits": 2, "group_size": 8, "balance": "none"}).codes().tolist()
            [[0, 1, 2, 3, 0, 1, 2, 3]]
        """
    def tensors(self) -> dict:
        """
        All present tensors by name, in the order of the file.

        Example:
            >>> import numpy as np
            >>> q = hqq_cpp.quantize(np.eye(8, dtype=np.float32), {"group_size": 8, "balance": "none"})
            >>> list(q.tensors())
            ['W_q', 'scale', 'zero']
        """
    def tile(self, threads: typing.SupportsInt | typing.SupportsIndex = 0) -> TiledTensor:
        """
        The matrix in the order in which the CPU kernels read it.

        Args:
            threads: CPU threads; 0: see default_threads().

        Returns:
            A TiledTensor. It shares col_scale and the like; codes, scale and zero are copies.

        Raises:
            ValueError: With axis 0, unless group_size is a multiple of 16 that divides out_features.

        Example:
            >>> import numpy as np
            >>> q = hqq_cpp.quantize(np.eye(64, dtype=np.float32), {"nbits": 4, "balance": "none"})
            >>> q.tile().W_q.shape
            (4, 2, 256)
        """
    @property
    def W_q(self) -> Tensor:
        ...
    @property
    def axis(self) -> int:
        """
        1: groups inside rows; 0: inside columns.
        """
    @property
    def bits_per_weight(self) -> float:
        """
        8 * nbytes / (out_features * in_features).
        """
    @property
    def col_scale(self) -> Tensor | None:
        ...
    @property
    def config(self) -> LayerConfig:
        """
        LayerConfig it was quantized with.
        """
    @property
    def group_size(self) -> int | None:
        """
        Weights a group has, or None.
        """
    @property
    def in_features(self) -> int:
        """
        Columns of W.
        """
    @property
    def nbits(self) -> int | float:
        """
        8, 6, 5, 4, 3, 2, 1.58 or 1.
        """
    @property
    def nbytes(self) -> int:
        """
        Bytes of all tensors.
        """
    @property
    def out_features(self) -> int:
        """
        Rows of W.
        """
    @property
    def scale(self) -> Tensor:
        ...
    @property
    def scale_offset(self) -> Tensor | None:
        ...
    @property
    def scale_step(self) -> Tensor | None:
        ...
    @property
    def shape(self) -> tuple[int, int]:
        """
        (out_features, in_features).
        """
    @property
    def zero(self) -> Tensor:
        ...
    @property
    def zero_offset(self) -> Tensor | None:
        ...
    @property
    def zero_step(self) -> Tensor | None:
        ...
class TiledTensor:
    """
    A quantized matrix in the order in which the CPU kernels read it.

    Made by ``QuantizedTensor.tile``; immutable. linear() is fastest with it: other weights are put into
    this order in every call.

    Attributes:
        W_q: uint8 [tiles of 16 rows, units of 32 columns, bytes of a unit] (docs/kernels.md).
        scale, zero: [tiles, groups of a row, 16] for axis 1, else as in QuantizedTensor.
        scale_step, scale_offset, zero_step, zero_offset, col_scale: As in QuantizedTensor.

    Example:
        >>> import numpy as np
        >>> q = hqq_cpp.quantize(np.eye(64, dtype=np.float32), {"nbits": 3, "balance": "none"})
        >>> t = q.tile()
        >>> t
        TiledTensor([64, 64], nbits=3, group_size=64, axis=1)
        >>> bytes(t.untile().W_q.numpy()) == bytes(q.W_q.numpy())
        True
    """
    @staticmethod
    def from_tensors(tensors: dict, config: typing.Any, shape: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]) -> TiledTensor:
        """
        Builds a tiled matrix from its tensors, as
        QuantizedTensor.from_tensors does.

        Raises:
            ValueError: For an unknown name.
            FormatError: If a tensor is missing, or has another shape or dtype than config and shape demand.
        """
    def __repr__(self) -> str:
        ...
    def dequantize_rows(self, rows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> numpy.ndarray:
        """
        Some rows of W_r, as an embedding takes them.

        Args:
            rows: Indices of rows.

        Returns:
            float32 NumPy array [len(rows), in_features].

        Raises:
            ValueError: For an index outside [0, out_features).

        Example:
            >>> import numpy as np
            >>> q = hqq_cpp.quantize(np.eye(64, dtype=np.float32), {"nbits": 8, "balance": "none"})
            >>> q.tile().dequantize_rows([3, 3]).shape
            (2, 64)
        """
    def tensors(self) -> dict:
        """
        All present tensors by name.
        """
    def untile(self, threads: typing.SupportsInt | typing.SupportsIndex = 0) -> QuantizedTensor:
        """
        Format 1 again, bit for bit.

        Args:
            threads: CPU threads; 0: see default_threads().

        Returns:
            A QuantizedTensor.
        """
    @property
    def W_q(self) -> Tensor:
        ...
    @property
    def col_scale(self) -> Tensor | None:
        ...
    @property
    def config(self) -> LayerConfig:
        """
        LayerConfig it was quantized with.
        """
    @property
    def in_features(self) -> int:
        """
        Columns of W.
        """
    @property
    def nbytes(self) -> int:
        """
        Bytes of all tensors.
        """
    @property
    def out_features(self) -> int:
        """
        Rows of W.
        """
    @property
    def scale(self) -> Tensor:
        ...
    @property
    def scale_offset(self) -> Tensor | None:
        ...
    @property
    def scale_step(self) -> Tensor | None:
        ...
    @property
    def shape(self) -> tuple[int, int]:
        """
        (out_features, in_features).
        """
    @property
    def zero(self) -> Tensor:
        ...
    @property
    def zero_offset(self) -> Tensor | None:
        ...
    @property
    def zero_step(self) -> Tensor | None:
        ...
class QuantizeStats:
    """
    Errors of the quantized W_r against W, over all weights.

    Example:
        >>> import numpy as np
        >>> W = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
        >>> q, stats = hqq_cpp.quantize(W, {"nbits": 4}, stats=True)
        >>> 0 < stats.mean_abs_error < stats.rms_error < stats.max_abs_error
        True
        >>> sorted(stats.to_dict())
        ['max_abs_error', 'mean_abs_error', 'relative_error', 'rms_error']
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: typing.Any) -> bool:
        ...
    def __repr__(self) -> str:
        ...
    def to_dict(self) -> dict[str, typing.Any]:
        """
        All attributes as a dict of plain values.
        """
    @property
    def max_abs_error(self) -> float:
        """
        max |W - W_r|.
        """
    @property
    def mean_abs_error(self) -> float:
        """
        mean |W - W_r|.
        """
    @property
    def relative_error(self) -> float:
        """
        ||W - W_r|| / ||W|| (Frobenius); 0 when W is all zeros.
        """
    @property
    def rms_error(self) -> float:
        """
        sqrt(mean (W - W_r)^2).
        """
class Roles:
    """
    What the tensors of a model are: linear weights, embeddings, ...

    The rule of hqq-cpp quantize, which looks at names, shapes, types, tensors beside each other and the
    model types in config.json.

    Args:
        tensors: (name, shape, dtype) of all tensors of the model, as in its files or its state dict. A
            dtype is a name ("bfloat16") or one of torch or NumPy; one that format 1 does not know
            counts as uint8.
        config: The text of config.json, or "".

    Raises:
        FormatError: If config is no JSON.

    Example:
        >>> roles = hqq_cpp._core.Roles([("mlp.gate.weight", (4, 64), "float32"),
        ...                              ("mlp.up.weight", (128, 64), "float32")])
        >>> roles.role("mlp.gate.weight"), roles.role("mlp.up.weight")
        ('router', 'linear')
    """
    def __init__(self, tensors: collections.abc.Iterable, config: str = '') -> None:
        ...
    def role(self, tensor: str) -> str:
        """
        The role of a tensor.

        Args:
            tensor: Its name.

        Returns:
            'linear', 'head', 'embedding', 'router', 'experts' ([experts, out, in]), 'conv1d' (stored
            [in, out]), 'conv2d' ([out, in, 1, 1]), or 'none': anything else, and unknown names.
        """
class NativeLayer:
    """
    For hqq_cpp.backends: a layer by the addresses of its tensors.
    """
    def __init__(self, config: LayerConfig, out_features: typing.SupportsInt | typing.SupportsIndex, in_features: typing.SupportsInt | typing.SupportsIndex, tiled: bool) -> None:
        ...
    def dequantize(self, addresses: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], out: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def dequantize_rows(self, addresses: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], rows: typing.SupportsInt | typing.SupportsIndex, count: typing.SupportsInt | typing.SupportsIndex, out: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def experts_linear(self, addresses: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], steps: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], parts: typing.SupportsInt | typing.SupportsIndex, counts: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], x: typing.SupportsInt | typing.SupportsIndex, stride: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex, y: typing.SupportsInt | typing.SupportsIndex, mode: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def kernel(self, rows: typing.SupportsInt | typing.SupportsIndex, mode: typing.SupportsInt | typing.SupportsIndex) -> tuple[str, str, str]:
        ...
    def linear(self, addresses: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], x: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, stride: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex, bias: typing.SupportsInt | typing.SupportsIndex, y: typing.SupportsInt | typing.SupportsIndex, mode: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
class CudaPlace:
    """
    For hqq_cpp.backends: a device and a stream.
    """
    def __init__(self, device: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
class CudaLayer:
    """
    For hqq_cpp.backends: a layer in device memory, by the addresses of its tensors.
    """
    def __init__(self, config: LayerConfig, out_features: typing.SupportsInt | typing.SupportsIndex, in_features: typing.SupportsInt | typing.SupportsIndex, tiled: bool) -> None:
        ...
    def dequantize(self, addresses: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(8)"], out: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex, place: CudaPlace) -> None:
        ...
    def dequantize_rows(self, addresses: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(8)"], ids: typing.SupportsInt | typing.SupportsIndex, count: typing.SupportsInt | typing.SupportsIndex, out: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex, place: CudaPlace) -> None:
        ...
    def experts_linear(self, addresses: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(8)"], steps: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(8)"], experts: typing.SupportsInt | typing.SupportsIndex, parts: typing.SupportsInt | typing.SupportsIndex, part: typing.SupportsInt | typing.SupportsIndex, row_begin: typing.SupportsInt | typing.SupportsIndex, x: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, x_stride: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex, bias: typing.SupportsInt | typing.SupportsIndex, y: typing.SupportsInt | typing.SupportsIndex, y_stride: typing.SupportsInt | typing.SupportsIndex, place: CudaPlace) -> bool:
        ...
    def linear(self, addresses: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(8)"], x: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, x_stride: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex, bias: typing.SupportsInt | typing.SupportsIndex, y: typing.SupportsInt | typing.SupportsIndex, place: CudaPlace) -> bool:
        ...
    def max_rows(self, x_dtype: typing.SupportsInt | typing.SupportsIndex, device: typing.SupportsInt | typing.SupportsIndex) -> int | None:
        ...
    def pack(self, addresses: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(8)"], tiles: typing.SupportsInt | typing.SupportsIndex, place: CudaPlace) -> None:
        ...
    def tiles_bytes(self, device: typing.SupportsInt | typing.SupportsIndex) -> int | None:
        ...
    def unpack(self, addresses: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(8)"], W_q: typing.SupportsInt | typing.SupportsIndex, place: CudaPlace) -> None:
        ...
class CudaSolver:
    """
    For hqq_cpp.backends: quantizes a matrix in device memory.
    """
    def __init__(self, config: typing.Any, name: str, dtype: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, cols: typing.SupportsInt | typing.SupportsIndex, importance: typing.Any) -> None:
        ...
    def solve(self, W: typing.SupportsInt | typing.SupportsIndex, stride: typing.SupportsInt | typing.SupportsIndex, addresses: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(8)"], workspace: typing.SupportsInt | typing.SupportsIndex, workspace_bytes: typing.SupportsInt | typing.SupportsIndex, place: CudaPlace) -> QuantizeStats:
        ...
    def workspace_bytes(self, device: typing.SupportsInt | typing.SupportsIndex) -> int:
        ...
    @property
    def config(self) -> LayerConfig:
        ...
class Checkpoint:
    """
    A checkpoint folder or a single .safetensors file, opened and validated.

    Reading is lazy: tensors are views of a memory map.

    Args:
        path: Folder with model.safetensors, or with model.safetensors.index.json and its shards; or a
            file.

    Raises:
        FormatError: If the index or a file breaks its format.
        OSError: If a file cannot be read.

    Example:
        >>> checkpoint = hqq_cpp.Checkpoint(model)
        >>> len(checkpoint) == len(checkpoint.tensor_names)
        True
        >>> checkpoint.tensor("model.norm.weight").shape
        (256,)
        >>> checkpoint.config["model_type"]
        'llama'
    """
    def __contains__(self, arg0: str) -> bool:
        ...
    def __init__(self, path: os.PathLike | str | bytes) -> None:
        ...
    def __iter__(self) -> collections.abc.Iterator:
        ...
    def __len__(self) -> int:
        ...
    def __repr__(self) -> str:
        ...
    def load(self, name: str, expert: typing.SupportsInt | typing.SupportsIndex = 0) -> QuantizedTensor:
        """
        Reads one quantized layer.

        Args:
            name: One of ``quantized_layers()``.
            expert: Which matrix of fused experts [E, out, in].

        Raises:
            ValueError: If there is no such quantized layer or expert.
            FormatError: If its tensors do not fit the settings in config.json.

        Example:
            >>> report = hqq_cpp.quantize_checkpoint(model, folder / "load-example")
            >>> hqq_cpp.Checkpoint(folder / "load-example").load("model.layers.0.mlp.down_proj").nbits
            4
        """
    def quantized_layers(self) -> list[str]:
        """
        Names of the quantized layers, in file order; empty for a dense checkpoint.

        Example:
            >>> hqq_cpp.Checkpoint(model).quantized_layers()
            []
        """
    def tensor(self, name: str) -> Tensor:
        """
        One tensor as it is in the file, without a copy.

        Args:
            name: Its name, one of ``tensor_names``.

        Returns:
            A read-only Tensor in a memory map of the file; it stays valid without the Checkpoint.

        Raises:
            KeyError: If there is no such tensor.

        Example:
            >>> hqq_cpp.Checkpoint(model).tensor("model.norm.weight").ndim
            1
        """
    @property
    def config(self) -> dict | None:
        """
        config.json as a dict, or None if there is none.
        """
    @property
    def is_sharded(self) -> bool:
        """
        True if there is an index of shards.
        """
    @property
    def metadata(self) -> dict[str, str]:
        """
        The text entries of the files' headers; the first file wins.
        """
    @property
    def path(self) -> pathlib.Path:
        """
        Where it is.
        """
    @property
    def shard_names(self) -> list[str]:
        """
        File names, sorted.
        """
    @property
    def tensor_names(self) -> list[str]:
        """
        Names of all tensors, in file order.
        """
    @property
    def total_bytes(self) -> int:
        """
        Bytes of all tensors.
        """
class Progress:
    """
    What a long operation is at; given to ``progress`` callbacks.

    Called in the thread that started the operation, about ten times a second at most and once at the
    end.

    Example:
        >>> seen = []
        >>> report = hqq_cpp.verify_checkpoint(model, progress=seen.append)
        >>> seen[-1].done == seen[-1].total
        True
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: typing.Any) -> bool:
        ...
    def __repr__(self) -> str:
        ...
    def to_dict(self) -> dict[str, typing.Any]:
        """
        All attributes as a dict of plain values.
        """
    @property
    def current(self) -> str:
        """
        Tensor or file at work.
        """
    @property
    def done(self) -> int:
        """
        Weights (or bytes, for verify and copies) so far.
        """
    @property
    def seconds(self) -> float:
        """
        Since the start.
        """
    @property
    def stage(self) -> str:
        """
        'quantize', 'verify', ...
        """
    @property
    def total(self) -> int:
        """
        Weights or bytes in all.
        """
class LayerReport:
    """
    What was done with one layer.

    Example:
        >>> report = hqq_cpp.quantize_checkpoint(model, folder / "unused", {"nbits": 2}, dry_run=True)
        >>> report.layers[0].config.nbits
        2
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: typing.Any) -> bool:
        ...
    def __repr__(self) -> str:
        ...
    def to_dict(self) -> dict[str, typing.Any]:
        """
        All attributes as a dict of plain values.
        """
    @property
    def bytes_after(self) -> int:
        """
        Of the quantized one.
        """
    @property
    def bytes_before(self) -> int:
        """
        Of the dense weight.
        """
    @property
    def config(self) -> LayerConfig:
        """
        The LayerConfig of the layer.
        """
    @property
    def name(self) -> str:
        """
        Full name, without '.weight'.
        """
    @property
    def shape(self) -> tuple[int, ...]:
        """
        [out_features, in_features], or [experts, out_features, in_features].
        """
    @property
    def stats(self) -> QuantizeStats:
        """
        Errors; zeros after a dry run.
        """
    @property
    def tag(self) -> str:
        """
        See layer_tag.
        """
class QuantizeReport:
    """
    What quantize_checkpoint did.

    Example:
        >>> report = hqq_cpp.quantize_checkpoint(model, folder / "unused", {"nbits": 2}, dry_run=True)
        >>> report.bytes_after < report.bytes_before
        True
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: typing.Any) -> bool:
        ...
    def __repr__(self) -> str:
        ...
    def to_dict(self) -> dict[str, typing.Any]:
        """
        All attributes as a dict of plain values.
        """
    @property
    def bits_per_weight(self) -> float:
        """
        Of the quantized layers, metadata included.
        """
    @property
    def bytes_after(self) -> int:
        """
        Of all tensors.
        """
    @property
    def bytes_before(self) -> int:
        """
        Of all tensors.
        """
    @property
    def copied(self) -> list[str]:
        """
        Matrices that were left as they are.
        """
    @property
    def layers(self) -> list[LayerReport]:
        """
        The quantized layers.
        """
    @property
    def seconds(self) -> float:
        """
        The whole operation.
        """
    @property
    def warnings(self) -> list[str]:
        """
        A sentence each: names that fit no layer, weights left out.
        """
    @property
    def weights(self) -> int:
        """
        How many were quantized.
        """
class VerifyReport:
    """
    What verify_checkpoint found.

    Example:
        >>> report = hqq_cpp.verify_checkpoint(model)  # not one of ours
        >>> report.ok, report.problems[-1]
        (False, 'no shard describes a quantized layer')
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: typing.Any) -> bool:
        ...
    def __repr__(self) -> str:
        ...
    def to_dict(self) -> dict[str, typing.Any]:
        """
        All attributes as a dict of plain values.
        """
    @property
    def bytes(self) -> int:
        """
        Bytes read.
        """
    @property
    def files(self) -> int:
        """
        Files checked.
        """
    @property
    def layers(self) -> int:
        """
        Quantized layers checked.
        """
    @property
    def ok(self) -> bool:
        """
        True without problems.
        """
    @property
    def problems(self) -> list[str]:
        """
        One sentence each; empty: all is well.
        """
class TensorDiff:
    """
    How one tensor differs between two checkpoints.

    Example:
        >>> diff = hqq_cpp.diff_checkpoints(model, model)[0]
        >>> diff.identical, diff.max_abs
        (True, 0.0)
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: typing.Any) -> bool:
        ...
    def __repr__(self) -> str:
        ...
    def to_dict(self) -> dict[str, typing.Any]:
        """
        All attributes as a dict of plain values.
        """
    @property
    def identical(self) -> bool:
        """
        All values are equal.
        """
    @property
    def max_abs(self) -> float:
        """
        max |A - B|.
        """
    @property
    def mean_abs(self) -> float:
        """
        mean |A - B|.
        """
    @property
    def name(self) -> str:
        """
        Tensor, or quantized layer.
        """
    @property
    def note(self) -> str:
        """
        'only in A', 'shapes differ: ...', or empty.
        """
    @property
    def relative(self) -> float:
        """
        ||A - B|| / ||A||.
        """
    @property
    def rms(self) -> float:
        """
        sqrt(mean (A - B)^2).
        """
def can_tile(config: LayerConfig, out_features: typing.SupportsInt | typing.SupportsIndex, in_features: typing.SupportsInt | typing.SupportsIndex) -> bool:
    """
    Whether there is a TiledTensor of such a matrix.
    """
def cli_main(argv: collections.abc.Sequence[str]) -> int:
    """
    Runs the command hqq-cpp with argv (argv[0] is its name); returns the exit code.
    """
def convert_checkpoint(src: os.PathLike | str | bytes, dst: os.PathLike | str | bytes, to: str, threads: typing.SupportsInt | typing.SupportsIndex, force: bool, follow_links: bool, progress: typing.Any) -> None:
    """
    See hqq_cpp.convert_checkpoint.
    """
def cpu_target() -> str:
    """
    The instruction set in use.

    The best one, or the one that the environment variable ``HQQ_CPU_TARGET`` named when the library
    first needed it. Results do not depend on it.

    Example:
        >>> hqq_cpp.cpu_target() in hqq_cpp.cpu_targets()
        True
    """
def cpu_targets() -> list[str]:
    """
    Instruction sets that this machine can run, best first.

    Example:
        >>> "scalar" in hqq_cpp.cpu_targets()
        True
    """
def cuda_is_available() -> bool:
    """
    True if libhqq_cuda was found and can use a GPU; 'hqq-cpp doctor' says why not.

    Example:
        >>> isinstance(hqq_cpp.cuda_is_available(), bool)
        True
    """
def cuda_require_device(device: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Raises CudaError unless the kernels can run on this device.
    """
def default_threads() -> int:
    """
    Threads that ``threads=0`` means.

    ``HQQ_NUM_THREADS`` if it is set to a positive number, else the processors this process may run on.

    Example:
        >>> hqq_cpp.default_threads() > 0
        True
    """
@typing.overload
def dequantize(q: QuantizedTensor, dtype: typing.Any, threads: typing.SupportsInt | typing.SupportsIndex) -> numpy.ndarray | Tensor:
    """
    See hqq_cpp.dequantize.
    """
@typing.overload
def dequantize(q: TiledTensor, dtype: typing.Any, threads: typing.SupportsInt | typing.SupportsIndex) -> numpy.ndarray | Tensor:
    """
    See hqq_cpp.dequantize.
    """
def dequantize_checkpoint(src: os.PathLike | str | bytes, dst: os.PathLike | str | bytes, dtype: typing.Any, threads: typing.SupportsInt | typing.SupportsIndex, force: bool, follow_links: bool, progress: typing.Any) -> None:
    """
    See hqq_cpp.dequantize_checkpoint.
    """
def diff_checkpoints(a: os.PathLike | str | bytes, b: os.PathLike | str | bytes, threads: typing.SupportsInt | typing.SupportsIndex, progress: typing.Any) -> list[TensorDiff]:
    """
    See hqq_cpp.diff_checkpoints.
    """
def dtype_code(dtype: typing.Any) -> int:
    """
    The code that NativeLayer takes for a dtype.
    """
def find_quantization(files: collections.abc.Sequence[os.PathLike | str | bytes]) -> str | None:
    """
    What says that weight files, or the folder they are in, are quantized already; None if nothing does.
    """
def from_upstream(tensors: dict, name: str) -> QuantizedTensor:
    """
    Converts one layer of upstream hqq's state_dict.

    Args:
        tensors: Key ("W_q", "nbits", ...) -> array; a bias is ignored.
        name: Of the layer, for messages.

    Raises:
        FormatError: For tensors that upstream would not have written.
        ValueError: For a layer that format 1 cannot hold.
    """
def is_adapter_name(component: str) -> bool:
    """
    Whether a component of a name is what peft calls a part of an adapter: 'lora_A'.
    """
def layer_tag(name: str) -> str:
    """
    The tag of a layer: its name without 'model', 'layers' and numbers.

    Args:
        name: Full name of the layer.

    Example:
        >>> hqq_cpp.layer_tag("model.layers.3.self_attn.q_proj")
        'self_attn.q_proj'
    """
@typing.overload
def linear(x: typing.Any, q: QuantizedTensor, bias: typing.Any, mode: str, threads: typing.SupportsInt | typing.SupportsIndex) -> numpy.ndarray:
    """
    See hqq_cpp.linear.
    """
@typing.overload
def linear(x: typing.Any, q: TiledTensor, bias: typing.Any, mode: str, threads: typing.SupportsInt | typing.SupportsIndex) -> numpy.ndarray:
    """
    See hqq_cpp.linear.
    """
def linear_mode_code(mode: str) -> int:
    """
    The code that NativeLayer takes for 'auto', 'fast' and 'exact'.
    """
def load_safetensors(path: os.PathLike | str | bytes) -> dict[str, Tensor]:
    """
    See hqq_cpp.load_safetensors.
    """
def packed_row_bytes(nbits: typing.SupportsFloat | typing.SupportsIndex, cols: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Bytes that a packed row takes.

    Args:
        nbits: 8, 6, 5, 4, 3, 2, 1.58 or 1.
        cols: Codes of the row.

    Raises:
        ValueError: For another number of bits.

    Example:
        >>> hqq_cpp._core.packed_row_bytes(3, 64)
        24
    """
def parse_json(text: str, where: str) -> typing.Any:
    """
    Reads a JSON text, with the limits of docs/cli.md.

    Args:
        text: One document.
        where: What messages begin with.

    Raises:
        FormatError: If it is no JSON, or has a duplicate key, or exceeds a limit.

    Example:
        >>> hqq_cpp._core.parse_json('{"a": [1, null]}', "example")
        {'a': [1, None]}
    """
def parse_upstream(tensors: dict, name: str) -> tuple:
    """
    What the tensors of a layer of upstream hqq say about it.

    Args:
        tensors: Key ("W_q", "nbits", ...) -> array. Of W_q, scale, zero and zero_scale only shape and
            dtype count.
        name: Of the layer, for messages.

    Returns:
        (LayerConfig, (out_features, in_features)).

    Raises:
        FormatError: For tensors that upstream would not have written.
        ValueError: For a layer that format 1 cannot hold.
    """
def quantize(W: typing.Any, config: typing.Any, name: str, importance: typing.Any, threads: typing.SupportsInt | typing.SupportsIndex, device: str, stats: bool) -> tuple[QuantizedTensor, QuantizeStats]:
    """
    See hqq_cpp.quantize.
    """
def quantize_checkpoint(src: os.PathLike | str | bytes, dst: os.PathLike | str | bytes, config: typing.Any, importance: os.PathLike | str | bytes, threads: typing.SupportsInt | typing.SupportsIndex, force: bool, resume: bool, dry_run: bool, device: str, follow_links: bool, progress: typing.Any) -> QuantizeReport:
    """
    See hqq_cpp.quantize_checkpoint.
    """
def read_json_file(path: os.PathLike | str | bytes) -> typing.Any:
    """
    Reads a JSON file that Python wrote, such as an index.

    Args:
        path: A regular file; NaN and numbers beyond a double in it become None.

    Raises:
        FormatError: As parse_json, and for a folder, a pipe or a device.
        OSError: If it cannot be read.
    """
def resolve_balance(balance: str, has_importance: bool) -> str:
    """
    What balance 'auto' means for a layer; 'none' and 'sinkhorn' mean themselves.
    """
def safetensors_metadata(path: os.PathLike | str | bytes) -> dict[str, str]:
    """
    See hqq_cpp.safetensors_metadata.
    """
def save_safetensors(path: os.PathLike | str | bytes, tensors: dict, metadata: collections.abc.Mapping[str, str]) -> None:
    """
    See hqq_cpp.save_safetensors.
    """
def settings_of(config: HqqConfig, layer: str, role: str) -> LayerConfig | None:
    """
    The LayerConfig of a layer, or None if it stays dense.

    A router does in any case, an embedding unless a rule names it; a head is skipped where skip_modules
    has "lm_head", whatever its own name is.

    Args:
        config: An HqqConfig.
        layer: Its name, without ".weight".
        role: As Roles.role() gives it.
    """
def tensor_specs(config: LayerConfig, out_features: typing.SupportsInt | typing.SupportsIndex, in_features: typing.SupportsInt | typing.SupportsIndex) -> list[tuple[str, tuple[int, ...], str]]:
    """
    The tensors that a layer has in format 1, in the order of files.

    Args:
        config: Settings of the layer; balance 'auto' is not allowed here.
        out_features: Rows of the weight.
        in_features: Columns of the weight.

    Returns:
        Name, shape and dtype of every tensor.

    Raises:
        ValueError: For balance 'auto' and for an empty shape.

    Example:
        >>> config = hqq_cpp.LayerConfig(nbits=4, balance="none")
        >>> hqq_cpp._core.tensor_specs(config, 8, 128)
        [('W_q', (8, 64), 'uint8'), ('scale', (8, 2), 'float16'), ('zero', (8, 2), 'float16')]
    """
def tile_specs(config: LayerConfig, out_features: typing.SupportsInt | typing.SupportsIndex, in_features: typing.SupportsInt | typing.SupportsIndex) -> list[tuple[str, tuple[int, ...], str]]:
    """
    The tensors of the same layer in tiles of the CPU kernels; see can_tile().
    """
def verify_checkpoint(path: os.PathLike | str | bytes, threads: typing.SupportsInt | typing.SupportsIndex, progress: typing.Any) -> VerifyReport:
    """
    See hqq_cpp.verify_checkpoint.
    """
BIT_WIDTHS: tuple
FORMAT_VERSION: int = 1
METADATA_BLOCK: int = 128
TENSOR_NAMES: tuple = ('W_q', 'scale', 'zero', 'scale_step', 'scale_offset', 'zero_step', 'zero_offset', 'col_scale')
TERNARY_DIGITS: int = 5
UPSTREAM_KEYS: list = ['W_q', 'nbits', 'group_size', 'shape', 'scale', 'zero', 'axis', 'packing', 'unpack_view_dtype', 'view_as_float', 'quant_scale', 'quant_zero', 'compute_dtype', 'bias', 'offload_meta', 'encoded_state_dict', 'stores_quant_config', 'channel_wise', 'optimize', 'round_zero']
__version__: str = '0.1.0'
_pybind11_version: str = '3.1'
