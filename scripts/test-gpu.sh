#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds the CUDA part for it and runs its tests, then those of small shapes
# under compute-sanitizer, if that is installed. Needs nvcc, and a Python (PYTHON, else the first that is found)
# with a torch that finds the GPU and the packages of scripts/requirements-test.txt.
#
#   scripts/test-gpu.sh [--no-sanitizer] [BUILD_FOLDER]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

sanitizer=true
build=$root/build/gpu
for argument in "$@"; do
  case $argument in
    --no-sanitizer) sanitizer=false ;;
    -*) die "unknown argument $argument (there is --no-sanitizer)" ;;
    *) build=$argument ;;
  esac
done

step "What is here"
command -v nvidia-smi >/dev/null || die "there is no nvidia-smi: no NVIDIA driver is installed"
nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total --format=csv
command -v nvcc >/dev/null || die "there is no nvcc on the PATH"
python=$(find_python)
"$python" - <<'PYTHON' || die "$python cannot run the tests"
import importlib
import sys

missing = []
for name in ("torch", "numpy", "pytest", "hypothesis", "pybind11"):
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing.append(f"{name} ({error})")
if missing:
    sys.exit("missing: " + ", ".join(missing))
import torch

if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} finds no GPU")
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")
PYTHON

step "Build"
# For the GPUs of this machine alone: nvcc compiles each kernel once.
architectures=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | tr -d . | sort -u | paste -sd ';')
launchers=()
if command -v ccache >/dev/null; then
  launchers=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
fi
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DHQQ_CUDA=ON \
  "-DHQQ_CUDA_ARCHITECTURES=$architectures" -DHQQ_PYTHON=ON "-DPython_EXECUTABLE=$python" \
  -DHQQ_BUILD_TESTS=OFF -DHQQ_BUILD_EXAMPLES=OFF "${launchers[@]}"
cmake --build "$build"

export PYTHONPATH=$build/python${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1
"$python" -m hqq_cpp._cli doctor

step "Tests"
tests=("$root"/tests/python/cuda/test_gpu*.py)
# Where there is a GPU, a suite that skips has failed.
"$python" -c 'import hqq_cpp, sys; sys.exit(not hqq_cpp.cuda_is_available())' ||
  die "hqq_cpp cannot use the GPU; see above"
"$python" -m pytest "${tests[@]}"

if ! $sanitizer; then exit 0; fi
if ! command -v compute-sanitizer >/dev/null; then
  echo "skipped: memcheck and racecheck, there is no compute-sanitizer"
  exit 0
fi
# Every tensor is an allocation of its own, so that its bounds are checked.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
small="few_rows or other_types or other_metadata or embedding or experts and not graph"
for tool in memcheck racecheck; do
  step "compute-sanitizer: $tool"
  # Our kernels only: the tool slows everything it looks at down by a factor of ten to a hundred.
  compute-sanitizer --tool "$tool" --kernel-name kns=hqq4cuda6device --error-exitcode 1 \
    "$python" -m pytest "${tests[@]}" -k "$small" -p no:cacheprovider
done
