#!/usr/bin/env bash
# Builds hqq-bench and runs it: times of quantize, dequantize and linear with every bit width
# (benchmarks/README.md). Arguments are those of Google Benchmark.
#
#   scripts/bench.sh                                        every case, about half an hour
#   scripts/bench.sh --benchmark_filter=linear/cpu/4bit/    some of them
#   HQQ_CPU_TARGET=AVX2 HQQ_NUM_THREADS=1 scripts/bench.sh  another instruction set, one thread
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

build=$root/build/bench
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DHQQ_BUILD_BENCHMARKS=ON \
  -DHQQ_BUILD_TESTS=OFF -DHQQ_BUILD_CLI=OFF -DHQQ_BUILD_EXAMPLES=OFF >&2
cmake --build "$build" --target hqq-bench >&2
exec "$build/benchmarks/hqq-bench" "$@"
