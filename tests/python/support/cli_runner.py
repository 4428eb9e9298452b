"""Runs the command hqq-cpp for its tests."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).resolve().parents[3] / "examples" / "tiny-llama"
BINARY = os.environ.get("HQQ_CPP_BIN") or shutil.which("hqq-cpp")
needs_binary = pytest.mark.skipif(
    not BINARY, reason="no hqq-cpp: it is not on the PATH and HQQ_CPP_BIN does not name it"
)

OK, DIFFERENCES, USER, FORMAT, SYSTEM, INTERRUPTED = 0, 1, 2, 3, 4, 130
COMMANDS = ["quantize", "inspect", "verify", "dequantize", "convert", "diff", "doctor"]

# A second or more of work for the bundled model: enough to be stopped in the middle.
SLOW = ["--iterations", "300", "--lp-norm", "0.7", "--threads", "1"]


def run(*args, code=OK, **kwargs):
    result = subprocess.run(
        [BINARY, *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs
    )
    assert result.returncode == code, f"{args}: {result.returncode}\n{result.stdout}{result.stderr}"
    return result


def run_json(*args, code=OK):
    return json.loads(run(*args, "--json", code=code).stdout)


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
