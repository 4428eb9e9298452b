#!/usr/bin/env bash
# Builds the fuzz targets of tests/fuzz with clang and runs them, one on each processor.
#
#   scripts/fuzz.sh [SECONDS] [TARGET...]        20 seconds each; all targets
#   RUNS=5000000 scripts/fuzz.sh 0 folder_fuzz   as many executions; 0 seconds: no limit
#
# Prints executions and findings of each. What a target has found out stays in build/fuzz/found, the
# input that ends it in build/fuzz/TARGET-crash-...; build/fuzz/TARGET.log says why.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

build=$root/build/fuzz
export build RUNS=${RUNS:--1} FUZZ_SECONDS=${1:-20}
shift || true

# The whole path: CMake starts over where the same compiler has another name.
find_clang() {
  local candidate
  for candidate in ${FUZZ_CXX:-clang++ clang++-14 clang++-16 clang++-19}; do
    if echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' |
      "$candidate" -fsanitize=fuzzer,address -x c++ - -o /dev/null 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
}

corpus_of() {
  case $1 in
    safetensors_fuzz) echo "$root/tests/golden/hostile" ;;
    *) echo "$root/tests/fuzz/corpus/${1%_fuzz}" ;;
  esac
}

run_target() {
  local target=$1 corpus=$2 log=$build/$1.log
  mkdir -p "$build/found/$target"
  if "$build/tests/fuzz/$target" -max_total_time="$FUZZ_SECONDS" -runs="$RUNS" -max_len=4096 \
    -timeout=25 -verbosity=0 -print_final_stats=1 -artifact_prefix="$build/$target-" \
    "$build/found/$target" "$corpus" >"$log" 2>&1; then
    awk -v target="$target" '/number_of_executed/ { runs = $2 } /average_exec/ { rate = $2 }
      END { printf "%s: %d executions, %d a second, no finding\n", target, runs, rate }' "$log"
  else
    tail -n 60 "$log"
    echo "$target: FOUND SOMETHING, see $log"
    return 1
  fi
}
export -f run_target

compiler=$(find_clang)
if [ -z "$compiler" ]; then
  echo "skipped: no clang++ with libFuzzer (Debian packages clang and libclang-rt-dev)"
  exit 0
fi
cmake -S "$root" -B "$build" -G Ninja "-DCMAKE_CXX_COMPILER=$compiler" -DHQQ_BUILD_FUZZERS=ON \
  -DHQQ_SANITIZE=fuzzer-no-link,address,undefined -DHQQ_CUDA=OFF -DHQQ_BUILD_CLI=OFF \
  -DHQQ_BUILD_EXAMPLES=OFF -DCMAKE_BUILD_TYPE=Debug "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1"
cmake --build "$build" --target "${@:-fuzzers}"

targets=("$@")
if [ $# -eq 0 ]; then
  for source in "$root"/tests/fuzz/*_fuzz.cpp; do
    target=$(basename "$source" .cpp)
    if [ -x "$build/tests/fuzz/$target" ]; then targets+=("$target"); fi
  done
fi
for target in "${targets[@]}"; do printf '%s\0%s\0' "$target" "$(corpus_of "$target")"; done |
  xargs -0 -n 2 -P "$(nproc)" bash -c 'run_target "$@"' run_target
