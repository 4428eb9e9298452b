#!/usr/bin/env python3
"""Speed and error of quantization beside its peers, in one run, as a Markdown table.

    python benchmarks/bench_quantize.py [--rows 4096 --cols 4096] [--threads 1,2] [--rounds 3] [--only REGEX]

One Gaussian matrix (std 1), groups of 64 along rows unless the row says otherwise. Every measurement is a process
of its own; the peers take turns, `--rounds` times, and each one's best time counts, since other work on the machine
can only add to it. "x upstream" is the rate over that of upstream hqq at the same width in the same run.
Peers that are not installed are left out with a note: hqq (with torch), libggml-python and gguf.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import subprocess
import sys
import time

import numpy as np

GROUP = 64


def gaussian(rows, cols):
    return np.random.default_rng(0).standard_normal((rows, cols), dtype=np.float32)


def time_best(function, repeats):
    """Best time of `repeats` calls after one that warms up, and the last result."""
    result, best = function(), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        best = min(best, time.perf_counter() - start)
    return best, result


def run_hqq_cpp(W, threads, options):
    import hqq_cpp

    options = dict(options)
    importance = np.ones(W.shape[1], np.float32) if options.pop("importance", False) else None
    config = hqq_cpp.HqqConfig(**{"group_size": GROUP, "balance": "none", **options})
    seconds, q = time_best(
        lambda: hqq_cpp.quantize(W, config, threads=threads, importance=importance), 3
    )
    return seconds, hqq_cpp.dequantize(q), q.bits_per_weight


def run_upstream(W, threads, options):
    import torch
    from hqq.core.quantize import Quantizer

    torch.set_num_threads(threads)
    w = torch.from_numpy(W)
    start = time.perf_counter()  # no warm-up: a call takes tens of seconds
    q, meta = Quantizer.quantize(
        w, nbits=options["nbits"], group_size=GROUP, axis=1, optimize=True,
        device="cpu", compute_dtype=torch.float32,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    return seconds, Quantizer.dequantize(q, meta).numpy(), options["nbits"] + 32 / GROUP


GGML_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12}


def run_ggml(W, threads, options):
    """Row blocks on Python threads (ctypes drops the GIL), as llama-quantize does it."""
    from concurrent.futures import ThreadPoolExecutor

    import libggml
    from gguf import GGMLQuantizationType, quants

    lib = ctypes.CDLL(os.path.join(os.path.dirname(libggml.__file__), "lib64", "libggml-base.so"))
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64

    class InitParams(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("buffer", pointer), ("no_alloc", ctypes.c_bool)]

    lib.ggml_init.argtypes, lib.ggml_init.restype = [InitParams], pointer
    lib.ggml_init(InitParams(1 << 16, None, True))  # fills the fp16 tables
    lib.ggml_row_size.argtypes, lib.ggml_row_size.restype = [ctypes.c_int, int64], ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        pointer,
        pointer,
        int64,
        int64,
        int64,
        pointer,
    ]
    kind = GGML_TYPES[options["type"]]
    lib.ggml_quantize_init(kind)
    rows, cols = W.shape
    row_size = lib.ggml_row_size(kind, cols)
    out = np.empty(row_size * rows, np.uint8)
    pool, block = ThreadPoolExecutor(threads), 64

    def job(row):
        lib.ggml_quantize_chunk(kind, W.ctypes.data, out.ctypes.data, row * cols, block, cols, None)

    seconds, _ = time_best(lambda: list(pool.map(job, range(0, rows, block))), 1)
    dense = quants.dequantize(out.reshape(rows, row_size), GGMLQuantizationType[options["type"]])
    return seconds, dense.astype(np.float32), row_size * 8 / cols


# name -> (function, options, the upstream row its rate is compared with)
RUNS = {}
for bits in (8, 4, 3, 2, 1):
    RUNS[f"upstream hqq {bits}-bit"] = (run_upstream, {"nbits": bits}, None)
for bits in (8, 6, 5, 4, 3, 2, 1.58, 1):
    peer = f"upstream hqq {int(bits)}-bit" if bits in (8, 4, 3, 2, 1) else None
    RUNS[f"hqq_cpp joint {bits}-bit"] = (run_hqq_cpp, {"nbits": bits}, peer)
for bits in (4, 3, 2):
    RUNS[f"hqq_cpp hqq {bits}-bit"] = (
        run_hqq_cpp, {"nbits": bits, "solver": "hqq", "meta_dtype": "float32"},
        f"upstream hqq {bits}-bit",
    )  # fmt: skip
RUNS["hqq_cpp minmax 4-bit"] = (run_hqq_cpp, {"nbits": 4, "solver": "minmax"}, None)
RUNS["hqq_cpp sinkhorn + joint 4-bit"] = (
    run_hqq_cpp, {"nbits": 4, "balance": "sinkhorn"}, "upstream hqq 4-bit")  # fmt: skip
RUNS["hqq_cpp joint + importance 4-bit"] = (
    run_hqq_cpp, {"nbits": 4, "importance": True}, "upstream hqq 4-bit")  # fmt: skip
for bits in (4, 3, 2):
    RUNS[f"hqq_cpp joint {bits}-bit g32, 8-bit metadata"] = (
        run_hqq_cpp,
        {"nbits": bits, "group_size": 32, "quant_scale": True, "quant_zero": True},
        None,
    )
# Q2_K takes 2.625 bits; this takes 2.53, and spends some of its lead in speed on more refits.
RUNS["hqq_cpp joint 2-bit g32, 8-bit metadata, 4 refits"] = (
    run_hqq_cpp,
    {"nbits": 2, "group_size": 32, "quant_scale": True, "quant_zero": True, "iterations": 4},
    None,
)
for name in ("Q4_K", "Q3_K", "Q2_K", "Q4_0", "Q8_0"):
    RUNS[f"ggml {name}"] = (run_ggml, {"type": name}, None)


def worker(name, threads, rows, cols):
    function, options, _ = RUNS[name]
    W = gaussian(rows, cols)
    seconds, dense, bits = function(W, threads, options)
    error = dense.reshape(W.shape).astype(np.float64) - W
    return {
        "rate": W.size / seconds / 1e6,
        "mae": float(np.abs(error).mean()),
        "rms": float(np.sqrt((error**2).mean())),
        "bits": float(bits),
    }


def measure(name, threads, args):
    command = [sys.executable, __file__, "--worker", json.dumps([name, threads])]
    command += ["--rows", str(args.rows), "--cols", str(args.cols)]
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1")
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["died"]
        return {"failed": lines[-1][:150]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"


def print_table(results, args):
    import hqq_cpp

    print(f"\n{args.rows} x {args.cols} float32, {cpu_name()}, {os.cpu_count()} processors, "
          f"hqq_cpp target {hqq_cpp.cpu_target()}\n")  # fmt: skip
    print(
        "| what | threads | M weights/s | x upstream | mean abs error | rms error | bits/weight |"
    )
    print("|--|--:|--:|--:|--:|--:|--:|")
    for (name, threads), r in results.items():
        peer = results.get((RUNS[name][2], threads), {})
        ratio = f"{r['rate'] / peer['rate']:.0f}" if "rate" in peer else ""
        print(f"| {name} | {threads} | {r['rate']:.4g} | {ratio} | {r['mae']:.4f} | "
              f"{r['rms']:.4f} | {r['bits']:.3f} |")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=".", help="regular expression on the names of the rows")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        # Peers print notices: only the last line of stdout is the result.
        print("\n" + json.dumps(worker(*json.loads(args.worker), args.rows, args.cols)))
        return
    results, failed = {}, {}
    for round_number in range(args.rounds):
        for threads in map(int, args.threads.split(",")):
            for name in RUNS:
                if not re.search(args.only, name) or name in failed:
                    continue
                r = measure(name, threads, args)
                if "failed" in r:
                    failed[name] = r["failed"]
                    continue
                print(f"round {round_number + 1}: {name}, {threads} threads: {r['rate']:.4g} M/s",
                      file=sys.stderr, flush=True)  # fmt: skip
                known = results.get((name, threads))
                if known is None or r["rate"] > known["rate"]:
                    results[name, threads] = r
    print_table(results, args)
    for name, why in failed.items():
        print(f"\nnot measured: {name}: {why}")


if __name__ == "__main__":
    main()
