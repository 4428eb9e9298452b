#!/usr/bin/env bash
# Sets everything up and quantizes the bundled model: sizes, errors, perplexity before and after.
#
#   scripts/quickstart.sh [NBITS]     8, 6, 5, 4 (default), 3, 2, 1.58 or 1
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
nbits=${1:-4}

step "System packages"
bash "$root/scripts/install-system-packages.sh"

step "Python module and command (the first build takes a minute or two)"
make_venv
# Kernels that nothing here could run need not be built.
cuda=AUTO
command -v nvidia-smi >/dev/null || cuda=OFF
# A build folder that stays makes the next run quick.
SKBUILD_BUILD_DIR="$root/build/quickstart" pip_install --config-settings "cmake.define.HQQ_CUDA=$cuda" "$root"

step "Quantize examples/tiny-llama to $nbits bits"
model=$root/examples/tiny-llama
out=$root/out/tiny-llama-${nbits}bit
mkdir -p "$root/out"
"$venv/bin/hqq-cpp" quantize "$model" "$out" --nbits "$nbits" --force

step "Before and after"
"$python" "$root/examples/quickstart.py" --model "$model" --out "$out"
