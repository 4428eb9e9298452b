"""A Llama in NumPy, small enough to read in one sitting: tokenizer, forward pass, perplexity.

    from tiny_llama import TinyLlama, Tokenizer, perplexity

    model = TinyLlama("examples/tiny-llama")           # or a folder that hqq-cpp quantize wrote
    ids = Tokenizer("examples/tiny-llama").encode("In the beginning")
    logits = model(ids)                                # [tokens, vocabulary], float32

It runs Llama checkpoints with a byte-level BPE tokenizer, in float32. Quantized layers are
dequantized when the model is loaded, so what is measured is the weights' error and nothing else.
"""

import itertools
import json
import re
from functools import cache
from pathlib import Path

import numpy as np

import hqq_cpp


class Tokenizer:
    """Byte-level BPE (GPT-2's) from a tokenizer.json."""

    def __init__(self, folder):
        data = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
        merges = [m.split(" ") if isinstance(m, str) else m for m in data["model"]["merges"]]
        self.vocab = data["model"]["vocab"]
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
        self.special = {token["content"]: token["id"] for token in data["added_tokens"]}
        self._split_special = re.compile("|".join(map(re.escape, self.special)) or "(?!)")
        self._encode_piece = cache(self._encode_piece)  # texts repeat their words

    def encode(self, text):
        ids, start = [], 0
        for match in self._split_special.finditer(text):
            ids += self._encode_plain(text[start : match.start()])
            ids.append(self.special[match.group()])
            start = match.end()
        return ids + self._encode_plain(text[start:])

    def _encode_plain(self, text):
        return [i for piece in split_words(text) for i in self._encode_piece(piece)]

    def _encode_piece(self, piece):
        """Merges the neighbours of lowest rank until no pair of neighbours has one."""
        parts = [BYTE_TO_CHAR[byte] for byte in piece.encode("utf-8")]
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, np.inf) for pair in itertools.pairwise(parts)]
            lowest = min(ranks)
            if lowest == np.inf:
                break
            i = ranks.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return tuple(self.vocab[part] for part in parts)


def split_words(text):
    r"""Splits text as GPT-2's expression does; its \p{L} and \p{N} are not in Python's re:

    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
    """
    kinds = [_kind(char) for char in text]
    start, length = 0, len(text)
    while start < length:
        if contraction := _CONTRACTION.match(text, start):
            end = contraction.end()
        else:
            # A word may take one space in front.
            first = start
            if text[start] == " " and start + 1 < length and kinds[start + 1] != "space":
                first += 1
            end = first + 1
            while end < length and kinds[end] == kinds[first]:
                end += 1
            # White space leaves its last character to the word that follows.
            if kinds[first] == "space" and end < length and end - start > 1:
                end -= 1
        yield text[start:end]
        start = end


_CONTRACTION = re.compile("'(?:s|t|re|ve|m|ll|d)")


@cache
def _kind(char):
    if char.isalpha():
        return "letter"
    if char.isnumeric():
        return "number"
    # Python also counts the separators U+001C..U+001F; Unicode's White_Space does not.
    if char.isspace() and not "\x1c" <= char <= "\x1f":
        return "space"
    return "other"


def _byte_to_char():
    """GPT-2's names of the 256 bytes: themselves where printable, else the characters from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_TO_CHAR = _byte_to_char()


def load_weights(folder):
    """Every weight of a checkpoint folder as float32: {name without ".weight": array}.

    Layers that are quantized are dequantized.
    """
    checkpoint = hqq_cpp.Checkpoint(folder)
    weights = {
        name.removesuffix(".weight"): np.asarray(checkpoint.tensor(name).numpy(), np.float32)
        for name in checkpoint
        if name.endswith((".weight", ".bias"))
    }
    for name in checkpoint.quantized_layers():
        weights[name] = hqq_cpp.dequantize(checkpoint.load(name))
    return weights


class TinyLlama:
    """The forward pass: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU."""

    def __init__(self, folder):
        self.config = config = json.loads((Path(folder) / "config.json").read_text())
        self.weights = load_weights(folder)
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads", self.heads)
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        rope = config.get("rope_parameters") or config
        exponents = np.arange(0, self.head_dim, 2) / self.head_dim
        self.frequencies = rope.get("rope_theta", 10000.0) ** -exponents

    def __call__(self, ids):
        """Logits [len(ids), vocab_size] of the next token after each prefix of ids."""
        embedding = self.weights["model.embed_tokens"]
        x = embedding[ids]
        angles = np.outer(np.arange(len(ids)), self.frequencies)[:, None, :]
        rotation = np.cos(angles, dtype=np.float32), np.sin(angles, dtype=np.float32)
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            h = self._norm(f"{layer}.input_layernorm", x)
            x = x + self._attention(f"{layer}.self_attn", h, rotation)
            h = self._norm(f"{layer}.post_attention_layernorm", x)
            x = x + self._mlp(f"{layer}.mlp", h)
        x = self._norm("model.norm", x)
        return x @ self.weights.get("lm_head", embedding).T

    def _linear(self, name, x):
        y = x @ self.weights[name].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _norm(self, name, x):
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config["rms_norm_eps"]) * self.weights[name]

    def _attention(self, name, x, rotation):
        tokens = len(x)

        def heads(projection, count):
            return self._linear(f"{name}.{projection}", x).reshape(tokens, count, self.head_dim)

        q = _rotate(heads("q_proj", self.heads), rotation)
        k = _rotate(heads("k_proj", self.kv_heads), rotation)
        v = heads("v_proj", self.kv_heads)
        # Several query heads share one head of keys and values.
        k, v = (np.repeat(t, self.heads // self.kv_heads, axis=1) for t in (k, v))
        scores = q.transpose(1, 0, 2) @ k.transpose(1, 2, 0) / np.float32(self.head_dim**0.5)
        scores[:, ~np.tri(tokens, dtype=bool)] = -np.inf
        mixed = _softmax(scores) @ v.transpose(1, 0, 2)
        return self._linear(f"{name}.o_proj", mixed.transpose(1, 0, 2).reshape(tokens, -1))

    def _mlp(self, name, x):
        gate = self._linear(f"{name}.gate_proj", x)
        silu = gate / (1 + np.exp(-gate))
        return self._linear(f"{name}.down_proj", silu * self._linear(f"{name}.up_proj", x))


def _rotate(x, rotation):
    """Rotary position embedding: the two halves of a head are the coordinates of its planes."""
    cos, sin = rotation
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def perplexity(model, ids, window=512, windows=48):
    """exp(mean cross entropy) over the first `windows` windows of `window` tokens each.

    Every window starts anew: its first token is not predicted.
    """
    windows = min(windows, len(ids) // window)
    if windows == 0:
        raise ValueError(f"perplexity needs at least {window} tokens, got {len(ids)}")
    losses = []
    for i in range(windows):
        piece = np.asarray(ids[i * window : (i + 1) * window])
        logits = model(piece)[:-1].astype(np.float64)
        largest = logits.max(axis=-1)
        log_sum = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
        losses.append(np.mean(log_sum - logits[np.arange(window - 1), piece[1:]]))
    return float(np.exp(np.mean(losses)))
