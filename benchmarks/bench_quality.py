#!/usr/bin/env python3
"""Perplexity of the bundled tiny-llama for every solver and width, as a Markdown table.

    python benchmarks/bench_quality.py [--nbits 4,3,2] [--windows 48]

The measurement of the quick start: 512-token windows of examples/text/valid.txt, a NumPy forward pass in float32,
groups of 64. "loss gap" is the mean loss minus that of the float model, in nats a token; below 0.001 it is noise.
Upstream's numbers are those of its algorithm as `solver="hqq"` computes it (tests compare the two).
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

import hqq_cpp
from methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from tiny_llama import TinyLlama, Tokenizer, perplexity  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nbits", default="4,3,2")
    parser.add_argument("--windows", type=int, default=48)
    args = parser.parse_args()
    folder = ROOT / "examples" / "tiny-llama"
    ids = Tokenizer(folder).encode((ROOT / "examples" / "text" / "valid.txt").read_text())

    def measure(path):
        return perplexity(TinyLlama(path), ids, windows=args.windows)

    base = measure(folder)
    print("| nbits | method | bits/weight | perplexity | loss gap |")
    print("|--|--|--:|--:|--:|")
    print(f"| 16 | bfloat16 | 16 | {base:.3f} | |", flush=True)
    for nbits in map(float, args.nbits.split(",")):
        for name, settings in METHODS.items():
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "out"
                report = hqq_cpp.quantize_checkpoint(folder, out, {"nbits": nbits, **settings})
                value = measure(out)
            print(f"| {nbits:g} | {name} | {report.bits_per_weight:.2f} | {value:.3f} | "
                  f"{math.log(value / base):.4f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
