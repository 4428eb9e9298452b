"""Writes tests/fuzz/corpus: the inputs that the fuzz targets start from.

Run it without arguments to rewrite the folder (the package hqq_cpp must be there); it writes the same
bytes every time. The corpus of safetensors_fuzz is tests/golden/hostile.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np

import hqq_cpp

HERE = Path(__file__).resolve().parent
OUT = HERE / "corpus"
MODEL = HERE.parents[1] / "examples" / "tiny-llama"
BETWEEN = b"\n====\n"
LARGEST = 4096

# The first two bytes of an input of folder_fuzz.
READ, VERIFY, TO_OURS, TO_UPSTREAM, DEQUANTIZE, QUANTIZE, DIFF = range(7)
OFFSETS, MANIFEST_HASH, RESUME = 1, 2, 4

WIDTHS = (8, 6, 5, 4, 3, 2, 1.58, 1)


def write(target: str, name: str, content: bytes) -> None:
    assert len(content) <= LARGEST, (target, name, len(content))
    (OUT / target).mkdir(parents=True, exist_ok=True)
    (OUT / target / name).write_bytes(content)


def dump(value) -> bytes:
    return json.dumps(value).encode()


# ---- folder_fuzz ---------------------------------------------------------------------------------


def save_shard(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, values) in tensors.items():
        end = len(data) + values.nbytes
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [len(data), end],
        }
        data += values.tobytes()
    text = dump(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def random_weights(rng, dtype: str, shape: tuple[int, ...]) -> tuple[str, np.ndarray]:
    values = rng.standard_normal(shape).astype(np.float32)
    if dtype == "BF16":
        return dtype, (values.view(np.uint32) >> 16).astype(np.uint16)
    return dtype, values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def save_model(folder: Path, sharded: bool) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    first = {
        "model.layers.0.q.weight": random_weights(rng, "F32", (8, 16)),
        "norm": random_weights(rng, "F32", (4,)),
    }
    second = {
        "model.layers.1.q.weight": random_weights(rng, "F16", (8, 16)),
        "model.embed_tokens.weight": random_weights(rng, "F32", (4, 8)),
    }
    if sharded:
        first["m.experts.down_proj"] = random_weights(rng, "BF16", (2, 8, 8))
        save_shard(folder / "a.safetensors", first)
        save_shard(folder / "b.safetensors", second)
        where = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_bytes(dump(index))
    else:
        save_shard(folder / "model.safetensors", first | second)
    (folder / "config.json").write_bytes(dump({"model_type": "llama"}))
    return folder


def shard_part(path: Path) -> bytes:
    """Header and the beginning of the data, which the target repeats."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length].rstrip() + b"\n--\n" + content[8 + length :][:200]


def folder_input(folder: Path, command: int, repairs: int, journal=b"", settings=b"") -> bytes:
    def read(name):
        path = folder / name
        return path.read_bytes() if path.exists() else b""

    shards = [shard_part(path) for path in sorted(folder.glob("*.safetensors"))]
    # Only verify reads it; without its indentation, which the target gives back.
    manifest = read("hqq_cpp.manifest.json") if command == VERIFY else b""
    parts = [
        read("config.json"),
        read("model.safetensors.index.json"),
        shards[0],
        shards[1] if len(shards) > 1 else b"",
        json.dumps(json.loads(manifest), separators=(",", ":")).encode() if manifest else b"",
        journal,
        settings,
    ]
    return bytes([command, repairs]) + BETWEEN.join(parts)


