"""Python threads that call the module at once, for scripts/tsan.sh: results are those of one thread.

Not a test of pytest: the interpreter has to be started with ThreadSanitizer's library.
"""

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import hqq_cpp
from cli_runner import files_of
from hqq_cpp import _core
from model_maker import bfloat16, save_model

THREADS = 4
ROUNDS = 3


def at_once(functions):
    """Results of functions that begin together, each on a thread of its own."""
    barrier = threading.Barrier(len(functions))

    def begin(function):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(begin, functions))


def tensor_bytes(q):
    return [np.asarray(tensor).tobytes() for tensor in q.tensors().values()]


def in_memory():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 128)).astype(np.float32)
    x = rng.standard_normal((3, 128)).astype(np.float32)
    q = hqq_cpp.quantize(weight, {"nbits": 4}, threads=1)
    y = np.asarray(hqq_cpp.linear(x, q))
    quantized = at_once([lambda: hqq_cpp.quantize(weight, {"nbits": 4}, threads=2)] * THREADS)
    assert all(tensor_bytes(one) == tensor_bytes(q) for one in quantized)
    products = at_once([lambda: np.asarray(hqq_cpp.linear(x, q))] * THREADS)
    assert all((one == y).all() for one in products)


def folders(work: Path):
    rng = np.random.default_rng(1)
    names = ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight")
    save_model(work / "m", [{name: bfloat16(rng, (32, 64))} for name in names])
    outs = [work / f"q{number}" for number in range(THREADS)]

    def quantize(out):
        return lambda: hqq_cpp.quantize_checkpoint(work / "m", out, {"nbits": 3}, threads=2)

    at_once([quantize(out) for out in outs])
    assert all(files_of(out) == files_of(outs[0]) for out in outs)
    reports = at_once([lambda out=out: hqq_cpp.verify_checkpoint(out) for out in outs])
    assert all(not report.problems for report in reports)


def main():
    for _ in range(ROUNDS):
        in_memory()
        with tempfile.TemporaryDirectory() as work:
            folders(Path(work))
    print(f"{THREADS} Python threads with {_core.__name__}: equal results")


if __name__ == "__main__":
    main()
