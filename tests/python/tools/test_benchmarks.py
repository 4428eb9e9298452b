"""The benchmark of products runs, and names what it cannot measure."""

import json
import os
import subprocess
import sys


def bench_linear(repository, *arguments, **environment):
    command = [sys.executable, repository / "benchmarks" / "bench_linear.py", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


def test_bench_linear(repository, tmp_path):
    out = tmp_path / "linear.json"
    done = bench_linear(
        repository, "--quick", "--threads", "1", "--only", r"hqq\.cpp 4-bit", "--json", out
    )
    assert done.returncode == 0, done.stderr
    everything = json.loads(out.read_text())
    errors = {(r["name"], r["m"]): r["error"] for r in everything["results"]}
    for m in (1, 16):
        assert 1e-4 < errors["hqq.cpp 4-bit fast", m] < 0.02
        assert errors["hqq.cpp 4-bit exact", m] < 1e-5
    assert set(everything["failed"]) <= {
        "read loop",
        "read loop, four streams",
    }  # it needs a C compiler
    assert "| hqq.cpp 4-bit exact " in done.stdout


def test_bench_linear_names_a_missing_peer(repository, tmp_path):
    (tmp_path / "openvino.py").write_text("raise ImportError('not here')\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = bench_linear(repository, "--quick", "--only", "openvino", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "Not measured: openvino 4-bit: ImportError: not here" in done.stdout


def test_bench_linear_refuses(repository):
    done = bench_linear(repository, "--only", "no such peer")
    assert done.returncode != 0 and "fits none of: read loop, " in done.stderr
