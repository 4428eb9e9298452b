"""Memory follows the largest matrix, not the model."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from cli_runner import BINARY, needs_binary, run
from model_maker import bfloat16, llama_layer, save_model

pytestmark = needs_binary

LONG = bool(os.environ.get("HQQ_LONG_TESTS"))
MB = 1_000_000
ALLOWANCE = 100 * MB


# A new process counts the memory of the one it was forked from, so a small one stands between.
LAUNCHER = """
import os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss)
"""


def peak_memory(*args):
    command = [sys.executable, "-c", LAUNCHER, BINARY, *map(str, args), "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    code, kilobytes = map(int, result.stdout.split())
    assert code in (0, 1), result.stderr
    return kilobytes * 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """300 MB: layers whose largest matrix has 16.8 MB, an embedding of 33 MB, experts of 4.2 MB."""
    rng = np.random.default_rng(0)
    shards = [{"model.embed_tokens.weight": bfloat16(rng, (8192, 2048))}]
    for layer in range(3):
        shards.append(llama_layer(rng, layer, 2048, 4096))
    shards.append({"model.layers.3.mlp.experts.gate_up_proj": bfloat16(rng, (12, 1024, 2048))})
    folder = tmp_path_factory.mktemp("memory") / "m"
    total = save_model(folder, shards)
    assert total >= 300 * MB
    return folder, 2 * 4096 * 2048, total


@pytest.mark.parametrize("nbits", [4, 8])
def test_peak_memory(model, tmp_path, nbits):
    source, largest, total = model
    bound = 3 * largest + ALLOWANCE
    # Otherwise reading everything at once would pass too.
    assert bound < total / 2
    out, dense = tmp_path / "q", tmp_path / "d"
    peaks = {
        "quantize": peak_memory("quantize", source, out, "--nbits", nbits, "--threads", 2),
        "verify": peak_memory("verify", out),
        "dequantize": peak_memory("dequantize", out, dense, "--dtype", "bfloat16"),
        # Two dense float32 matrices of twice the size.
        "diff": peak_memory("diff", out, dense) - largest,
    }
    print({name: f"{peak / MB:.0f} MB" for name, peak in peaks.items()})
    for name, peak in peaks.items():
        assert peak <= bound, f"{name}: {peak / MB:.0f} MB, allowed {bound / MB:.0f} MB"


def save_sparse(folder, shape):
    """One bfloat16 tensor of zeros that takes no room on the disk. Returns its bytes."""
    folder.mkdir()
    size = 2 * int(np.prod(shape, dtype=np.int64))
    name = "model.layers.0.mlp.experts.up_proj" if len(shape) == 3 else "model.up_proj.weight"
    entry = {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}
    text = json.dumps({name: entry}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return size


def test_a_tensor_larger_than_memory_may_be(tmp_path):
    """A tensor of many matrices: 300 MB, or 20 GB, with the memory of a few matrices."""
    experts, matrix = 2400 if LONG else 36, 2 * 2048 * 2048
    total = save_sparse(tmp_path / "m", [experts, 2048, 2048])
    settings = ("--nbits", 1, "--solver", "minmax", "--balance", "none", "--threads", 2)
    peak = peak_memory("quantize", tmp_path / "m", tmp_path / "q", *settings)
    print(f"{total / MB:.0f} MB with {peak / MB:.0f} MB")
    assert peak <= 3 * matrix + ALLOWANCE
    assert peak_memory("verify", tmp_path / "q") <= 3 * matrix + ALLOWANCE


@pytest.mark.skipif(not LONG, reason="a minute and 6 GB of disk: HQQ_LONG_TESTS=1")
def test_more_elements_than_int32_counts(tmp_path):
    """2^31 + 1 weights in a matrix, whose rows end with a short group."""
    shape = [3, (2**31 + 1) // 3]
    assert np.prod(shape, dtype=np.int64) == 2**31 + 1
    save_sparse(tmp_path / "m", shape)
    settings = ("--solver", "minmax", "--balance", "none", "--quiet")
    run("quantize", tmp_path / "m", tmp_path / "q", *settings)
    run("verify", tmp_path / "q", "--quiet")
    run("diff", tmp_path / "m", tmp_path / "q", "--quiet")  # zeros are exact
