"""The case of experts: every row of x with the matrix of its expert, in one call."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from layers import COLUMNS, MEMORY_SHARE, STD, Bench
from report import Section
from shapes import GROUP, layer_bytes
from timing import Walk, measure
from torch.nn import functional


class Experts(NamedTuple):
    name: str
    count: int
    top: int
    n: int
    k: int


SHAPES = [
    Experts("8 experts, 2 a token", 8, 2, 14336, 4096),
    Experts("128 experts, 8 a token", 128, 8, 1536, 2048),
]
TOKENS = (1, 4, 16, 64, 512)
DTYPE = torch.bfloat16  # what torch's grouped product takes
OURS, DENSE = "hqq.cpp", "torch grouped_mm"


def route(shape: Experts, tokens: int) -> torch.Tensor:
    """int64 [experts]: rows that each expert has when tokens choose at random."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, shape.count, generator=generator).topk(shape.top).indices
    return torch.bincount(chosen.flatten(), minlength=shape.count)


def quantized_experts(weight: torch.Tensor, nbits: float):
    """HqqExperts of a weight [experts, n, k] in device memory."""
    import hqq_cpp

    settings = {"nbits": nbits, "group_size": GROUP, "balance": "none"}
    layers = [hqq_cpp.quantize_linear(matrix, settings) for matrix in weight]
    made = hqq_cpp.HqqExperts.empty(
        layers[0].layer_config, tuple(weight.shape), dtype=weight.dtype, device="meta"
    )
    fields = [layer.packed()._asdict() for layer in layers]
    stacks = {
        name: torch.stack([field[name] for field in fields])
        for name, tensor in fields[0].items()
        if tensor is not None
    }
    made.set_packed(stacks, weight.device)
    return made


def several(bench: Bench, item: Any, used_bytes: float, whole_bytes: float) -> list[Any]:
    """Copies of all experts, so that those in use overflow the cache."""
    room = int(MEMORY_SHARE * bench.memory_bytes // whole_bytes)
    count = max(2, min(bench.copies(used_bytes), room))
    return [item] + [copy.deepcopy(item) for _ in range(count - 1)]


def error_of(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> float:
    """Relative, against the products with the dense matrices."""
    parts = x.split(counts.tolist())
    expected = torch.cat([part.float() @ matrix.float().t() for part, matrix in zip(parts, weight)])
    return float((y.float() - expected).norm() / expected.norm())


def experts(bench: Bench) -> None:
    """4-bit experts of a mixture beside torch's grouped product in bfloat16."""
    for shape in SHAPES[-1:] if bench.quick else SHAPES:
        weight = STD * torch.randn(shape.count, shape.n, shape.k, dtype=DTYPE, device=bench.device)
        few = int((route(shape, TOKENS[0]) > 0).sum()) / shape.count
        nbytes = layer_bytes(shape.count * shape.n, shape.k, 4)
        layers = several(bench, quantized_experts(weight, 4), few * nbytes, nbytes)
        matrices = several(bench, weight, few * weight.nbytes, weight.nbytes)
        rows = []
        for tokens in TOKENS[:2] if bench.quick else TOKENS:
            counts = route(shape, tokens)
            on_gpu = counts.to(bench.device)
            offsets = on_gpu.cumsum(0).to(torch.int32)
            x = torch.randn(tokens * shape.top, shape.k, dtype=DTYPE, device=bench.device)
            walks = [Walk(OURS, [lambda e=e: e(x, on_gpu) for e in layers])]
            if hasattr(functional, "grouped_mm"):
                calls = [
                    lambda w=w: functional.grouped_mm(x, w.transpose(-2, -1), offs=offsets)
                    for w in matrices
                ]
                walks.append(Walk(DENSE, calls))
            for name, why in measure(walks, bench.samples).items():
                bench.fail(f"experts: {name}, {shape.name}, {tokens} tokens", why)
            used = int((counts > 0).sum()) / shape.count
            dense = next((w.seconds for w in walks if w.name == DENSE and w.times), None)
            for walk in walks:
                if not walk.times:
                    continue
                whole = nbytes if walk.name == OURS else weight.nbytes
                row = {
                    "name": f"{tokens} tokens: {walk.name}",
                    "us": 1e6 * walk.seconds,
                    "best_us": 1e6 * min(walk.times),
                    "bits": 8 * whole / weight.numel(),
                    "x_dense": None if dense is None else dense / walk.seconds,
                    "error": error_of(walk.calls[0](), x, weight, counts),
                    "how": "graph" if walk.graph else "calls",
                }
                rows.append(row | bench.shares(used * whole, walk.seconds))
        columns = [
            ("x bf16" if key == "x_dense" else head, key, spec) for head, key, spec in COLUMNS
        ]
        title = f"Experts: {shape.name}, each {shape.n} x {shape.k}, 4 bits"
        note = "Bytes are those of the experts that have rows."
        bench.report.sections.append(Section(title, rows, columns, note))
        del weight, layers, matrices
        torch.cuda.empty_cache()
