"""Quantized matrices on a GPU: torch tensors to the kernels of libhqq_cuda, by address and on torch's
current stream.

Nothing here waits for the GPU but quantize(), and nothing asks torch.cuda for anything before a tensor
is on a GPU.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any, NamedTuple

import torch

from .. import _core
from .dequantize import Layout, Weight, config_of, stored_of, tensor_specs

# What the fused kernels multiply.
FUSED_DTYPES = (torch.float16, torch.bfloat16)
# What the solver takes.
SOLVED_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Whether the library can be used; None: nobody has asked yet. Asking starts the driver, which a process
# that forks later must not have done at import.
_available: bool | None = None
_use_fused = True
_lock = threading.RLock()


def is_available() -> bool:
    """Whether libhqq_cuda was found and can drive a GPU."""
    global _available
    if _available is None:
        _available = _core.cuda_is_available()
    return _available


# A compiler that traces a forward pass calls it and takes the answer as a constant.
is_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_native(tensor: torch.Tensor) -> bool:
    """Whether the tensor lies where the kernels of libhqq_cuda work."""
    return tensor.device.type == "cuda" and is_available()


def use_fused(wanted: bool) -> None:
    """Whether products may keep a second copy of the codes in the order of the fused kernels."""
    global _use_fused
    _use_fused = wanted
    if not wanted:
        _fused.clear()


def _device(tensor: torch.Tensor) -> int:
    return max(tensor.get_device(), 0)


def _stream(tensor: torch.Tensor) -> int:
    # What torch.cuda.current_stream() wraps, in a fifth of its time; Triton's launcher calls it too.
    return torch._C._cuda_getCurrentRawStream(tensor.get_device()) if tensor.is_cuda else 0


def _place(tensor: torch.Tensor) -> _core.CudaPlace:
    return _core.CudaPlace(_device(tensor), _stream(tensor))


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being recorded: nothing may wait for the GPU."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _addresses(weight: Weight) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in weight]


def _contiguous(weight: Weight) -> Weight:
    return Weight(*(t if t is None else t.contiguous() for t in weight))


@functools.lru_cache(maxsize=1024)
def _make_layer(layout: Layout, *stored: Any) -> _core.CudaLayer:
    config = config_of(layout, *stored)
    return _core.CudaLayer(config, layout.out_features, layout.in_features)


def _layer(weight: Weight, layout: Layout) -> _core.CudaLayer:
    return _make_layer(layout, *stored_of(weight))


@functools.cache
def _dtype_code(dtype: torch.dtype) -> int:
    return _core.dtype_code(dtype)


def dequantize(weight: Weight, layout: Layout, dtype: torch.dtype) -> torch.Tensor | None:
    """W_r [out_features, in_features]; None: there is no kernel for it."""
    weight = _contiguous(weight)
    out = weight.W_q.new_empty(layout.out_features, layout.in_features, dtype=dtype)
    layer = _layer(weight, layout)
    done = layer.dequantize(
        _addresses(weight), out.data_ptr(), _dtype_code(dtype), _place(weight.W_q)
    )
    return out if done else None


def embedding(
    ids: torch.Tensor, weight: Weight, layout: Layout, dtype: torch.dtype
) -> torch.Tensor | None:
    """The rows `ids` [...] of W_r; None: there is no kernel for it."""
    weight, rows = _contiguous(weight), ids.to(torch.int64).contiguous()
    # The kernel trusts them. As in nn.Embedding, a wrong one is noticed later, and ends the process's
    # use of the GPU.
    there = ((rows >= 0) & (rows < layout.out_features)).all()
    torch._assert_async(there, f"[embedding] an id is not in 0 to {layout.out_features - 1}")
    out = weight.W_q.new_empty(*ids.shape, layout.in_features, dtype=dtype)
    layer = _layer(weight, layout)
    done = layer.dequantize_rows(
        _addresses(weight), rows.data_ptr(), rows.numel(), out.data_ptr(), _dtype_code(dtype),
        _place(weight.W_q),
    )  # fmt: skip
    return out if done else None


# ---- Memory that outlives a call ---------------------------------------------------------------


# (device, stream) -> workspaces, the last one in use. Recorded graphs hold addresses of earlier ones.
_workspaces: dict[tuple[int, int], list[torch.Tensor]] = {}
# device -> what graphs use that are recorded on a stream without one: torch.cuda.graph() makes a stream
# of its own, and nothing can be allocated for good while it records.
_graph_workspaces: dict[int, list[torch.Tensor]] = {}
_MIN_WORKSPACE = 16 << 20


def _grow(held: list[torch.Tensor], size: int, like: torch.Tensor) -> None:
    if not held or held[-1].numel() < size:
        held.append(torch.zeros(size, dtype=torch.uint8, device=like.device))


def _workspace(size: int, like: torch.Tensor) -> torch.Tensor | None:
    """At least `size` bytes for the products of one stream, whose counters at the start are zero between
    calls. None: a graph is being recorded, and no call before it has made one."""
    device = _device(like)
    held = _workspaces.get((device, _stream(like)))
    if held is not None and held[-1].numel() >= size:
        return held[-1]
    if is_capturing(like):
        shared = _graph_workspaces.get(device)
        return shared[-1] if shared and shared[-1].numel() >= size else None
    with _lock:
        held = _workspaces.setdefault((device, _stream(like)), [])
        least = max(size, _MIN_WORKSPACE) if like.is_cuda else size
        _grow(held, least, like)
        if like.is_cuda:
            _grow(_graph_workspaces.setdefault(device, []), least, like)
    return held[-1]


class Fused:
    """A copy of a matrix, or of [experts * parts] of them, in the order of the fused kernels."""

    def __init__(
        self,
        matrices: _core.CudaFused,
        tensors: tuple[torch.Tensor | None, ...],
        max_rows: int,
        grouped: bool,
    ):
        self.matrices = matrices
        # Their memory: codes, metadata, col_scale.
        self.tensors = tensors
        # Of one expert, on average.
        self.max_rows = max_rows
        self._grouped = grouped
        self._workspace_bytes: dict[int, int] = {}

    def run(
        self,
        part: int,
        row_begin: torch.Tensor | None,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        y_address: int,
        y_stride: int,
    ) -> bool:
        """Matrix `part` of every expert times x [rows, in]; False: there is no kernel for it."""
        rows = x.shape[0]
        size = self._workspace_bytes.get(rows)
        if size is None:
            size = self.matrices.workspace_bytes(rows, self._grouped)
            if len(self._workspace_bytes) < 1024:
                self._workspace_bytes[rows] = size
        workspace = _workspace(size, x)
        if workspace is None:
            return False
        return self.matrices.linear(
            part, 0 if row_begin is None else row_begin.data_ptr(), x.data_ptr(), rows, x.stride(0),
            0 if bias is None else bias.data_ptr(), y_address, y_stride, workspace.data_ptr(),
            workspace.numel(), _stream(x),
        )  # fmt: skip


class _Entry(NamedTuple):
    storage: weakref.ref  # of W_q
    versions: list[int]
    fused: Fused | None  # None: there is no fused kernel for it


# Copies by what they were made of; an entry goes with the memory of its W_q.
_fused: dict[tuple, _Entry] = {}


def _versions(weight: Weight) -> list[int]:
    """Changes when a tensor is written to."""
    try:
        return [t._version for t in weight if t is not None]
    except RuntimeError:  # tensors of inference mode count nothing
        return []


def fused(weight: Weight, layout: Layout, parts: int, dtype: torch.dtype) -> Fused | None:
    """The copy of a matrix for x of `dtype`, made when it is first asked for; None: there is none.

    Args:
        weight: Tensors, with a leading dimension [experts] where parts > 0.
        layout: Of one matrix (one part).
        parts: Matrices an expert has; 0: weight is a single one.
    """
    if not _use_fused or dtype not in FUSED_DTYPES:
        return None
    W_q = weight.W_q
    key = (W_q.data_ptr(), W_q.shape[0], layout, parts, dtype)
    entry = _current_entry(key, weight)
    if entry is None and is_capturing(W_q):
        # It would be made again with every replay.
        return None
    if entry is not None:
        return entry.fused
    with _lock:
        entry = _current_entry(key, weight)
        if entry is not None:
            return entry.fused
        made = _make_fused(_contiguous(weight), layout, parts, dtype)
        storage = weakref.ref(W_q.untyped_storage(), lambda _: _fused.pop(key, None))
        _fused[key] = _Entry(storage, _versions(weight), made)
    return made


def _current_entry(key: tuple, weight: Weight) -> _Entry | None:
    entry = _fused.get(key)
    if entry is None or entry.storage() is not weight.W_q.untyped_storage():
        return None
    return entry if entry.versions == _versions(weight) else None


def forget(weight: Weight) -> None:
    """Drops the copies of a matrix whose memory was written to."""
    with _lock:
        for key in list(_fused):
            if key[0] == weight.W_q.data_ptr():
                _fused.pop(key, None)


def _make_fused(weight: Weight, layout: Layout, parts: int, dtype: torch.dtype) -> Fused | None:
    matrices = weight.W_q.shape[0] * parts if parts else 1
    layer, code, place = _layer(weight, layout), _dtype_code(dtype), _place(weight.W_q)
    sizes = layer.fused_sizes(code, _device(weight.W_q))
    if sizes is None:
        return None
    # Every matrix on a boundary that any load may need.
    steps = [-(-size // 256) * 256 for size in sizes]
    codes, metadata = (weight.W_q.new_empty(matrices * step, dtype=torch.uint8) for step in steps)
    bytes_of = [0 if t is None else t.nbytes // matrices for t in weight]
    first = _addresses(weight)
    for m in range(matrices):
        addresses = [a and a + m * size for a, size in zip(first, bytes_of)]
        if not layer.repack(
            addresses, code, codes.data_ptr() + m * steps[0], metadata.data_ptr() + m * steps[1],
            place,
        ):  # fmt: skip
            return None
    col_scale = None if weight.col_scale is None else weight.col_scale.detach().float()
    steps.append(0 if col_scale is None else 4 * layout.in_features)
    addresses = [0 if t is None else t.data_ptr() for t in (codes, metadata, col_scale)]
    experts = weight.W_q.shape[0] if parts else 1
    matrices_of = _core.CudaFused(layer, code, _device(codes), addresses, steps, experts, parts)
    max_rows = layer.fused_max_rows(code, _device(codes))
    return Fused(matrices_of, (codes, metadata, col_scale), max_rows, parts > 0)


# ---- Products ----------------------------------------------------------------------------------


def _rows(x: torch.Tensor, features: int) -> torch.Tensor:
    """x as [rows, features] with contiguous rows."""
    rows = x.reshape(-1, features)
    return rows if rows.stride(1) == 1 and rows.stride(0) >= features else rows.contiguous()


def linear(
    x: torch.Tensor, weight: Weight, layout: Layout, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """x [..., in_features] W_r^T + bias by a fused kernel; None: a dense product does better here."""
    if bias is not None and bias.device != x.device:
        return None
    made = fused(weight, layout, 0, x.dtype)
    if made is None or x.numel() > made.max_rows * layout.in_features:
        return None
    rows = _rows(x, layout.in_features)
    y = x.new_empty(*x.shape[:-1], layout.out_features)
    if rows.shape[0] == 0:
        return y
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    done = made.run(0, None, rows, bias, y.data_ptr(), layout.out_features)
    return y if done else None


def experts_linear(
    x: torch.Tensor,
    counts: torch.Tensor,
    weight: Weight,
    layout: Layout,
    parts: int,
    bias: torch.Tensor | None,
) -> torch.Tensor | None:
    """Every row of x [rows, in] times the matrix of its expert, without asking the GPU how many rows
    each has; None: it cannot be done by fused kernels, or dense products do better here.

    Args:
        counts: int64 [experts]; rows after them get zeros.
        layout: Of the whole matrix of one expert, `parts` matrices.
        bias: [experts, out], or None.
    """
    if bias is not None and bias.device != x.device:
        return None
    piece = layout._replace(out_features=layout.out_features // parts)
    made = fused(weight, piece, parts, x.dtype)
    experts = weight.W_q.shape[0]
    if made is None:
        return None
    if x.shape[0] > made.max_rows * experts and not is_capturing(x):
        return None
    y = x.new_zeros(x.shape[0], layout.out_features)
    if x.shape[0] == 0:
        return y
    rows = _rows(x, layout.in_features)
    row_begin = torch.nn.functional.pad(counts.to(x.device, torch.int64).cumsum(0), (1, 0))
    for part in range(parts):
        part_bias = None
        if bias is not None:
            part_bias = bias.to(x.dtype).unflatten(1, (parts, -1))[:, part].contiguous()
        y_part = y.data_ptr() + part * piece.out_features * y.element_size()
        if not made.run(part, row_begin, rows, part_bias, y_part, layout.out_features):
            return None
    return y


# ---- Quantization ------------------------------------------------------------------------------


def quantize(
    W: torch.Tensor, config: Any, name: str, importance: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any], Any]:
    """Quantizes W [out, in] where it lies.

    Returns:
        The tensors of format 1 on the device of W, the settings with balance decided, and
        QuantizeStats.

    Raises:
        ValueError: As hqq_cpp.quantize().
    """
    W = W.detach()
    W = W if W.stride(-1) == 1 and W.stride(0) >= W.shape[1] else W.contiguous()
    if isinstance(importance, torch.Tensor):
        importance = importance.detach().float().cpu()
    solver = _core.CudaSolver(config, name, _dtype_code(W.dtype), *W.shape, importance)
    settings = solver.config
    tensors = {
        key: torch.empty(shape, dtype=dtype, device=W.device)
        for key, (shape, dtype) in tensor_specs(settings, *W.shape).items()
    }
    addresses = [
        t.data_ptr() if (t := tensors.get(key)) is not None else 0 for key in Weight._fields
    ]
    size = solver.workspace_bytes(_device(W))
    workspace = torch.empty(size + 256, dtype=torch.uint8, device=W.device)
    start = -(-workspace.data_ptr() // 256) * 256
    stats = solver.solve(W.data_ptr(), W.stride(0), addresses, start, size, _place(W))
    return tensors, settings, stats
