"""Loading and running a quantized model through Transformers, beside the same model in bfloat16.

    python benchmarks/bench_transformers.py [--repeat 7] [--hidden 768] [--layers 12]

Makes a random Llama of about 100 million parameters in a temporary folder and prints medians of
interleaved runs: from_pretrained plain, with quantization (4 bits, group 64), of the quantized
folder, and upstream hqq (if installed) on the layers of one decoder layer, times the number of
layers. Then compiled against eager forward.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hqq_cpp
import hqq_cpp.transformers


def seconds(work) -> float:
    gc.collect()
    start = time.perf_counter()
    result = work()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def interleaved(works: dict, repeat: int) -> dict[str, float]:
    """Median seconds of each, run in turns so that a busy machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()  # warms page cache, imports, compilers
    for _ in range(repeat):
        for name, work in works.items():
            times[name].append(seconds(work))
    return {name: statistics.median(values) for name, values in times.items()}


def upstream_seconds(model) -> float | None:
    """Upstream's time for all decoder layers, from one."""
    try:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    except ImportError:
        return None
    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    layers = [m for m in model.model.layers[0].modules() if isinstance(m, torch.nn.Linear)]
    start = time.perf_counter()
    for layer in layers:
        copy = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        copy.weight.data = layer.weight.data.float()
        HQQLinear(copy, config, compute_dtype=torch.float32, device="cpu")
    return (time.perf_counter() - start) * len(model.model.layers)


def load(path: Path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **kwargs)


def measure_loads(dense: Path, quantized: Path, repeat: int) -> dict[str, float]:
    """Median seconds of every way to load. The folder `quantized` is made here."""
    settings = hqq_cpp.HqqConfig(nbits=4, group_size=64)
    plain = transformers.HqqConfig(nbits=4, group_size=64)
    load(dense, quantization_config=settings).save_pretrained(quantized)
    return interleaved(
        {
            "bfloat16, mapped: nothing is read yet": lambda: load(dense),
            "bfloat16, read": lambda: load(dense, disable_mmap=True),
            "quantize on load, transformers.HqqConfig": lambda: load(
                dense, quantization_config=plain
            ),
            "quantize on load, hqq_cpp.HqqConfig (balanced)": lambda: load(
                dense, quantization_config=settings
            ),
            "quantized folder, mapped": lambda: load(quantized),
            "quantized folder, read": lambda: load(quantized, disable_mmap=True),
        },
        repeat,
    )


def print_loads(loads: dict[str, float], upstream: float | None) -> None:
    print("| from_pretrained | seconds | against bfloat16, read |\n|--|--:|--:|")
    read = loads["bfloat16, read"]
    for name, value in loads.items():
        print(f"| {name} | {value:.3f} | {value / read:.2f} |")
    if upstream is not None:
        ours = loads["quantize on load, transformers.HqqConfig"]
        print(
            f"| upstream hqq, solving alone | {upstream:.1f} | {upstream / read:.0f} "
            f"({upstream / ours:.0f}x ours) |"
        )


def print_forwards(model, repeat: int) -> None:
    """Times of the eager and the compiled model, for one token and for 64."""
    compiled = torch.compile(model, fullgraph=True)

    def forward(run, ids):
        with torch.no_grad():
            return run(ids, use_cache=False).logits

    print("\n| forward | eager, ms | compiled, ms | compiled / eager |\n|--|--:|--:|--:|")
    for tokens in (1, 64):
        ids = torch.randint(0, 16000, (1, tokens))
        times = interleaved(
            {
                "eager": lambda: forward(model, ids),
                "compiled": lambda: forward(compiled, ids),
            },
            repeat,
        )
        eager, fast = 1e3 * times["eager"], 1e3 * times["compiled"]
        print(f"| {tokens} tokens | {eager:.1f} | {fast:.1f} | {fast / eager:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16000, hidden_size=arguments.hidden, intermediate_size=arguments.hidden * 8 // 3,
        num_hidden_layers=arguments.layers, num_attention_heads=12, num_key_value_heads=12,
        max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        dense, quantized = Path(folder, "dense"), Path(folder, "quantized")
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(dense)
        count = sum(p.numel() for p in model.parameters())
        upstream = upstream_seconds(model)
        del model
        loads = measure_loads(dense, quantized, arguments.repeat)
        print(
            f"{count / 1e6:.0f} M parameters, {torch.get_num_threads()} threads, "
            f"{hqq_cpp.cpu_target()}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}, {platform.machine()}\n"
        )
        print_loads(loads, upstream)
        print_forwards(load(quantized), 3 * arguments.repeat)


if __name__ == "__main__":
    main()