def quantized_inputs(model: Path, work: Path, upstream_too: bool):
    """Name and content for every width and the settings that change the layout."""
    choices = product((0, 1), (False, True))
    for number, (nbits, (axis, small)) in enumerate(product(WIDTHS, list(choices))):
        ours = work / f"{model.name}-{nbits}-{axis}-{small}"
        balance = "sinkhorn" if axis == 1 and small else "none"
        config = hqq_cpp.HqqConfig(
            nbits=nbits,
            group_size=8,
            axis=axis,
            quant_scale=small,
            quant_zero=small,
            balance=balance,
        )
        hqq_cpp.quantize_checkpoint(model, ours, config)
        command = (READ, VERIFY, DEQUANTIZE, DIFF)[(number + number // 4) % 4]
        yield ours.name, folder_input(ours, command, OFFSETS | MANIFEST_HASH)
        if upstream_too and axis == 1 and not small:
            upstream = work / f"{ours.name}-upstream"
            hqq_cpp.convert_checkpoint(ours, upstream, "upstream")
            yield f"{ours.name}-to", folder_input(ours, TO_UPSTREAM, OFFSETS | MANIFEST_HASH)
            yield f"{ours.name}-from", folder_input(upstream, TO_OURS, OFFSETS)


def folders(work: Path) -> None:
    settings = dump({"nbits": 3, "group_size": 8})
    finished = {"a.safetensors": {"size": 10, "xxh3_128": "00", "extra": {}}}
    journal = dump({"request": {"version": hqq_cpp.__version__}, "finished": finished})
    for name, sharded in (("one", False), ("two", True)):
        model = save_model(work / name, sharded)
        write("folder", f"{name}-quantize", folder_input(model, QUANTIZE, OFFSETS, b"", settings))
        resumed = folder_input(model, QUANTIZE, OFFSETS | RESUME, journal, settings)
        write("folder", f"{name}-resume", resumed)
        write("folder", f"{name}-diff", folder_input(model, DIFF, OFFSETS))
        for label, content in quantized_inputs(model, work, upstream_too=not sharded):
            # The larger ones say nothing new.
            if len(content) <= LARGEST:
                write("folder", label, content)


# ---- the other targets ---------------------------------------------------------------------------


def configs() -> None:
    rules = {
        "mlp.down_proj": {"nbits": 6},
        "model.layers.0.*": {"nbits": 8},
        "re:.*experts\\.[0-9]+\\..*": {"nbits": 3, "group_size": 32},
        "visual.*": None,
        "[a-z!]?": {"axis": 0},
    }
    ours = hqq_cpp.HqqConfig(skip_modules=["lm_head"]).to_dict()
    weights = {"nbits": 4, "channel_wise": True, "group_size": 64, "optimize": True}
    zeros = {"nbits": 8, "channel_wise": False, "group_size": None, "optimize": False}
    upstream = {
        "weight_quant_params": {**weights, "round_zero": True, "axis": 0, "view_as_float": False},
        "scale_quant_params": None,
        "zero_quant_params": zeros,
        "offload_meta": False,
    }
    inputs = {
        "ours": ours | {"dynamic_config": rules},
        "described": {
            "quant_method": "hqq_cpp",
            "format_version": 1,
            "nbits": 3,
            "not_quantized": ["a"],
        },
        "upstream": upstream,
        "transformers": {
            "quant_config": upstream,
            "quant_method": "hqq",
            "skip_modules": ["lm_head"],
        },
        "per_tag": {
            "self_attn.q_proj": {"weight_quant_params": {"nbits": 1.58, "group_size": 64}},
            "mlp.x": {"weight_quant_params": {"nbits": 3}},
        },
        "keywords": {"quant_method": "hqq", "nbits": 4, "group_size": 64, "axis": 1},
        "numbers": {
            "beta": 1e308,
            "kappa": 1.01,
            "lp_norm": 0.7,
            "iterations": 20,
            "group_size": 8,
        },
    }
    for name, value in inputs.items():
        write("config", name, dump(value))
    write("config", "overflow", b'{"beta": 1e999}')
    write("config", "nul", b'{"nbits": 4}\0{"nbits": 8}')
    write("config", "twice", b'{"nbits": 4, "nbits": 8}')
    write("config", "deep", b'{"dynamic_config":' + b"[" * 600)
    write("config", "surrogate", b'{"dynamic_config": {"\\ud800": {}}}')
    write("config", "backtracks", b'{"dynamic_config": {"re:(a+)+$|(a|aa)*b": {}}}')


def random_bytes() -> None:
    """For the targets that take their input apart themselves."""
    rng = np.random.default_rng(0)
    for number in range(24):
        write("packed", f"{number:02}", rng.bytes(40 + 10 * number))
        write("upstream", f"{number:02}", rng.bytes(40 + 10 * number))


def tokenizer(pattern: str | None, **more) -> dict:
    splits = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": pattern is None}
    vocabulary = {chr(byte): byte for byte in range(ord("!"), ord("~") + 1)}
    return {
        "added_tokens": [{"id": 300, "content": "<s>", "special": True}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": (splits if pattern is not None else []) + [byte_level],
        },
        "model": {
            "type": "BPE",
            "vocab": vocabulary | {"he": 200, "hel": 201, "\u0120": 202},
            "merges": [["h", "e"], "he l"],
        },
        **more,
    }


def hqq_run() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    scaled = config | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                        "high_freq_factor": 4.0,
                                        "original_max_position_embeddings": 8192}}  # fmt: skip
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
        "special_tokens": {"<s>": {"ids": [300]}},
    }
    inputs = {
        "plain": (config, tokenizer(None), "hello <s>world"),
        "split": (scaled, tokenizer(r"\p{L}+|\s+(?!\S)"), "hello  w\u00e9rld"),
        "backtracks": (config, tokenizer("(a+)+$"), "a" * 40 + "!"),
        "empty_pattern": (config, tokenizer(""), "hel"),
        "template": (config, tokenizer(None, post_processor=template), "hel"),
        "digits": (
            config | {"head_dim": 2**40},
            tokenizer(None, pre_tokenizer={"type": "Digits", "individual_digits": True}),
            "12",
        ),
        "no_heads": (config | {"num_attention_heads": 0, "vocab_size": 0}, {}, ""),
    }
    for name, (settings, words, text) in inputs.items():
        compact = [json.dumps(value, separators=(",", ":")).encode() for value in (settings, words)]
        write("hqq_run", name, BETWEEN.join([*compact, text.encode()]))


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        folders(Path(work))
    configs()
    random_bytes()
    hqq_run()
    sizes = [path.stat().st_size for path in OUT.rglob("*") if path.is_file()]
    print(f"{len(sizes)} files, {sum(sizes)} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
