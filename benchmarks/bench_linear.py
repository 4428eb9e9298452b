"""Speed of y = x W^T with low-bit weights beside its peers, in one run, as Markdown tables.

    python benchmarks/bench_linear.py [--n 4096 --k 4096] [--m 1,2,4,128,512] [--threads 1,2] [--only REGEX]

W is [n, k] in groups of 64, x has m rows of float32. Every peer is a process of its own. They take turns in short
slices, `--rounds` times, and only one runs at a time. Up to 8 rows the products walk through copies of the weights,
together more than `--cold-mb`, as decoding walks through the layers of a model; with more rows they use one copy.

Two of the processes only read memory. "of read" is the rate at which a peer reads its weights over the best rate of
the first, a plain loop (four streams at a time read up to half more): hqq.cpp counts the tiles it reads,
and in "of read (format 1)" the bytes of the same weights in format 1
(1.58 bits take 2 bits a weight in tiles). The error is that of y against the product with the same quantized weights.
Peers: pip install -r benchmarks/requirements-peers.txt; those that are missing are named with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

from bench_quantize import cpu_name
from linear_case import DECODE_ROWS, Case
from linear_peers import PEERS, SLOW_PEERS

READ_LOOP = "read loop"
# The versions of these are printed.
PACKAGES = ["torch", "onnxruntime", "openvino", "libggml-python", "ik-llama-cpp-python", "hqq"]
# What a call costs on a layer that is too small to take time itself.
OVERHEAD_PEERS = ["hqq.cpp 4-bit fast", "HqqLinear 4-bit float32", "torch float32"]
OVERHEAD_SIZE = 64
ANSWER_SECONDS = 300


class PeerError(Exception):
    """Why a peer is not measured."""


def time_slice(job, seconds: float) -> tuple[float, float]:
    """Best and median seconds of a product."""
    job.run()  # wakes threads
    times = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        job.run()
        times.append((time.perf_counter() - start) / job.copies)
    return min(times), statistics.median(times)


def serve(connection, name: str) -> None:
    """The process of a peer: a Case prepares it, a number of seconds is a slice."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # libraries print notices
    os.dup2(quiet, 2)
    build = (PEERS | SLOW_PEERS)[name]
    job = None
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            if isinstance(request, Case):
                job = None  # frees its memory first
                job = build(dataclasses.replace(request, single_copy=name in SLOW_PEERS))
                connection.send((job.nbytes, job.format_nbytes, job.error))
            else:
                connection.send(time_slice(job, request))
        except Exception as error:
            text = " ".join(str(error).split())
            connection.send(PeerError(f"{type(error).__name__}: {text}"[:200]))


class Worker:
    def __init__(self, name: str, threads: int):
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HQQ_NUM_THREADS"):
            os.environ[variable] = str(threads)  # of this process, for its children
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, request):
        try:
            self._connection.send(request)
            if not self._connection.poll(ANSWER_SECONDS):
                raise PeerError(f"no answer for {ANSWER_SECONDS} s")
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise PeerError(f"its process died: {how}") from None
        if isinstance(answer, PeerError):
            raise answer
        return answer

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()


class Benchmark:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.failed: dict[str, str] = {}

    def ask_all(self, workers: list[Worker], request) -> dict[str, tuple]:
        """One after the other. A worker that fails is stopped and leaves the list."""
        answers = {}
        for worker in list(workers):
            try:
                answers[worker.name] = worker.ask(request)
            except PeerError as error:
                self.failed[worker.name] = str(error)
                worker.stop()
                workers.remove(worker)
        return answers

    def measure(self, workers: list[Worker], case: Case) -> list[dict]:
        note(f"m = {case.m}, threads = {case.threads}: preparing {len(workers)} peers")
        ready = self.ask_all(workers, case)
        slices: dict[str, list] = {name: [] for name in ready}
        for number in range(self.args.rounds):
            note(f"m = {case.m}, threads = {case.threads}: round {number + 1}")
            for name, times in self.ask_all(workers, self.args.slice).items():
                slices[name].append(times)
        results = [
            result(case, worker.name, *ready[worker.name], slices[worker.name])
            for worker in workers
        ]
        add_shares(results)
        return results

    def run(self, names: list[str], cases: list[Case]) -> list[dict]:
        """The cases have the same number of threads."""
        workers = [Worker(name, cases[0].threads) for name in names]
        results = []
        for case in cases:
            results += self.measure(workers, case)
        for worker in workers:
            worker.stop()
        return results


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def result(case: Case, name, nbytes, format_nbytes, error, slices) -> dict:
    best = min(best for best, _ in slices)
    product = not name.startswith(READ_LOOP)
    return {
        "name": name,
        "n": case.n,
        "k": case.k,
        "m": case.m,
        "threads": case.threads,
        "us_best": best * 1e6,
        "us_median": statistics.median(median for _, median in slices) * 1e6,
        "bits": nbytes * 8 / (case.n * case.k) if product else None,
        "nbytes": nbytes,
        "format_nbytes": format_nbytes,
        "gb_per_s": nbytes / best / 1e9,
        "gop_per_s": 2 * case.m * case.n * case.k / best / 1e9 if product else None,
        "error": error,
    }


