"""Runs the program hqq-run for its tests."""

import os
import shutil
import subprocess

import pytest

BINARY = shutil.which(os.environ.get("HQQ_RUN") or "hqq-run")
needs_hqq_run = pytest.mark.skipif(
    not BINARY, reason="no hqq-run: it is not on the PATH and HQQ_RUN does not name it"
)


def run(*arguments):
    # One thread unless a test asks for more: the models are tiny, and the machine may be shared.
    environment = os.environ | {"HQQ_NUM_THREADS": "1"}
    command = [BINARY, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(errors="replace")


def refusal(*arguments):
    """The message of a run that must fail."""
    done = subprocess.run(
        [BINARY, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.startswith("hqq-run: ") and done.stderr.count("\n") == 1
    return done.stderr
