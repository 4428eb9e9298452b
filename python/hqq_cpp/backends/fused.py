"""Products by the fused kernels of libhqq_cuda, and the memory they keep beyond a call: copies of matrices
in the order of those kernels, and workspaces.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from .. import _core
from ..format import Numbers, PackedWeight, Tensors
from . import cuda_calls as cuda

# What the fused kernels multiply.
DTYPES = (torch.float16, torch.bfloat16)

_use = True
_lock = threading.RLock()


def use(wanted: bool) -> None:
    """Whether products may keep a second copy of the codes in the order of the fused kernels."""
    global _use
    _use = wanted
    if not wanted:
        for key, entry in list(_copies.items()):
            if not entry.is_recorded:
                _copies.pop(key, None)


# ---- Memory that outlives a call ---------------------------------------------------------------


def _allocate(sizes: Sequence[int], like: torch.Tensor) -> list[torch.Tensor]:
    """Memory of so many bytes each, for good.

    While torch.compile prepares the recording of a graph, what the current thread allocates goes to the
    memory of the graph, which must be empty in the end. Another thread's memory is its own.
    """
    place: contextlib.AbstractContextManager = contextlib.nullcontext()
    if like.is_cuda:
        place = torch.cuda.stream(torch.cuda.current_stream(like.device))

    def allocate() -> list[torch.Tensor]:
        with place:
            return [torch.empty(size, dtype=torch.uint8, device=like.device) for size in sizes]

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate).result()


class _Workspace:
    def __init__(self, memory: torch.Tensor):
        self.memory = memory
        # Whether a graph holds its address.
        self.is_recorded = False


# By device and stream.
_workspaces: dict[Hashable, _Workspace] = {}
# By device: for graphs that are recorded on a stream without one. torch.cuda.graph() makes a stream of its
# own, and nothing can be allocated for good while it records.
_graph_workspaces: dict[Hashable, _Workspace] = {}
# Smaller ones of earlier whose addresses graphs hold.
_recorded: list[torch.Tensor] = []
_MIN_WORKSPACE = 16 << 20


def _grow(held: dict[Hashable, _Workspace], key: Hashable, size: int, like: torch.Tensor) -> None:
    old = held.get(key)
    if old is not None and old.memory.numel() >= size:
        return
    [memory] = _allocate([size], like)
    held[key] = _Workspace(memory.zero_())
    if old is not None and old.is_recorded:
        _recorded.append(old.memory)


def _workspace(
    size: int, like: torch.Tensor, stream: int, is_recording: bool
) -> torch.Tensor | None:
    """At least `size` bytes for the products of one stream, whose counters at the start are zero between
    calls. None: a graph is being recorded, and no call before it has made one."""
    device = cuda.device_of(like)
    key = (device, stream)
    if is_recording:
        with _lock:
            for held in (_workspaces.get(key), _graph_workspaces.get(device)):
                if held is not None and held.memory.numel() >= size:
                    held.is_recorded = True
                    return held.memory
        return None
    held = _workspaces.get(key)
    if held is None or held.memory.numel() < size:
        # Doubled: sizes go up with the rows, one by one.
        rounded = 1 << (max(size, _MIN_WORKSPACE) - 1).bit_length()
        with _lock:
            _grow(_workspaces, key, rounded, like)
            _grow(_graph_workspaces, device, rounded, like)
            held = _workspaces[key]
    return held.memory


class Fused:
    """A copy of a matrix, or of [experts * parts] of them, in the order of the fused kernels."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, limits: Limits):
        layout, W_q = weight.layout, weight.tensors.W_q
        parts = layout.parts if layout.experts else 0
        self._layer, self._dtype = cuda.layer_of(layout.matrix), cuda.dtype_code(dtype)
        self._count = layout.experts * parts if parts else 1
        self._is_grouped = parts > 0
        # Of one expert, on average.
        self.max_rows = limits.max_rows
        # Whether a graph holds the addresses.
        self.is_recorded = False
        # Every matrix on a boundary that any load may need.
        self._steps = [-(-size // 256) * 256 for size in limits.sizes]
        self._steps.append(0 if weight.tensors.col_scale is None else 4 * layout.in_features)
        # Codes, metadata, col_scale.
        self.tensors = _allocate([self._count * step for step in self._steps], W_q)
        self._matrices = _core.CudaFused(
            self._layer,
            self._dtype,
            cuda.device_of(W_q),
            [t.data_ptr() if t.numel() else 0 for t in self.tensors],
            self._steps,
            layout.experts or 1,
            parts,
        )
        self._workspace_bytes: dict[int, int] = {}
        self.fill(weight.tensors)

    def fill(self, weight: Tensors) -> None:
        """Copies the matrices, into the same memory when they have changed: graphs hold its address."""
        weight = Tensors(*(t if t is None else t.contiguous() for t in weight))
        codes, metadata, col_scale = self.tensors
        bytes_of = [0 if t is None else t.nbytes // self._count for t in weight]
        first, place = cuda.addresses(weight), cuda.place(weight.W_q)
        for m in range(self._count):
            addresses = [a and a + m * size for a, size in zip(first, bytes_of)]
            to = [t.data_ptr() + m * step for t, step in zip((codes, metadata), self._steps)]
            self._layer.repack(addresses, self._dtype, *to, place)
        if weight.col_scale is not None:
            col_scale.view(torch.float32).copy_(weight.col_scale.detach().flatten())
        event = None
        if codes.is_cuda:
            stream = torch.cuda.current_stream(codes.device)
            event = stream.record_event()
            self._used_on(stream)
        self._event = event
        # Streams whose work comes after it.
        self._ready = {cuda.stream_of(codes)}

    def _wait(self, stream: int) -> None:
        """Lets the current stream wait until the matrices are there."""
        if self._event is not None:
            current = torch.cuda.current_stream(self.tensors[0].device)
            current.wait_event(self._event)
            self._used_on(current)
        self._ready.add(stream)

    def _used_on(self, stream: torch.cuda.Stream) -> None:
        # The memory is not given to anything else before the stream is done with it.
        for tensor in self.tensors:
            if tensor.numel():
                tensor.record_stream(stream)

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
            size = self._matrices.workspace_bytes(rows, self._is_grouped)
            if len(self._workspace_bytes) < 1024:
                self._workspace_bytes[rows] = size
        stream = cuda.stream_of(x)
        # Nothing can be recorded on stream 0.
        is_recording = stream != 0 and cuda.is_capturing(x)
        workspace = _workspace(size, x, stream, is_recording)
        if workspace is None:
            return False
        if is_recording:
            # Before a recording everything has been waited for; an event of outside ends it.
            self.is_recorded = True
        elif stream not in self._ready:
            self._wait(stream)
        return self._matrices.linear(
            part, 0 if row_begin is None else row_begin.data_ptr(), x.data_ptr(), rows, x.stride(0),
            0 if bias is None else bias.data_ptr(), y_address, y_stride, workspace.data_ptr(),
            workspace.numel(), stream,
        )  # fmt: skip


class Limits(NamedTuple):
    """Of the fused kernel for a matrix."""

    sizes: tuple[int, int]  # bytes of its codes and metadata
    max_rows: int  # (of one expert, on average) with which it is faster than a dense product


@functools.lru_cache(maxsize=1024)
def _limits_of(layer: _core.CudaLayer, dtype: int, device: int) -> Limits | None:
    sizes = layer.fused_sizes(dtype, device)
    return None if sizes is None else Limits(sizes, layer.fused_max_rows(dtype, device))


def limits(weight: PackedWeight, dtype: torch.dtype) -> Limits | None:
    """Of the kernel for this matrix and x of `dtype`; None: there is none."""
    if dtype not in DTYPES:
        return None
    layer = cuda.layer_of(weight.layout.matrix)
    return _limits_of(layer, cuda.dtype_code(dtype), cuda.device_of(weight.tensors.W_q))


# Addresses, experts or rows, and strides of the codes; the matrix and its parts; the type of x.
_Key = tuple[tuple[int, ...], int, tuple[int, ...], Numbers, int, torch.dtype]


class _Entry:
    def __init__(self, key: _Key, weight: Tensors, fused: Fused | None):
        def died(storage: weakref.ref) -> None:
            _storage_died(key, storage)

        # W_q's first.
        self.storages = [weakref.ref(t.untyped_storage(), died) for t in weight if t is not None]
        # None: not to be used before it is filled again.
        self.versions: list[int] | None = _versions(weight)
        # None: there is no fused kernel for it.
        self.fused = fused

    @property
    def is_recorded(self) -> bool:
        return self.fused is not None and self.fused.is_recorded

    def is_of(self, weight: Tensors) -> bool:
        """Whether it was made of this memory, whatever it held."""
        return self.storages[0]() is weight.W_q.untyped_storage()

    def is_current(self, weight: Tensors) -> bool:
        return self.is_of(weight) and self.versions == _versions(weight)

    def fill(self, weight: Tensors) -> None:
        versions = _versions(weight)
        if self.fused is not None:
            self.fused.fill(weight)
        self.versions = versions


# Copies by what they were made of; an entry goes with the memory of its tensors.
_copies: dict[_Key, _Entry] = {}
# Entries whose scale or zero is another tensor now, but that graphs read: they go with W_q.
_retired: list[_Entry] = []


def _key(weight: Tensors, numbers: Numbers, parts: int, dtype: torch.dtype) -> _Key:
    W_q = weight.W_q
    return tuple(cuda.addresses(weight)), W_q.shape[0], W_q.stride(), numbers, parts, dtype


def _versions(weight: Tensors) -> list[int]:
    """Changes when a tensor is written to."""
    try:
        return [t._version for t in weight if t is not None]
    except RuntimeError:  # tensors of inference mode count nothing
        return [0 if t.is_inference() else t._version for t in weight if t is not None]


def _retire(entry: _Entry) -> None:
    if entry.is_recorded and entry.storages[0]() is not None:
        _retired.append(entry)


def _storage_died(key: tuple, storage: weakref.ref) -> None:
    # Any thread comes here at any time, also one that holds the lock: no lock.
    entry = _copies.get(key)
    if entry is not None and any(other is storage for other in entry.storages):
        _copies.pop(key, None)
        _retire(entry)
    for entry in [e for e in _retired if e.storages[0] is storage]:
        _retired.remove(entry)


def fused(weight: PackedWeight, dtype: torch.dtype, rows: int = 0) -> Fused | None:
    """The copy of a matrix for x of `dtype`, made when it is first asked for; None: there is none.

    Args:
        weight: A matrix, or a stack.
        dtype: Of x.
        rows: Of one expert, on average: no copy is made for so many that it would not be used.
    """
    if not _use or dtype not in DTYPES:
        return None
    layout, tensors = weight.layout, weight.tensors
    key = _key(tensors, layout.numbers, layout.parts if layout.experts else 0, dtype)
    entry = _copies.get(key)
    if entry is not None and entry.is_current(tensors):
        return entry.fused
    if cuda.is_capturing(tensors.W_q):
        # It would be made again with every replay.
        return None
    with _lock:
        entry = _copies.get(key)
        if entry is not None and entry.is_of(tensors):
            if not entry.is_current(tensors):
                entry.fill(tensors)
            return entry.fused
        possible = limits(weight, dtype)
        if possible is not None and rows > possible.max_rows:
            return None
        made = None if possible is None else Fused(weight, dtype, possible)
        if entry is not None:
            _retire(entry)
        _copies[key] = _Entry(key, tensors, made)
    return made


def refresh(weight: Tensors) -> None:
    """Fills the copies of a matrix whose memory was written to again."""
    if not _copies:
        return
    addresses = {a for a in cuda.addresses(weight) if a}
    with _lock:
        for key, entry in list(_copies.items()):
            if not addresses.isdisjoint(key[0]):
                entry.versions = None
                # Others that share a tensor are filled when they are used.
                same = key == _key(weight, *key[3:]) and entry.is_of(weight)
                if same and not cuda.is_capturing(weight.W_q):
                    entry.fill(weight)


# ---- Products ----------------------------------------------------------------------------------


def _rows(x: torch.Tensor, features: int) -> torch.Tensor:
    """x as [rows, features] with contiguous rows."""
    rows = x.reshape(-1, features)
    return rows if rows.stride(1) == 1 and rows.stride(0) >= features else rows.contiguous()


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor | None:
    """x [..., in_features] W_r^T + bias by a fused kernel; None: a dense product does better here."""
    if bias is not None and bias.device != x.device:
        return None
    _, _, _, out_features, in_features = weight.layout.numbers
    count = x.numel() // in_features
    made = fused(weight, x.dtype, count)
    if made is None or count > made.max_rows:
        return None
    rows = _rows(x, in_features)
    y = x.new_empty(*x.shape[:-1], out_features)
    if count == 0:
        return y
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    done = made.run(0, None, rows, bias, y.data_ptr(), out_features)
    return y if done else None


def experts_linear(
    x: torch.Tensor,
    counts: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
) -> torch.Tensor | None:
    """Every row of x [rows, in] times the matrix of its expert, without asking the GPU how many rows
    each has; None: it cannot be done by fused kernels, or dense products do better here.

    Args:
        counts: int64 [experts]; rows after them get zeros.
        weight: A stack.
        bias: [experts, out], or None.
    """
    if bias is not None and bias.device != x.device:
        return None
    layout, parts = weight.layout, weight.layout.parts
    average = -(-x.shape[0] // layout.experts)
    # On a stream of its own it may be the run before a recording, which takes the copy for any rows.
    made = fused(weight, x.dtype, average if cuda.stream_of(x) == 0 else 0)
    if made is None or (average > made.max_rows and not cuda.is_capturing(x)):
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
        y_part = y.data_ptr() + part * layout.matrix.out_features * y.element_size()
        if not made.run(part, row_begin, rows, part_bias, y_part, layout.out_features):
            return None
    return y
