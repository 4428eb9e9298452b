"""The cases about whole models: tokens a second of a Llama, and a checkpoint from folder to folder."""

from __future__ import annotations

import gc
import inspect
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from layers import STD, Bench
from report import Goal, Section
from shapes import GROUP, LLAMA_3_8B, SMALL_LLAMA, Llama
from timing import Walk, measure, reason, wall_seconds

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench_checkpoint import make_checkpoint

CACHE_TOKENS = 512
PROMPT_TOKENS = 16
READERS = 8


def random_llama(sizes: Llama, nbits: float, device: str) -> torch.nn.Module:
    """A Llama of random fp16 weights on the device; nbits below 16: each matrix is quantized as it is made,
    the last one (lm_head) too."""
    import transformers

    import hqq_cpp

    config = transformers.LlamaConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads, max_position_embeddings=8192, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.float16)
    settings = {"nbits": nbits, "group_size": GROUP, "balance": "none"}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            shape = module.weight.shape
            weight = STD * torch.randn(*shape, dtype=torch.float16, device=device)
            if nbits < 16:
                model.set_submodule(name, hqq_cpp.quantize_linear(weight, settings))
            else:
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
        elif isinstance(module, torch.nn.Embedding):
            values = STD * torch.randn(*module.weight.shape, dtype=torch.float16, device=device)
            module.weight = torch.nn.Parameter(values, requires_grad=False)
        elif module._parameters.get("weight") is not None:  # a norm
            ones = torch.ones(*module.weight.shape, dtype=torch.float16, device=device)
            module.weight = torch.nn.Parameter(ones, requires_grad=False)
    # Its buffers are computed, not loaded.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


