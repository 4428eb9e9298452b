"""The peers of bench_linear.py: how each multiplies with low-bit weights, ready to be timed.

Every function takes a Case, prepares as many copies of the weights as the case wants and returns a Job. Packages are
imported where they are used: each peer runs in a process of its own and may be missing.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from linear_case import GROUP, Case, Job, dense_rows, pack, round_to_nearest
from linear_ggml import ggml_product, ik_llama_product

READ_LOOP = r"""
#include <stddef.h>
#include <stdint.h>
uint64_t read_all(const uint64_t* p, ptrdiff_t n, int threads, int streams) {
  uint64_t x = 0;
  ptrdiff_t part = n / threads / streams;
#pragma omp parallel for num_threads(threads) reduction(^ : x) schedule(static)
  for (int t = 0; t < threads; ++t) {
    const uint64_t* a = p + streams * t * part;
    if (streams == 1) {
      for (ptrdiff_t i = 0; i < part; ++i) x ^= a[i];
    } else {
      const uint64_t *b = a + part, *c = b + part, *d = c + part;
      for (ptrdiff_t i = 0; i < part; ++i) x ^= a[i] ^ b[i] ^ c[i] ^ d[i];
    }
  }
  return x;
}
"""


def read_loop(case: Case, streams: int) -> Job:
    """What memory gives: a loop that reads as many bytes as 4-bit weights have, and does nothing else.

    A core does not get all of its memory's rate from a single stream: the second loop reads four.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "read.c", Path(folder) / "read.so"
        source.write_text(READ_LOOP)
        flags = ["-O3", "-march=native", "-funroll-loops", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, source, "-o", library], check=True, capture_output=True)
        read_all = ctypes.CDLL(str(library)).read_all
    read_all.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_int]
    nbytes = case.n * case.k * (4 * GROUP + 32) // GROUP // 8  # 32 bits of metadata a group
    copies = case.copies(nbytes)
    memory = np.ones(copies * nbytes // 8, np.uint64)

    def run():
        read_all(memory.ctypes.data, memory.size, case.threads, streams)

    return Job(run, copies, nbytes)


def quantize(case: Case, options: dict):
    import hqq_cpp

    config = {"group_size": GROUP, "balance": "none", **options}
    return hqq_cpp.quantize(case.weight, config, threads=case.threads)


def hqq_cpp_product(case: Case, mode: str, **options) -> Job:
    import hqq_cpp

    q = quantize(case, options)
    tiled = [q.tile()]
    copies = case.copies(tiled[0].nbytes)
    tiled += [q.tile() for _ in range(copies - 1)]
    x, threads = case.x, case.threads

    def run():
        for t in tiled:
            y = hqq_cpp.linear(x, t, mode=mode, threads=threads)
        return y

    dense = hqq_cpp.dequantize(q)[: len(case.weight_rows)]
    return Job(run, copies, tiled[0].nbytes, case.error(run(), dense), q.nbytes)


def torch_for(case: Case):
    import torch

    torch.set_num_threads(case.threads)
    torch.set_grad_enabled(False)
    return torch


def over(layers: list, x) -> Callable:
    """Calls every layer with x."""

    def run():
        for layer in layers:
            y = layer(x)
        return y

    return run


def hqq_linear(case: Case, nbits: float, dtype: str) -> Job:
    """The module that models use, which tiles its weights when it is first called."""
    torch = torch_for(case)
    import hqq_cpp

    q = quantize(case, {"nbits": nbits})
    nbytes = q.tile().nbytes
    copies = case.copies(nbytes)
    # Each from a matrix of its own: layers share the memory of what they are made of.
    layers = [hqq_cpp.HqqLinear(quantize(case, {"nbits": nbits})) for _ in range(copies)]
    run = over(layers, torch.from_numpy(case.x).to(getattr(torch, dtype)))
    dense = hqq_cpp.dequantize(q)[: len(case.weight_rows)]
    return Job(run, copies, nbytes, case.error(run().float(), dense), q.nbytes)


def torch_dense(case: Case, dtype: str) -> Job:
    torch = torch_for(case)
    weight = torch.from_numpy(case.weight).to(getattr(torch, dtype))
    copies = case.copies(weight.nbytes)
    layers = []
    for _ in range(copies):
        layers.append(torch.nn.Linear(case.k, case.n, bias=False, dtype=weight.dtype))
        layers[-1].weight.copy_(weight)
    run = over(layers, torch.from_numpy(case.x).to(weight.dtype))
    dense = weight[: len(case.weight_rows)].float().numpy()
    return Job(run, copies, weight.nbytes, case.error(run().float(), dense))


def torch_int4(case: Case, dtype: str) -> Job:
    torch = torch_for(case)
    codes, scale, zero = round_to_nearest(case.weight_rows, 4, "float")
    # torch's weight is (code - 8) * scale + offset.
    pairs = np.stack([scale, (8 - zero) * scale], -1)
    pairs = torch.from_numpy(pairs).to(getattr(torch, dtype))
    rounded = pairs.float().numpy()
    dense = dense_rows(codes, rounded[..., 0], 8 - rounded[..., 1] / rounded[..., 0])
    pairs = pairs.repeat(case.n // len(codes), 1, 1).transpose(0, 1).contiguous()
    codes = torch.from_numpy(case.repeat(codes).astype(np.int32))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    nbytes = packed.nbytes + pairs.nbytes
    copies = case.copies(nbytes)
    weights = [(packed.clone(), pairs.clone()) for _ in range(copies)]
    x = torch.from_numpy(case.x).to(pairs.dtype)

    def run():
        for w, scale_and_offset in weights:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, GROUP, scale_and_offset)
        return y

    return Job(run, copies, nbytes, case.error(run().float(), dense))


def upstream_hqq(case: Case, nbits: int) -> Job:
    torch = torch_for(case)
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    config = BaseQuantizeConfig(nbits=nbits, group_size=GROUP, axis=1)
    config["weight_quant_params"]["optimize"] = False  # minutes, and products take the same time
    HQQLinear.set_backend(HQQBackend.PYTORCH)
    linear = torch.nn.Linear(case.k, case.n, bias=False)
    linear.weight.copy_(torch.from_numpy(case.weight))
    layer = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
    run = over([layer], torch.from_numpy(case.x))
    dense = layer.dequantize()[: len(case.weight_rows)].numpy()
    nbytes = case.n * case.k * nbits // 8 + case.n * case.k // GROUP * 8
    return Job(run, 1, nbytes, case.error(run(), dense))


def onnxruntime_product(case: Case, bits: int, zero: str, accuracy_level: int) -> Job:
    """The operator MatMulNBits; accuracy_level 4 rounds x to int8, 1 leaves it in float32."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    codes, scale, zeros = round_to_nearest(case.weight_rows, bits, zero)
    dense = dense_rows(codes, scale, zeros)
    tensors = {
        "w": case.repeat(pack(codes, bits).reshape(*scale.shape, -1)),
        "scale": case.repeat(scale),
    }
    if zero != "middle":
        zeros = case.repeat(zeros)
        tensors["zero"] = zeros if zero == "float" else pack(zeros, bits)
    nbytes = sum(array.nbytes for array in tensors.values())
    copies = case.copies(nbytes)
    constants = [
        numpy_helper.from_array(array, f"{name}{i}")
        for i in range(copies)
        for name, array in tensors.items()
    ]
    nodes = [
        helper.make_node(
            "MatMulNBits", ["x", *(f"{name}{i}" for name in tensors)], [f"y{i}"],
            domain="com.microsoft", K=case.k, N=case.n, bits=bits, block_size=GROUP,
            accuracy_level=accuracy_level,
        )
        for i in range(copies)
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [case.m, case.k])],
        [
            helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [case.m, case.n])
            for i in range(copies)
        ],
        constants,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    # The copies are equal; nothing may merge them.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def run():
        return session.run(None, {"x": case.x})

    return Job(run, copies, nbytes, case.error(run()[-1], dense))


def openvino_product(case: Case, bits: int) -> Job:
    """Constants and arithmetic that the CPU plugin turns into one product with compressed weights."""
    import openvino as ov
    import openvino.opset13 as op
    from openvino.properties import hint, inference_num_threads, num_streams

    codes, scale, zeros = round_to_nearest(case.weight_rows, bits, "int")
    scale = scale.astype(np.float16)
    dense = dense_rows(codes, scale.astype(np.float32), zeros)
    groups = [case.n, case.k // GROUP]
    scale, zeros, codes = map(case.repeat, (scale, pack(zeros, bits), pack(codes, bits)))
    nbytes = codes.nbytes + zeros.nbytes + scale.nbytes
    copies = case.copies(nbytes)
    element = {2: ov.Type.u2, 4: ov.Type.u4, 8: ov.Type.u8}[bits]
    keep = []

    def constant(array: np.ndarray, last: int):
        keep.append(array.copy())  # the tensor shares the memory
        return op.convert(ov.op.Constant(ov.Tensor(keep[-1], [*groups, last], element)), "f16")

    x = op.parameter([case.m, case.k], ov.Type.f32)
    products = []
    for _ in range(copies):
        w = op.subtract(constant(codes, GROUP), constant(zeros, 1))
        w = op.multiply(w, op.constant(scale.reshape(*groups, 1)))
        w = op.reshape(w, op.constant(np.array([case.n, case.k], np.int64)), False)
        products.append(op.matmul(x, op.convert(w, "f32"), False, True))
    settings = {
        inference_num_threads(): case.threads,
        num_streams(): 1,
        hint.inference_precision(): ov.Type.f32,
    }
    model = ov.Core().compile_model(ov.Model(products, [x], "products"), "CPU", settings)
    request = model.create_infer_request()
    request.set_input_tensor(0, ov.Tensor(case.x))
    request.infer()
    y = request.get_output_tensor(copies - 1).data.copy()
    return Job(request.infer, copies, nbytes, case.error(y, dense), keep=keep)


WIDTHS = (8, 6, 5, 4, 3, 2, 1.58, 1)

# name -> builds a Job from a Case
PEERS: dict[str, Callable[[Case], Job]] = {
    "read loop": functools.partial(read_loop, streams=1),
    "read loop, four streams": functools.partial(read_loop, streams=4),
    "torch float32": partial(torch_dense, dtype="float32"),
    "torch bfloat16": partial(torch_dense, dtype="bfloat16"),
}
for mode in ("fast", "exact"):
    for nbits in WIDTHS:
        PEERS[f"hqq.cpp {nbits}-bit {mode}"] = partial(hqq_cpp_product, mode=mode, nbits=nbits)
PEERS |= {
    "hqq.cpp 4-bit fast, axis=0": partial(hqq_cpp_product, mode="fast", nbits=4, axis=0),
    "hqq.cpp 4-bit fast, 8-bit metadata": partial(
        hqq_cpp_product, mode="fast", nbits=4, quant_scale=True, quant_zero=True
    ),
    "HqqLinear 4-bit float32": partial(hqq_linear, nbits=4, dtype="float32"),
    "HqqLinear 4-bit bfloat16": partial(hqq_linear, nbits=4, dtype="bfloat16"),
    "onnxruntime 4-bit int8, symmetric": partial(
        onnxruntime_product, bits=4, zero="middle", accuracy_level=4
    ),
    "onnxruntime 4-bit int8": partial(onnxruntime_product, bits=4, zero="int", accuracy_level=4),
    "onnxruntime 4-bit float32": partial(onnxruntime_product, bits=4, zero="int", accuracy_level=1),
    "onnxruntime 8-bit int8": partial(onnxruntime_product, bits=8, zero="int", accuracy_level=4),
    "onnxruntime 2-bit int8": partial(onnxruntime_product, bits=2, zero="int", accuracy_level=4),
}
for kind in ("Q4_K_R4", "Q4_K", "Q3_K", "Q2_K"):
    PEERS[f"ik_llama.cpp {kind}"] = partial(ik_llama_product, kind=kind)
for kind in ("Q4_0", "Q4_K"):
    PEERS[f"ggml {kind} repacked"] = partial(ggml_product, kind=kind, repack=True)
for kind in ("Q8_0", "TQ2_0", "Q1_0"):
    PEERS[f"ggml {kind}"] = partial(ggml_product, kind=kind)
PEERS |= {
    "openvino 4-bit": partial(openvino_product, bits=4),
    "torch int4pack bfloat16": partial(torch_int4, dtype="bfloat16"),
}

# More than 10 ms for one row: measured with --slow.
SLOW_PEERS: dict[str, Callable[[Case], Job]] = {
    "onnxruntime 4-bit float zero": partial(
        onnxruntime_product, bits=4, zero="float", accuracy_level=4
    ),
    "torch int4pack float32": partial(torch_int4, dtype="float32"),
    "upstream hqq 4-bit": partial(upstream_hqq, nbits=4),
}
