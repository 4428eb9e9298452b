"""Times on a GPU: CUDA graphs of walks through copies of the weights, all peers in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from shapes import bus_bytes_per_second

WARM_UPS = 3
# Keeps the GPU busy while the host enqueues what is measured: about 0.1 ms.
HEAD_START_CYCLES = 200_000
COPY_BYTES = 1 << 30


@dataclass
class Walk:
    """Calls that take turns; one sample is all of them."""

    name: str
    calls: list[Callable[[], Any]]
    graph: bool = True  # False: launched one by one, since it cannot be recorded
    replay: Callable[[], None] | None = None
    times: list[float] = field(default_factory=list)  # seconds of one call

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)


def synchronize() -> None:
    torch.cuda.synchronize()


def wall_seconds(work: Callable[[], Any]) -> float:
    """Of work that allocates and waits, as its caller sees it."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def run_all(calls: list[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def record(walk: Walk) -> None:
    """Warms the walk up and records it as a CUDA graph, or leaves it to be launched call by call."""
    # Recorded on the stream that warmed it up: workspaces belong to streams.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run_all(walk.calls)
    torch.cuda.current_stream().wait_stream(stream)
    synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            run_all(walk.calls)
        graph.replay()
        synchronize()
    except Exception:
        walk.graph = False
        walk.replay = lambda: run_all(walk.calls)
        synchronize()
        return
    walk.replay = graph.replay


def sample(walk: Walk) -> float:
    """Seconds of one call, by events around the whole walk."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    walk.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / len(walk.calls)


def measure(walks: list[Walk], samples: int) -> dict[str, str]:
    """Fills the times of all walks, in turns; returns why a walk has none."""
    failed = {}
    ready = []
    for walk in walks:
        try:
            record(walk)
            ready.append(walk)
        except Exception as error:
            failed[walk.name] = reason(error)
    for _ in range(samples):
        for walk in ready:
            walk.times.append(sample(walk))
    return failed


def reason(error: BaseException) -> str:
    """One line that names an error."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]


def copy_rate(samples: int) -> float:
    """Bytes a second, read and written, of a device-to-device copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    walk = Walk("copy", [lambda: target.copy_(source)])
    measure([walk], samples)
    return 2 * COPY_BYTES / walk.seconds


def bus_rate(properties: Any) -> float | None:
    """Peak bytes a second of the device's memory; None: torch does not say."""
    clock = getattr(properties, "memory_clock_rate", 0)
    bits = getattr(properties, "memory_bus_width", 0)
    return bus_bytes_per_second(clock, bits) if clock and bits else None
