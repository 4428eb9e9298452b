"""ggml (libggml-python) and ik_llama.cpp (ik-llama-cpp-python) as peers of bench_linear.py, by ctypes."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from linear_case import Case, Job

TYPES = {
    "F32": 0, "Q4_0": 2, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "TQ2_0": 35, "Q1_0": 41,
    "Q4_K_R4": 212,
}  # fmt: skip
# Types ending in _R4 interleave four rows; they are read four rows at a time.
ROWS_AT_ONCE = 4
CONTEXT_BYTES = 16 << 20  # for the descriptions of tensors and the graph


class InitParams(ctypes.Structure):
    _fields_ = [("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool)]


PROTOTYPES = {
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    # Of ggml alone.
    "ggml_threadpool_params_init": (None, [c_void_p, c_int]),
    "ggml_threadpool_new": (c_void_p, [c_void_p]),
    "ggml_backend_cpu_set_threadpool": (None, [c_void_p, c_void_p]),
}
REPACK_BUFFER_TYPE = "_Z35ggml_backend_cpu_repack_buffer_typev"


class Library:
    """One build of ggml; its functions are attributes without the prefix ggml_."""

    def __init__(self, *paths: Path):
        self._libraries = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in paths]
        for name, (result, arguments) in PROTOTYPES.items():
            function = self.find(name)
            if function is not None:
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)

    def find(self, name: str):
        return next((getattr(lib, name) for lib in self._libraries if hasattr(lib, name)), None)

    def dequantize(self, kind: str, packed: np.ndarray, dense: np.ndarray) -> None:
        # dequantize_row_q4_0, but dequantize_row_q4_K and dequantize_row_q4_k_r4.
        names = [f"dequantize_row_{kind.lower()}", f"dequantize_row_{kind[0].lower()}{kind[1:]}"]
        function = next(filter(None, map(self.find, names)))
        function.restype, function.argtypes = None, [c_void_p, c_void_p, c_int64]
        for row in range(0, len(dense), ROWS_AT_ONCE):
            some = dense[row : row + ROWS_AT_ONCE]
            function(packed[row:].ctypes.data, some.ctypes.data, some.size)

    def backend(self, threads: int) -> int:
        backend = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(backend, threads)
        if hasattr(self, "threadpool_new"):
            # Without a pool ggml starts threads for every graph.
            params = ctypes.create_string_buffer(4096)
            self.threadpool_params_init(params, threads)
            self.backend_cpu_set_threadpool(backend, self.threadpool_new(params))
        return backend


def folder_of(module: str) -> Path:
    spec = find_spec(module)
    if spec is None:
        raise ModuleNotFoundError(f"No module named '{module}'")
    return Path(spec.submodule_search_locations[0])


@cache
def ggml() -> Library:
    folder = folder_of("libggml") / "lib64"
    return Library(folder / "libggml-base.so", folder / "libggml-cpu.so")


@cache
def ik_llama() -> Library:
    return Library(folder_of("ik_llama_cpp") / "lib" / "libggml.so")


def product(case: Case, lib: Library, kind: str, repack: bool) -> Job:
    rows, type_id = case.weight_rows, TYPES[kind]
    context = lib.init(InitParams(CONTEXT_BYTES, None, True))  # also fills tables of float16
    packed = np.empty((len(rows), lib.row_size(type_id, case.k)), np.uint8)
    lib.quantize_chunk(type_id, rows.ctypes.data, packed.ctypes.data, 0, *rows.shape, None)
    dense = np.empty_like(rows)
    lib.dequantize(kind, packed, dense)

    packed = case.repeat(packed)
    copies = case.copies(packed.nbytes)
    buffer_type = lib.backend_cpu_buffer_type()
    weights_type = buffer_type
    if repack:
        find_repack = lib.find(REPACK_BUFFER_TYPE)
        find_repack.restype = c_void_p
        weights_type = find_repack()
    weights = [lib.new_tensor_2d(context, type_id, case.k, case.n) for _ in range(copies)]
    if not lib.backend_alloc_ctx_tensors_from_buft(context, weights_type):
        raise MemoryError(f"ggml has no memory for {copies} weights of {packed.nbytes} bytes")
    for weight in weights:
        lib.backend_tensor_set(weight, packed.ctypes.data, 0, packed.nbytes)

    context = lib.init(InitParams(CONTEXT_BYTES, None, True))
    x = lib.new_tensor_2d(context, TYPES["F32"], case.k, case.m)
    products = [lib.mul_mat(context, weight, x) for weight in weights]
    graph = lib.new_graph(context)
    for y in products:
        lib.build_forward_expand(graph, y)
    lib.backend_alloc_ctx_tensors_from_buft(context, buffer_type)
    lib.backend_tensor_set(x, case.x.ctypes.data, 0, case.x.nbytes)
    backend = lib.backend(case.threads)

    def run():
        lib.backend_graph_compute(backend, graph)

    run()
    y = np.empty((case.m, case.n), np.float32)
    lib.backend_tensor_get(products[-1], y.ctypes.data, 0, y.nbytes)
    return Job(run, copies, packed.nbytes, case.error(y, dense))


def ggml_product(case: Case, kind: str, repack: bool = False) -> Job:
    return product(case, ggml(), kind, repack)


def ik_llama_product(case: Case, kind: str) -> Job:
    return product(case, ik_llama(), kind, repack=False)
