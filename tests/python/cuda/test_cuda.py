"""The CUDA library: how it is found and refused, and what runs on it, on the SIMT shim in its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hqq_cpp
from hqq_cpp import _core


def is_stub():
    try:
        _core.cuda_require_device(0)
    except hqq_cpp.CudaError as error:
        return "built without CUDA" in str(error)
    return False


WITHOUT_CUDA = is_stub()


def shim_path():
    """libhqq_cuda_simt.so of the build that _core comes from, or that HQQ_CUDA_SIMT names."""
    named = os.environ.get("HQQ_CUDA_SIMT")
    if named:
        assert Path(named).exists(), f"HQQ_CUDA_SIMT names {named}, which does not exist"
        return Path(named)
    path = Path(_core.__file__).resolve().parents[2] / "cuda" / "libhqq_cuda_simt.so"
    return path if path.exists() else None


@pytest.fixture
def shim():
    if WITHOUT_CUDA:
        pytest.skip("this module was built with HQQ_CUDA=OFF")
    path = shim_path()
    if path is None:
        pytest.skip("no libhqq_cuda_simt.so: build it and set HQQ_CUDA_SIMT to its path")
    return path


def test_everything_on_the_shim(shim):
    """cuda_*_on_shim.py in a process of its own: a process loads one library."""
    pytest.importorskip("torch", reason="the tests of the shim need torch")
    environment = {
        "HQQ_CUDA_LIBRARY": str(shim),
        "HQQ_SIMT_HOST_MEMORY": "1",
        # Device memory of torch is ordinary memory there: the library must see the same.
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    files = sorted(map(str, Path(__file__).parent.glob("cuda_*_on_shim.py")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1]


QUANTIZE = """
import sys
import numpy as np
import hqq_cpp
assert hqq_cpp.cuda_is_available() is (sys.argv[1] == "yes"), hqq_cpp.cuda_is_available()
W = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
q = hqq_cpp.quantize(W)
try:
    on_gpu = hqq_cpp.quantize(W, device="cuda")
except hqq_cpp.CudaError as first:
    try:
        hqq_cpp.quantize(W, device="cuda")
    except hqq_cpp.CudaError as second:
        assert str(first) == str(second)
        print(first)
else:
    assert np.array_equal(q.W_q, on_gpu.W_q)
    print("solved")
"""


def quantize_with(run_python, available, **environment):
    done = run_python(QUANTIZE, "yes" if available else "no", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_shim_solves(run_python, shim):
    assert quantize_with(run_python, True, HQQ_CUDA_LIBRARY=str(shim)) == "solved\n"


def test_a_driver_of_the_same_major_version_is_enough(run_python, shim):
    text = quantize_with(
        run_python, True, HQQ_CUDA_LIBRARY=str(shim), HQQ_SIMT_DRIVER="13000", HQQ_SIMT_COMPUTE="75"
    )
    assert text == "solved\n"


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            {"HQQ_SIMT_DRIVER": "0"},
            "no NVIDIA driver was found; install one that supports CUDA 13.0",
        ),
        (
            {"HQQ_SIMT_DRIVER": "12040"},
            "the NVIDIA driver supports CUDA 12.4, but the library was built with CUDA 13.0",
        ),
        (
            {"HQQ_SIMT_COMPUTE": "70"},
            "has compute capability 7.0; this build has kernels for 7.5 and newer",
        ),
    ],
)
def test_drivers_and_gpus_that_are_too_old(run_python, shim, environment, message):
    text = quantize_with(run_python, False, HQQ_CUDA_LIBRARY=str(shim), **environment)
    assert text.startswith("[cuda] ") and message in text


def test_too_little_memory(run_python, shim):
    text = quantize_with(run_python, True, HQQ_CUDA_LIBRARY=str(shim), HQQ_SIMT_MEMORY="1000")
    assert text.startswith("[cuda] quantize on cuda:0 needs ") and " bytes: " in text


def test_files_that_are_no_library(run_python, shim, tmp_path):
    missing = tmp_path / "missing.so"
    text = quantize_with(run_python, False, HQQ_CUDA_LIBRARY=str(missing))
    assert f"there is no CUDA library (looked for {missing})" in text
    text_file = tmp_path / "text.so"
    text_file.write_text("not a library")
    text = quantize_with(run_python, False, HQQ_CUDA_LIBRARY=str(text_file))
    assert f"cannot load {text_file}" in text
    text = quantize_with(run_python, False, HQQ_CUDA_LIBRARY=_core.__file__)
    assert "has no function hqq_cuda_api" in text


def test_doctor_says_why_not(run_python, shim, tmp_path):
    code = "import sys; from hqq_cpp import _core; sys.exit(_core.cli_main(['hqq-cpp', 'doctor']))"
    done = run_python(code, HQQ_CUDA_LIBRARY=str(tmp_path / "missing.so"))
    assert done.returncode == 0 and done.stderr == ""
    assert "CUDA         not available\n" in done.stdout
    assert "missing.so" in done.stdout


def test_import_loads_no_library(run_python, shim):
    code = """
import hqq_cpp
import hqq_cpp.nn

def is_loaded():
    with open("/proc/self/maps") as maps:
        return "libhqq_cuda" in maps.read()

assert not is_loaded()
assert hqq_cpp.backends.cuda._available is None
assert hqq_cpp.cuda_is_available() and is_loaded()
"""
    pytest.importorskip("torch")
    done = run_python(code, HQQ_CUDA_LIBRARY=str(shim))
    assert done.returncode == 0, done.stderr
