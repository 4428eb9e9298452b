#!/usr/bin/env python3
"""From a bf16 checkpoint folder to a 4-bit folder: time against the solver's own rate, and peak memory.

    python benchmarks/bench_checkpoint.py [--gigabytes 1.0] [--threads 2] [--rounds 3] [--folder DIR]

Writes a random sharded Llama of the given size (hidden 2048) if DIR does not hold one, reads it once so that it is in
the page cache, then takes turns: the solver alone on the same bf16 matrices in memory, and the whole folder. The goal
is 85 % of the solver's rate, with a peak of at most three times the largest tensor + 100 MB.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HIDDEN, MLP, VOCAB = 2048, 5632, 32000


def layer_shapes(index):
    prefix = f"model.layers.{index}"
    shapes = {f"{prefix}.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
    shapes[f"{prefix}.mlp.gate_proj.weight"] = (MLP, HIDDEN)
    shapes[f"{prefix}.mlp.up_proj.weight"] = (MLP, HIDDEN)
    shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, MLP)
    shapes[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
    shapes[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN,)
    return shapes


def bf16(rng, shape):
    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def write_safetensors(path, tensors):
    """A plain writer: NumPy has no bfloat16, so the bits come as uint16."""
    header, offset = {}, 0
    for name, bits in tensors.items():
        header[name] = {
            "dtype": "BF16",
            "shape": bits.shape,
            "data_offsets": [offset, offset + bits.nbytes],
        }
        offset += bits.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for bits in tensors.values():
            file.write(bits.tobytes())


def make_checkpoint(folder, gigabytes):
    rng = np.random.default_rng(0)
    per_layer = sum(2 * int(np.prod(shape)) for shape in layer_shapes(0).values())
    fixed = 2 * VOCAB * HIDDEN
    layers = max(1, round((gigabytes * 1e9 - fixed) / per_layer))
    shards = [{"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}]
    for index in range(layers):
        if index % 4 == 0:
            shards.append({})
        shards[-1].update(layer_shapes(index))
    folder.mkdir(parents=True)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: bf16(rng, shape) for key, shape in shard.items()}
        total += sum(t.nbytes for t in tensors.values())
        write_safetensors(folder / name, tensors)
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN,
              "intermediate_size": MLP, "num_hidden_layers": layers, "vocab_size": VOCAB,
              "tie_word_embeddings": True, "num_attention_heads": 16}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def solver_seconds(folder, threads):
    """All linear weights from memory, one after the other."""
    import hqq_cpp

    total = 0.0
    weights = 0
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in hqq_cpp.load_safetensors(path).items():
            if len(tensor.shape) != 2 or "embed" in name:
                continue
            start = time.perf_counter()
            hqq_cpp.quantize(tensor, threads=threads, stats=True)
            total += time.perf_counter() - start
            weights += int(np.prod(tensor.shape))
    return total, weights


def folder_seconds(folder, threads):
    """The whole folder in a process of its own: seconds and peak resident memory in bytes."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        code = (
            "import sys, time, hqq_cpp\n"
            "start = time.perf_counter()\n"
            "hqq_cpp.quantize_checkpoint(sys.argv[1], sys.argv[2], threads=int(sys.argv[3]))\n"
            "seconds = time.perf_counter() - start\n"
            # Not ru_maxrss: that begins with the memory of the process that forked this one.
            "status = open('/proc/self/status').read()\n"
            "print(seconds, status.split('VmHWM:')[1].split()[0])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(Path(scratch) / "out"), str(threads)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        seconds, peak = done.stdout.split()
        return float(seconds), int(peak) * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    scratch = None
    folder = args.folder
    if folder is None:
        scratch = Path(tempfile.mkdtemp())
        folder = scratch / "checkpoint"
    try:
        if not folder.exists():
            make_checkpoint(folder, args.gigabytes)
        for path in folder.glob("*.safetensors"):
            path.read_bytes()
        solver, whole, peak = [], [], []
        for _ in range(args.rounds):
            seconds, weights = solver_seconds(folder, args.threads)
            solver.append(seconds)
            seconds, memory = folder_seconds(folder, args.threads)
            whole.append(seconds)
            peak.append(memory)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch)
    largest = 2 * VOCAB * HIDDEN
    print("| what | seconds | M weights/s |")
    print("|--|--:|--:|")
    print(
        f"| solver alone, {args.threads} threads | {min(solver):.2f} | {weights / min(solver) / 1e6:.0f} |"
    )
    print(f"| folder to folder | {min(whole):.2f} | {weights / min(whole) / 1e6:.0f} |")
    print(f"\nfolder rate / solver rate: {min(solver) / min(whole):.2f}; peak memory "
          f"{max(peak) / 1e6:.0f} MB (largest tensor {largest / 1e6:.0f} MB, "
          f"3 x largest + 100 MB = {3 * largest / 1e6 + 100:.0f} MB)")  # fmt: skip


if __name__ == "__main__":
    main()