def add_shares(results: list[dict]) -> None:
    """Of the rate of the read loop in the same table."""
    read = next((r["gb_per_s"] for r in results if r["name"] == READ_LOOP), None)
    for r in results:
        r["of_read"] = r["of_read_format"] = None
        if read is not None:
            r["of_read"] = r["gb_per_s"] / read
            if r["format_nbytes"] is not None:
                r["of_read_format"] = r["of_read"] * r["format_nbytes"] / r["nbytes"]


# Heading, key and format of a column.
TIMES = [("best us", "us_best", ".1f"), ("median us", "us_median", ".1f")]
WORK = [("Gop/s", "gop_per_s", ".1f"), ("rel. error", "error", ".1e")]
READS = [
    ("bits/weight", "bits", ".3f"),
    ("GB/s", "gb_per_s", ".1f"),
    ("of read", "of_read", ".2f"),
    ("of read (format 1)", "of_read_format", ".2f"),
]


def table(title: str, results: list[dict], columns: list[tuple]) -> str:
    """A Markdown table whose columns are aligned."""

    def text(value, spec: str) -> str:
        return "" if value is None else format(value, spec)

    rows = [["what", *(heading for heading, _, _ in columns)]]
    for r in results:
        rows.append([r["name"], *(text(r[key], spec) for _, key, spec in columns)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = [
        " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join([f"**{title}**", "", *(f"| {line} |" for line in lines)])


def report(groups: list[list[dict]], overhead: list[dict], failed: dict[str, str]) -> str:
    parts = [machine()]
    for results in groups:
        first = results[0]
        decode = first["m"] <= DECODE_ROWS
        title = (
            f"{first['n']} x {first['k']}, m = {first['m']}, threads = {first['threads']}, "
            f"{'cold' if decode else 'one copy'}"
        )
        products = [r for r in results if decode or not r["name"].startswith(READ_LOOP)]
        parts.append(table(title, products, TIMES + (READS if decode else []) + WORK))
    if overhead:
        title = f"One call on a layer of {OVERHEAD_SIZE} x {OVERHEAD_SIZE}, m = 1, threads = 1"
        parts.append(table(title, overhead, TIMES))
    for reason in dict.fromkeys(failed.values()):
        names = "; ".join(name for name, why in failed.items() if why == reason)
        parts.append(f"Not measured: {names}: {reason}")
    return "\n\n".join(parts)


def machine() -> str:
    import hqq_cpp

    versions = [f"hqq_cpp {hqq_cpp.__version__} (target {hqq_cpp.cpu_target()})"]
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    return f"{cpu_name()}, {os.cpu_count()} processors; " + ", ".join(versions)


def parse_args() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4096, help="rows of W; a multiple of 16")
    parser.add_argument("--k", type=int, default=4096, help="columns of W; a multiple of 256")
    parser.add_argument("--m", type=numbers, default=[1, 128], help="rows of x: 1,2,4,128,512")
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slice", type=float, default=0.12, help="seconds of a turn")
    parser.add_argument(
        "--cold-mb", type=int, default=128, help="weights that few rows walk through"
    )
    parser.add_argument("--only", default=".", help="regular expression on the names of the rows")
    parser.add_argument("--slow", action="store_true", help="also peers that take > 10 ms a row")
    parser.add_argument("--quick", action="store_true", help="one short round on a small layer")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--markdown", type=Path, help="file for what is printed")
    args = parser.parse_args()
    if args.quick:
        args.n, args.k, args.m = 256, 512, [1, 16]
        args.rounds, args.slice, args.cold_mb = 1, 0.001, 1
    if args.n % 16 or args.k % 256:
        parser.error(f"--n {args.n} must be a multiple of 16 and --k {args.k} one of 256")
    return args


def main() -> None:
    args = parse_args()
    peers = PEERS | SLOW_PEERS if args.slow else PEERS
    names = [name for name in peers if re.search(args.only, name)]
    if not names:
        sys.exit(f"--only {args.only!r} fits none of: {', '.join(peers)}")
    if READ_LOOP not in names:
        names.insert(0, READ_LOOP)
    benchmark = Benchmark(args)
    groups, cold_bytes = [], args.cold_mb << 20
    for threads in args.threads:
        cases = [Case(args.n, args.k, m, threads, cold_bytes) for m in args.m]
        names = [name for name in names if name not in benchmark.failed]
        results = benchmark.run(names, cases)
        groups += [[r for r in results if r["m"] == m] for m in args.m]
    groups = [group for group in groups if group]
    small = Case(OVERHEAD_SIZE, OVERHEAD_SIZE, 1, 1, cold_bytes)
    tiny = [name for name in OVERHEAD_PEERS if name in set(names) - set(benchmark.failed)]
    overhead = benchmark.run(tiny, [small]) if tiny else []
    text = report(groups, overhead, benchmark.failed)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.json:
        everything = {
            "machine": machine(),
            "results": [r for results in groups for r in results],
            "overhead": overhead,
            "failed": benchmark.failed,
        }
        args.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
