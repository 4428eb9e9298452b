"""Memory follows the largest matrix, not the model."""

import json
import math
import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from cli_runner import BINARY, needs_binary
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


def save_sparse(folder, shapes):
    """bfloat16 tensors of zeros that take no room on the disk."""
    folder.mkdir()
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text('{"model_type": "llama"}')


# The quickest.
PLAIN = ("--solver", "minmax", "--balance", "none", "--threads", 2)


def test_a_tensor_larger_than_memory_may_be(tmp_path):
    """A tensor of many matrices: 300 MB, or 20 GB, with the memory of a few matrices."""
    experts, matrix = 2400 if LONG else 36, 2 * 2048 * 2048
    save_sparse(tmp_path / "m", {"model.layers.0.mlp.experts.up_proj": [experts, 2048, 2048]})
    out = tmp_path / "q"
    peak = peak_memory("quantize", tmp_path / "m", out, "--nbits", 1, *PLAIN)
    print(f"{experts * matrix / MB:.0f} MB with {peak / MB:.0f} MB")
    assert peak <= 3 * matrix + ALLOWANCE
    assert peak_memory("verify", out) <= 3 * matrix + ALLOWANCE


@pytest.mark.skipif(not LONG, reason="minutes, and 6 GB of disk: HQQ_LONG_TESTS=1")
def test_more_elements_than_int32_counts(tmp_path):
    """2^31 + 1 values that are copied, and as many weights in a matrix with short last groups."""
    side = 46_344
    assert side**2 > 2**31 and side % 64
    shapes = {"model.norm.weight": [2**31 + 1], "model.up_proj.weight": [side, side]}
    save_sparse(tmp_path / "m", shapes)

    def succeed(*args):
        subprocess.run([BINARY, *map(str, args), "--quiet"], check=True)

    succeed("quantize", tmp_path / "m", tmp_path / "q", *PLAIN)
    succeed("verify", tmp_path / "q")
    succeed("diff", tmp_path / "m", tmp_path / "q")  # zeros are exact