class DecodeStep:
    """One token through the model with a static cache; the cache fills up with every call."""

    def __init__(self, model: torch.nn.Module, compiled: bool):
        import transformers

        device = model.lm_head.weight.device
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=CACHE_TOKENS)
        # The name of the argument changed between versions of Transformers.
        known = inspect.signature(type(model).forward).parameters
        name = "cache" if "cache" in known else "past_key_values"
        self.arguments: dict[str, Any] = {name: self.cache, "use_cache": True}
        self.model = model
        self.ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.position = torch.full((1, 1), PROMPT_TOKENS, dtype=torch.int64, device=device)
        prompt = torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64, device=device)
        model(prompt, **self.arguments)
        self.forward = torch.compile(self.step, fullgraph=True) if compiled else self.step

    def step(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        logits = self.model(ids, position_ids=position, **self.arguments).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def __call__(self) -> None:
        """The next token becomes the input of the next call."""
        self.ids.copy_(self.forward(self.ids, self.position))
        self.position.add_(1)

    def rewind(self) -> None:
        """Back to the end of the prompt."""
        self.position.fill_(PROMPT_TOKENS)
        for layer in self.cache.layers:
            length = getattr(layer, "cumulative_length", None)
            if isinstance(length, torch.Tensor):
                length.fill_(PROMPT_TOKENS)


def decode_rate(
    bench: Bench, model: torch.nn.Module, name: str, compiled: bool
) -> dict[str, Any] | None:
    """Tokens a second of a recorded step."""
    try:
        step = DecodeStep(model, compiled)
        walk = Walk(name, [step])
        failed = measure([walk], min(4 * bench.samples, (CACHE_TOKENS - PROMPT_TOKENS) // 2))
        if failed:
            raise RuntimeError(failed[name])
        step.rewind()
    except Exception as error:
        bench.fail(name, reason(error))
        return None
    how = "CUDA graph" if walk.graph else "calls"
    return {"name": name, "rate": 1 / walk.seconds, "ms": 1e3 * walk.seconds, "how": how}


def generate_rate(bench: Bench, model: torch.nn.Module, name: str) -> dict[str, Any] | None:
    """Tokens a second of generate(), which compiles the step by itself; without the prompt's time."""
    few, many = (4, 12) if bench.quick else (16, 144)
    ids = torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64, device=bench.device)

    def generate(count: int) -> None:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count,
            do_sample=False, cache_implementation="static", pad_token_id=0,
        )  # fmt: skip

    try:
        for count in (few, many, few, many):  # compiles for caches of both lengths
            generate(count)
        seconds = []
        for _ in range(3 if bench.quick else 5):
            short, long = wall_seconds(lambda: generate(few)), wall_seconds(lambda: generate(many))
            seconds.append((long - short) / (many - few))
    except Exception as error:
        bench.fail(name, reason(error))
        return None
    median = statistics.median(seconds)
    return {"name": name, "rate": 1 / median, "ms": 1e3 * median, "how": "torch.compile"}


def llama(bench: Bench) -> None:
    """Batch 1, quantized and in fp16, where memory allows."""
    sizes = SMALL_LLAMA if bench.quick else LLAMA_3_8B
    rows: list[dict[str, Any]] = []
    best = generated = None
    for nbits in (4, 16):
        name = f"hqq.cpp {nbits}-bit" if nbits < 16 else "torch fp16"
        try:
            model = random_llama(sizes, nbits, bench.device)
        except Exception as error:
            bench.fail(f"llama, {name}", reason(error))
            continue
        steps = [
            decode_rate(bench, model, f"{name}: step", compiled=False),
            decode_rate(bench, model, f"{name}: compiled step", compiled=True),
        ]
        whole = generate_rate(bench, model, f"{name}: generate(), static cache")
        if nbits < 16:
            best = max((row["rate"] for row in steps if row), default=None)
            generated = whole["rate"] if whole else None
        rows += [row for row in [*steps, whole] if row]
        del model
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    goals = bench.report.goals
    goals.append(Goal("Llama-3-8B, 4-bit, batch 1, CUDA graph", 500, best, " tokens/s"))
    goals.append(Goal("the same by generate(), static cache", 150, generated, " tokens/s"))
    note = f"{sizes.linear_weights() / 1e9:.2f} G weights in matrices, lm_head quantized like the rest."
    if bench.bus is not None:
        note += f" Floor of the format at full bus speed: {bench.bus / sizes.token_bytes(4):.0f} tokens/s."
    columns = [("tokens/s", "rate", ".1f"), ("ms", "ms", ".3f"), ("as", "how", "s")]
    title = "Llama-3-8B" if sizes == LLAMA_3_8B else "A small Llama (--quick)"
    bench.report.sections.append(Section(f"{title}, random weights, batch 1", rows, columns, note))


def read_files(folder: Path) -> int:
    """Reads all weights with several threads; returns their bytes."""

    def read(path: Path) -> int:
        buffer = bytearray(16 << 20)
        total = 0
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
        return total

    with ThreadPoolExecutor(READERS) as pool:
        return sum(pool.map(read, sorted(folder.glob("*.safetensors"))))


def checkpoint(bench: Bench, gigabytes: float, folder: Path | None = None) -> None:
    """hqq-cpp quantize --device cuda, against reading the same files; both from the page cache."""
    import hqq_cpp

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        make_checkpoint(source, gigabytes)
        program = [sys.executable, "-m", "hqq_cpp._cli"]
        command = [*program, "quantize", source, target, "--device", bench.device, "--force"]
        config = hqq_cpp.HqqConfig(nbits=4, group_size=GROUP)

        def in_process() -> None:
            hqq_cpp.quantize_checkpoint(source, target, config, device=bench.device, force=True)

        def in_command() -> None:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"hqq-cpp: {done.stderr[-200:]}")

        works = {
            "read the files": lambda: read_files(source),
            "quantize_checkpoint(device='cuda')": in_process,
            "hqq-cpp quantize --device cuda (with its start)": in_command,
        }
        times: dict[str, list[float]] = {n: [] for n in bench.try_once(works, "checkpoint: ")}
        for _ in range(2 if bench.quick else 3):
            for name, its in times.items():
                shutil.rmtree(target, ignore_errors=True)
                start = time.perf_counter()
                works[name]()
                its.append(time.perf_counter() - start)
        nbytes = read_files(source)
    read = min(times["read the files"])
    rows = [
        {"name": name, "s": min(its), "gb_per_s": nbytes / min(its) / 1e9, "x": min(its) / read}
        for name, its in times.items()
    ]
    solved = next((row["x"] for row in rows if row["name"].startswith("quantize_")), None)
    ratio = None if solved is None else 1 / solved
    bench.report.goals.append(Goal("checkpoint, rate of reading the files kept", 1 / 1.1, ratio))
    columns = [("s", "s", ".2f"), ("GB/s", "gb_per_s", ".2f"), ("x reading", "x", ".2f")]
    bench.report.sections.append(
        Section(f"A checkpoint of {nbytes / 1e9:.1f} GB, 4 bits, default settings", rows, columns)
    )
