"""Functions for checkpoint folders and safetensors files. The work is done in C++, without the GIL."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from . import _core
from ._core import (
    Checkpoint,
    Progress,
    QuantizeReport,
    Tensor,
    TensorDiff,
    VerifyReport,
)
from .config import importance_of

if TYPE_CHECKING:
    from .api import ConfigLike

    PathLike = str | os.PathLike[str]
    ProgressCallback = Callable[[Progress], bool | None]


def quantize_checkpoint(
    src: PathLike,
    dst: PathLike,
    config: ConfigLike = None,
    *,
    importance: PathLike | Mapping[str, Any] | None = None,
    threads: int = 0,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    device: str = "cpu",
    follow_links: bool = False,
    progress: ProgressCallback | None = None,
) -> QuantizeReport:
    """Quantizes a checkpoint folder into a new one.

    Memory stays near the largest matrix. dst appears under its name only when it is whole.

    Args:
        src: Folder with safetensors and config.json, or a single .safetensors file.
        dst: Folder to write.
        config: An HqqConfig, a dict that HqqConfig.from_dict reads, or None for the defaults.
        importance: Layer name -> 1-D array [in_features] (see quantize), or a safetensors file of
            such. None: config.importance.
        threads: CPU threads; 0: see default_threads().
        force: Replace dst if it is a checkpoint folder.
        resume: Go on from the finished shards of an interrupted run with the same arguments.
        dry_run: Only the report: nothing is solved or written.
        device: Where to solve: 'cpu', 'cuda' or 'cuda:<number>'. The files are the same.
        follow_links: Use shards and copy files (tokenizer, README, ...) that src links to from elsewhere,
            instead of refusing them. Links into the hub's cache are always followed.
        progress: Called with a Progress in this thread, about ten times a second at most. Returning
            False stops the work; None and True let it go on.

    Returns:
        A QuantizeReport: layers with their errors, sizes, bits a weight. Its warnings, about names
        of the config that fit no layer and weights that are left out, are given as a UserWarning
        too.

    Raises:
        ValueError: If an argument is invalid, dst exists, or a layer cannot be quantized as asked.
        FormatError: If a file of src breaks its format.
        OSError: If the operating system refuses (no such file, disk full, ...).
        CudaError: If there is no such device, or it fails.
        Interrupted: If progress returned False. Finished shards stay for resume=True, as they do
            after an exception of progress or Ctrl-C, which are raised unchanged.

    Example:
        >>> report = hqq_cpp.quantize_checkpoint(model, folder / "tiny-3bit", {"nbits": 3})
        >>> report.bits_per_weight < 3.8
        True
    """
    if importance is None and (importance := getattr(config, "importance", None)) == "random":
        importance_of(config, "")
    with _importance_file(importance) as file:
        report = _core.quantize_checkpoint(
            src, dst, config, file, threads, force, resume, dry_run, device, follow_links, progress
        )
    if report.warnings:
        warnings.warn(f"[quantize] {'. '.join(report.warnings)}", stacklevel=2)
    return report


class _importance_file:
    """The path of an importance file; a mapping is written to a temporary one."""

    def __init__(self, importance):
        self._importance = importance
        self._folder = None

    def __enter__(self):
        if self._importance is None:
            return ""
        if not isinstance(self._importance, Mapping):
            return os.fspath(self._importance)
        self._folder = tempfile.TemporaryDirectory(prefix="hqq-cpp-")
        try:
            path = os.path.join(self._folder.name, "importance.safetensors")
            save_safetensors(path, self._importance)
        except BaseException:
            self._folder.cleanup()
            raise
        return path

    def __exit__(self, *exception):
        if self._folder is not None:
            self._folder.cleanup()


def dequantize_checkpoint(
    src: PathLike,
    dst: PathLike,
    dtype: Any = "auto",
    *,
    threads: int = 0,
    force: bool = False,
    follow_links: bool = False,
    progress: ProgressCallback | None = None,
) -> None:
    """Writes a checkpoint with every quantized layer as a dense weight again.

    Args:
        src: Quantized checkpoint, in our format or that of upstream hqq.
        dst: Folder to write.
        dtype: 'float32', 'float16', 'bfloat16', 'float64', or 'auto': what config.json names, else
            float32.
        threads: CPU threads; 0: see default_threads().
        force: Replace dst if it is a checkpoint folder.
        follow_links: See quantize_checkpoint().
        progress: See quantize_checkpoint.

    Raises:
        ValueError: If an argument is invalid or dst exists.
        FormatError: If a file of src breaks its format.
        OSError: If the operating system refuses.
        Interrupted: If progress returned False.

    Example:
        >>> report = hqq_cpp.quantize_checkpoint(model, folder / "tiny-8bit", {"nbits": 8})
        >>> hqq_cpp.dequantize_checkpoint(folder / "tiny-8bit", folder / "tiny-dense", "float16")
        >>> dense = hqq_cpp.Checkpoint(folder / "tiny-dense")
        >>> dense.tensor("model.layers.0.mlp.up_proj.weight").dtype
        'float16'
    """
    if isinstance(dtype, str) and dtype == "auto":
        dtype = _model_dtype(Checkpoint(src).config)
    _core.dequantize_checkpoint(src, dst, dtype, threads, force, follow_links, progress)


def _model_dtype(config: dict[str, Any] | None) -> str:
    for key in ("dtype", "torch_dtype"):
        dtype = (config or {}).get(key)
        if dtype in ("float32", "float16", "bfloat16", "float64"):
            return dtype
    return "float32"


def convert_checkpoint(
    src: PathLike,
    dst: PathLike,
    to: Literal["upstream", "hqq_cpp"],
    *,
    threads: int = 0,
    force: bool = False,
    follow_links: bool = False,
    progress: ProgressCallback | None = None,
) -> None:
    """Changes between our format and the state_dict layout of upstream hqq 0.2, without loss.

    Args:
        src: Quantized checkpoint in either format.
        dst: Folder to write.
        to: The format of dst.
        threads: CPU threads; 0: see default_threads().
        force: Replace dst if it is a checkpoint folder.
        follow_links: See quantize_checkpoint().
        progress: See quantize_checkpoint.

    Raises:
        ValueError: If an argument is invalid, dst exists, or a layer has what the other format
            cannot hold (upstream's has no col_scale: quantize with balance='none').
        FormatError: If a file of src breaks its format.
        OSError: If the operating system refuses.
        Interrupted: If progress returned False.

    Example:
        >>> report = hqq_cpp.quantize_checkpoint(model, folder / "plain", {"balance": "none"})
        >>> hqq_cpp.convert_checkpoint(folder / "plain", folder / "upstream", "upstream")
    """
    _core.convert_checkpoint(src, dst, to, threads, force, follow_links, progress)


def verify_checkpoint(
    path: PathLike, *, threads: int = 0, progress: ProgressCallback | None = None
) -> VerifyReport:
    """Recomputes every hash of a checkpoint and checks every quantized layer.

    Args:
        path: Checkpoint folder.
        threads: CPU threads; 0: see default_threads().
        progress: See quantize_checkpoint.

    Returns:
        A VerifyReport; ``ok`` is True when nothing is wrong.

    Raises:
        ValueError: If path is no folder.
        OSError: If the operating system refuses.
        Interrupted: If progress returned False.

    Example:
        >>> report = hqq_cpp.quantize_checkpoint(model, folder / "tiny-4bit")
        >>> hqq_cpp.verify_checkpoint(folder / "tiny-4bit").ok
        True
    """
    return _core.verify_checkpoint(path, threads, progress)


def diff_checkpoints(
    a: PathLike, b: PathLike, *, threads: int = 0, progress: ProgressCallback | None = None
) -> list[TensorDiff]:
    """Compares two checkpoints tensor by tensor on dense values.

    Args:
        a: Checkpoint; quantized layers are dequantized.
        b: Checkpoint to compare with it.
        threads: CPU threads; 0: see default_threads().
        progress: See quantize_checkpoint.

    Returns:
        One TensorDiff per tensor of either.

    Raises:
        FormatError: If a file breaks its format.
        OSError: If a file cannot be read.
        Interrupted: If progress returned False.

    Example:
        >>> all(diff.identical for diff in hqq_cpp.diff_checkpoints(model, model))
        True
    """
    return _core.diff_checkpoints(a, b, threads, progress)


def load_safetensors(path: PathLike) -> dict[str, Tensor]:
    """Opens a safetensors file; nothing is read before it is used.

    Args:
        path: The file.

    Returns:
        Name -> Tensor, in the order of the file: read-only views of a memory map.

    Raises:
        FormatError: If the file breaks the format.
        OSError: If it cannot be read.

    Example:
        >>> tensors = hqq_cpp.load_safetensors(model / "model.safetensors")
        >>> tensors["model.norm.weight"].shape
        (256,)
    """
    return _core.load_safetensors(path)


def safetensors_metadata(path: PathLike) -> dict[str, str]:
    """The text entries of a safetensors header (``__metadata__``).

    Args:
        path: The file.

    Raises:
        FormatError: If the file breaks the format.
        OSError: If it cannot be read.

    Example:
        >>> import numpy as np
        >>> path = folder / "with-metadata.safetensors"
        >>> hqq_cpp.save_safetensors(path, {"a": np.zeros(2)}, {"format": "pt"})
        >>> hqq_cpp.safetensors_metadata(path)
        {'format': 'pt'}
    """
    return _core.safetensors_metadata(path)


def save_safetensors(
    path: PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file: temporary file, fsync, rename.

    Args:
        path: The file; replaced if it exists.
        tensors: Name -> array: NumPy, torch, Tensor or anything with ``__dlpack__`` in CPU memory.
        metadata: Text entries for the header.

    Raises:
        ValueError: If an array has an element type that safetensors lacks, or is not in CPU memory.
        OSError: If it cannot be written.

    Example:
        >>> import numpy as np
        >>> hqq_cpp.save_safetensors(folder / "a.safetensors", {"a": np.arange(3, dtype=np.int16)})
        >>> hqq_cpp.load_safetensors(folder / "a.safetensors")["a"].numpy().tolist()
        [0, 1, 2]
    """
    _core.save_safetensors(path, dict(tensors), dict(metadata or {}))
