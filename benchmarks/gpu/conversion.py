"""The cases that make weights: solve and dequantize."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from layers import READS, TIMES, Bench
from peers import OURS, ours, upstream
from report import Goal, Section
from shapes import GROUP, layer_bytes
from timing import Walk, measure, wall_seconds


def dequantize(bench: Bench) -> None:
    """Packed weights to fp16, in both orders, at every width."""
    size = bench.sizes[min(1, len(bench.sizes) - 1)]
    weight = bench.weight(size, size, torch.float16)
    rows, worst = [], None
    for nbits in bench.widths:
        nbytes = layer_bytes(size, size, nbits) + 2 * size * size
        walks = []
        for axis in (1, 0):
            name = f"{OURS} {nbits:g}-bit, axis {axis}"
            layer = ours(weight, nbits, axis)
            calls = [
                lambda layer=layer: layer.dequantize(torch.float16)
                for layer in layer.copies(bench.copies(layer_bytes(size, size, nbits)))
            ]
            walks.append(Walk(name, calls))
        for name, why in measure(walks, bench.samples).items():
            bench.fail(f"dequantize {name}", why)
        for walk in walks:
            if walk.times:
                row = {
                    "name": walk.name,
                    "us": 1e6 * walk.seconds,
                    "best_us": 1e6 * min(walk.times),
                }
                rows.append(row | bench.shares(nbytes, walk.seconds))
    if rows and bench.bus is not None:
        worst = min(row["of_bus"] for row in rows)
    bench.report.goals.append(Goal("dequantize, every width and axis", 85, worst, " % of the bus"))
    columns = TIMES + [column for column in READS if column[1] != "bits"]
    bench.report.sections.append(
        Section(f"Dequantize {size} x {size} to fp16 (bytes read and written)", rows, columns)
    )


def solve(bench: Bench) -> None:
    """Quantization of fp16 weights in device memory; a call allocates its result and waits for it."""
    import hqq_cpp

    size = bench.sizes[0]
    weight = bench.weight(size, size, torch.float16)
    plain = {"group_size": GROUP, "balance": "none"}
    works: dict[str, Callable[[], Any]] = {}
    goal_name = "joint 4-bit"
    for nbits in bench.widths:
        settings = plain | {"nbits": nbits}
        works[f"joint {nbits:g}-bit"] = lambda s=settings: hqq_cpp.quantize_linear(weight, s)
    for name, settings in {
        "sinkhorn + joint 4-bit (default)": {"group_size": GROUP},
        "joint 4-bit, axis 0": plain | {"axis": 0},
        "hqq 4-bit": plain | {"solver": "hqq"},
        "minmax 4-bit": plain | {"solver": "minmax"},
    }.items():
        settings = {"nbits": 4} | settings
        works[name] = lambda s=settings: hqq_cpp.quantize_linear(weight, s)
    if any(peer.name == "hqq, pytorch" for peer in bench.peers):
        works["hqq (upstream) 4-bit"] = lambda: upstream(weight, 4)
    times: dict[str, list[float]] = {name: [] for name in bench.try_once(works, "solve ")}
    for _ in range(bench.samples):
        for name, its in times.items():
            its.append(wall_seconds(works[name]))
    rows = [
        {
            "name": name,
            "ms": 1e3 * statistics.median(its),
            "rate": size * size / statistics.median(its) / 1e9,
        }
        for name, its in times.items()
    ]
    rate = next((row["rate"] for row in rows if row["name"] == goal_name), None)
    bench.report.goals.append(Goal(f"solve joint 4-bit g{GROUP}", 20, rate, " G weights/s"))
    columns = [("ms", "ms", ".2f"), ("G weights/s", "rate", ".2f")]
    bench.report.sections.append(Section(f"Quantize {size} x {size} fp16", rows, columns))
