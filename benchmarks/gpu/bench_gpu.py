#!/usr/bin/env python3
"""Speed on a GPU beside the peers that are installed, as a Markdown file.

    python benchmarks/gpu/bench_gpu.py [--out FILE.md] [--only REGEX] [--peers REGEX] [--quick]

Cases: solve, dequantize, decode (M = 1), few rows (M = 2 to 16), sweep (M = 1 to 4096), experts, llama,
checkpoint. Every product walks through copies of the weights, together four times the L2 cache, recorded as
a CUDA graph; the peers take turns, and the median of the samples counts. Peers are optional:
pip install -r benchmarks/requirements-gpu-peers.txt. Those that are missing or fail are named with the reason.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

NO_GPU = 2
QUICK_SIZES = [1024, 512]
SIZES = [16384, 8192, 4096]
LARGE_MEMORY = 40 << 30  # below, the largest size is left out


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for what is printed")
    parser.add_argument("--only", default=".", help="regular expression on the names of the cases")
    parser.add_argument("--peers", default=".", help="regular expression on the names of the peers")
    parser.add_argument("--widths", default="8,6,5,4,3,2,1.58,1", help="bits of the codes")
    parser.add_argument("--sizes", help="n = k of the layers, the largest first (16384,8192,4096)")
    parser.add_argument("--samples", type=int, default=25, help="of which the median counts, >= 12")
    parser.add_argument("--bus-gb-s", type=float, help="peak of the memory; else from its clock")
    parser.add_argument("--checkpoint-gb", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written for a while")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows what works")
    args = parser.parse_args(arguments)
    if args.samples < 12:
        parser.error(f"--samples {args.samples}: it must be at least 12")
    return args


def gpu_problem() -> str | None:
    """Why nothing can be measured here, in one sentence; None: it can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error}): install it with CUDA"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "this torch was built without CUDA" if built is None else "torch finds no GPU"
        return f"there is no GPU to measure: {why}"
    try:
        import hqq_cpp
    except ImportError as error:
        return f"hqq_cpp cannot be imported: {error}"
    if not hqq_cpp.cuda_is_available():
        return "hqq_cpp cannot use the GPU: 'hqq-cpp doctor' says why"
    return None


def case_functions(args: argparse.Namespace) -> dict:
    import conversion
    import experts
    import layers
    import models

    gigabytes = 0.1 if args.quick else args.checkpoint_gb
    cases = {
        "solve": conversion.solve,
        "dequantize": conversion.dequantize,
        "decode": layers.decode,
        "few rows": layers.few_rows,
        "sweep": layers.sweep,
        "experts": experts.experts,
        "llama": models.llama,
        "checkpoint": lambda bench: models.checkpoint(bench, gigabytes, args.folder),
    }
    return {name: run for name, run in cases.items() if re.search(args.only, name)}


def make_bench(args: argparse.Namespace):
    import torch
    from layers import Bench, all_widths
    from peers import BASELINE, OURS, PEERS, available
    from report import Report, machine_text, nvidia_smi, versions
    from timing import bus_rate, copy_rate

    import hqq_cpp

    device = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(device)
    bus = args.bus_gb_s * 1e9 if args.bus_gb_s else bus_rate(properties)
    copied = copy_rate(args.samples)
    facts = {
        "device": f"{properties.name}, compute {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory / 2**30:.0f} GiB, L2 {properties.L2_cache_size >> 20} MiB",
        "memory": f"{'unknown peak' if bus is None else f'{bus / 1e9:.0f} GB/s by its clock'}, "
        f"copy {copied / 1e9:.0f} GB/s read and written",
        "CUDA of torch": torch.version.cuda,
        "nvidia-smi at start": nvidia_smi(device),
        "hqq_cpp": hqq_cpp.__version__,
        "packages": versions(),
        "samples": f"{args.samples}, median",
    }
    wanted = [p for p in PEERS if re.search(args.peers, p.name) or p.name in (OURS, BASELINE)]
    peers, reasons = available(wanted)
    if args.sizes:
        sizes = sorted(map(int, args.sizes.split(",")), reverse=True)
    elif args.quick:
        sizes = QUICK_SIZES
    else:
        sizes = SIZES if properties.total_memory >= LARGE_MEMORY else SIZES[1:]
    return Bench(
        report=Report(machine_text(facts), failed=reasons),
        peers=peers,
        samples=args.samples,
        sizes=sizes,
        widths=all_widths(args.widths),
        bus=bus,
        copy=copied,
        cache_bytes=properties.L2_cache_size,
        memory_bytes=properties.total_memory,
        quick=args.quick,
    )


def main() -> int:
    args = parse_args()
    problem = gpu_problem()
    if problem is not None:
        print(f"bench_gpu: {problem}", file=sys.stderr)
        return NO_GPU
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from report import nvidia_smi
    from timing import reason

    cases = case_functions(args)
    if not cases:
        print(f"bench_gpu: --only {args.only!r} fits no case", file=sys.stderr)
        return 1
    bench = make_bench(args)
    with torch.no_grad():
        for name, run in cases.items():
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                run(bench)
            except Exception as error:
                bench.fail(name, reason(error))
            torch.cuda.empty_cache()
            # Whatever happens later, this much is there.
            if args.out:
                args.out.write_text(bench.report.markdown())
    bench.report.machine += f"\n- nvidia-smi at end: {nvidia_smi(torch.cuda.current_device())}"
    text = bench.report.markdown()
    print(text)
    if args.out:
        args.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
