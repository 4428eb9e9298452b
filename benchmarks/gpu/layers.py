"""The cases about products with one layer: decode, few rows, a sweep over the rows of x."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peers import BASELINE, OURS, Layer, Peer
from report import Goal, Report, Section
from shapes import GROUP, WIDTHS, copies
from timing import Walk, measure, reason

STD = 0.02
# Of the device's memory, for the copies of one peer.
MEMORY_SHARE = 0.04
SWEEP = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
SMALL_M = (2, 4, 8, 16)


@dataclass
class Bench:
    """What the cases share."""

    report: Report
    peers: list[Peer]
    samples: int
    sizes: list[int]  # of square layers, the largest first
    widths: list[float]
    bus: float | None  # peak bytes a second
    copy: float  # measured
    cache_bytes: int
    memory_bytes: int
    quick: bool = False
    device: str = "cuda"

    def copies(self, nbytes: float) -> int:
        return copies(int(nbytes), self.cache_bytes, int(MEMORY_SHARE * self.memory_bytes))

    def shares(self, nbytes: float, seconds: float) -> dict[str, float | None]:
        rate = nbytes / seconds
        return {
            "gb_per_s": rate / 1e9,
            "of_bus": None if self.bus is None else 100 * rate / self.bus,
            "of_copy": 100 * rate / self.copy,
        }

    def fail(self, name: str, why: str) -> None:
        self.report.failed[name] = why

    def try_once(self, works: dict[str, Callable[[], Any]], what: str) -> list[str]:
        """Runs each of `works`; gives the names of those that can, and notes why the others cannot."""
        able = []
        for name, work in works.items():
            try:
                work()
                able.append(name)
            except Exception as error:
                self.fail(f"{what}{name}", reason(error))
        return able

    def weight(self, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
        """The same one for every peer, but for rounding."""
        generator = torch.Generator(self.device).manual_seed(0)
        return STD * torch.randn(n, k, dtype=dtype, device=self.device, generator=generator)


@dataclass
class Entry:
    """A peer with its copies of a layer."""

    name: str
    peer: Peer
    nbits: float
    layer: Layer
    states: list[Any]

    def walk(self, x: torch.Tensor) -> Walk:
        calls = [lambda state=state: self.layer.multiply(state, x) for state in self.states]
        return Walk(self.name, calls)


def build(bench: Bench, n: int, k: int, nbits: float) -> list[Entry]:
    """Every peer that has this width, and the dense baseline."""
    entries = []
    for peer in bench.peers:
        width = 16 if peer.widths == (16,) else nbits
        if width not in peer.widths:
            continue
        name = peer.row_name(width)
        try:
            layer = peer.build(bench.weight(n, k, peer.dtype), width)
            states = layer.copies(bench.copies(n * k * peer.bits(width) / 8))
            entries.append(Entry(name, peer, width, layer, states))
        except Exception as error:
            bench.fail(f"{name} {n}x{k}", reason(error))
        torch.cuda.empty_cache()
    return entries


def products(bench: Bench, entries: list[Entry], n: int, k: int, m: int) -> list[dict[str, Any]]:
    """Rows of a table: every entry's time for x [m, k]."""
    x = torch.randn(m, k, device=bench.device)
    walks, errors = [], {}
    for entry in entries:
        its_x = x.to(entry.peer.dtype)
        try:
            y = entry.layer.multiply(entry.states[0], its_x).float()
            expected = its_x.float() @ bench.weight(n, k, entry.peer.dtype).float().t()
            errors[entry.name] = float((y - expected).norm() / expected.norm())
            del expected
            walks.append(entry.walk(its_x))
        except Exception as error:
            bench.fail(f"{entry.name} {n}x{k}, M={m}", reason(error))
    for name, why in measure(walks, bench.samples).items():
        bench.fail(f"{name} {n}x{k}, M={m}", why)
    by_name = {entry.name: entry for entry in entries}
    done = [walk for walk in walks if walk.times]
    dense = next((walk.seconds for walk in done if walk.name == BASELINE), None)
    rows = []
    for walk in done:
        entry = by_name[walk.name]
        row = {
            "name": walk.name,
            "peer": entry.peer.name,
            "m": m,
            "us": 1e6 * walk.seconds,
            "best_us": 1e6 * min(walk.times),
            "x_dense": None if dense is None else dense / walk.seconds,
            "bits": entry.peer.bits(entry.nbits),
            "error": errors[walk.name],
            "how": "graph" if walk.graph else "calls",
        }
        rows.append(row | bench.shares(n * k * row["bits"] / 8, walk.seconds))
    return rows


