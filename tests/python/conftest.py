"""What the Python tests share. They run against the installed package: pip install . first, or set
PYTHONPATH to the folder python of a CMake build with HQQ_PYTHON=ON."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would the programs whose
# Ctrl-C is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Most tests compare with dense products to float32's accuracy; those of the fast mode ask for it.
os.environ.setdefault("HQQ_CPU_MODE", "exact")

REPOSITORY = Path(__file__).resolve().parents[2]

# A shared machine may stall any single example.
settings.register_profile("hqq", deadline=None, print_blob=True)
settings.load_profile("hqq")


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def model() -> Path:
    """The bundled model. Read only: tests write elsewhere."""
    return REPOSITORY / "examples" / "tiny-llama"


@pytest.fixture
def rng():
    return np.random.default_rng(20240229)


@pytest.fixture
def run_python(tmp_path):
    """Runs code in a fresh interpreter, in an empty folder; returns the CompletedProcess."""

    def run(code, *arguments, **environment):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
