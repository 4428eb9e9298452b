"""Writes checkpoints of random bfloat16 weights with nothing but NumPy."""

import json
import struct

import numpy as np


def bfloat16(rng, shape, std=0.02):
    """Random weights; a million values are drawn and repeated, since gigabytes would take long."""
    count = int(np.prod(shape))
    values = (rng.standard_normal(min(count, 1 << 20)) * std).astype(np.float32)
    return np.resize((values.view(np.uint32) >> 16).astype(np.uint16), shape)


def save_shard(path, tensors):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(values.shape),
            "data_offsets": [offset, offset + values.nbytes],
        }
        offset += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            file.write(values.tobytes())


def save_model(folder, shards, config=None):
    """`shards`: one dict {name: uint16 array} per file. Returns the bytes of all tensors."""
    folder.mkdir(parents=True)
    weight_map, total = {}, 0
    for i, tensors in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_shard(folder / name, tensors)
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(values.nbytes for values in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    return total


def llama_layer(rng, layer, hidden, inter):
    prefix = f"model.layers.{layer}."
    tensors = {
        prefix + f"self_attn.{name}_proj.weight": bfloat16(rng, (hidden, hidden)) for name in "qkvo"
    }
    for name in ("gate", "up"):
        tensors[prefix + f"mlp.{name}_proj.weight"] = bfloat16(rng, (inter, hidden))
    tensors[prefix + "mlp.down_proj.weight"] = bfloat16(rng, (hidden, inter))
    tensors[prefix + "input_layernorm.weight"] = bfloat16(rng, (hidden,), 1.0)
    return tensors