TIMES = [("us", "us", ".2f"), ("best us", "best_us", ".2f")]
READS = [
    ("bits/weight", "bits", ".2f"), ("GB/s", "gb_per_s", ".0f"), ("% of bus", "of_bus", ".1f"),
    ("% of copy", "of_copy", ".1f"),
]  # fmt: skip
CHECKS = [("x fp16", "x_dense", ".2f"), ("rel. error", "error", ".1e"), ("launched as", "how", "s")]
COLUMNS = TIMES + READS + CHECKS
ERROR_NOTE = "The error is that of y against the product with the weight before it was quantized."


def find(rows: list[dict[str, Any]], peer: str, key: str) -> float | None:
    return next((row[key] for row in rows if row["peer"] == peer), None)


def decode(bench: Bench) -> None:
    """M = 1 at every width and size."""
    # nbits -> least % of the bus, by place of the size: the largest, the middle one, the smallest.
    goals = {4: (80, 60, 40), 3: (70,), 2: (60,), 1: (40,)}
    for place, size in enumerate(bench.sizes):
        rows = []
        for nbits in bench.widths:
            entries = build(bench, size, size, nbits)
            its_rows = products(bench, entries, size, size, 1)
            rows += [row for row in its_rows if row["peer"] != BASELINE or not rows]
            least = goals.get(nbits, ())[place : place + 1]
            if least:
                what = f"decode M=1, {nbits:g}-bit g{GROUP}, {size}^2"
                value = find(its_rows, OURS, "of_bus")
                bench.report.goals.append(Goal(what, least[0], value, " % of the bus"))
            if nbits == 4 and place == 1:
                mine, theirs = (find(its_rows, peer, "us") for peer in (OURS, "humming"))
                ratio = None if mine is None or theirs is None else theirs / mine
                bench.report.goals.append(
                    Goal(f"4-bit M=1, {size}^2, against humming", 1.5, ratio, "x")
                )
            del entries
            torch.cuda.empty_cache()
        title = f"Decode: M = 1, {size} x {size}"
        bench.report.sections.append(Section(title, rows, COLUMNS, ERROR_NOTE))


def few_rows(bench: Bench) -> None:
    """M = 2 to 16 at the middle size, 4 bits."""
    size = bench.sizes[min(1, len(bench.sizes) - 1)]
    entries = build(bench, size, size, 4)
    for m in SMALL_M:
        rows = products(bench, entries, size, size, m)
        bench.report.sections.append(Section(f"M = {m}, {size} x {size}, 4 bits", rows, COLUMNS))
        if m == SMALL_M[-1]:
            value = find(rows, OURS, "x_dense")
            bench.report.goals.append(
                Goal(f"M={m}, {size}^2, against cuBLAS fp16", 2.5, value, "x")
            )


def sweep_rows(results: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a peer: its speed over fp16 for every M; fp16's is in microseconds."""
    names = dict.fromkeys(row["name"] for rows in results.values() for row in rows)
    table = []
    for name in names:
        key = "us" if name == BASELINE else "x_dense"
        line = {"name": f"{name}, us" if name == BASELINE else name}
        for m, rows in results.items():
            line[str(m)] = next((row[key] for row in rows if row["name"] == name), None)
        table.append(line)
    return table


def sweep(bench: Bench) -> None:
    """M from 1 to 4096 at every size, 4 bits, against cuBLAS fp16."""
    ratios: dict[int, list[float]] = {}
    ms = (1, 16) if bench.quick else SWEEP
    for size in reversed(bench.sizes):
        entries = build(bench, size, size, 4)
        results = {m: products(bench, entries, size, size, m) for m in ms}
        for m, rows in results.items():
            value = find(rows, OURS, "x_dense")
            if value is not None:
                ratios.setdefault(m, []).append(value)
        columns = [(f"M={m}", str(m), ".2f") for m in ms]
        title = f"Speed over cuBLAS fp16, {size} x {size}, 4 bits"
        bench.report.sections.append(Section(title, sweep_rows(results), columns))
        del entries
        torch.cuda.empty_cache()
    for what, least, limit in (("any M", 0.9, max(ms)), ("M up to 256", 1.0, 256)):
        values = [value for m, its in ratios.items() if m <= limit for value in its]
        worst = min(values) if values else None
        bench.report.goals.append(Goal(f"{what}, against cuBLAS fp16", least, worst, "x"))


def all_widths(text: str) -> list[float]:
    """The widths of a list such as "4,2,1.58"."""
    widths = [float(part) for part in text.split(",")]
    wrong = [width for width in widths if width not in WIDTHS]
    if wrong:
        raise ValueError(f"there are no {wrong[0]:g} bits; there are {', '.join(map(str, WIDTHS))}")
    return [width if width == 1.58 else int(width) for width in widths]
