"""Quantizes the bundled model (unless that has been done) and prints what it cost and what it saved.

python examples/quickstart.py [--nbits 4] [--model examples/tiny-llama] [--out FOLDER]
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

import hqq_cpp

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from tiny_llama import TinyLlama, Tokenizer, perplexity  # noqa: E402


def print_table(title, header, rows):
    """Columns as wide as their widest cell; the first is text, the others are figures."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]

    def line(row):
        first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w)
                          for i, (cell, w) in enumerate(zip(row, widths)))  # fmt: skip
        return "  ".join([first, *others])

    print(f"\n{title}\n")
    print(line(header))
    print("  ".join("-" * width for width in widths))
    for row in rows:
        print(line(row))


def size_of(folder):
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def layer_errors(before, after, folder):
    """Rows of the table of errors, one per layer type; `before` and `after` are the weights."""
    checkpoint = hqq_cpp.Checkpoint(folder)
    types = defaultdict(list)
    for name in checkpoint.quantized_layers():
        types[hqq_cpp.layer_tag(name)].append(name)
    types["all of them"] = checkpoint.quantized_layers()

    rows = []
    for kind, names in types.items():
        W = np.concatenate([before[name].ravel() for name in names]).astype(np.float64)
        error = W - np.concatenate([after[name].ravel() for name in names])
        nbytes = sum(checkpoint.load(name).nbytes for name in names)
        rows.append(
            [
                kind,
                f"{len(names)}",
                f"{W.size:,}",
                f"{8 * nbytes / W.size:.2f}",
                f"{np.abs(error).mean():.5f}",
                f"{np.sqrt(np.mean(error**2)):.5f}",
                f"{100 * np.linalg.norm(error) / np.linalg.norm(W):.2f} %",
            ]
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nbits", type=float, default=4, help="8, 6, 5, 4, 3, 2, 1.58 or 1 (4)")
    parser.add_argument("--model", type=Path, default=HERE / "tiny-llama", help="Llama folder")
    parser.add_argument("--out", type=Path, help="quantized folder; used as it is when it exists")
    parser.add_argument("--text", type=Path, default=HERE / "text" / "valid.txt")
    args = parser.parse_args()
    out = args.out or HERE.parent / "out" / f"{args.model.name}-{args.nbits:g}bit"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        hqq_cpp.quantize_checkpoint(args.model, out, hqq_cpp.HqqConfig(nbits=args.nbits))

    original, quantized = TinyLlama(args.model), TinyLlama(out)
    before, after = size_of(args.model), size_of(out)
    print_table(
        "Error by layer type (W is the original weight, W_r the quantized one)",
        ["layer type", "layers", "weights", "bits/weight", "mean |W - W_r|", "rms", "relative"],
        layer_errors(original.weights, quantized.weights, out),
    )

    ids = Tokenizer(args.model).encode(args.text.read_text(encoding="utf-8"))
    ppl_before, ppl_after = perplexity(original, ids), perplexity(quantized, ids)
    print_table(
        "Before and after",
        ["", "before", "after", "change"],
        [
            ["size of the weights", f"{before:,} B", f"{after:,} B", f"{before / after:.2f}x less"],
            [
                "perplexity",
                f"{ppl_before:.3f}",
                f"{ppl_after:.3f}",
                f"{ppl_after - ppl_before:+.3f}",
            ],
        ],
    )
    print(f"\nEmbeddings and norms are kept as they were. The quantized model is in {out}")


if __name__ == "__main__":
    main()
